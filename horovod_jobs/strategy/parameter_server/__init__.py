"""The parameter server, a strategy. Read ``strategy.py`` first; ``worker.py`` and ``server.py`` are its two sides."""

from horovod_jobs.strategy.parameter_server.strategy import ParameterServer

__all__ = ["ParameterServer"]
