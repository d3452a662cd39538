"""Batches, splits and data modules: the whole contract between a data set and a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from horovod_jobs.data.digest import content_digest, read_all
from horovod_jobs.errors import DataError
from horovod_jobs.preprocessing import Preprocessing, numbers


@dataclass(frozen=True)
class Batch:
    """Samples of a split.

    inputs: ``[B, ...]``; targets: ``[B]`` int64 for classification; indices: ``[B]`` int64, positions in the split.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return self.indices.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; itself when it is already there."""
        if all(part.device == device for part in (self.inputs, self.targets, self.indices)):
            return self
        return Batch(self.inputs.to(device), self.targets.to(device), self.indices.to(device))


@runtime_checkable
class Split(Protocol):
    """One part of a data set, read by position. An empty index tensor gives a batch of shape ``[0, ...]``."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> Batch:
        """The samples at ``indices`` (``[B]`` int64), in that order, ready for the model."""
        ...


class TensorSplit:
    """Samples held in memory, normalised when they are fetched.

    A uint8 tensor is divided by 255 first, so ``mean`` and ``std`` are of values between 0 and 1; a float tensor is
    taken as it is. Both are one number, or one for each channel (the first dimension of a sample).

    Raises:
        DataError: lengths that differ, a type other than uint8 or float, or a ``std`` that is not positive.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        if inputs.ndim < 1 or targets.ndim < 1 or len(inputs) != len(targets):
            raise DataError(
                f"inputs of shape {list(inputs.shape)} and targets of shape {list(targets.shape)} do not belong "
                "together; the first dimension of both must be the number of samples"
            )
        if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
            raise DataError(f"inputs are {inputs.dtype}; use torch.uint8 (0 to 255) or a floating-point type")
        self._inputs = inputs.contiguous()
        self._targets = _standard_targets(targets)
        self._mean, self._std = mean, std
        channels = inputs.shape[1] if inputs.ndim > 1 else 1
        centre = _per_channel(mean, channels=channels, name="mean")
        spread = _per_channel(std, channels=channels, name="std")
        if not all(value > 0 for value in (spread if isinstance(spread, tuple) else [spread])):
            raise DataError(f"std={std} is not positive; leave out channels that never change, or use 1")
        self._how = Preprocessing(255.0 if inputs.dtype == torch.uint8 else 1.0, centre, spread)
        self._scale, self._offset = self._how.factors(ndim=inputs.ndim)

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def targets(self) -> Tensor:
        """All targets, ``[N]``."""
        return self._targets

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What ``fetch`` does to a sample; None where it does nothing: what was done before is then not known."""
        return None if self._how == Preprocessing(1.0, 0.0, 1.0) else self._how

    def fetch(self, indices: Tensor) -> Batch:
        """Normalised float32 inputs ``[B, ...]`` of the samples at ``indices``."""
        rows = self._inputs.index_select(0, indices)
        return Batch(rows.float().mul_(self._scale).add_(self._offset), self._targets.index_select(0, indices), indices)

    def subset(self, indices: Tensor) -> TensorSplit:
        """A split of the samples at ``indices`` only; its positions count from 0 again."""
        inputs, targets = self._inputs.index_select(0, indices), self._targets.index_select(0, indices)
        return TensorSplit(inputs, targets, mean=self._mean, std=self._std)


