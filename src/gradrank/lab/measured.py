"""One measurement for many methods: which part of it is whose."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradrank.signals.measure import MeanGradient, Signal, Spectrum
from gradrank.signals.measurement import Measurement


def measured_signals(method: Any) -> tuple[Signal, ...]:
    """Return what ``gradrank plan`` measures for a method: other methods' sketches as well.

    Args:
        method: The method.

    Returns:
        The signals; none for a method that needs none.
    """
    signals = tuple(method.signals())
    dense = any(isinstance(s, Spectrum) and s.estimator != "sketch" for s in signals)
    if not signals or dense:
        return signals
    kinds = {type(signal) for signal in signals}
    return (*signals, *(kind() for kind in (Spectrum, MeanGradient) if kind not in kinds))


def narrow(measurement: Measurement, signals: Sequence[Signal]) -> Measurement:
    """Return the part of a measurement that one method would have measured alone.

    Args:
        measurement: A measurement of several signals.
        signals: Those of the method.

    Returns:
        The part; a plan made from it equals that of a run of the method alone.
    """
    if not signals:
        return measurement
    wants_spectrum = any(isinstance(signal, Spectrum) for signal in signals)
    wants_mean = any(isinstance(signal, MeanGradient) for signal in signals)
    wants_rows = any(isinstance(signal, MeanGradient) and signal.rows for signal in signals)
    mean = measurement.mean_gradient if wants_mean else None
    if mean is not None and mean.rows and not wants_rows:
        mean = replace(mean, rows={})
    kept = {"spectrum": wants_spectrum, "mean-gradient": wants_mean}
    return replace(
        measurement,
        spectrum=measurement.spectrum if wants_spectrum else None,
        mean_gradient=mean,
        info={
            **measurement.info,
            "signals": [n for n in measurement.info.get("signals", ()) if kept.get(n, True)],
            "sketch_dim": measurement.info.get("sketch_dim") if wants_spectrum else None,
            "directions": measurement.info.get("directions") if wants_mean else None,
            "rows": (measurement.info.get("rows", False) and wants_rows) if wants_mean else None,
        },
    )


def together(signals: Sequence[Signal]) -> tuple[Signal, ...]:
    """Return what to measure so that other methods can share it.

    Args:
        signals: What one method asks for.

    Returns:
        Both sketches as everybody asks for them, if that covers the method; else its own request.
    """
    common: tuple[Signal, ...] = (Spectrum(), MeanGradient())
    return common if all(signal in common for signal in signals) else tuple(signals)
