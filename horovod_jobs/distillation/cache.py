"""The teacher's outputs over the training split, computed once by all ranks together and kept as an artifact."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from horovod_jobs.artifacts import SCHEMA_VERSION, Artifact
from horovod_jobs.data.base import batches
from horovod_jobs.data.sharding import evaluation_indices
from horovod_jobs.errors import ArtifactError
from horovod_jobs.stages.base import StageContext
from horovod_jobs.storage import digest_of

KIND, _FILE, _BATCH = "teacher_outputs", "outputs.safetensors", 250


def teacher_outputs(
    ctx: StageContext, teacher: Artifact, model: nn.Module, *, device: torch.device
) -> tuple[Tensor, str, bool]:
    """Collective. The outputs [N, C] by position in the training split, the artifact's name, and whether they were made now."""
    print_ = digest_of(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "teacher": teacher.fingerprint,
            "data": ctx.data.digest,
            "split": "train",
        }
    )
    ref = ctx.world.main(lambda: _look(ctx, print_), name="teacher_cache.look")
    made = ref is None
    if ref is None:
        ref = _make(ctx, teacher, model, print_, device=device)
    with ctx.world.agreed("teacher_cache.read"):
        artifact = ctx.store.lookup(KIND, print_, verify=False)
        if artifact is None:
            raise ArtifactError(
                f"teacher's outputs {ref} are not visible on this host; put run.store on a shared file system"
            )
        outputs = load_file(artifact.file(_FILE))["outputs"]
    return outputs, ref, made


def _look(ctx: StageContext, print_: str) -> str | None:
    try:
        found = ctx.store.lookup(KIND, print_)
    except ArtifactError as error:
        ctx.log.warning("%s: the teacher's outputs are computed again: %s", ctx.name, error)
        return None
    return found.ref if found else None


def _make(ctx: StageContext, teacher: Artifact, model: nn.Module, print_: str, *, device: torch.device) -> str:
    model = model.eval()
    mine = evaluation_indices(len(ctx.data.train), rank=ctx.world.rank, size=ctx.world.size, batch=_BATCH)
    parts: list[Tensor] = []
    with torch.no_grad(), ctx.console.progress(f"{ctx.name}: teacher's outputs", len(mine)) as progress:
        for done, batch in enumerate(batches(ctx.data.train, mine), start=1):
            parts.append(model(batch.to(device).inputs).float().cpu())
            progress.update(done)
    classes = ctx.data.num_classes
    local = torch.cat(parts) if parts else torch.empty(0, classes)
    # Shares are contiguous and in the order of ranks: joined, they are in the order of the split.
    joined = b"".join(ctx.world.gather_bytes(local.contiguous().numpy().tobytes(), name="teacher_cache.gather"))

    def publish() -> str:
        with ctx.store.lock(KIND, print_):
            staging = ctx.store.staging(KIND, print_)
            try:
                outputs = (
                    torch.frombuffer(bytearray(joined), dtype=torch.float32).reshape(len(ctx.data.train), -1).clone()
                )
                save_file({"outputs": outputs}, staging / _FILE)
                meta = {
                    "stage": ctx.name,
                    "stage_kind": "distill",
                    "inputs": {"teacher": {"ref": teacher.ref}},
                    "shape": list(outputs.shape),
                }
                return ctx.store.publish(staging, kind=KIND, fingerprint=print_, meta=meta).ref
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    return ctx.world.main(publish, name="teacher_cache.publish")