class MapSplit:
    """Any map-style ``torch.utils.data.Dataset`` of (input, target) pairs, put together by torch's ``default_collate``.

    Floating-point inputs and targets become float32, whole-number targets int64; whole-number inputs (token numbers)
    stay what they are. Random augmentation does not belong in the data set: give it as the module's ``augment``.
    ``preprocessing`` says what the data set does to raw samples, for those who have no data set.

    Raises:
        DataError: no samples, or a sample that is not a pair of things that torch can put in a tensor.
    """

    def __init__(self, dataset: Any, *, name: str = "split", preprocessing: Preprocessing | None = None) -> None:
        self._dataset, self._name, self.preprocessing = dataset, name, preprocessing
        try:
            self._length = len(dataset)
        except TypeError as error:
            raise DataError(
                f"the {name} data set ({type(dataset).__name__}) has no length; give a map-style data set with "
                "__len__ and __getitem__, because exact sharding needs the position of every sample"
            ) from error
        if self._length == 0:
            raise DataError(f"the {name} data set ({type(dataset).__name__}) has 0 samples; give at least 1")
        first = self._collate([0])
        self._empty = Batch(first.inputs[:0], first.targets[:0], first.indices[:0])

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: Tensor) -> Batch:
        """The samples at ``indices``, read one by one and put together."""
        if len(indices) == 0:
            return Batch(self._empty.inputs.clone(), self._empty.targets.clone(), indices)
        return self._collate(indices.tolist(), indices)

    def _collate(self, positions: list[int], indices: Tensor | None = None) -> Batch:
        from torch.utils.data import default_collate

        samples = [self._dataset[position] for position in positions]
        for position, sample in zip(positions, samples, strict=True):
            if not isinstance(sample, (tuple, list)) or len(sample) != 2:
                raise DataError(
                    f"sample {position} of the {self._name} data set is a {type(sample).__name__}, not a pair; "
                    "return (input, target) from __getitem__"
                )
        try:
            inputs, targets = default_collate([tuple(sample) for sample in samples])
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"samples {positions[0]} to {positions[-1]} of the {self._name} data set do not fit in one tensor "
                f"({error}); return tensors or numbers of one shape"
            ) from error
        if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
            raise DataError(
                f"sample {positions[0]} of the {self._name} data set has an input or target that is not a tensor or "
                "a number; return one tensor and one number from __getitem__"
            )
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        return Batch(inputs, _standard_targets(targets), torch.tensor(positions) if indices is None else indices)


@dataclass(frozen=True)
class DataModule:
    """What a data set is to every stage.

    input_shape: of one sample, without the batch. digest: SHA-256 (hex) of the content and of how it was split; it is
    part of the fingerprint of every stage that reads the data. augment: called on training batches only, as
    ``augment(inputs [B, ...], seed=..., epoch=..., indices=[B]) -> Tensor``. fields: where a sample is a row of ids, the
    (name, number of ids, columns) of each field.
    """

    train: Split
    test: Split
    validation: Split | None
    num_classes: int
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    digest: str
    augment: Callable[..., Tensor] | None = None
    fields: tuple[tuple[str, int, int], ...] = ()

    @property
    def input_dtype(self) -> str:
        """The type of the inputs that a model gets, such as ``float32`` or ``int64``."""
        dtype = self.train.fetch(torch.empty(0, dtype=torch.int64)).inputs.dtype
        return "float32" if dtype.is_floating_point else str(dtype).removeprefix("torch.")

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What the training split does to a raw sample; None where it does not tell."""
        return getattr(self.train, "preprocessing", None)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What a model's constructor is offered besides its config."""
        known = {"num_classes": self.num_classes, "input_shape": tuple(self.input_shape)}
        return {**known, "fields": self.fields} if self.fields else known


