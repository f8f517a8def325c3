"""Growth study, part ``allocation``: processor seconds against targets, ranks and kind of gains.

Gains are drawn as in ``bench_allocate``; two slow kinds are made on purpose: every direction of
every target gains the same, and that with heads of odd cost in between, so that costs share no
divisor. A kind that was slow at one size is not tried at the next.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.bench_allocate import KINDS as DRAWN
from benchmarks.bench_allocate import SHAPES

from gradrank.allocation import allocate_gains, proportional
from gradrank.core.errors import GradrankError
from gradrank.core.targets import Target, cost_of_rank_one

Row = dict[str, Any]
Problem = tuple[list[Target], Any]
KINDS = (*DRAWN, "equal", "equal, odd costs")
SCORES = ("lognormal", "all equal", "300 decades")
_HEAD_EVERY = 8


@dataclass(frozen=True)
class AllocationSize:
    """How much is allocated.

    Attributes:
        targets: Numbers of targets, ascending, at ``rank``.
        ranks: Largest ranks, ascending, at ``count`` targets.
        rank: The rank at which targets grow.
        count: The number of targets at which ranks grow.
        patience: Processor seconds after which the next size of that kind is left out.
    """

    targets: tuple[int, ...] = (64, 256, 1024, 4096)
    ranks: tuple[int, ...] = (8, 32, 64, 128, 256)
    rank: int = 64
    count: int = 256
    patience: float = 10.0


FULL = AllocationSize()
QUICK = AllocationSize((4, 8), (8, 16), rank=8, count=8)


def cells(size: AllocationSize) -> Iterable[tuple[str, Callable[[], Row]]]:
    """Yield one cell per solver and kind, each with the work that gives its row."""
    for kind in KINDS:
        for solver in ("exact", "greedy"):
            yield f"{solver}: {kind}", lambda s=solver, k=kind: grown(size, s, k)
    for kind in SCORES:
        yield f"proportional: {kind}", lambda k=kind: grown(size, "proportional", k)


def grown(size: AllocationSize, solver: str, kind: str) -> Row:
    """Return processor seconds along both axes."""
    along = {
        "targets": [(count, size.rank) for count in size.targets],
        "ranks": [(size.count, rank) for rank in size.ranks],
    }
    row: Row = {"solver": solver, "kind": kind, "rank": size.rank, "count": size.count}
    for axis, sizes in along.items():
        points: list[Row] = []
        for count, rank in sizes:
            if points and (points[-1]["seconds"] or size.patience) >= size.patience:
                points.append({"targets": count, "ranks": rank, "seconds": None})
                continue
            points.append({"targets": count, "ranks": rank} | timed(solver, kind, count, rank))
        row[axis] = points
    return row


def timed(solver: str, kind: str, count: int, rank: int) -> Row:
    """Return the fewest processor seconds of several calls; one call if it is slow."""
    targets, values = problem(kind, count, rank)
    # A quarter of what can be spent, and a few parameters that no rank uses up.
    budget = max(1, rank // 4) * cost_of_rank_one(targets) + 7
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 1:
        started = time.process_time()
        try:
            if solver == "proportional":
                proportional(targets, values, budget, r_max=rank)
            else:
                allocate_gains(targets, values, budget, r_max=rank, solver=solver)
        except GradrankError as error:
            return {"seconds": None, "refused": type(error).__name__}
        seconds.append(time.process_time() - started)
    return {"seconds": min(seconds)}


def problem(kind: str, count: int, ranks: int) -> Problem:
    """Return targets in blocks of Llama-3-8B's shapes, and random gains or scores."""
    parts = list(SHAPES["Llama-3-8B"].items())
    targets = []
    for i in range(count):
        name, (d_in, d_out) = parts[i % len(parts)]
        if kind == "equal, odd costs" and i % _HEAD_EVERY == 0:
            # Wide enough for all ranks, of odd cost.
            name, d_in, d_out = "head", 4096, 2 * ranks + 1
        targets.append(Target(f"model.layers.{i // len(parts)}.{name}.{i}", d_in, d_out))
    draw = np.random.default_rng(0)
    if kind in SCORES:
        return targets, dict(zip(_names(targets), _scores(draw, kind, count), strict=True))
    return targets, {name: _gains(draw, kind, ranks) for name in _names(targets)}


def _names(targets: Sequence[Target]) -> list[str]:
    return [target.name for target in targets]


def _scores(draw: np.random.Generator, kind: str, count: int) -> list[float]:
    if kind == "all equal":
        return [1.0] * count
    if kind == "lognormal":
        return draw.lognormal(0, 1, count).tolist()
    return (10.0 ** draw.uniform(-300, 0, count)).tolist()


def _gains(draw: np.random.Generator, kind: str, ranks: int) -> list[float]:
    if kind.startswith("equal"):
        return [1.0] * ranks
    return DRAWN[kind](draw, ranks)
