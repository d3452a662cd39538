"""``horovod-jobs``, which is also ``python -m horovod_jobs``. It imports nothing that takes time before it listens for signals."""

from horovod_jobs import early


def main() -> None:
    """Entry point of the console script."""
    early.arm()
    from horovod_jobs.app import main as begin

    begin()


if __name__ == "__main__":
    main()
