"""The section on how capacity moved: one block per run whose ranks have a history."""

from collections.abc import Callable, Mapping, Sequence

from gradrank.report.blocks import Block, Cell, Gallery, Paragraph, Section, Table, num
from gradrank.report.figures_courses import effective_courses, rank_courses
from gradrank.report.figures_gap import completeness
from gradrank.report.figures_importance import importance_against_rank
from gradrank.report.figures_moves import budget_course, moved_bars
from gradrank.report.figures_time import energy_map, rank_map
from gradrank.report.history import Event
from gradrank.report.layout import Layout
from gradrank.report.movement import contradictions, headline
from gradrank.report.pruned import descent, gap_of, gap_warning, relative, tolerance
from gradrank.report.text import NOTHING, count, number, percent, plural, seconds
from gradrank.report.view import Run

_Column = tuple[str, Callable[[Event], Cell | None]]
# A longer table of decisions starts folded.
SHORT = 12


def history_section(runs: Sequence[Run], layout: Layout) -> Section:
    """Draw the histories of all runs that have one.

    Args:
        runs: The runs.
        layout: Where each target stands.

    Returns:
        The section; without blocks if no run has a history.
    """
    blocks: list[Block] = []
    dynamic = [run for run in runs if run.history is not None]
    for i, run in enumerate(dynamic):
        blocks += _history(run, layout, f"-{i + 1}" if i else "", len(runs) > 1)
    return Section("history", "How capacity moved", blocks)


def _history(run: Run, layout: Layout, suffix: str, named: bool) -> list[Block]:
    lead = f"{run.label}{'' if run.finished else f' ({run.status})'}." if named else ""
    words = [headline(run, layout), descent(run) if run.falls else "", _cost(run)]
    blocks: list[Block] = [Paragraph(" ".join(filter(None, words)), "note", lead)]
    odd = contradictions(run.history) if run.history else ""
    if odd:
        blocks.append(Paragraph(odd, "warn"))
    incomplete = gap_warning(run)
    if incomplete is not None:
        blocks.append(incomplete)
    drawn = (
        rank_map(run, layout, suffix),
        energy_map(run, layout, suffix),
        rank_courses(run, layout, suffix),
        budget_course(run, suffix),
        moved_bars(run, suffix),
        completeness(run, suffix),
        importance_against_rank(run, layout, suffix),
        effective_courses(run, layout, suffix),
    )
    figures = [figure for figure in drawn if figure is not None]
    if figures:
        blocks.append(Gallery(figures))
    table = decision_table(run, suffix)
    return [*blocks, table] if table else blocks


def decision_table(run: Run, suffix: str = "") -> Table | None:
    """Return every decision with what it measured, moved and cost.

    Args:
        run: The run.
        suffix: Ends the table's name when a page shows several histories.

    Returns:
        The table, folded if it is long; None without decisions. Columns that no decision fills
        are left out.
    """
    history = run.history
    if history is None or not history.events:
        return None
    moves: list[_Column] = [
        ("parameters moved", lambda e: _whole(e.moved)),
        ("share of the budget", _share),
    ]
    if history.only_shrinks:
        moves = [("parameters taken away", lambda e: _whole(e.taken))]
    columns: list[_Column] = [
        ("step", lambda e: num(count(e.step), e.step)),
        ("parameters in use", lambda e: _whole(e.parameters)),
        ("allowed" if history.falls else "budget", lambda e: _whole(e.budget)),
        ("left over", _slack),
        *moves,
        ("targets changed", lambda e: _whole(e.changed)),
        ("mean effective rank", lambda e: _mean(e.decision.effective_rank)),
        ("mean energy", lambda e: _mean(e.decision.energy)),
        ("attributed, nats", lambda e: _number(e.decision.attributed)),
        ("loss change, nats", lambda e: _number(e.decision.loss_change)),
        ("completeness gap", lambda e: _gap(e, tolerance(run))),
        ("scoring passes so far", lambda e: _passes(e.decision.passes)),
        ("time", lambda e: _seconds(e.decision.seconds)),
    ]
    filled = []
    for head, value in columns:
        cells = [value(event) for event in history.events]
        if any(cell is not None for cell in cells):
            filled.append((head, cells))
    rows = [[cells[i] or num(NOTHING) for _, cells in filled] for i in range(len(history.events))]
    whose = "" if not suffix else f" of {run.label}"
    caption = f"{_title(run, len(rows))}{whose}"
    folded = len(rows) > SHORT
    heads = [num(head) for head, _ in filled]
    return Table(f"decisions{suffix}", caption, heads, rows, folded, hint="step or number")


def _title(run: Run, rows: int) -> str:
    told = run.history is not None and run.history.decisions
    return f"All {plural(rows, 'decision' if told else 'change')}" if rows > 1 else "One decision"


def _cost(run: Run) -> str:
    """Say what all decisions took, which share of training that is, and what scoring took."""
    spent = [e.decision.seconds for e in (run.history.events if run.history else ())]
    known = [each for each in spent if each is not None]
    passes = run.history.passes if run.history else None
    words = []
    if known:
        whole = run.cost.get("train_seconds")
        share = f", {percent(sum(known) / whole)} of training time" if whole else ""
        what = "Measuring, deciding and resizing" if passes is None else "Deciding and resizing"
        words.append(f"{what} took {seconds(sum(known))} in all{share}.")
    if passes == 0:
        words.append(
            "Scoring went by the gradients of training itself and took no pass of its own."
        )
    elif passes is not None:
        words.append(
            f"Scoring took {count(passes)} passes of its own; their time is part of training."
        )
    return " ".join(words)


def _whole(value: int | None) -> Cell | None:
    return None if value is None else num(count(value), value)


def _slack(event: Event) -> Cell | None:
    if event.parameters is None or event.budget is None:
        return None
    left = event.budget - event.parameters
    flag = "over budget" if left < 0 else ""
    return Cell(count(left).replace("-", "−"), left, numeric=True, flag=flag)


def _share(event: Event) -> Cell | None:
    if event.moved is None or not event.budget:
        return None
    return num(percent(event.moved / event.budget), event.moved / event.budget)


def _mean(values: Mapping[str, float]) -> Cell | None:
    mean = sum(values.values()) / len(values) if values else None
    return None if mean is None else num(number(mean, 3), mean)


def _seconds(value: float | None) -> Cell | None:
    return None if value is None else num(seconds(value), value)


def _number(value: float | None) -> Cell | None:
    return None if value is None else num(number(value, 3), value)


def _gap(event: Event, bound: float) -> Cell | None:
    gap = gap_of(event.decision)
    if gap is None:
        return None
    return Cell(relative(gap), gap, numeric=True, flag="large" if gap > bound else "")


def _passes(value: float | None) -> Cell | None:
    return None if value is None else num(count(value), value)
