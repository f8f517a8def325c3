"""Comparisons shaped like real ones: three tasks, three budgets, fourteen methods."""

import numpy as np

from gradrank.evidence.comparison import (
    BudgetInfo,
    Cell,
    Comparison,
    Contrast,
    Excluded,
    Failure,
    Outcome,
    Pooled,
    Stability,
    TaskInfo,
    Tuned,
)

TASKS = {
    "sst2": TaskInfo("accuracy", True, "Share of sentences with the right sentiment.", 872),
    "mrpc": TaskInfo("accuracy_f1", True, "Mean of accuracy and F1 over pairs of sentences.", 408),
    "wikitext-2": TaskInfo("perplexity", False, "Perplexity of held-out Wikipedia text.", 240),
}
BUDGETS = {"2570": 2570, "0.3%": 41472, "uniform:8": 331776}
METHODS = (
    "uniform",
    "gard",
    "gard-dynamic",
    "igu",
    "pilora",
    "waterfill",
    "hybrid",
    "gradient-norm",
    "depth",
    "random",
    "reversed",
    "dora",
    "bitfit",
    "full",
)
UNMATCHED = {"bitfit": 9600, "full": 22_700_000}
BASE = {"sst2": 0.86, "mrpc": 0.81, "wikitext-2": 27.4}
SPREAD = {"sst2": 0.004, "mrpc": 0.009, "wikitext-2": 0.11}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TYPES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def ranks_of(rng, method, level, layers=12):
    """Return ranks by target, equal everywhere for some methods."""
    names = [f"encoder.layer.{i}.{t}" for i in range(layers) for t in TYPES]
    if method in {"uniform", "dora"}:
        return dict.fromkeys(names, 2**level)
    depth = np.repeat(np.linspace(0, 1, layers), len(TYPES))
    means = 2**level * (0.3 + 1.4 * np.abs(depth - rng.random()))
    return {n: int(r) for n, r in zip(names, rng.poisson(means), strict=True)}


def outcome(rng, task, budget, method, seed, value, **changes):
    """Return one finished run."""
    level = list(BUDGETS).index(budget) if budget in BUDGETS else 1
    spent = UNMATCHED.get(method, BUDGETS.get(budget, 4096))
    seconds = 40 * (2.6 if method == "full" else 1) * (1 + 0.08 * rng.random())
    fields = {
        "run_id": f"{task}-{method}-{budget}-seed{seed}".replace(":", "-"),
        "task": task,
        "method": method,
        "budget": budget,
        "seed": seed,
        "lr": RATES[2] if method != "pilora" else RATES[-1],
        "value": float(value),
        "items": {"kind": "classes", "expected": [], "predicted": [], "nll": []},
        "peak": int(spent * (1.5 if method == "gard-dynamic" else 1)),
        "final": spent,
        "other": 770,
        "train_seconds": float(seconds),
        "calibration_seconds": 0.0 if method in {"uniform", "dora", "full"} else 6.5,
        "peak_memory_bytes": 9e8 * (2.2 if method == "full" else 1) * (1 + 0.02 * rng.random()),
        "ranks": {} if method in UNMATCHED else ranks_of(rng, method, level),
        "matched": method not in UNMATCHED,
    }
    return Outcome(**{**fields, **changes})


def cell(outcomes, task="sst2", budget="0.3%", method="gard", failed=0, missing=(), **changes):
    """Return a cell with the usual statistics."""
    values = [each.value for each in outcomes]
    several = len(values) > 1
    centre = float(np.mean(values)) if values else None
    sd = float(np.std(values, ddof=1)) if several else None
    half = 2.5 * sd / len(values) ** 0.5 if several else None
    fields = {
        "task": task,
        "budget": budget,
        "method": method,
        "outcomes": tuple(outcomes),
        "failed": failed,
        "missing": tuple(missing),
        "mean": centre,
        "sd": sd,
        "low": centre - half if several else None,
        "high": centre + half if several else None,
        "lr": outcomes[0].lr if outcomes else None,
        "matched": outcomes[0].matched if outcomes else True,
    }
    return Cell(**{**fields, **changes})


def contrast(ours, base, higher=True):
    """Return the contrast of two cells, judged by a rough rule."""
    pairs = {each.seed: each.value for each in base.outcomes} if base else {}
    found = [e.value - pairs[e.seed] for e in ours.outcomes if e.seed in pairs]
    sign = 1 if higher else -1
    centre = sign * float(np.mean(found)) if found else None
    where = (ours.task, ours.budget, ours.method, base.method if base else "uniform")
    seeds = tuple(e.seed for e in ours.outcomes if e.seed in pairs)
    if len(found) < 2 or not ours.matched:
        why = ("Fewer than two paired seeds.",) if ours.matched else ("Not held to the budget.",)
        return Contrast(*where, seeds, centre, None, None, None, None, "not tested", why)
    half = 3 * float(np.std(found, ddof=1)) / len(found) ** 0.5
    clear = abs(centre) > half
    p = 0.004 if clear else 0.31
    verdict = ("better" if centre > 0 else "worse") if clear else "no evidence"
    return Contrast(*where, seeds, centre, centre - half, centre + half, p, min(1, 4 * p), verdict)


def effect_of(method, budget, seed=3):
    """Return how far a method is from uniform, in spreads over seeds."""
    rng = np.random.default_rng([seed, METHODS.index(method), list(BUDGETS).index(budget)])
    known = {"gard": 1.9, "reversed": -4.0, "full": 6.0, "bitfit": -2.0, "waterfill": 2.6}
    tight = 1.4 if budget == "2570" else 0.4
    return 0.0 if method == "uniform" else known.get(method, 0.0) * tight + rng.normal(0, 0.3)


