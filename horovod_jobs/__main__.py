"""``python -m horovod_jobs`` is ``horovod-jobs``."""

from horovod_jobs.app import main

if __name__ == "__main__":
    main()
