"""Start a world of ranks for a job: what to run is decided by pure functions, and one small function a kind starts it.

A new launcher is a module with ``plan_job`` and ``start`` (``starting.Launcher``), a line in ``starting.KINDS``, its section in
``config.LaunchConfig`` and a file in ``conf/launch``. A kind that needs more than one module is a package.
"""
