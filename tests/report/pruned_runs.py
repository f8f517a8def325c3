"""Records of runs that began above their budget and pruned directions down to it."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from report import history_cases, report_cases
from report.history_cases import COST, Q0, Q1, V0, V1, decision

WIDE = {Q0: 4, V0: 4, Q1: 4, V1: 4}
MIDDLE = {Q0: 2, V0: 4, Q1: 3, V1: 1}
NARROW = {Q0: 0, V0: 4, Q1: 1, V1: 0}
STEPS = [[0, WIDE], [10, MIDDLE], [30, NARROW]]
PULL = {"q_proj": 0.35, "k_proj": 0.3, "gate_proj": 0.9, "v_proj": 1.5, "down_proj": 1.6}


def price(ranks):
    """Return what ranks of the tiny targets cost."""
    return sum(rank * COST[name] for name, rank in ranks.items())


def tiny(told=True, entries=STEPS, budget=32, extra=(), **changes):
    """Return a record of four targets (a rank of q costs 8, one of v 6), pruned in two decisions.

    ``extra`` holds one mapping per decision, with what it tells beside the counts.
    """
    decisions = []
    if told:
        for (_, before), (step, after) in pairwise(entries):
            allowed = price(after) + 1 if price(after) > budget else budget
            changed = sum(before[name] != after[name] for name in before)
            decisions.append(decision(step, price(after), allowed, 0, changed))
    for entry, more in zip(decisions, extra, strict=False):
        entry.update(more)
    record = history_cases.tiny(
        entries, decisions, budget, start=dict.fromkeys(WIDE, 1), name="igu", **changes
    )
    record.plan["method"]["name"] = "igu"
    return record


def facts(attributed, change, gap=None, passes=10.0):
    """Return what a decision of the direction-level method tells."""
    exact = abs(attributed - change) / abs(change)
    return {
        "passes": passes,
        "attributed": attributed,
        "loss_change": change,
        "gap": exact if gap is None else gap,
    }


def pruned(
    method="igu", layers=30, steps=1000, interval=25, seed=0, initial=16, name=None, until=None
):
    """Return a realistic run: cubic budget, directions of the lowest scores taken out for good."""
    rng = np.random.default_rng(seed)
    targets = report_cases.shapes(layers)
    cost = {n: sum(shape) for n, shape in targets.items()}
    start, budget = initial * sum(cost.values()), initial // 2 * sum(cost.values())
    scores = _scores(method, targets, initial, rng)
    ranks = dict.fromkeys(targets, initial)
    entries, told, passes = [[0, dict(ranks)]], [], 0
    warmup, last = steps // 10, steps - 3 * steps // 10
    for step in [*range(warmup + interval, last, interval), last]:
        if until is not None and step > until:
            break
        left = (last - step) / (last - warmup)
        allowed = budget + int((start - budget) * left**3)
        after, kept = _prune(scores, cost, ranks, allowed)
        passes += 0 if method == "adalora" else interval // 10 * 2
        told.append(
            decision(
                step,
                sum(after[n] * cost[n] for n in targets),
                allowed,
                0,
                sum(after[n] != ranks[n] for n in targets),
                seconds=0.2 + 0.05 * float(rng.random()),
                left_out=0,
                passes=float(passes),
                importance={n: math.fsum(values) for n, values in kept.items()},
            )
        )
        if method == "igu-direction":
            told[-1] |= _attributions(step / last, rng) | {"passes": float(passes)}
        if after != ranks:
            entries.append([step, dict(after)])
        ranks = after
    even = dict.fromkeys(targets, initial // 2)
    options = {"tolerance": 0.1} if method == "igu-direction" else {}
    planned = report_cases.plan(
        method, targets, even, dict.fromkeys(targets, 1 / len(targets)), None, options, budget
    )
    record = report_cases.record(name or method, targets, planned, None, -0.008, seed)
    record.cost = {**record.cost, "steps": until or steps, "train_seconds": 1.4 * steps}
    record.ranks_over_time, record.decisions = entries, told
    status = "finished" if until is None else "interrupted"
    return replace(record, status=status)


def _scores(method, targets, initial, rng):
    found = {}
    for i, name in enumerate(targets):
        pull = PULL.get(name.rpartition(".")[2], 1.0) * (0.6 + 0.8 * i / len(targets))
        values = pull * np.exp(0.7 * rng.standard_normal(initial)) * np.linspace(1.6, 0.4, initial)
        if method == "igu-direction":
            values = 1e-7 * (values - 0.25 + 0.1 * rng.standard_normal(initial))
        found[name] = sorted(map(float, values), reverse=True)
    return found


def _prune(scores, cost, ranks, allowed):
    """Take out the directions of the lowest scores until what is left is allowed."""
    listed = sorted((scores[n][i], n) for n, rank in ranks.items() for i in range(rank))
    after, used = dict(ranks), sum(ranks[n] * cost[n] for n in ranks)
    for _, name in listed:
        if used <= allowed:
            break
        after[name] -= 1
        used -= cost[name]
    return after, {n: scores[n][: after[n]] for n in scores}


def _attributions(progress, rng):
    change = -0.02 - 0.45 * progress**0.6
    miss = 0.9 * math.exp(-7 * progress) + 0.03 * abs(float(rng.standard_normal()))
    return facts(change * (1 + miss), change)
