"""Tables and the figure of docs/benchmarks.md, from the files under results/benchmarks.

Usage: python -m benchmarks.page [--results results/benchmarks] [--page docs/benchmarks.md]
                                 [--figure docs/figures/benchmarks.svg]

Nothing is run. Results of ``--quick`` are refused: they are of a tiny model.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frame import RESULTS, ROOT, SCHEMA
from benchmarks.pages import fill, markdown
from matplotlib.axes import Axes

from gradrank.core.errors import DataError
from gradrank.core.files import read_json
from gradrank.report.svg import Figure, canvas, finish, look

Result = Mapping[str, Any]

TITLES = {
    "start": "Start",
    "allocate": "Exact allocation",
    "resize": "Resizing",
    "measure": "Measuring one mini-batch",
    "decide": "Deciding ranks, all in all",
    "dynamic": "Dynamic GARD, whole run",
    "igu": "IGU-LoRA, whole run",
    "pilora": "PiLoRA, per step",
    "data": "Training through gradrank and through the Trainer alone",
    "processes": "One process and two",
}
"""By benchmark; all that the page shows, in its order."""
COLUMNS = (
    ("seconds", "seconds"),
    ("ratio", "ratio"),
    ("interval", "95 %"),
    ("ratio_to_bare", "to bare"),
    ("parameters", "parameters"),
    ("held_bytes", "held at most"),
    ("peak_bytes", "peak"),
    ("memory_ratio", "peak, ratio"),
    ("memory_to_bare", "peak to bare"),
    ("stored_bytes", "kept"),
    ("decision_bytes", "decision"),
    ("greedy_seconds", "greedy, seconds"),
    ("greedy_over_exact_gain", "greedy's gain"),
    ("loads_torch", "loads torch"),
    ("microseconds_per_token", "µs per token"),
    ("ratio_per_token", "ratio per token"),
    ("interval_per_token", "95 %"),
    ("padding", "padding"),
    ("exchanged_bytes", "exchanged"),
    ("target_bytes", "per target"),
    ("gradient_bytes", "DDP's gradients, per step"),
    ("note", ""),
)
_MET, _MISSED, _INK = "#0072B2", "#D55E00", "#333333"


def main() -> None:
    """Write the tables into the page, and the figure."""
    parser = argparse.ArgumentParser(description="Tables and figure of the page of benchmarks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "benchmarks.svg")
    args = parser.parse_args()
    results = read_results(args.results)
    goals = goals_table(results)
    drawn = goals_figure(results)
    if drawn is not None:
        drawn.save(args.figure, overwrite=True)
        goals = f"![{drawn.title}: {drawn.headline}](figures/{args.figure.name})\n\n{goals}"
        goals = f"{goals}\n\n{drawn.caption}"
    fill(args.page, {"goals": goals, "rows": rows_tables(results)})
    print(f"{len(results)} of {len(TITLES)} benchmarks written into {args.page.name}")


def read_results(folder: Path) -> dict[str, Result]:
    """Read what the benchmarks wrote.

    Args:
        folder: Where.

    Returns:
        Results by name, in the page's order; those that have not run are left out.

    Raises:
        DataError: If a file is of another kind, or of ``--quick``.
    """
    found = {}
    for name in TITLES:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        result = read_json(path, "result of a benchmark")
        if not isinstance(result, dict) or result.get("schema") != SCHEMA or result.get("quick"):
            raise DataError(
                f"'{path.name}' is no result of a whole benchmark ({SCHEMA}; --quick makes "
                f"others). Run python -m benchmarks {name} again."
            )
        found[name] = result
    return found


def goals_table(results: Mapping[str, Result]) -> str:
    """Return the goals and what came of them, as Markdown.

    Args:
        results: The results.
    """
    if not results:
        return "No benchmark has run yet."
    head = ["what", "wanted", "measured", "95 %", "", "against"]
    rows = [
        [
            goal["what"],
            f"≤ {goal['limit']:g}" + ("" if goal["against"] else " s"),
            f"**{goal['value']:.3f}**",
            "" if goal["interval"] is None else "{:.3f} to {:.3f}".format(*goal["interval"]),
            verdict(goal),
            goal["against"],
        ]
        for result in results.values()
        for goal in result["goals"]
    ]
    return markdown(head, rows)


def verdict(goal: Mapping[str, Any]) -> str:
    """Return what came of a goal in a word or two.

    Args:
        goal: From a file of results.
    """
    word = "met" if goal["met"] else "missed"
    return f"{word}, within the noise" if goal["sure"] is False else word


def rows_tables(results: Mapping[str, Result]) -> str:
    """Return one table per benchmark, as Markdown, with its settings above.

    Args:
        results: The results.
    """
    parts = []
    for name, result in results.items():
        rows = result["rows"]
        used = [(key, title) for key, title in COLUMNS if any(key in row for row in rows.values())]
        lines = [
            [row, *(shown(key, data.get(key)) for key, _ in used)] for row, data in rows.items()
        ]
        text = [f"### {TITLES[name]}", "", setting_line(result), ""]
        text += [markdown(["", *(title for _, title in used)], lines), ""]
        text += [f"`{row}` was left out: {why}" for row, why in result["skipped"].items()]
        text += [*result["notes"], ""]
        parts.append("\n".join(text).rstrip())
    return "\n\n".join(parts) or "No benchmark has run yet."


def setting_line(result: Result) -> str:
    """Return one line about what a benchmark ran with.

    Args:
        result: The result.
    """
    settings, machine = result["settings"], result["environment"]
    named = {
        k: v
        for k, v in settings.items()
        if k not in {"model", "batch", "length", "quick", "threads", "no_memory"}
    }
    flags = ", ".join(
        f"{k.replace('_', ' ')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in named.items()
    )
    busy = result["others_share"]
    doubt = f" **Other programs used {busy:.0%} of the processors.**" if busy > 0.1 else ""
    return (
        f"`python -m benchmarks {result['name']}`, {settings['model']}, batches of "
        f"{settings['batch']} x {settings['length']} tokens; {flags}. {machine['device']}, "
        f"{machine['threads']} threads, {result['minutes']:.1f} min.{doubt}"
    )


def shown(key: str, value: Any) -> str:
    """Return a figure as a cell: MiB or KiB for bytes, three places for ratios.

    Args:
        key: Its key in the row.
        value: The figure, or None.
    """
    if value is None:
        return ""
    if key.endswith("_bytes"):
        if value < 2**10:
            return f"{value} B"
        return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"
    if isinstance(value, list):
        return "{:.3f} to {:.3f}".format(*value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@look()
def goals_figure(results: Mapping[str, Result]) -> Figure | None:
    """Draw every goal as a share of its limit, with its interval.

    Args:
        results: The results.

    Returns:
        The figure; None if there are no goals.
    """
    goals = [goal for result in results.values() for goal in result["goals"]]
    if not goals:
        return None
    drawn = canvas(860, 110 + 40 * len(goals))
    height = drawn.get_figheight() * 72
    axes = drawn.add_axes((0.42, 64 / height, 0.55, 1 - 104 / height))
    _draw_goals(axes, goals)
    missed = sum(not goal["met"] for goal in goals)
    return finish(
        drawn,
        "benchmarks",
        "Costs beside what is wanted of them",
        "Each figure divided by its limit, with its 95 % interval where there is one: left of the "
        "line is better. Filled circles are met, open diamonds are missed.",
        {"goals": [dict(goal) for goal in goals]},
        f"{len(goals) - missed} of {len(goals)} goals met",
    )


def _draw_goals(axes: Axes, goals: Sequence[Mapping[str, Any]]) -> None:
    places = list(range(len(goals)))[::-1]
    edge = 1.0
    for place, goal in zip(places, goals, strict=True):
        value = goal["value"] / goal["limit"]
        colour, marker, fill_ = (_MET, "o", _MET) if goal["met"] else (_MISSED, "D", "white")
        edge = max(edge, value)
        if goal["interval"] is not None:
            low, high = (end / goal["limit"] for end in goal["interval"])
            axes.plot([low, high], [place, place], color=colour, linewidth=2.4)
            edge = max(edge, high)
        axes.plot([value], [place], marker, color=colour, markerfacecolor=fill_, markersize=8)
        unit = "" if goal["against"] else " s"
        text = f"{goal['value']:.3g}{unit} (≤ {goal['limit']:g}{unit})"
        axes.annotate(
            text,
            (value, place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (5, 2)))
    axes.set_yticks(places, [_label(goal) for goal in goals], fontsize=10)
    axes.set_ylim(-0.6, len(goals) - 0.2)
    axes.set_xlim(0, 1.15 * edge)
    axes.set_xlabel("measured, as a share of the limit")
    axes.grid(visible=False, axis="y")


def _label(goal: Mapping[str, Any]) -> str:
    return goal["what"] + (f"\n(to {goal['against']})" if goal["against"] else "")


if __name__ == "__main__":
    main()