def as_data_module(obj: object, *, name: str) -> DataModule:
    """A data module from ``obj``: itself, or one made of a user's object.

    The object has ``train`` and ``test``, each a map-style data set of (input, target) pairs or a ``Split``, and
    optionally ``validation``, ``num_classes``, ``class_names``, ``input_shape``, ``digest``, ``augment``, ``fields`` and
    ``preprocessing`` (scale, mean and std of what its data sets do to a raw sample; see ``Preprocessing``). What
    is absent is found from the samples: ``num_classes`` is the largest training target + 1, and ``digest`` is a SHA-256
    over the content of every sample of every split. Both read all samples once, so a large data set should give them.

    Raises:
        DataError: something is missing, empty or does not fit; the message names the attribute and ``name``.
    """
    if isinstance(obj, DataModule):
        return obj
    splits = {part: _as_split(obj, part, name=name) for part in ("train", "test")}
    if getattr(obj, "validation", None) is not None:
        splits["validation"] = _as_split(obj, "validation", name=name)
    num_classes = _num_classes(obj, splits["train"], name=name)
    names = getattr(obj, "class_names", None) or [str(number) for number in range(num_classes)]
    if len(names) != num_classes:
        raise DataError(f"data set {name} has {len(names)} class_names for num_classes={num_classes}; give one a class")
    augment = getattr(obj, "augment", None)
    if augment is not None and not callable(augment):
        raise DataError(f"augment of data set {name} is {augment!r}, which cannot be called; give a function or None")
    shape = getattr(obj, "input_shape", None) or splits["train"].fetch(torch.tensor([0])).inputs.shape[1:]
    return DataModule(
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        num_classes=num_classes,
        class_names=tuple(str(label) for label in names),
        input_shape=tuple(int(extent) for extent in shape),
        digest=_digest(obj, splits, name=name),
        augment=augment,
        fields=tuple((str(label), int(size), int(columns)) for label, size, columns in getattr(obj, "fields", ())),
    )


def batches(split: Split, index_batches: Iterable[Tensor], *, workers: int = 0) -> Iterator[Batch]:
    """One batch for each tensor of positions, in order; an empty tensor gives an empty batch.

    ``workers`` processes read a ``MapSplit`` ahead. Any other split is read in this process, where a tensor in memory
    is fastest.
    """
    if workers > 0 and isinstance(split, MapSplit):
        from horovod_jobs.data.workers import batches_from_workers

        return batches_from_workers(split, index_batches, workers=workers)
    return (split.fetch(indices) for indices in index_batches)


def _per_channel(value: float | Sequence[float], *, channels: int, name: str) -> float | tuple[float, ...]:
    if not isinstance(value, (int, float)) and len(value) != channels:
        raise DataError(f"{name} has {len(value)} numbers for {channels} channels; give one number, or one a channel")
    return numbers(value)


def _standard_targets(targets: Tensor) -> Tensor:
    return targets.float() if targets.is_floating_point() else targets.long()


def _as_split(obj: object, part: str, *, name: str) -> Split:
    given = getattr(obj, part, None)
    if given is None:
        raise DataError(
            f"data set {name} ({type(obj).__name__}) has no attribute {part!r}; give `train` and `test`, each a "
            "map-style data set of (input, target) pairs"
        )
    if isinstance(given, Split):
        if len(given) == 0:
            raise DataError(f"the {name}.{part} data set ({type(given).__name__}) has 0 samples; give at least 1")
        return given
    if not hasattr(given, "__getitem__"):
        raise DataError(
            f"{part} of data set {name} is a {type(given).__name__}, which cannot be read by position; "
            "give a map-style data set with __len__ and __getitem__"
        )
    return MapSplit(given, name=f"{name}.{part}", preprocessing=_preprocessing(obj, name=name))


def _preprocessing(obj: object, *, name: str) -> Preprocessing | None:
    given = getattr(obj, "preprocessing", None)
    if given is None or isinstance(given, Preprocessing):
        return given
    try:
        return Preprocessing.of(given)
    except (ValueError, TypeError) as error:
        raise DataError(f"data set {name}: {error}") from error


def _num_classes(obj: object, train: Split, *, name: str) -> int:
    given = getattr(obj, "num_classes", None)
    if given is not None:
        if not isinstance(given, int) or given < 1:
            raise DataError(f"num_classes={given!r} of data set {name} is not a positive whole number; give one")
        return given
    largest = -1
    for batch in read_all(train):
        if batch.targets.is_floating_point():
            raise DataError(f"the targets of data set {name} are not whole numbers; give its num_classes")
        largest = max(largest, int(batch.targets.max()))
    return largest + 1


def _digest(obj: object, splits: dict[str, Split], *, name: str) -> str:
    given = getattr(obj, "digest", None)
    if given is None:
        return content_digest(splits, name=name)
    if not isinstance(given, str) or not given:
        raise DataError(f"digest={given!r} of data set {name} is not a text; give the SHA-256 of its content, or none")
    return given
