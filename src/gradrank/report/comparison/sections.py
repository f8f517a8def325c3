"""The sections of a comparison's page: what was found first, the numbers behind it after."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradrank.report.blocks import Facts, Gallery, Paragraph, Quote
from gradrank.report.comparison.blocks import Entry, Fold, Grid, Line, Part, Piece, Points
from gradrank.report.comparison.breakdown import parts_table
from gradrank.report.comparison.figures_contrasts import contrast_figure, seeds_figure
from gradrank.report.comparison.figures_cost import cost_figures
from gradrank.report.comparison.figures_pareto import pareto_figure
from gradrank.report.comparison.figures_ranks import ranks_figures
from gradrank.report.comparison.figures_rates import Search, rates_figure, searches
from gradrank.report.comparison.figures_stability import stability_figure
from gradrank.report.comparison.tables import (
    main_table,
    pooled_table,
    stability_table,
    task_table,
)
from gradrank.report.comparison.view import View, label
from gradrank.report.comparison.words import limits, overall, pooled_sentence, sentence
from gradrank.report.svg import Figure
from gradrank.report.text import clean, count, listed, plural

MAX_RANK_FIGURES = 24
_RANKS_SHOWN = 2
MAX_LISTED = 400
_MOST_OPEN = 4
_MOST_POINTS = 12
_LEGEND = (
    "▲ better and ▼ worse than the reference: the interval excludes zero and so does the test "
    "after correction. ○ no evidence of a difference. – not tested. ◆ the reference."
)


@dataclass(frozen=True)
class Grown:
    """How far the grid is; None where nobody said."""

    finished: int | None = None
    planned: int | None = None


def all_parts(view: View, grown: Grown) -> list[Part]:
    """Return the sections that have something to show, in order.

    Args:
        view: The comparison.
        grown: How far the grid is.

    Returns:
        The sections.
    """
    searched = searches(view)
    parts = [
        _found(view, grown, searched),
        _table(view),
        _by_task(view),
        _pooled(view),
        _pareto(view),
        _rates(view, searched),
        _ranks(view),
        _stability(view),
        Part("cost", "Cost", _gallery(cost_figures(view))),
        _records(view),
        _replay(view),
    ]
    return [part for part in parts if part.blocks]


def figures_of(pieces: Iterable[Piece]) -> Iterator[Figure]:
    """Find the figures of a section.

    Args:
        pieces: Its blocks.

    Yields:
        The figures, in the order of the page.
    """
    for piece in pieces:
        if isinstance(piece, Gallery):
            yield from piece.figures
        elif isinstance(piece, Fold):
            yield from figures_of(piece.blocks)


def _gallery(drawn: Iterable[Figure | None]) -> list[Piece]:
    shown = [figure for figure in drawn if figure is not None]
    return [Gallery(shown)] if shown else []


def _found(view: View, grown: Grown, searched: Sequence[Search]) -> Part:
    pieces: list[Piece] = [Facts("", _facts(view))]
    pieces.append(Paragraph(_state(view, grown), _tone(view, grown), "The grid."))
    pooled = pooled_sentence(view)
    pieces.append(Paragraph(" ".join(filter(None, (overall(view), pooled)))))
    points = [sentence(view, t, b) for t in view.tasks for b in view.budgets if view.of(t, b)]
    if len(points) > _MOST_POINTS:
        pieces.append(Fold(f"All {count(len(points))} findings", [Points(points)]))
    elif points:
        pieces.append(Points(points))
    return Part("found", "What was found", [*pieces, *limits(view, searched)])


def _facts(view: View) -> list[tuple[str, str]]:
    source = view.source
    # Text of people: as long as they wrote it, within reason.
    about, paper = (clean(text, 1200).strip() for text in (source.about, source.source))
    pairs = [
        ("Question", about),
        ("Source", paper),
        ("Tasks", listed(_task(view, task) for task in view.tasks)),
        ("Budgets", listed(label(budget) for budget in view.budgets)),
        ("Methods", listed(label(method) for method in view.methods)),
        ("Compared with", label(view.reference) if view.rows else ""),
    ]
    return [(name, value) for name, value in pairs if value]


def _task(view: View, task: str) -> str:
    info = view.source.tasks.get(task)
    items = f", {plural(info.items, 'item')}" if info is not None and info.items else ""
    return f"{label(task)} ({view.metric(task)}{items})"


def _state(view: View, grown: Grown) -> str:
    source = view.source
    runs = sum(len(row.outcomes) for row in view.rows)
    done = f"{count(grown.finished)} runs finished" if grown.finished is not None else ""
    planned = f" of {count(grown.planned)} planned" if grown.planned is not None else ""
    parts = [f"{done}{planned}"] if done else []
    parts.append(f"{plural(runs, 'finished run')} of the reported phase went into the table")
    parts += [f"{plural(len(source.failures), 'run')} failed"] if source.failures else []
    parts += [f"{plural(len(source.excluded), 'record')} left out"] if source.excluded else []
    missing = sum(len(row.cell.missing) for row in view.rows)
    parts += [f"{plural(missing, 'seed')} missing"] if missing else []
    text = f"{'; '.join(parts)}."
    if _unfinished(grown):
        text += " The grid is not complete, so all of this may still change."
    named = [label(each.run_id) for each in source.failures]
    named += [label(each.name) for each in source.excluded]
    if named:
        more = f" and {count(len(named) - 6)} more" if len(named) > 6 else ""
        shown = ", ".join(named[:6]) if more else listed(named)
        text += f" Failed or left out: {shown}{more}; see below."
    return text


def _unfinished(grown: Grown) -> bool:
    return (
        grown.finished is not None and grown.planned is not None and grown.finished < grown.planned
    )


def _tone(view: View, grown: Grown) -> str:
    lost = view.source.failures or view.source.excluded
    lost = lost or any(row.cell.missing for row in view.rows)
    return "warn" if lost or _unfinished(grown) else "note"


def _table(view: View) -> Part:
    grid = main_table(view)
    title = "All results"
    if grid is None:
        return Part("table", title, [])
    text = _LEGEND
    if view.unmatched:
        text += " Unmatched methods are not held to the budget: compare their parameters first."
    return Part("table", title, [Paragraph(text), grid])


def _by_task(view: View) -> Part:
    tasks = view.tasks
    folds = []
    for i, task in enumerate(tasks):
        drawn = [make(view, task, i + 1) for make in (contrast_figure, seeds_figure)]
        info = view.source.tasks.get(task)
        said = clean(info.describe, 400) if info is not None else ""
        pieces: list[Piece] = [Paragraph(said)] if said else []
        pieces.append(task_table(view, task, i + 1))
        parts = parts_table(view, task, i + 1)
        if parts is not None:
            pieces.append(Fold("Part by part", [parts]))
        opened = len(tasks) <= _MOST_OPEN or i == 0
        folds.append(Fold(label(task), [*pieces, *_gallery(drawn)], opened))
    return Part("tasks", "Task by task", folds)


def _pooled(view: View) -> Part:
    grid = pooled_table(view)
    if grid is None:
        return Part("pooled", "All tasks together", [])
    text = (
        "Each task's difference is divided by that task's standard deviation over seeds, then "
        "averaged. Only methods that have paired seeds on every task are tested."
    )
    return Part("pooled", "All tasks together", [Paragraph(text), grid])


def _pareto(view: View) -> Part:
    drawn = [pareto_figure(view, task, i + 1) for i, task in enumerate(view.tasks)]
    return Part("pareto", "Quality against parameters", _gallery(drawn))


def _rates(view: View, searched: Sequence[Search]) -> Part:
    tasks = list(dict.fromkeys([*view.tasks, *(search.task for search in searched)]))
    drawn = [rates_figure(view, searched, task, i + 1) for i, task in enumerate(tasks)]
    return Part("rates", "Learning rates", _gallery(drawn))


def _ranks(view: View) -> Part:
    title = "Where capacity went"
    pairs = [(t, b) for t in view.tasks for b in view.budgets if view.of(t, b)]
    shown: list[Figure] = []
    more: list[Figure] = []
    left_out = []
    for i, (task, budget) in enumerate(pairs):
        if len(shown) + len(more) >= MAX_RANK_FIGURES:
            left_out.append(f"{label(task, 40)} at {label(budget, 40)}")
            continue
        for j, figure in enumerate(ranks_figures(view, task, budget, i + 1)):
            (shown if len(shown) < _RANKS_SHOWN and not j else more).append(figure)
    pieces: list[Piece] = _gallery(shown)
    if more:
        pieces.append(Fold(f"{count(len(more))} more rank profiles", _gallery(more)))
    if left_out:
        pieces.append(Paragraph(f"Not drawn: {listed(left_out)}; the records hold all."))
    return Part("ranks", title, pieces)


def _stability(view: View) -> Part:
    title = "Stability of plans"
    grid = stability_table(view)
    if grid is None:
        return Part("stability", title, [])
    tasks = list(dict.fromkeys([*view.tasks, *(each.task for each in view.source.stability)]))
    drawn = [stability_figure(view, task, i + 1) for i, task in enumerate(tasks)]
    return Part("stability", title, [*_gallery(drawn), Fold("All numbers", [grid])])


def _records(view: View) -> Part:
    source = view.source
    failed = [(label(each.run_id, 160), clean(each.message, 600)) for each in source.failures]
    left_out = [(label(each.name, 160), clean(each.reason, 600)) for each in source.excluded]
    pieces: list[Piece] = []
    if failed:
        caption = "Failed or diverged; none of them is averaged into any mean."
        pieces.append(_pairs("failed", caption, ("run", "what happened"), failed))
    if left_out:
        caption = "Records that went into nothing."
        pieces.append(_pairs("excluded", caption, ("record", "why"), left_out))
    remarks = _remarks(view)
    if remarks:
        grid = _pairs("remarks", "Remarks", ("remark", "where"), remarks)
        pieces.append(Fold(f"Remarks ({count(len(remarks))})", [grid]))
    return Part("records", "Failures and remarks", pieces)


def _remarks(view: View) -> list[tuple[str, str]]:
    """Return each remark once, with where it belongs."""
    found: dict[str, dict[str, None]] = {}
    for row in view.rows:
        place = f"{label(row.method, 30)} on {label(row.task, 30)} at {label(row.budget, 30)}"
        notes = [*row.cell.notes, *(row.contrast.notes if row.contrast else ())]
        notes += [note for each in row.outcomes for note in each.notes]
        for note in notes:
            found.setdefault(clean(note, 400), {})[place] = None
    for each in view.source.pooled:
        for note in each.notes:
            place = f"{label(each.method, 30)} over all tasks at {label(each.budget, 30)}"
            found.setdefault(clean(note, 400), {})[place] = None
    return [(note, _places(list(places))) for note, places in found.items()]


def _places(places: Sequence[str]) -> str:
    more = len(places) - 4
    return f"{'; '.join(places[:4])}; {count(more)} more" if more > 0 else "; ".join(places)


def _pairs(
    name: str, caption: str, heads: tuple[str, str], pairs: Sequence[tuple[str, str]]
) -> Grid:
    lines = [Line([Entry(a, a), Entry(b, b)]) for a, b in pairs[:MAX_LISTED]]
    if len(pairs) > MAX_LISTED:
        caption += f" The first {MAX_LISTED} of {count(len(pairs))} are listed."
    return Grid(name, caption, [Entry(head) for head in heads], lines)


def _replay(view: View) -> Part:
    text = (
        "Every number here comes from records: one file per run in the folder 'runs', which holds "
        "the full configuration, the seeds and the versions. The CSV file names the runs behind "
        "each row. The same command in the same folder continues an unfinished grid; what "
        "is finished is not repeated."
    )
    name = label(view.source.name)
    lines = [
        "gradrank compare FOLDER/recipe.yaml --out FOLDER",
        "gradrank compare FOLDER/recipe.yaml --out FOLDER --report-only --reference random",
    ]
    quote = Quote(f"Recipe: {name}", "\n".join(lines))
    return Part("replay", "Replay", [Paragraph(text), quote])
