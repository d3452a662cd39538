"""The world of ranks. The only folder that imports horovod or mpi4py."""
