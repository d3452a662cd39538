"""Figures as text: one unit for a column, enough digits, a dash for what is unknown."""

from __future__ import annotations

from collections.abc import Iterable

DASH = "–"


def percent(fraction: float | None, *, digits: int = 2) -> str:
    """A fraction as a percentage: 0.9123 -> "91.23 %"."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points, signed: -0.0123 -> "−1.23"."""
    if difference is None:
        return DASH
    text = f"{100 * difference:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def integer(value: int | None) -> str:
    """An integer with thousands separated: 242762 -> "242,762"."""
    return DASH if value is None else f"{value:,}"


def throughput(samples_per_s: float) -> str:
    """Samples a second without an exponent: 19990.4 -> "19,990 samples/s"."""
    shown = f"{samples_per_s:,.0f}" if samples_per_s >= 100 else significant(samples_per_s)
    return f"{shown} samples/s"


def size(value: int | None) -> str:
    """Bytes with a decimal unit: 242762 -> "242.8 kB"."""
    if value is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value} B"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours: 75.3 -> "1 min 15 s"."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def significant(value: float | None, *, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent: 0.0012345 -> "0.00123"."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text:
        number = float(text)
        text = f"{number:,.0f}" if abs(number) >= 1 else f"{number:.12f}".rstrip("0")
    return text.replace("-", "−")


def milliseconds(value: float | None) -> str:
    """A latency's number, in ms, with three significant digits."""
    if value is None:
        return DASH
    text = f"{value:#.3g}"  # With its zeros, so that a column of them reads as one.
    return significant(value) if "e" in text else text.rstrip(".")


def energy_unit(values_kwh: Iterable[float | None]) -> tuple[str, float]:
    """The unit of a column of energies and the factor from kWh."""
    return _unit(values_kwh, (("kWh", 1.0), ("Wh", 1e3), ("mWh", 1e6)))


def mass_unit(values_kg: Iterable[float | None]) -> tuple[str, float]:
    """The unit of a column of masses and the factor from kg."""
    return _unit(values_kg, (("kg", 1.0), ("g", 1e3), ("mg", 1e6)))


def money_unit(values_usd: Iterable[float | None]) -> tuple[str, float]:
    """The unit of a column of amounts and the factor from US dollars."""
    return _unit(values_usd, (("USD", 1.0),))


def scaled(value: float | None, factor: float) -> str:
    """A figure in a column's unit."""
    return DASH if value is None else significant(value * factor)


def energy(value_kwh: float | None) -> str:
    """One energy with its unit: 0.0054 -> "5.4 Wh"."""
    return _with_unit(value_kwh, energy_unit([value_kwh]))


def mass(value_kg: float | None) -> str:
    """One mass with its unit: 0.002 -> "2 g"."""
    return _with_unit(value_kg, mass_unit([value_kg]))


def money(value_usd: float | None) -> str:
    """One amount with its unit: 0.002 -> "0.002 USD"."""
    return _with_unit(value_usd, money_unit([value_usd]))


def _with_unit(value: float | None, unit: tuple[str, float]) -> str:
    return DASH if value is None else f"{scaled(value, unit[1])} {unit[0]}"


def _unit(values: Iterable[float | None], units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    largest = max((value for value in values if value is not None), default=0.0)
    for name, factor in units:
        if largest * factor >= 1:
            return name, factor
    return units[-1] if largest > 0 else units[0]
