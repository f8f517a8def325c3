"""Growth study, part ``time``: seconds of measuring beside the same passes without it."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.growth_points import QUICK_AXES, VARIANTS, Axes, Point, batches_of, do, model_of
from benchmarks.timing import ratio, take_turns

Row = dict[str, Any]
FULL = Axes(
    Point(batches=4),
    {
        "batches": (2, 4, 8, 16, 32),
        "tokens": (64, 128, 256, 512, 1024),
        "width": (128, 256, 512, 1024),
        "layers": (2, 4, 8, 16),
        "k": (16, 32, 64, 128, 256, 512),
    },
    rounds=7,
)
QUICK = QUICK_AXES


def cells(axes: Axes) -> Iterable[tuple[str, Callable[[], Row]]]:
    """Yield the points by name, each with the work that gives its row."""
    for point in axes.points():
        yield point.name, lambda point=point: row_of(point, axes.rounds)


def row_of(point: Point, rounds: int) -> Row:
    """Let the variants take turns; a turn is one whole measurement of M mini-batches."""
    model, batches = model_of(point), batches_of(point)
    turns = {name: partial(_turn, name, point, model, batches) for name in VARIANTS}
    seconds = take_turns(turns, rounds, warmup=1)
    row: Row = asdict(point) | {"rounds": rounds}
    for name in VARIANTS:
        row[name] = sum(seconds[name]) / rounds / point.batches
        if name != "bare":
            found = ratio(seconds[name], seconds["bare"])
            row[f"{name}_ratio"] = found.value
            row[f"{name}_interval"] = list(found.interval) if found.interval else None
            row[f"{name}_extra"] = row[name] - row["bare"]
    return row


def _turn(name: str, point: Point, model: Any, batches: list[Any], _round: int) -> None:
    do(name, point, model, batches)
