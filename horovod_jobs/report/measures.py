"""How a figure of quality is called and written: accuracy in percent, an AUC with four digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from horovod_jobs import formats

if TYPE_CHECKING:
    from horovod_jobs.report.collect import ModelRow


@dataclass(frozen=True)
class Measure:
    """A figure of a task's summary. title: in tables; noun: within a sentence; percent: a fraction shown as a percentage."""

    key: str
    title: str
    noun: str
    percent: bool = False

    def show(self, value: float | None) -> str:
        """The figure with its unit, a dash where it is unknown."""
        if value is None:
            return formats.DASH
        return formats.percent(value) if self.percent else f"{value:.4f}".replace("-", "−")

    def difference(self, change: float) -> str:
        """A change without its sign: "1.23 percentage points", or "0.0123"."""
        return f"{abs(100 * change):.2f} percentage points" if self.percent else f"{abs(change):.4f}"

    @property
    def factor(self) -> float:
        """From the figure to what an axis shows."""
        return 100.0 if self.percent else 1.0

    @property
    def axis(self) -> str:
        """The title with its unit."""
        return f"{self.title}, %" if self.percent else self.title

    @property
    def smallest(self) -> float:
        """Half of the last digit shown: changes below are none."""
        return 5e-5


_KNOWN = {
    measure.key: measure
    for measure in (
        Measure("accuracy", "Accuracy", "accuracy", percent=True),
        Measure("auc", "AUC", "AUC"),
        Measure("loss", "Log loss", "log loss"),
        Measure("calibration", "Calibration", "calibration"),
    )
}
# What the main table shows beside a primary figure.
_BESIDE = {"auc": ("loss", "accuracy", "calibration")}


def measure(key: str) -> Measure:
    """The measure of that key; one of a task of yours is called what its key says."""
    words = key.replace("_", " ")
    return _KNOWN.get(key, Measure(key, words[:1].upper() + words[1:], words))


def columns(models: Sequence[ModelRow]) -> list[tuple[str, list[str], bool]]:
    """The main table's columns of quality: (title, a text for each model, whether they are figures)."""
    keys = dict.fromkeys(row.primary for row in models)
    for primary in list(keys):
        keys.update(dict.fromkeys(_BESIDE.get(primary, ())))
    return [(measure(key).title, [measure(key).show(row.metrics.get(key)) for row in models], True) for key in keys]
