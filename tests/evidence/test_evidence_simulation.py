"""Simulated comparisons with a known effect, and with none."""

import numpy as np
import pytest
from scipy import stats

from evidence.evidence_cases import simulated
from gradrank.evidence.bootstrap import resampled, spread
from gradrank.evidence.comparison import compare
from gradrank.evidence.items import read_items

ITEMS = 60
SCENARIOS = {
    "seeds": (0.4, 0.05, 0.05),
    "items": (0.0, 0.6, 0.0),
    "flips": (0.0, 0.0, 0.6),
    "all": (0.05, 0.4, 0.8),
}


def losses(rng, seeds, by_seed, by_item, by_both, effect):
    """Paired losses of two methods, ``[2, K, n]``; the true difference is the effect."""
    hard = rng.exponential(size=ITEMS)
    own, luck = by_item * rng.standard_normal(ITEMS), by_seed * rng.standard_normal((seeds, 1))
    ours = 5 + hard + effect + own + luck + by_both * rng.standard_normal((seeds, ITEMS))
    return np.stack([ours, np.broadcast_to(5 + hard, ours.shape)])


def covered(scenario, seeds, experiments, effect=0.3):
    """How many intervals hold the effect: the library's, and without the widening for seeds."""
    rng, held, naive = np.random.default_rng([seeds, *map(ord, scenario)]), 0, 0
    for number in range(experiments):
        both = losses(rng, seeds, *SCENARIOS[scenario], effect)
        runs = [
            read_items({"kind": "tokens", "nll": r.tolist(), "count": [1] * ITEMS})
            for r in both.reshape(-1, ITEMS)
        ]
        replicates = resampled("eval_loss", runs, 100, number)
        replicates = replicates[:, :seeds] - replicates[:, seeds:]
        found = spread(np.mean(both[0] - both[1], axis=1), replicates, ITEMS)
        low, high = found.interval()
        held += low <= effect <= high
        half = 1.96 * np.std(replicates.mean(axis=1), ddof=1)
        naive += abs(found.value - effect) <= half
    return held, naive


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_cover_a_known_effect(scenario, seeds):
    held, _ = covered(scenario, seeds, 250)
    # Not below 95 % by more than chance (one in ten thousand).
    assert held >= stats.binom.ppf(1e-4, 250, 0.95)


def test_an_interval_over_items_alone_is_caught():
    held, naive = covered("seeds", 5, 250)
    assert naive < stats.binom.ppf(1e-4, 250, 0.95) <= held


def test_without_an_effect_few_differences_are_called_evidence():
    count = 150
    p_values = []
    for number in range(count):
        rng = np.random.default_rng([1, number])
        records = simulated(rng, {"uniform": 0.0, "gard": 0.0}, items=80)
        (contrast,) = compare(records, resamples=100).contrasts
        p_values.append(contrast.p)
    false = sum(p < 0.05 for p in p_values)
    assert false <= stats.binom.ppf(1 - 1e-4, count, 0.05)
    # Nor is it a test that never finds anything.
    assert sum(p < 0.5 for p in p_values) >= stats.binom.ppf(1e-4, count, 0.3)


def test_power_grows_with_the_effect():
    def power(effect):
        found = 0
        for number in range(20):
            rng = np.random.default_rng([2, number])
            records = simulated(rng, {"uniform": 0.0, "gard": effect}, items=80)
            (contrast,) = compare(records, resamples=100).contrasts
            found += contrast.verdict == "better"
        return found

    weak, middling, strong = power(0.1), power(0.3), power(2.0)
    assert weak < middling < strong
    assert strong >= 19


def test_many_arms_without_an_effect_are_rarely_called_evidence():
    wrong = 0
    for number in range(50):
        rng = np.random.default_rng([3, number])
        effects = dict.fromkeys(["uniform", "a", "b", "c", "d", "e", "f"], 0.0)
        found = compare(simulated(rng, effects, items=50), resamples=100)
        wrong += any(c.verdict != "no evidence" for c in found.contrasts)
    assert wrong <= stats.binom.ppf(1 - 1e-4, 50, 0.05)


def pooled_and_single(effect, count):
    """How many pooled verdicts are not `no evidence`, and the mean share of small p per task."""
    single, pooled = 0.0, 0
    for number in range(count):
        records = []
        for task in ("a", "b", "c", "d"):
            rng = np.random.default_rng([4, number, ord(task)])
            records += simulated(rng, {"uniform": 0.0, "gard": effect}, items=60, task=task)
        found = compare(records, resamples=100)
        single += sum(c.p < 0.05 for c in found.contrasts) / len(found.contrasts)
        pooled += found.pooled[0].verdict != "no evidence"
    return pooled, single


def test_pooling_finds_what_single_tasks_do_not():
    pooled, single = pooled_and_single(0.25, 20)
    assert pooled > single + 4


def test_pooling_finds_nothing_where_nothing_is():
    pooled, _ = pooled_and_single(0.0, 40)
    assert pooled <= stats.binom.ppf(1 - 1e-4, 40, 0.05)
