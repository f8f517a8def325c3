"""The heavy part of ``gradrank compare``."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gradrank.cli.console import Console
from gradrank.cli.exits import RunFailedError
from gradrank.cli.settings import needed
from gradrank.core.errors import DataError
from gradrank.evidence.comparison import Comparison
from gradrank.evidence.metrics import find_metric
from gradrank.lab.compare.dry import rehearsal
from gradrank.lab.compare.run import Grid, open_grid
from gradrank.lab.compare.store import Found
from gradrank.report.comparison import write_comparison

_MARKS = {"better": "+", "worse": "-", "no evidence": "o", "not tested": " "}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the flags of ``gradrank compare`` say.

    Attributes:
        recipe: The recipe.
        out: The grid's folder.
        workers: Runs at a time.
        data_dir: Folder with public data.
        retry: Whether to try failed runs again.
        report_only: Whether to run nothing.
        reference: Label to compare with; None: the recipe's.
        metric: Metric to report; None: each task's own.
        png: Whether to write figures as files too.
    """

    recipe: Path
    out: Path | None
    workers: int = 1
    data_dir: str | None = None
    retry: bool = False
    report_only: bool = False
    reference: str | None = None
    metric: str | None = None
    png: bool = False


def run(asked: Asked, console: Console) -> None:
    """Run what is missing, then draw the report.

    Args:
        asked: What the flags say.
        console: Shows how far it is.

    Raises:
        KeyboardInterrupt: If the user stopped the grid.
        DataError: If there is no finished run to report.
        RunFailedError: After the report, if runs of this call failed.
    """
    out = needed(asked.out)
    with console.working():
        grid = open_grid(asked.recipe, out, asked.data_dir)
        grid.workers, grid.retry, grid.say = asked.workers, asked.retry, console.say
        if asked.reference is not None:
            grid.take_reference(asked.reference)
        if asked.metric is not None:
            grid.metric = find_metric(asked.metric).name
        if not asked.report_only:
            with _interruptible(grid, console):
                grid.work()
        comparison, found = grid.comparison()
        planned = grid.all_runs()
        finished = sum(found.finished(r) is not None for r in planned)
        for name, reason in found.excluded:
            console.warn(f"left out: {name}: {reason}")
        if not finished:
            raise DataError(
                f"'{out}' has no finished run of '{grid.recipe.name}' to report"
                + (
                    f"; {len(found.records)} failed, see {grid.store.runs}."
                    if found.records
                    else "."
                )
            )
        files = write_comparison(
            comparison,
            out / "report.html",
            overwrite=True,
            figures_dir=out / "figures" if asked.png else None,
            csv=out / "table.csv",
            finished=finished,
            planned=len(planned),
        )
    console.show(*_lines(comparison), f"written: {', '.join(str(file) for file in files[:2])}")
    console.result(_result(grid, comparison, found, finished, len(planned)))
    if grid.stopped:
        raise KeyboardInterrupt(
            f"interrupted after {finished} of {len(planned)} runs. The same command goes on."
        )
    if grid.failures:
        raise RunFailedError(
            f"failed runs: {len(grid.failures)}. The lines above and the report say why. Their "
            "records are kept and not repeated, unless you give --retry-failed."
        )


def rehearse(recipe: Path, console: Console) -> None:
    """Check a recipe on shapes and print what it would run.

    Args:
        recipe: The recipe.
        console: Where to print.
    """
    with console.working():
        found = rehearsal(recipe)
    console.show(*found.lines())
    console.result(found.to_dict())


@contextlib.contextmanager
def _interruptible(grid: Grid, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C end the grid after the runs in hand, and the second at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        if grid.stopped:
            raise KeyboardInterrupt("interrupted; the same command goes on with what is missing.")
        grid.stop()
        console.warn("stopping after the runs in hand; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(comparison: Comparison) -> list[Any]:
    """Return the table of the finished runs, one line per cell."""
    contrasts = {(c.task, c.budget, c.method): c for c in comparison.contrasts}
    lines: list[Any] = []
    head = f"{'method':22} {'mean':>9} {'95 % interval':>19} {'seeds':>5} {'parameters':>11}  "
    for task, info in comparison.tasks.items():
        better = "more" if info.higher_is_better else "less"
        for budget in comparison.budgets:
            cells = [c for c in comparison.cells if (c.task, c.budget) == (task, budget.text)]
            if not cells:
                continue
            lines.append(f"\n{task}, budget {budget.text}: {info.metric} ({better} is better)")
            lines.append(head + f"against {comparison.reference}")
            for cell in cells:
                contrast = contrasts.get((cell.task, cell.budget, cell.method))
                lines.append(_line(cell, contrast))
    return lines


def _line(cell: Any, contrast: Any) -> str:
    if cell.mean is None:
        return f"{cell.method:22} {'failed':>9}  ({cell.failed} run(s))"
    interval = "" if cell.low is None else f"{cell.low:.4f} .. {cell.high:.4f}"
    final = max((outcome.final or 0 for outcome in cell.outcomes), default=0)
    told = f"{cell.method:22} {cell.mean:9.4f} {interval:>19} {len(cell.outcomes):5} {final:11,}  "
    if contrast is None or contrast.difference is None:
        return told
    p = "" if contrast.p_corrected is None else f" p {contrast.p_corrected:.3f}"
    return f"{told}{_MARKS.get(contrast.verdict, ' ')} {contrast.difference:+.4f}{p}"


def _result(
    grid: Grid, comparison: Comparison, found: Found, finished: int, planned: int
) -> dict[str, Any]:
    return {
        "recipe": grid.recipe.name,
        "out": str(grid.store.folder),
        "finished": finished,
        "planned": planned,
        "failed": [failure.run_id for failure in comparison.failures],
        "excluded": [name for name, _ in found.excluded],
        "contrasts": [
            {
                "task": c.task,
                "budget": c.budget,
                "method": c.method,
                "reference": c.reference,
                "difference": c.difference,
                "low": c.low,
                "high": c.high,
                "p_corrected": c.p_corrected,
                "verdict": c.verdict,
            }
            for c in comparison.contrasts
        ],
    }
