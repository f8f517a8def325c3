"""Study of intervals for a difference of two methods, from few seeds and a sample of items.

Usage: python -m benchmarks.study_coverage [--experiments 500] [--out FOLDER]

Simulates paired runs whose true difference is known (about new seeds and new items) and counts how
often each kind of 95 % interval holds it. Writes results/studies/coverage.json. About three minutes
on one core.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gradrank.core.files import write_json
from gradrank.evidence.bootstrap import resampled, spread
from gradrank.evidence.items import Items
from gradrank.evidence.metrics import metric_value

SEEDS = (2, 3, 5, 10)
METRICS = ("eval_loss", "accuracy", "mcc")
ITEMS, RESAMPLES, EFFECT, MARGIN, POSITIVE = 200, 400, 0.15, 0.8, 0.3
SCENARIOS = {
    "items": (0.0, 0.5, 0.0),
    "seeds": (0.25, 0.05, 0.05),
    "flips": (0.0, 0.05, 0.6),
    "all": (0.05, 0.5, 1.0),
}
"""Standard deviations of what a method's run owes to its seed, to an item whatever the seed, and to
the two together (training that flips single items, a different set for every seed)."""
Interval = tuple[float, float]
Ways = Mapping[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Interval]]


def main() -> None:
    """Run the study and write what it found."""
    parser = argparse.ArgumentParser(description="Study of intervals")
    parser.add_argument("--experiments", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    args = parser.parse_args()
    started, rows = time.process_time(), []
    for scenario in SCENARIOS:
        for metric in METRICS:
            for seeds in SEEDS:
                row = study(scenario, metric, seeds, args.experiments)
                rows.append(row)
                told = "  ".join(f"{way} {value:.3f}" for way, value in row["coverage"].items())
                print(f"{scenario:6} {metric:9} {seeds:2} seeds  {told}", flush=True)
    write_json(
        args.out / "coverage.json",
        {
            "about": "Share of 95 % intervals that hold the true difference of two methods, over "
            "new seeds and new items; width: median over settings, relative to square-and-add",
            "experiments": args.experiments,
            "items": ITEMS,
            "resamples": RESAMPLES,
            "scenarios": {name: list(values) for name, values in SCENARIOS.items()},
            "summary": summary(rows),
            "rows": rows,
            "seconds": round(time.process_time() - started),
        },
    )


def study(scenario: str, metric: str, seeds: int, experiments: int) -> dict[str, Any]:
    """Return coverage and mean width of every kind of interval in one setting."""
    place = (list(SCENARIOS).index(scenario), METRICS.index(metric), seeds)
    rng = np.random.default_rng([0, *place])
    truth = true_difference(scenario, metric)
    held, width = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0.0)
    for number in range(experiments):
        runs = simulate(scenario, metric, seeds, rng)
        replicates = resampled(metric, runs, RESAMPLES, number)
        replicates = replicates[:, seeds:] - replicates[:, :seeds]
        values = np.array([metric_value(metric, run) for run in runs])
        values = values[seeds:] - values[:seeds]
        for way, interval in WAYS.items():
            low, high = interval(values, replicates, rng)
            held[way] += low <= truth <= high
            width[way] += (high - low) / experiments
    return {
        "scenario": scenario,
        "metric": metric,
        "seeds": seeds,
        "truth": round(truth, 5),
        "coverage": {way: count / experiments for way, count in held.items()},
        "width": {way: round(value, 5) for way, value in width.items()},
    }


def simulate(scenario: str, metric: str, seeds: int, rng: np.random.Generator) -> list[Items]:
    """Return the items of the reference's runs, then of the method's, paired by seed."""
    by_seed, by_item, by_both = SCENARIOS[scenario]
    label = np.where(rng.random(ITEMS) < POSITIVE, 1, 0)
    hard, luck = rng.standard_normal(ITEMS), 0.5 * by_seed * rng.standard_normal(seeds)
    runs: list[Items] = []
    for effect in (0.0, EFFECT):
        # Skewed: most items gain a little, a few lose much.
        own = by_item * (
            1 - rng.exponential(size=ITEMS) if metric == "eval_loss" else rng.standard_normal(ITEMS)
        )
        for shift in luck:
            seed = shift + by_seed * rng.standard_normal()
            noise = by_both * rng.standard_normal(ITEMS)
            score = MARGIN + effect + seed + hard + own + noise
            right = score > 0
            runs.append(
                Items(
                    kind="classes",
                    size=ITEMS,
                    right=right.astype(float),
                    expected=label,
                    predicted=np.where(right, label, 1 - label),
                    nll=10 - score,
                    count=np.ones(ITEMS),
                    group=np.zeros(ITEMS, dtype=int),
                    fingerprint="",
                )
            )
    return runs


def true_difference(scenario: str, metric: str) -> float:
    """Return the mean over all seeds of the difference on infinitely many items."""
    if metric == "eval_loss":
        return -EFFECT
    by_seed, by_item, by_both = SCENARIOS[scenario]
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    shifts, weights = np.sqrt(1.25) * by_seed * nodes, weights / weights.sum()
    scale = np.sqrt(1 + by_item**2 + by_both**2)
    values = []
    for effect in (0.0, EFFECT):
        right = stats.norm.cdf((MARGIN + effect + shifts) / scale)
        if metric == "mcc":
            ones = POSITIVE * right + (1 - POSITIVE) * (1 - right)
            right = (2 * right - 1) * np.sqrt(POSITIVE * (1 - POSITIVE) / (ones * (1 - ones)))
        values.append(float(weights @ right))
    return values[1] - values[0]


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return least, mean and largest coverage of every kind of interval."""
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        values = np.array([row["coverage"][way] for row in rows])
        ratio = np.array([row["width"][way] / row["width"]["square-and-add"] for row in rows])
        found[way] = {
            "least": float(values.min()),
            "mean": round(float(values.mean()), 4),
            "largest": float(values.max()),
            "width": round(float(np.median(ratio)), 3),
        }
    return found


