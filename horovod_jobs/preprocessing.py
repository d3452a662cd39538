"""How a raw sample becomes what a model takes. It travels with the model, so that a picture can be predicted without the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from horovod_jobs.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """``(raw / scale - mean) / std``.

    scale: 255 where raw values are bytes, 1 where they are fractions already. mean, std: one number, or one for each
    channel (the first dimension of a sample).
    """

    scale: float
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From a mapping of the same names, such as config.json's.

        Raises:
            ValueError: a name too few or too many, something that is no number, or a scale or std that is not positive.
        """
        if set(values) != {"scale", "mean", "std"}:
            raise ValueError(f"preprocessing has {', '.join(values) or 'nothing'}; it takes scale, mean and std")
        made = cls(float(values["scale"]), numbers(values["mean"]), numbers(values["std"]))
        spread = made.std if isinstance(made.std, tuple) else (made.std,)
        if not made.scale > 0 or not all(value > 0 for value in spread):
            raise ValueError(f"preprocessing has scale={made.scale} and std={made.std}; both must be positive")
        return made

    def to_json(self) -> dict[str, Any]:
        """What ``of`` reads."""
        return asdict(self)

    def factors(self, *, ndim: int) -> tuple[Tensor, Tensor]:
        """The whole as one multiplication and one addition, rounded once to float32; for batches of ``ndim`` dimensions."""
        centre, spread = (_per_channel(value, ndim=ndim) for value in (self.mean, self.std))
        return (1.0 / (self.scale * spread)).float(), (-centre / spread).float()


def numbers(value: float | Sequence[float]) -> float | tuple[float, ...]:
    """One number, or one for each channel, as plain floats."""
    return float(value) if isinstance(value, int | float) else tuple(float(entry) for entry in value)


def prepare(raw: Any, *, how: Preprocessing | None, input_shape: tuple[int, ...]) -> Tensor:
    """Raw samples as a model's inputs ``[B, *input_shape]``, float32; the very values that the data set gives.

    ``raw`` is a tensor or array ``[B, *input_shape]``; a single sample, and pictures without their one channel, will do.

    Raises:
        DataError: it is not known how, the shape is another, or fractions came where bytes are due.
    """
    import torch

    if how is None:
        raise DataError(
            "this model does not say how its inputs were prepared (config.json has no preprocessing); "
            "prepare them as in training and call the model"
        )
    rows = torch.as_tensor(raw)
    if how.scale != 1 and rows.is_floating_point():
        raise DataError(f"raw samples are {rows.dtype}, but whole numbers from 0 to {how.scale:g} are due; give those")
    short = input_shape[1:] if input_shape[:1] == (1,) and len(input_shape) > 1 else input_shape
    if not any(
        tuple(rows.shape[-len(shape) :]) == shape and rows.ndim <= len(shape) + 1 for shape in (input_shape, short)
    ):
        wanted = ", ".join(map(str, ("B", *input_shape)))
        raise DataError(f"raw samples have shape {list(rows.shape)}, but the model takes [{wanted}]; reshape them")
    rows = rows.reshape(-1, *input_shape).float()
    scale, offset = how.factors(ndim=rows.ndim)
    return rows * scale + offset


def _per_channel(value: float | tuple[float, ...], *, ndim: int) -> Tensor:
    import torch

    found = torch.tensor(value, dtype=torch.float64)
    return found if found.ndim == 0 else found.view(-1, *[1] * (ndim - 2))
