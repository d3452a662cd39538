"""Start a world of ranks for a job: what to run is decided by pure functions (``plan``), one small function a kind starts it.

A new launcher is a module with ``plan`` and ``start``, a line in ``starting.KINDS``, its section in ``config.LaunchConfig`` and a file
in ``conf/launch``.
"""