def _chosen(values: np.ndarray, replicates: np.ndarray, _: np.random.Generator) -> Interval:
    return spread(values, replicates, ITEMS).interval()


def _percentile(values: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> Interval:
    seeds = len(values)
    drawn = rng.integers(0, seeds, replicates.shape)
    means = np.take_along_axis(replicates, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _seeds_only(values: np.ndarray, _: np.ndarray, __: np.random.Generator) -> Interval:
    return _around(values, values.var(ddof=1) / len(values), len(values) - 1)


def _items_only(values: np.ndarray, replicates: np.ndarray, _: np.random.Generator) -> Interval:
    return _around(values, replicates.mean(axis=1).var(ddof=1), np.inf)


def _sum_t(values: np.ndarray, replicates: np.ndarray, _: np.random.Generator) -> Interval:
    seeds = len(values)
    variance = values.var(ddof=1) / seeds + replicates.mean(axis=1).var(ddof=1)
    return _around(values, variance, seeds - 1)


def _satterthwaite(values: np.ndarray, replicates: np.ndarray, _: np.random.Generator) -> Interval:
    found = spread(values, replicates, ITEMS)
    whole = max(found.seeds + found.items, found.floor)
    below = found.seeds**2 / found.seed_freedom + found.items**2 / found.item_freedom
    return _around(values, whole, whole**2 / below if below else np.inf)


def _around(values: np.ndarray, variance: float, freedom: float) -> Interval:
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return float(values.mean()) - half, float(values.mean()) + half


WAYS: Ways = {
    "square-and-add": _chosen,
    "percentile": _percentile,
    "t over seeds": _seeds_only,
    "items only": _items_only,
    "t of the sum": _sum_t,
    "satterthwaite": _satterthwaite,
}

if __name__ == "__main__":
    main()
