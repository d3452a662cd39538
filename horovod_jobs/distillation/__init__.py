"""Knowledge distillation: loss terms over (student, teacher, batch), the objective that adds them, the teacher's cache."""

from __future__ import annotations

from horovod_jobs.distillation.objective import Distiller

__all__ = ["Distiller"]
