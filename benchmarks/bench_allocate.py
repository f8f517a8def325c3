"""Time the exact knapsack against the greedy fallback, and compare what they reach.

Run ``python benchmarks/bench_allocate.py [--targets 224 1000] [--out FILE]``. Prints one line per
shape family, number of targets, number of ranks and kind of gain. Seconds are of processor time,
the middle one of several repeats, for the whole call: checking, table, search and ranks. The
budget is uniform rank 8 and 7 parameters more, so that no whole number of ranks spends it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradrank.allocation import allocate_gains
from gradrank.core.files import write_json
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


def measure(
    targets: Sequence[Target], gains: Gains, budget: int, solver: str, repeats: int
) -> tuple[float, float]:
    """Return seconds of processor time and the total gain."""
    seconds, ranks = [], {}
    for _ in range(repeats):
        start = time.process_time()
        ranks = allocate_gains(targets, gains, budget, solver=solver)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), sum(sum(gains[name][:r]) for name, r in ranks.items())


def main() -> None:
    """Run all problems and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[224, 1000, 4000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'shapes':14}{'targets':>8}{'ranks':>6}  {'gains':12}{'exact s':>9}{'greedy s':>9}  ratio"
    )
    for shapes in SHAPES:
        for count in options.targets:
            for ranks in options.ranks:
                for kind in KINDS:
                    targets, gains = make_problem(shapes, count, ranks, kind)
                    budget = 8 * sum(target.cost for target in targets) + 7
                    exact, best = measure(targets, gains, budget, "exact", options.repeats)
                    greedy, reached = measure(targets, gains, budget, "greedy", options.repeats)
                    rows.append(
                        {
                            "shapes": shapes,
                            "targets": count,
                            "ranks": ranks,
                            "gains": kind,
                            "exact_seconds": exact,
                            "greedy_seconds": greedy,
                            "greedy_over_exact_gain": reached / best,
                        }
                    )
                    print(
                        f"{shapes:14}{count:8}{ranks:6}  {kind:12}{exact:9.3f}{greedy:9.3f}"
                        f"  {reached / best:.6f}",
                        flush=True,
                    )
    if options.out:
        write_json(options.out, {"schema": "gradrank.bench/1", "name": "allocate", "rows": rows})


if __name__ == "__main__":
    main()
