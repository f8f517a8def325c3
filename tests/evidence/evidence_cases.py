"""Simulated records of comparisons."""

from typing import Any

import numpy as np

from gradrank.record.run import RunRecord


def record(
    method: str = "uniform",
    seed: int = 0,
    right: np.ndarray | None = None,
    task: str = "toy",
    budget: str = "uniform:1",
    phase: str = "final",
    lr: float | None = 1e-3,
    status: str = "finished",
    **changes: Any,
) -> RunRecord:
    """Return a record of a two-class task; `changes` go into the comparison."""
    right = np.ones(8, dtype=int) if right is None else np.asarray(right).astype(int)
    expected = np.arange(len(right)) % 2
    predicted = np.where(right == 1, expected, 1 - expected)
    accuracy = float((expected == predicted).mean())
    return RunRecord(
        name=method,
        kind="train",
        status=status,
        metrics={"accuracy": accuracy} if status == "finished" else {},
        cost={"train_seconds": 2.0, "measure_seconds": 0.5, "peak_memory_bytes": 100},
        trainable_parameters={"peak": 1000, "final": 1000, "other": 10},
        ranks_over_time=[[0, {"a": 1, "b": 1}]],
        items={
            "kind": "classes",
            "expected": expected.tolist(),
            "predicted": predicted.tolist(),
            "nll": np.where(right == 1, 0.1, 2.0).tolist(),
        },
        comparison={
            "run": f"{phase}--{task}--{method}--{budget}--{lr}--{seed}",
            "recipe": "sim",
            "about": "a simulation",
            "source": "none",
            "phase": phase,
            "task": task,
            "method": method,
            "budget": budget,
            "seed": seed,
            "lr": lr,
            "metric": "accuracy",
            "higher_is_better": True,
            "matched": True,
            "notes": [],
            "message": "",
            **changes,
        },
    )


def simulated(
    rng: np.random.Generator,
    effects: dict[str, float],
    seeds: int = 5,
    items: int = 120,
    by_seed: float = 0.1,
    by_item: float = 0.3,
    by_both: float = 0.7,
    task: str = "toy",
    budget: str = "uniform:1",
) -> list[RunRecord]:
    """Return paired runs of several methods; effects move the latent score, of scale about 1."""
    hard, luck = rng.standard_normal(items), by_seed * rng.standard_normal(seeds)
    records = []
    for method, effect in effects.items():
        own = by_item * rng.standard_normal(items)
        for seed in range(seeds):
            noise = by_both * rng.standard_normal(items)
            shift = luck[seed] + by_seed * rng.standard_normal()
            right = 0.8 + effect + shift + hard + own + noise > 0
            records.append(record(method, seed, right, task, budget))
    return records
