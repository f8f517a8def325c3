"""Time the exact knapsack against the greedy fallback, and compare what they reach.

Usage: python -m benchmarks.bench_allocate [--targets 224 1000] [--quick]

One row per shape family, number of targets, number of ranks and kind of gain. Seconds are the
middle of several repeats of the whole call: checking, table, search and ranks. The budget is
uniform rank 8 and 7 parameters more, so that no whole number of ranks spends it.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from benchmarks.frame import Bench, Found, Goal, Row, main
from benchmarks.timing import take_turns

from gradrank.allocation import allocate_gains
from gradrank.core.targets import Target

SHAPES = {
    "Llama-3-8B": {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (4096, 1024),
        "self_attn.v_proj": (4096, 1024),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (4096, 14336),
        "mlp.up_proj": (4096, 14336),
        "mlp.down_proj": (14336, 4096),
    },
    "SmolLM2-135M": {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    },
    "ViT-B": {
        "attention.query": (768, 768),
        "attention.key": (768, 768),
        "attention.value": (768, 768),
        "attention.output": (768, 768),
        "mlp.up": (768, 3072),
        "mlp.down": (3072, 768),
    },
}
GOALS = (Goal("exact allocation, 1,000 targets x 64 ranks, slowest case", "slowest", "seconds", 1),)

Gains = dict[str, list[float]]


def concave(draw: np.random.Generator, ranks: int) -> list[float]:
    """Return a falling spectrum: a power law with a random level and decay."""
    level, decay = draw.lognormal(0, 1), draw.uniform(0.3, 2)
    return (level * np.arange(1, ranks + 1) ** -decay).tolist()


def non_concave(draw: np.random.Generator, ranks: int) -> list[float]:
    """Return independent steps, so that a large one may hide behind small ones."""
    return (draw.lognormal(0, 1) * draw.exponential(size=ranks)).tolist()


def whole_numbers(draw: np.random.Generator, ranks: int) -> list[float]:
    """Return steps of 1 to 4: ties everywhere."""
    return draw.integers(1, 5, ranks).astype(float).tolist()


KINDS: dict[str, Callable[[np.random.Generator, int], list[float]]] = {
    "concave": concave,
    "non-concave": non_concave,
    "ties": whole_numbers,
}


def make_problem(shapes: str, count: int, ranks: int, kind: str) -> tuple[list[Target], Gains]:
    """Return targets in blocks of the shapes, and random gains."""
    parts = list(SHAPES[shapes].items())
    targets = [
        Target(
            f"model.layers.{i // len(parts)}.{parts[i % len(parts)][0]}", *parts[i % len(parts)][1]
        )
        for i in range(count)
    ]
    draw = np.random.default_rng(0)
    return targets, {target.name: KINDS[kind](draw, ranks) for target in targets}


def solve(shapes: str, count: int, ranks: int, kind: str, repeats: int) -> Row:
    """Return the seconds of both solvers, and what share of the gain greedy reaches."""
    targets, gains = make_problem(shapes, count, ranks, kind)
    budget = 8 * sum(target.cost for target in targets) + 7
    reached: dict[str, float] = {}

    def turn(solver: str) -> Callable[[int], Any]:
        def call(_number: int) -> None:
            found = allocate_gains(targets, gains, budget, solver=solver)
            reached[solver] = sum(sum(gains[name][:rank]) for name, rank in found.items())

        return call

    seconds = take_turns({solver: turn(solver) for solver in ("exact", "greedy")}, repeats)
    return {
        "seconds": statistics.median(seconds["exact"]),
        "greedy_seconds": statistics.median(seconds["greedy"]),
        "greedy_over_exact_gain": reached["greedy"] / reached["exact"],
    }


def run(args: argparse.Namespace) -> Found:
    """Solve all problems."""
    rows: dict[str, Row] = {}
    largest: list[float] = []
    for shapes in SHAPES:
        for count in args.targets:
            for ranks in args.ranks:
                for kind in KINDS:
                    row = solve(shapes, count, ranks, kind, args.repeats)
                    rows[f"{shapes}, {count} x {ranks}, {kind}"] = row
                    if (count, ranks) == (1000, 64):
                        largest.append(row["seconds"])
    if largest:
        rows["slowest"] = {"seconds": max(largest)}
    return Found(rows)


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--targets", type=int, nargs="+", default=[224, 1000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)


BENCH = Bench(
    name="allocate",
    about="Time of exact allocation, and what the greedy fallback loses.",
    minutes=0.5,
    run=run,
    flags=flags,
    quick={"targets": [24], "ranks": [16], "repeats": 1},
    goals=GOALS,
    columns=("seconds", "greedy_seconds", "greedy_over_exact_gain"),
)

if __name__ == "__main__":
    main(BENCH)
