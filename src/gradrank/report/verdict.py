"""What the numbers allow to be said, in plain language, and what they do not."""

from collections.abc import Sequence

from gradrank.report.blocks import Paragraph
from gradrank.report.pruned import larger_while_training
from gradrank.report.text import as_float, clean, count, listed, number, percent, plural, signed
from gradrank.report.view import BASELINE, Run

SHORT_RUN = 500
FEW_SEEDS = 3


def baseline_for(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the finished uniform run to compare with: of the same seed if there is one.

    Args:
        run: The run to compare.
        runs: All runs.

    Returns:
        The uniform run; None for a uniform run itself or if there is none.
    """
    if run.method == BASELINE:
        return None
    bases = [
        other
        for other in runs
        if other.method == BASELINE and other.finished and other.final_loss is not None
    ]
    return next((b for b in bases if b.seed == run.seed), bases[0] if bases else None)


def verdict(runs: Sequence[Run]) -> list[Paragraph]:
    """Say what came out, relative to uniform, and how little or much that proves.

    Args:
        runs: The runs.

    Returns:
        Paragraphs; warnings first.
    """
    result = _unfinished(runs) + _recommendations(runs)
    trained = [run for run in runs if run.kind == "train" and run.final_loss is not None]
    compared = [run for run in trained if run.finished]
    if not any(run.kind == "train" for run in runs):
        text = (
            "Nothing was trained here. The report shows where capacity would go and how far the "
            "measurement can be trusted, not whether it makes the model better."
        )
        return [*result, Paragraph(text, lead="A plan.")]
    if not compared:
        text = "No finished run holds a held-out loss, so there is no outcome to compare."
        return [*result, Paragraph(text, lead="No result.")]
    sentences = _outcomes(compared)
    result.append(Paragraph(" ".join(sentences), lead="What came out."))
    sizes = [*_mismatch(compared), *larger_while_training(compared)]
    return [*result, *_limits(compared), *sizes]


def _unfinished(runs: Sequence[Run]) -> list[Paragraph]:
    broken = [run for run in runs if not run.finished]
    if not broken:
        return []
    names = listed(f"{run.label} ({run.status}{_at(run)})" for run in broken)
    text = (
        f"{names}. What is shown of {'it' if len(broken) == 1 else 'them'} is partial and is left "
        "out of every comparison."
    )
    return [Paragraph(text, "warn", f"{plural(len(broken), 'run')} not finished:")]


def _at(run: Run) -> str:
    reached = max((curve[-1][0] for curve in (run.train, run.evals) if curve), default=None)
    return "" if reached is None else f" at step {count(reached)}"


def _recommendations(runs: Sequence[Run]) -> list[Paragraph]:
    advised = [
        run for run in runs if (run.reliability or {}).get("recommendation") == "use uniform"
    ]
    if not advised:
        return []
    names = listed(run.label for run in advised)
    reasons = dict.fromkeys(clean((run.reliability or {}).get("reason") or "") for run in advised)
    text = f"The scores of {names} are not reliable. " + " ".join(r for r in reasons if r)
    return [Paragraph(text, "warn", "The planner recommends uniform.")]


def _outcomes(runs: Sequence[Run]) -> list[str]:
    bases = [run for run in runs if run.method == BASELINE]
    if not bases:
        parts = [f"{run.label} ended at a held-out loss of {_loss(run):.4f}" for run in runs]
        return [
            listed(parts) + ".",
            "No finished uniform run at the same budget is here, so nothing says whether placing "
            "capacity helped.",
        ]
    sentences = [
        f"Uniform ended at a held-out loss of {listed(f'{_loss(run):.4f}' for run in bases)} nats."
    ]
    methods = dict.fromkeys(run.method for run in runs if run.method != BASELINE)
    for method in methods:
        pairs = [
            _loss(run) - _loss(base)
            for run in runs
            if run.method == method and (base := baseline_for(run, runs)) is not None
        ]
        sentences.append(_difference(method, pairs, _loss(bases[0])))
    if not methods:
        sentences.append("There is no other method to compare it with.")
    return sentences


def _difference(method: str, pairs: Sequence[float], base: float) -> str:
    mean = sum(pairs) / len(pairs)
    share = f" ({percent(abs(mean) / base)})" if base > 0 else ""
    if len(pairs) == 1:
        if abs(mean) < 5e-5:
            return f"{method} ended level with it."
        where = "below" if mean < 0 else "above"
        return f"{method} ended {abs(mean):.4f} nats{share} {where} it."
    better = sum(pair < 0 for pair in pairs)
    return (
        f"{method} ended {signed(mean)} nats{share} from it on average over {len(pairs)} runs "
        f"({signed(min(pairs))} to {signed(max(pairs))}), below it in {better} of them."
    )


def _limits(runs: Sequence[Run]) -> list[Paragraph]:
    methods = {run.method for run in runs}
    if len(methods) < 2:
        return []
    seeds = min(len({run.seed for run in runs if run.method == method}) for method in methods)
    known = [run.steps for run in runs if run.steps]
    steps = min(known) if known else None
    short = steps is not None and steps < SHORT_RUN
    reasons = ["one seed per method"] if seeds <= 1 else []
    if 1 < seeds < FEW_SEEDS:
        reasons.append(f"only {seeds} seeds per method")
    if short:
        reasons.append(f"only {plural(steps or 0, 'step')} of training")
    if not reasons:
        text = (
            f"{seeds} seeds per method. Differences smaller than their spread are no evidence; "
            "'gradrank compare' adds tuned rates, controls and intervals."
        )
        return [Paragraph(text, "note", "How far this goes.")]
    text = (
        f"With {listed(reasons)}, another seed could change differences of this size or turn them "
        "around. The order of the methods above is a description of these runs, not evidence that "
        "one is better."
    )
    return [Paragraph(text, "note", "This proves nothing yet.")]


def _mismatch(runs: Sequence[Run]) -> list[Paragraph]:
    sizes = [run.parameters for run in runs if run.parameters]
    if len(sizes) < 2 or max(sizes) <= 1.02 * min(sizes):
        return []
    text = (
        f"Adapter parameters range from {count(min(sizes))} to {count(max(sizes))}, so part of "
        "any difference may come from size and not from placement."
    )
    return [Paragraph(text, "warn", "The runs do not have the same size.")]


def _loss(run: Run) -> float:
    return run.final_loss if run.final_loss is not None else float("nan")


def reliability_sentences(run: Run) -> str:
    """Say in words whether a run's scores can be trusted.

    Args:
        run: The run.

    Returns:
        The sentences.
    """
    told = run.reliability or {}
    half, within = as_float(told.get("split_half")), as_float(told.get("within_shape"))
    if half is None and within is None:
        reason = clean(told.get("reason") or "")
        return f"No agreement between halves is known. {reason}".strip()
    threshold, splits = as_float(told.get("threshold")), as_float(told.get("splits"))
    parts = []
    if half is not None:
        over = f" over {plural(round(splits), 'split')}" if splits else ""
        against = "" if threshold is None else f", threshold {number(threshold, 2)}"
        parts.append(f"Split-half agreement is {half:.2f}{over}{against}.".replace("-0", "−0"))
    if within is not None:
        parts.append(f"Among targets of equal shape it is {within:.2f}.".replace("-0", "−0"))
    advice = {"use uniform": "use uniform ranks instead", "as planned": "use the ranks as planned"}
    given = clean(told.get("recommendation") or "", 60)
    if given:
        parts.append(f"Recommendation: {advice.get(given, given)}.")
    reason = clean(told.get("reason") or "")
    return " ".join([*parts, *([reason] if reason else [])])
