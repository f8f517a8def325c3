"""Records of runs that split output neurons: two-stage runs, and plans with partitions."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gradrank.core.partition import NeuronPartition
from report import report_cases as cases

PULL = {"q_proj": 0.9, "k_proj": 1.1, "v_proj": 0.7, "gate_proj": 0.5, "down_proj": 1.3}


def importance(name, d_out, task, seed):
    """Return an importance per neuron: mostly the model's, partly the task's, a little the seed's.

    Each target draws from a generator of its own, so that runs of one task agree.
    """
    parts = []
    for key, weight in ((name, 0.8), (f"{name}/{task}", 0.6), (f"{name}/{task}/{seed}", 0.25)):
        rng = np.random.default_rng([ord(c) for c in key])
        parts.append(weight * rng.standard_normal(d_out))
    pull = PULL.get(name.rpartition(".")[2], 1.0)
    return np.exp(0.6 * pull * sum(parts))


def counted(values, looks, noise, rng):
    """Count in how many noisy looks each neuron is above the mean of all."""
    hits = np.zeros(len(values), dtype=int)
    for _ in range(looks):
        seen = values * np.exp(noise * rng.standard_normal(len(values)))
        hits += seen > seen.mean()
    return hits


def gradient(values, d_in, strength, rng, cells=64):
    """Return a map of magnitudes whose rows follow ``values`` the more, the larger ``strength``."""
    rows, columns = min(cells, len(values)), min(cells, d_in)
    edges = np.arange(rows + 1) * len(values) // rows
    means = np.array([values[a:b].mean() for a, b in pairwise(edges)])
    across = np.exp(0.4 * rng.standard_normal(columns))
    noise = np.exp(0.25 * rng.standard_normal((rows, columns)))
    return (1e-5 * strength * np.outer(means**strength, across) * noise).tolist()


def neurons(targets, task="sst2", seed=0, rule="majority", looks=10, rank=8, lower=1, maps=2):
    """Return the ``neurons`` of a record."""
    rng = np.random.default_rng(seed)
    found, pictures = {}, {}
    for name, (_, d_out) in targets.items():
        values = importance(name, d_out, task, seed)
        hits = counted(values, looks, 0.6, rng)
        chosen = hits > looks / 2
        if rule == "random":
            chosen = rng.permutation(chosen)
        split = NeuronPartition.of(chosen, rank, lower)
        told = {"looks": looks, "hits": np.bincount(hits, minlength=looks + 1).tolist()}
        found[name] = {**split.to_dict(), **told}
    for name in list(targets)[-1 : -1 - maps : -1]:
        d_in, d_out = targets[name]
        values = importance(name, d_out, task, seed)
        pictures[name] = {
            "rows": d_out,
            "columns": d_in,
            "before": gradient(values, d_in, 0.4, rng),
            "after": gradient(values, d_in, 1.0, rng),
        }
    told = {"step": 2 * looks, "looks": looks, "interval": 2, "rule": rule}
    return {**told, "targets": found, "maps": pictures}


def pilora(name="pilora", layers=6, task="sst2", seed=0, targets=None, **options):
    """Return the record of a two-stage run."""
    targets = targets or cases.shapes(layers)
    told = neurons(targets, task, seed, **options)
    rank = options.get("rank", 8)
    budget = sum(
        NeuronPartition.from_dict(entry).parameters(targets[n][0])
        for n, entry in told["targets"].items()
    )
    start = rank * sum(sum(shape) for shape in targets.values())
    planned = cases.plan("pilora", targets, dict.fromkeys(targets, rank - 2), budget=budget)
    record = cases.record(name, targets, planned, None, -0.01, seed)
    record.config = {**record.config, "task": task, "method": "pilora"}
    after = {n: NeuronPartition.from_dict(e).lora_rank for n, e in told["targets"].items()}
    record.ranks_over_time = [[0, dict.fromkeys(targets, rank)], [told["step"], after]]
    record.decisions = [
        {"step": told["step"], "parameters": budget, "budget": budget, "moved": 0, "seconds": 0.4}
    ]
    record.trainable_parameters = {"peak": start, "final": budget}
    return replace(record, neurons=told)


def hybrid(layers=6, seed=0, name="hybrid"):
    """Return a plan of the hybrid method: some targets with one rank, some split, some dropped."""
    rng = np.random.default_rng(seed)
    targets = cases.shapes(layers)
    ranks = {n: int(r) for n, r in zip(targets, rng.integers(0, 9, len(targets)), strict=True)}
    planned = cases.plan("hybrid", targets, ranks)
    for target, (d_in, d_out) in targets.items():
        if rng.random() < 0.4:
            values = importance(target, d_out, "sst2", seed)
            top = math.ceil(d_out * float(rng.uniform(0.15, 0.5)))
            chosen = np.zeros(d_out, dtype=bool)
            chosen[np.argsort(-values)[:top]] = True
            split = NeuronPartition.of(chosen, 16, 2)
            change = {"rank": split.lora_rank, "parameters": split.parameters(d_in)}
            planned["targets"][target] |= {**change, "partition": split.to_dict()}
    spent = sum(entry["parameters"] for entry in planned["targets"].values())
    planned["parameters"] = spent
    planned["budget"]["parameters"] = spent + 100
    return cases.record(name, targets, planned, None, -0.004, seed, kind="plan", losses={})


def big(layers=32, d_model=4096, d_hidden=14336, **options):
    """Return a two-stage run at the shapes of an 8B model: 7 targets a layer."""
    key = d_model // 4
    shapes = {
        "self_attn.q_proj": (d_model, d_model),
        "self_attn.k_proj": (d_model, key),
        "self_attn.v_proj": (d_model, key),
        "self_attn.o_proj": (d_model, d_model),
        "mlp.gate_proj": (d_model, d_hidden),
        "mlp.up_proj": (d_model, d_hidden),
        "mlp.down_proj": (d_hidden, d_model),
    }
    targets = {
        f"model.layers.{layer}.{module}": shape
        for layer in range(layers)
        for module, shape in shapes.items()
    }
    return pilora(targets=targets, **options)
