"""Records of runs whose ranks moved while they trained."""

import math

import numpy as np

from gradrank.report.reading import read_runs
from gradrank.report.sections import gather
from report import report_cases as cases

TINY = {"h.0.q": (4, 4), "h.0.v": (4, 2), "h.1.q": (4, 4), "h.1.v": (4, 2)}
Q0, V0, Q1, V1 = TINY
COST = {name: sum(shape) for name, shape in TINY.items()}
START = {Q0: 3, V0: 2, Q1: 3, V1: 2}
LATER = {Q0: 1, V0: 4, Q1: 3}  # one target dropped by leaving it out
LAST = {Q0: 1, V0: 5, Q1: 3, V1: 0}
ENTRIES = [[0, START], [10, LATER], [30, LAST]]
MAPS = {
    "effective_rank": {Q0: 3.0, Q1: 5.0, V0: 2.0},
    "smoothed": {Q0: 4.0, Q1: 4.5, V0: 2.5},
    "energy": {Q0: 0.01, Q1: 1.0, V0: 0.0},
}


def prepared(record):
    """Return the run of a record, and the layout of its targets."""
    material = gather(read_runs([record]))
    return material.runs[0], material.layout


def cost(ranks):
    """Return what ranks of the tiny targets cost."""
    return sum(rank * COST[name] for name, rank in ranks.items())


def decision(step, parameters=None, budget=None, moved=None, changed=None, **rest):
    """Return one decision; what is None is left out."""
    told = {"step": step, "parameters": parameters, "budget": budget, "moved": moved}
    told |= {"changed": changed, **rest}
    return {key: value for key, value in told.items() if value is not None}


def tiny(entries, decisions=(), budget=100, start=None, steps=60, **changes):
    """Return a record of four targets (a rank of q costs 8, one of v 6) with given ranks."""
    first = start or (entries[0][1] if entries else {})
    ranks = {name: first.get(name, 0) for name in TINY}
    planned = cases.plan("gard-dynamic", TINY, ranks, budget=budget)
    cost = {"steps": steps, "train_seconds": 10.0}
    fields = {"cost": cost, "losses": {}, "metrics": {}, **changes}
    history = {"ranks_over_time": [list(entry) for entry in entries], "decisions": list(decisions)}
    return cases.record(fields.pop("name", "dynamic"), TINY, planned, None, **fields, **history)


def dynamic(layers=30, decisions=10, interval=50, seed=0, name="gard-dynamic", freeze=None):
    """Return a realistic dynamic run: smoothed effective ranks, bounded steps, one budget."""
    rng = np.random.default_rng(seed)
    targets = cases.shapes(layers)
    cost = {name: sum(shape) for name, shape in targets.items()}
    budget = 8 * sum(cost.values())
    ranks = dict.fromkeys(targets, 8)
    smoothed = dict.fromkeys(targets, 8.0)
    taste = {n: _taste(n, i / len(targets), rng) for i, n in enumerate(targets)}
    entries, told = [[0, dict(ranks)]], []
    for number in range(1, decisions + 1):
        progress = number / decisions
        window = {
            n: float(np.clip(round(8 + progress * taste[n] + 0.9 * rng.standard_normal()), 1, 15))
            for n in targets
        }
        smoothed = {n: 0.7 * smoothed[n] + 0.3 * window[n] for n in targets}
        wanted = _drop(cases.allocate(targets, smoothed, budget, 32), smoothed)
        if freeze and number > freeze:
            wanted = ranks
        after = _towards(ranks, wanted, cost, budget)
        grown = {n: after[n] - ranks[n] for n in targets if after[n] > ranks[n]}
        energy = {
            n: float(10 ** (-2 - 1.2 * i / len(targets) - 0.8 * progress + 0.02 * taste[n]))
            for i, n in enumerate(targets)
        }
        step = number * interval
        if after != ranks:
            entries.append([step, dict(after)])
        told.append(
            decision(
                step,
                sum(after[n] * cost[n] for n in targets),
                budget,
                sum(rise * cost[n] for n, rise in grown.items()),
                sum(after[n] != ranks[n] for n in targets),
                seconds=0.6 + 0.1 * float(rng.random()),
                effective_rank=window,
                smoothed=dict(smoothed),
                energy=energy,
            )
        )
        ranks = after
    planned = cases.plan("gard-dynamic", targets, dict.fromkeys(targets, 8), budget=budget)
    record = cases.record(name, targets, planned, None, -0.01, seed)
    steps = interval * (decisions + 2)
    record.cost = {**record.cost, "steps": steps, "train_seconds": 1.4 * steps}
    record.ranks_over_time, record.decisions = entries, told
    return record


def _taste(name, depth, rng):
    pull = {"q_proj": -4.0, "k_proj": -1.0, "down_proj": 4.0, "gate_proj": 1.0}
    module = name.rpartition(".")[2]
    return pull.get(module, 0.0) + 2.5 * math.sin(3 * depth) + float(rng.standard_normal())


def _drop(wanted, smoothed):
    return {n: 0 if smoothed[n] < 4.2 else rank for n, rank in wanted.items()}


def _towards(ranks, wanted, cost, budget, most=2):
    """Move each rank by at most two, downwards first, upwards while the budget lasts."""
    after = {n: min(r, max(wanted[n], r - most)) for n, r in ranks.items()}
    left = budget - sum(after[n] * cost[n] for n in ranks)
    for name, rank in ranks.items():
        rise = min(max(0, min(wanted[name], rank + most) - after[name]), left // cost[name])
        after[name] += rise
        left -= rise * cost[name]
    return after
