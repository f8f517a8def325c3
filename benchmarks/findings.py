"""Tables of the page of findings, from the records under results/compare.

Usage: python -m benchmarks.findings [--page docs/findings.md]

Every pair of lines ``<!-- table FOLDER METRIC [REFERENCE] -->`` and ``<!-- end -->`` in the page
gets what the runs in ``results/compare/FOLDER`` say, failed ones and what speaks against a figure
included; METRIC ``own`` is each task's own. ``<!-- overview FOLDER ... -->`` gets one line per task
and budget of these grids: how many arms were tested, and which of them differ from the reference
with evidence. Nothing is trained.
"""

import argparse
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from gradrank.core.files import write_text
from gradrank.evidence.findings import Cell, Comparison, Contrast
from gradrank.lab.compare.run import open_grid

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"(<!-- table (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_OVERVIEW = re.compile(r"(<!-- overview ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(description="Tables of the page of findings")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "findings.md")
    page = parser.parse_args().page
    text = page.read_text(encoding="utf-8")
    write_text(page, filled(text))
    print(f"{len(_MARK.findall(text))} tables written into {page.name}")


def filled(text: str) -> str:
    """Return a page with its marks filled.

    Args:
        text: The page.
    """
    text = _OVERVIEW.sub(lambda m: f"{m[1]}\n{overview(m[2].split())}\n\n{m[3]}", text)
    return _MARK.sub(lambda m: f"{m[1]}\n{tables(m[2], m[3], m[4])}\n{m[5]}", text)


def overview(folders: Iterable[str]) -> str:
    """Return one line per grid, task and budget: what differs from the reference.

    Args:
        folders: Names of grids under ``results/compare``.
    """
    lines = [
        "| grid | task | budget | reference | arms tested | better | worse | better by the loss | "
        "worse by the loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        own, loss = compared(folder, "own", None), compared(folder, "eval_loss", None)
        for task, budget in dict.fromkeys((c.task, c.budget) for c in own.contrasts):
            here = [c for c in own.contrasts if (c.task, c.budget) == (task, budget)]
            there = [c for c in loss.contrasts if (c.task, c.budget) == (task, budget)]
            lines.append(
                f"| {folder} | {task} | {budget} | {own.reference} | {_tested(here)} | "
                f"{_named(here, 'better')} | {_named(here, 'worse')} | "
                f"{_named(there, 'better')} | {_named(there, 'worse')} |"
            )
    return "\n".join(lines)


def _tested(contrasts: Iterable[Contrast]) -> int:
    return sum(contrast.verdict != "not tested" for contrast in contrasts)


def _named(contrasts: Iterable[Contrast], verdict: str) -> str:
    return ", ".join(c.method for c in contrasts if c.verdict == verdict) or "none"


@functools.lru_cache(maxsize=32)
def compared(folder: str, metric: str, reference: str | None) -> Comparison:
    """Return what a grid's finished runs are evidence of.

    Args:
        folder: Name of a grid under ``results/compare``.
        metric: A metric, or ``own``.
        reference: Another line to compare with than the recipe's.
    """
    place = ROOT / "results" / "compare" / folder
    grid = open_grid(place / "recipe.yaml", place)
    grid.metric = None if metric == "own" else metric
    if reference:
        grid.take_reference(reference)
    return grid.comparison()[0]


def tables(folder: str, metric: str, reference: str | None) -> str:
    """Return one table per task and budget.

    Args:
        folder: Name of a grid under ``results/compare``.
        metric: A metric, or ``own``.
        reference: Another line to compare with than the recipe's.
    """
    found = compared(folder, metric, reference)
    known = {(c.task, c.budget, c.method): c for c in found.contrasts}
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found.cells:
        groups.setdefault((cell.task, cell.budget), []).append(cell)
    return "\n".join(
        _table(task, budget, cells, known, found) for (task, budget), cells in groups.items()
    )


def _table(
    task: str,
    budget: str,
    cells: list[Cell],
    known: dict[tuple[str, str, str], Contrast],
    found: Comparison,
) -> str:
    counts = found.tasks[task]
    higher = counts.higher_is_better
    ordered = sorted(cells, key=lambda cell: _place(cell, higher))
    lines = [
        f"**{task}, budget {budget}** ({counts.metric}; {'higher' if higher else 'lower'} is "
        "better)",
        "",
        f"| arm | parameters | rate | seeds | mean | sd over seeds | better than {found.reference} "
        "by, 95 % | p, corrected | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [(cell, known.get((task, budget, cell.method))) for cell in ordered]
    lines += [_row(cell, contrast) for cell, contrast in rows]
    return "\n".join(lines + _remarks(rows)) + "\n"


def _place(cell: Cell, higher: bool) -> tuple[bool, float]:
    mean = cell.mean or 0.0
    return cell.mean is None, -mean if higher else mean


def _row(cell: Cell, contrast: Contrast | None) -> str:
    sizes = sorted({outcome.final for outcome in cell.outcomes})
    spent = f"{sizes[0]:,}" if sizes else ""
    spent += f" to {sizes[-1]:,}" if len(sizes) > 1 else ""
    rate = "" if cell.lr is None else f"{cell.lr:g}"
    seeds = f"{len(cell.outcomes)}" + (f", {cell.failed} failed" if cell.failed else "")
    mean = "" if cell.mean is None else f"{cell.mean:.3f}"
    sd = "" if cell.sd is None else f"{cell.sd:.3f}"
    start = f"| {cell.method} | {spent} | {rate} | {seeds} | {mean} | {sd} | "
    if contrast is None:
        return start + "| | reference |"
    if contrast.low is None or contrast.high is None or contrast.p_corrected is None:
        return start + f"| | {contrast.verdict} |"
    return start + (
        f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}] | "
        f"{contrast.p_corrected:.3f} | {contrast.verdict} |"
    )


def _remarks(rows: Iterable[tuple[Cell, Contrast | None]]) -> list[str]:
    """Return what speaks against taking figures at face value, one line for arms that share it.

    What an arm says of itself, how it was built, is left to the report.
    """
    said: dict[str, list[str]] = {}
    for cell, contrast in rows:
        own = {note for outcome in cell.outcomes for note in outcome.notes}
        about = (*cell.notes, *(contrast.notes if contrast is not None else ()))
        for note in dict.fromkeys(note for note in about if note not in own):
            said.setdefault(note, []).append(f"`{cell.method}`")
    lines = [f"- {', '.join(arms)}: {note}." for note, arms in said.items()]
    return ["", *lines] if lines else []


if __name__ == "__main__":
    main()
