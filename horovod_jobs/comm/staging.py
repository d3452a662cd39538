"""CPU and GPU ranks in one world: tensors go to Horovod through host memory.

Horovod refuses a collective to which one rank gives a tensor on a GPU and another one on the CPU (upstream issue 1825). A build
without GPU operations copies by itself, but without waiting for the copy. So where only a part of the ranks has a GPU, every tensor is
copied to the host before Horovod sees it, and the result back to the tensor's device.
"""

from __future__ import annotations

import horovod.torch as hvd
import torch
from torch import Tensor

_mixed = False  # One world a process.


def agree() -> bool:
    """Collective. Find out whether some ranks see a GPU and others do not; all come to the same answer."""
    global _mixed
    seen = torch.tensor([int(torch.cuda.is_available())], dtype=torch.int32)
    with_gpu = int(hvd.allreduce(seen, name="comm.devices", op=hvd.Sum))
    _mixed = 0 < with_gpu < hvd.size()
    return _mixed


def to_host(tensor: Tensor) -> Tensor:
    """What Horovod is given: the tensor itself, or its copy in host memory, which is complete when this returns."""
    return tensor.cpu() if _mixed else tensor
