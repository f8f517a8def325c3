"""Can the scores be trusted? Agreement of the scores that two halves of the batches give."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment
from gradrank.ops.agreement import spearman
from gradrank.signals.measurement import Measurement

THRESHOLD = 0.5
SPLITS = 8
SATURATED = 0.75


class _Assessor(Protocol):
    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment: ...


def split_half(
    method: _Assessor,
    targets: Sequence[Target],
    measurement: Measurement,
    assessment: Assessment,
    splits: int = SPLITS,
) -> dict[str, Any]:
    """Judge a method's scores by the rank correlation of two halves of the batches.

    Args:
        method: The method.
        targets: The targets.
        measurement: The measurement.
        assessment: The method's scores on the whole measurement.
        splits: Random splits to average over, where the statistic allows more than one.

    Returns:
        ``split_half`` (mean Spearman correlation of the halves over all targets),
        ``within_shape`` (the same within targets of one shape, weighted by their number: what is
        left when telling kinds of modules apart does not count), ``splits``, ``threshold``,
        ``saturation`` (mean share of the largest effective rank that M batches allow, for
        methods that have one), ``row_agreement`` (mean rank correlation of the halves' row
        energies, for methods that split rows), ``recommendation`` (``use uniform`` or
        ``as planned``) and ``reason``. Correlations are None where they do not exist.
    """
    overall: list[float] = []
    within: list[float] = []
    for first, second in measurement.halves(splits):
        try:
            a = method.assess(targets, first).scores
            b = method.assess(targets, second).scores
        except MeasurementError:
            continue
        overall.append(_agreement(targets, a, b))
        within.append(_within_shapes(targets, a, b))
    saturation = _mean([d["saturation"] for d in assessment.details.values() if "saturation" in d])
    rows = _mean([d["row_agreement"] for d in assessment.details.values() if "row_agreement" in d])
    result = {
        "split_half": _mean(overall),
        "within_shape": _mean(within),
        "splits": len(overall),
        "threshold": THRESHOLD,
        "saturation": saturation,
        **({} if rows is None else {"row_agreement": rows}),
    }
    return {**result, **_verdict(result, assessment, measurement.batches)}


def _verdict(result: Mapping[str, Any], assessment: Assessment, batches: int) -> dict[str, str]:
    score, within, saturation = (result[k] for k in ("split_half", "within_shape", "saturation"))
    uniform = "use uniform"
    if batches < 2:
        return _say(uniform, "fewer than two batches: agreement cannot be measured.")
    if len(set(assessment.scores.values())) == 1:
        return _say(uniform, "all scores are equal, so the plan is uniform up to rounding.")
    if score is None:
        return _say(uniform, "the halves give constant scores: they tell no targets apart.")
    measured = f"split-half agreement of the scores is {score:.2f}"
    if score < THRESHOLD:
        return _say(
            uniform,
            f"{measured}, below {THRESHOLD}: another sample of batches would give another plan. "
            "Measure more batches, or use uniform LoRA.",
        )
    notes = []
    if within is not None and within < THRESHOLD:
        notes.append(
            f"within targets of one shape it is only {within:.2f}, so the scores mostly tell "
            "kinds of modules apart, not layers"
        )
    if saturation is not None and saturation > SATURATED:
        notes.append(
            f"the effective rank is saturated ({saturation:.0%} of what {batches} batches allow), "
            "so the scores are nearly equal: measure more batches or lower the energy threshold"
        )
    rows = result.get("row_agreement")
    if rows is not None and rows < THRESHOLD:
        notes.append(
            f"which rows hold the energy agrees only {rows:.2f} between two halves, so partitions "
            "may rest on chance: measure more batches, or offer ranks only (shares=none)"
        )
    return _say("as planned", "; ".join([f"{measured} (threshold {THRESHOLD})", *notes]) + ".")


def _say(recommendation: str, reason: str) -> dict[str, str]:
    return {"recommendation": recommendation, "reason": reason}


def _agreement(targets: Sequence[Target], a: Mapping[str, float], b: Mapping[str, float]) -> float:
    names = [target.name for target in targets]
    return spearman(torch.tensor([a[n] for n in names]), torch.tensor([b[n] for n in names]))


def _within_shapes(
    targets: Sequence[Target], a: Mapping[str, float], b: Mapping[str, float]
) -> float:
    groups: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.d_in, target.d_out), []).append(target)
    pairs = [(len(group), _agreement(group, a, b)) for group in groups.values() if len(group) > 2]
    known = [(size, value) for size, value in pairs if math.isfinite(value)]
    total = sum(size for size, _ in known)
    return sum(size * value for size, value in known) / total if total else math.nan


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None
