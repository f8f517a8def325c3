"""Tables of the page of findings, from the records under results/compare.

Usage: python -m benchmarks.findings [--page docs/findings.md]

Every pair of lines ``<!-- table FOLDER METRIC [REFERENCE] -->`` and ``<!-- end -->`` in the page
gets what the finished runs in ``results/compare/FOLDER`` say; METRIC ``own`` is each task's own.
Nothing is trained.
"""

import argparse
import re
from pathlib import Path

from gradrank.core.files import write_text
from gradrank.evidence.findings import Cell, Contrast
from gradrank.lab.compare.run import open_grid

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"(<!-- table (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(description="Tables of the page of findings")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "findings.md")
    page = parser.parse_args().page
    text = page.read_text(encoding="utf-8")
    filled = _MARK.sub(lambda m: f"{m[1]}\n{tables(m[2], m[3], m[4])}\n{m[5]}", text)
    write_text(page, filled)
    print(f"{len(_MARK.findall(text))} tables written into {page.name}")


def tables(folder: str, metric: str, reference: str | None) -> str:
    """Return one table per task and budget.

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
    found, _ = grid.comparison()
    known = {(c.task, c.budget, c.method): c for c in found.contrasts}
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in found.cells:
        if cell.mean is not None:
            groups.setdefault((cell.task, cell.budget), []).append(cell)
    return "\n".join(
        _table(task, budget, cells, known, grid.metric, found.reference)
        for (task, budget), cells in groups.items()
    )


def _table(
    task: str,
    budget: str,
    cells: list[Cell],
    known: dict[tuple[str, str, str], Contrast],
    metric: str | None,
    reference: str | None,
) -> str:
    lower = metric == "eval_loss" or task in {"wikitext2", "movie-review-lm"}
    ordered = sorted(cells, key=lambda cell: cell.mean or 0.0, reverse=not lower)
    named = metric or ("perplexity" if task == "wikitext2" else "accuracy")
    lines = [
        f"**{task}, budget {budget}** ({named}; {'lower' if lower else 'higher'} is better)",
        "",
        f"| arm | parameters | rate | mean | sd over seeds | better than {reference} by, 95 % | "
        "p, corrected | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(cell, known.get((task, budget, cell.method))) for cell in ordered]
    return "\n".join(lines) + "\n"


def _row(cell: Cell, contrast: Contrast | None) -> str:
    sizes = sorted({outcome.final for outcome in cell.outcomes})
    spent = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    sd = "" if cell.sd is None else f"{cell.sd:.3f}"
    start = f"| {cell.method} | {spent} | {cell.lr:g} | {cell.mean:.3f} | {sd} | "
    if contrast is None:
        return start + "| | reference |"
    if contrast.low is None or contrast.high is None or contrast.p_corrected is None:
        return start + f"| | {contrast.verdict} |"
    return start + (
        f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}] | "
        f"{contrast.p_corrected:.3f} | {contrast.verdict} |"
    )


if __name__ == "__main__":
    main()
