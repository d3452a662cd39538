"""``launch=mpijob`` and ``launch=trainjob``, a module each, and what ``horovod-runs`` does with jobs in a cluster."""
