"""Study of the regimes in which signals of a calibration tell targets apart.

Usage: python -m benchmarks.study_regimes [--data-dir FOLDER] [--out FILE] [--minutes N] [--quick]

Measures gradients of small real models on several tasks, at several points, with three seeds each,
and writes results/studies/regimes.json after every pass, then the figures in docs/figures and the
tables of docs/studies/regimes.md. What the results hold already is not measured again, so that a
stopped command is finished by the same command. Tasks without data are named and left out. About
40 minutes on two busy cores. --quick takes tiny random models and seconds, and is no evidence of
anything.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from benchmarks.regimes.measure import CASES, QUICK, START
from benchmarks.regimes.readings import ENERGIES, NORM, gard
from benchmarks.regimes.results import collect, summarise
from benchmarks.regimes.tables import FEW, USUAL, average, models_of, pick, tables
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from gradrank.core.files import read_json
from gradrank.lab.cache import cache_root
from gradrank.lab.compare.bench import Bench
from gradrank.report.style import Mark, percent_ticks, type_marks
from gradrank.report.svg import Figure, canvas, finish, look

Rows = Sequence[dict[str, Any]]
_WIDTH = 900
# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study; write its results, its figures and the tables of its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny random models, seconds")
    parser.add_argument("--data-dir", default=None, help="folder with public data")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the measurements")
    parser.add_argument("--out", type=Path, default=Path("results/studies/regimes.json"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/regimes.md"))
    parser.add_argument("--minutes", type=float, default=None, help="measure nothing after so many")
    parser.add_argument("--redraw", action="store_true", help="figures and tables from the results")
    args = parser.parse_args(arguments)
    if args.quick:
        args.out = args.out.with_name(f"{args.out.stem}-quick{args.out.suffix}")
    found = read_json(args.out, "study") if args.redraw else measured(args)
    if not args.quick:
        rows = summarise(found)
        for figure in figures(rows):
            figure.save(args.figures / f"{figure.name}.svg", overwrite=True)
        fill(args.page, tables(found, rows))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the study finds, with a line for each pass."""
    started = time.perf_counter()
    cache = args.cache or cache_root() / "studies" / "regimes"

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:8.1f} s  {text}", flush=True)

    cases = QUICK if args.quick else CASES
    return collect(cases, args.out, Bench(cache, args.data_dir), cache, args.minutes, say)


def figures(rows: Rows) -> list[Figure]:
    """Draw every figure of the study, in the order of the page."""
    return [energies(rows), batches(rows), tasks(rows)]


@look()
def energies(rows: Rows) -> Figure:
    """Draw saturation over the energy threshold, and what it does to plans."""
    drawn = canvas(_WIDTH, 360)
    left, right = drawn.subplots(1, 2)
    names = models_of(rows)
    marks, data = type_marks(names), {}
    for name in names:
        by = [pick(rows, model=name, point=START, whole=True, reading=gard(e)) for e in ENERGIES]
        told = {
            key: [average(chosen, key, budget) for chosen in by]
            for key, budget in (("saturation", None), ("moved", USUAL), ("changed", USUAL))
        }
        data[name] = told
        _line(left, ENERGIES, told["saturation"], marks[name], name)
        _line(right, ENERGIES, told["moved"], marks[name], name)
        _line(right, ENERGIES, told["changed"], marks[name], None, "--")
    left.set(xlabel="energy threshold", title="Effective rank / its ceiling", ylim=(0, 1.02))
    right.set(xlabel="energy threshold", title=f"Share of the parameters, {USUAL}", ylim=(0, None))
    for ax in (left, right):
        ax.set_xticks(list(ENERGIES))
        percent_ticks(ax.yaxis)
    left.legend(loc="upper left")
    drawn.tight_layout()
    caption = (
        "All measured mini-batches, no warm-up. Right: solid, moved away from uniform; dashed, "
        "changed by another calibration seed."
    )
    title = "The energy threshold of the effective rank"
    return finish(drawn, "regimes-energy", title, caption, {"energies": list(ENERGIES), **data})


@look()
def batches(rows: Rows) -> Figure:
    """Draw moved and changed shares over the number of mini-batches."""
    shown = (gard(0.9), gard(0.5), NORM)
    drawn = canvas(_WIDTH, 340)
    names = models_of(rows)
    marks, data = type_marks(names), {}
    for ax, reading in zip(drawn.subplots(1, 3, sharey=True), shown, strict=True):
        for name in names:
            its = pick(rows, model=name, point=START, reading=reading)
            size = min(row["size"] for row in its)
            counts = sorted({row["batches"] for row in its if row["size"] == size})
            by = [pick(its, batches=count, size=size) for count in counts]
            told = {k: [average(chosen, k, USUAL) for chosen in by] for k in ("moved", "changed")}
            data[f"{reading}, {name}"] = {"batches": counts, **told}
            _line(ax, counts, told["moved"], marks[name], name)
            _line(ax, counts, told["changed"], marks[name], None, "--")
        ax.set_xscale("log")
        ax.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="mini-batches M", title=reading)
        percent_ticks(ax.yaxis)
    # Only now: the axis is shared, and what is drawn later may be taller.
    drawn.axes[0].set_ylim(0, None)
    drawn.axes[0].set_ylabel(f"share of the parameters, {USUAL}")
    drawn.axes[0].legend(loc="upper left")
    drawn.tight_layout()
    caption = "Solid: moved away from uniform. Dashed: changed by another calibration seed."
    return finish(drawn, "regimes-batches", "Plans over the number of mini-batches", caption, data)


@look()
def tasks(rows: Rows) -> Figure:
    """Draw agreement between seeds beside agreement between tasks."""
    cells: list[tuple[str, str, str]] = []
    data: dict[str, Any] = {}
    for row in pick(rows, whole=True):
        known = row["tasks_within"] is not None and row["reading"] in FEW
        if known and (name := (row["model"], row["point"], row["reading"])) not in cells:
            cells.append(name)
    drawn = canvas(_WIDTH, 110 + 24 * max(len(cells), 1))
    ax = drawn.subplots()
    kinds = {"seeds_within": "another seed", "tasks_within": "another task and seed"}
    marks = type_marks(list(kinds.values()))
    for key, label in kinds.items():
        told: Any = [
            average(pick(rows, whole=True, model=m, point=p, reading=r), key) for m, p, r in cells
        ]
        data[label] = told
        mark = marks[label]
        places = range(len(cells))
        ax.plot(told, places, marker=mark.marker, color=mark.color, linestyle="", label=label)
    ax.set_yticks(range(len(cells)), [f"{m}, {p}: {r}" for m, p, r in cells])
    ax.set_ylim(max(len(cells), 1) - 0.4, -0.6)
    known = [value for told in data.values() for value in told if value is not None]
    least = min([0.0, *known])
    ax.set(xlim=(least - 0.02, 1.02))
    ax.set(xlabel="Spearman's correlation of scores within targets of one shape")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    drawn.tight_layout()
    caption = "Where both marks coincide, the signal is about the model and not about the task."
    data["cells"] = [", ".join(cell) for cell in cells]
    return finish(drawn, "regimes-tasks", "Is the signal about the task?", caption, data)


def _line(
    ax: Axes, x: Sequence[float], y: Sequence[Any], mark: Mark, label: str | None, line: Any = "-"
) -> None:
    ax.plot(x, y, color=mark.color, marker=mark.marker, linestyle=line, markersize=5, label=label)


if __name__ == "__main__":
    main()