def table(tasks=TASKS, budgets=BUDGETS, methods=METHODS, seeds=5, seed=0):
    """Return cells and contrasts of a whole grid."""
    cells, contrasts = [], []
    for t, (task, info) in enumerate(tasks.items()):
        base, spread = BASE.get(task, 0.7), SPREAD.get(task, 0.01)
        sign = 1 if info.higher_is_better else -1
        for b, budget in enumerate(budgets):
            rng = np.random.default_rng([seed, t, b])
            shared = rng.normal(0, spread, seeds)
            row = {}
            for m, method in enumerate(methods):
                known = method in METHODS and budget in BUDGETS
                gain = effect_of(method, budget) if known else 0.2 * rng.normal()
                centre = base + sign * spread * (gain + 2.2 * b)
                values = centre + shared + rng.normal(0, 0.6 * spread, seeds)
                lost = method == "pilora" and budget == "2570" and task == "mrpc"
                few = method == "igu" and budget == "2570"
                kept = 0 if lost else seeds - 2 if few else seeds
                runs = [outcome(rng, task, budget, method, s, values[s]) for s in range(kept)]
                failed = 1 if few else seeds if lost else 0
                missing = (seeds - 1,) if few else ()
                row[method] = cell(runs, task, budget, method, failed, missing)
                if m:
                    contrasts.append(contrast(row[method], row[methods[0]], info.higher_is_better))
            cells += row.values()
    return tuple(cells), tuple(contrasts)


def tuned(tasks=TASKS, budgets=BUDGETS, methods=METHODS):
    """Return a search over five rates; one method is best at the edge, one diverges."""
    rng = np.random.default_rng(7)
    runs = []
    for task, info in tasks.items():
        sign = 1 if info.higher_is_better else -1
        for budget in budgets:
            for method in methods:
                for i, rate in enumerate(RATES):
                    best = 4 if method == "pilora" else 2
                    value = BASE.get(task, 0.7) - sign * SPREAD.get(task, 0.01) * (
                        1.2 * (i - best) ** 2 + rng.normal(0, 0.4)
                    )
                    gone = method == "full" and i == 4
                    runs.append(Tuned(task, budget, method, rate, 0, None if gone else value))
    return tuple(runs)


def pooled(budgets=BUDGETS, methods=METHODS, tasks=TASKS):
    """Return the differences over all tasks."""
    rows = []
    for budget in budgets:
        for method in methods[1:]:
            effect, names = effect_of(method, budget), tuple(tasks)
            verdict = "better" if effect > 1.5 else "worse" if effect < -1.5 else "no evidence"
            if method in UNMATCHED:
                none = (None,) * 5
                why = ("Not held to the budget.",)
                rows.append(Pooled(budget, method, "uniform", names, *none, "not tested", why))
                continue
            p = 0.3 if verdict == "no evidence" else 0.01
            ends = (effect, effect - 1.2, effect + 1.2)
            rows.append(Pooled(budget, method, "uniform", names, *ends, p / 3, p, verdict))
    return tuple(rows)


def stability(tasks=TASKS, budgets=BUDGETS, methods=("gard", "waterfill", "hybrid", "random")):
    """Return how far plans agree."""
    rng = np.random.default_rng(5)
    rows = []
    for task in tasks:
        for budget in budgets:
            for method in methods:
                centre = 0.02 if method == "random" else 0.75 + 0.2 * rng.random()
                ends = (centre - 0.08, min(1.0, centre + 0.05))
                rows.append(Stability(task, budget, method, 10, centre, *ends, 0.4 + centre / 2))
    return tuple(rows)


def realistic():
    """Return the comparison of three tasks, three budgets and fourteen methods."""
    cells, contrasts = table()
    return Comparison(
        "encoder-three-tasks",
        "Does adaptive allocation beat uniform LoRA on MiniLM at equal trainable parameters?",
        "GARD, Table 2 (small twin)",
        "uniform",
        TASKS,
        tuple(BudgetInfo(t, dict.fromkeys(TASKS, n)) for t, n in BUDGETS.items()),
        METHODS,
        cells,
        contrasts,
        pooled(),
        tuned(),
        stability(),
        tuple(Failure(f"mrpc-pilora-2570-seed{i}", "Diverged at step 41.") for i in range(5)),
        (Excluded("runs/0f3a/record.json", "not valid JSON: line 3 ends early"),),
    )


def empty(**changes):
    """Return a comparison of nothing."""
    fields = {
        "name": "nothing",
        "about": "",
        "source": "",
        "reference": "uniform",
        "tasks": {},
        "budgets": (),
        "methods": (),
        "cells": (),
        "contrasts": (),
        "pooled": (),
        "tuned": (),
        "stability": (),
        "failures": (),
        "excluded": (),
    }
    return Comparison(**{**fields, **changes})


def small(outcomes, base=(), **changes):
    """Return a comparison of one task and budget: uniform, and gard."""
    ours = cell(outcomes, failed=changes.pop("failed", 0))
    theirs = cell(base, method="uniform")
    fields = {
        "tasks": {"sst2": TASKS["sst2"]},
        "budgets": (BudgetInfo("0.3%", {"sst2": 41472}),),
        "methods": ("uniform", "gard"),
        "cells": (theirs, ours),
        "contrasts": (contrast(ours, theirs),),
    }
    return empty(**{**fields, **changes})
