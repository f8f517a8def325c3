"""Words on runs that began above their budget, and on attributions that should add up."""

from collections.abc import Sequence

from gradrank.report.blocks import Paragraph
from gradrank.report.history import Decision, History
from gradrank.report.text import count, listed, number, percent, plural
from gradrank.report.view import Run

# What is called large where a record names no tolerance.
DEFAULT_TOLERANCE = 0.1
# Sizes of one comparison that differ by more than this share are not the same size.
_SAME = 1.02


def falling(run: Run) -> str:
    """Say how a run came down to its budget, and whether it kept to what was allowed.

    Args:
        run: A run whose budget falls.

    Returns:
        One or two sentences; empty if parameters are unknown.
    """
    told = descent(run)
    return f"{told}{_within(run.history)}" if told and run.history else told


def descent(run: Run) -> str:
    """Say where a run began and whether it came down to its budget.

    Args:
        run: A run whose budget falls.

    Returns:
        One sentence; empty if parameters are unknown.
    """
    history = run.history
    used = [used for _, used, _ in history.usage if used is not None] if history else []
    if history is None or not used or history.asked is None:
        return ""
    budget = f"the budget of {count(history.asked)} parameters"
    end = f"ends {count(used[-1] - history.asked)} above it"
    if history.settled is not None:
        end = f"is within it from step {count(history.settled)} on"
    elif not run.finished:
        over = count(used[-1] - history.asked)
        end = f"stopped ({run.status}) while still {over} above it"
    if used[0] > history.asked > 0:
        return f"Training began with {number(used[0] / history.asked, 3)} times {budget} and {end}."
    return f"Training began under {budget} and {end}."


def _within(history: History) -> str:
    """Say whether each decision kept to what it allowed."""
    pairs = [(s, u - a) for s, u, a in history.usage if u is not None and a is not None]
    over = [(step, excess) for step, excess in pairs if excess > 0]
    if not pairs:
        return " What was allowed on the way is not recorded."
    if not over:
        return " No decision leaves more in use than it allows."
    steps = listed(count(step) for step, _ in over[:3])
    more = f" and {count(len(over) - 3)} more" if len(over) > 3 else ""
    most = count(max(excess for _, excess in over))
    return f" After step {steps}{more} more is in use than allowed, by up to {most} parameters."


def larger_while_training(runs: Sequence[Run]) -> list[Paragraph]:
    """Warn that a comparison matches final sizes, where some run trained with more before.

    Args:
        runs: The runs that are compared.

    Returns:
        At most one paragraph.
    """
    above = [r for r in runs if r.falls and r.parameters and _SAME * r.parameters < (r.peak or 0)]
    if not above or len(above) == len(runs):
        return []
    who = []
    for run in above:
        settled = run.history.settled if run.history else None
        times = f"{number((run.peak or 0) / (run.parameters or 1), 3)} times its final size"
        down = f", pruned down to it by step {count(settled)}" if settled else ""
        if run.neurons is not None and run.neurons.step is not None:
            down = f", until rows were split after step {count(run.neurons.step)}"
        who.append(f"{run.label} used up to {count(run.peak)} parameters ({times}{down})")
    text = (
        f"{'; '.join(who)}. Only final sizes are matched here, so part of any difference may come "
        "from what was in use before."
    )
    return [Paragraph(text, "note", "Larger while training:")]


def gap_of(decision: Decision) -> float | None:
    """Return the completeness gap of a decision: as told, else from what it should explain.

    Args:
        decision: The decision.

    Returns:
        The gap relative to the change of the loss, or None if it is unknown.
    """
    attributed, change = decision.attributed, decision.loss_change
    if decision.gap is not None or attributed is None or change is None:
        return decision.gap
    if attributed == change:
        return 0.0
    return abs(attributed - change) / abs(change) if abs(change) > 1e-12 else None


def gaps(run: Run) -> list[tuple[Decision, float]]:
    """Return the decisions whose completeness gap is known.

    Args:
        run: The run.

    Returns:
        Decisions and gaps, by rising step.
    """
    decisions = run.history.decisions if run.history else ()
    return [(d, gap) for d in decisions if (gap := gap_of(d)) is not None]


def tolerance(run: Run) -> float:
    """Return the gap above which a run's attributions count as incomplete.

    Args:
        run: The run.

    Returns:
        The method's own tolerance, else ``DEFAULT_TOLERANCE``.
    """
    told = run.history.tolerance if run.history else None
    return told if told is not None else DEFAULT_TOLERANCE


def relative(gap: float) -> str:
    r"""Return a gap as a reader takes it in: per cent, or a multiple where per cent grow long.

    Args:
        gap: The gap, relative to the change of the loss.

    Returns:
        The text.

    Examples:
        >>> relative(0.25), relative(31.0), relative(1e6)
        ('25\xa0%', '31 times', '1×10⁶ times')
    """
    return percent(gap) if gap < 10 else f"{number(gap, 3)} times"


def gap_warning(run: Run) -> Paragraph | None:
    """Say plainly that attributions do not add up to what they should explain.

    Args:
        run: The run.

    Returns:
        The warning; None if every known gap is within the tolerance.
    """
    known, bound = gaps(run), tolerance(run)
    large = [(decision, gap) for decision, gap in known if gap > bound]
    if not large:
        return None
    worst, most = max(large, key=lambda pair: pair[1])
    where = f"At {count(len(large))} of {plural(len(known), 'decision')}"
    if len(known) == 1:
        where = "At the only decision"
    says = ""
    if worst.attributed is not None and worst.loss_change is not None:
        says = (
            f": they add up to {number(worst.attributed, 3)} nats, and the loss changed by "
            f"{number(worst.loss_change, 3)}"
        )
    text = (
        f"{where} attributions miss the change of the loss by more than {percent(bound)}, at worst "
        f"(step {count(worst.step)}) by {relative(most)}{says}. What was pruned there went by a "
        "poor estimate of the path integral: raise segments, use estimator 'grid', or raise "
        "micro_batches. A gap is large without meaning where the loss has hardly changed yet."
    )
    return Paragraph(text, "warn", "The attributions are incomplete.")
