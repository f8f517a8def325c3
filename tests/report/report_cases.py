"""Records shaped like real ones: SmolLM2-135M's layers, and awkward cases beside it."""

import math

import numpy as np

from gradrank.record import RunRecord

SHAPES = {  # module: (d_in, d_out)
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
BATCHES = 16
STRENGTH = dict(zip(SHAPES, (1.0, 0.8, 1.6, 1.3, 0.9, 1.2, 2.0), strict=True))


def shapes(layers=30, pattern="model.layers.{}.{}"):
    """Return {name: (d_in, d_out)} of a decoder."""
    return {
        pattern.format(layer, module): shape
        for layer in range(layers)
        for module, shape in SHAPES.items()
    }


def measurement(targets, seed=0, singular=True):
    """Return a measurement with plausible spectra: flatter in the middle of the model."""
    rng = np.random.default_rng(seed)
    entries = {}
    for i, name in enumerate(targets):
        depth = i / max(1, len(targets) - 1)
        decay = 0.10 + 0.35 * abs(depth - 0.55) + 0.05 * rng.random()
        strength = next((s for m, s in STRENGTH.items() if name.endswith(m)), 1.0)
        energy = strength * 10 ** (-2.5 - 1.6 * depth + 0.25 * rng.standard_normal())
        values = np.exp(-decay * np.arange(BATCHES)) * (1 + 0.1 * rng.random(BATCHES))
        values = np.sort(values)[::-1] * energy / values.sum()
        share = np.cumsum(values) / values.sum()
        p = values / values.sum()
        entry = {
            "eigenvalues": [float(v) for v in values],
            "effective_rank": int(np.searchsorted(share, 0.9) + 1),
            "entropy_rank": float(np.exp(-(p * np.log(p)).sum())),
            "stable_rank": float(values.sum() / values[0]),
            "energy": float(energy),
        }
        falling = (1 + np.arange(32)) ** -(0.5 + 0.5 * rng.random())
        if singular:
            entry["singular_values"] = [float(math.sqrt(energy) * v) for v in falling]
        entries[name] = entry
    return {
        "batches": BATCHES,
        "examples": 128,
        "tokens": 6144,
        "estimator": "sketch",
        "sketch_dim": 64,
        "seconds": 21.4,
        "peak_memory_bytes": 1_470_000_000,
        "targets": entries,
    }


def plan(method, targets, ranks, scores=None, reliability=None, options=None, budget=None):
    """Return a plan as plain data."""
    entries = {
        name: {
            "rank": ranks[name],
            "d_in": d_in,
            "d_out": d_out,
            "kind": "linear",
            "parameters": ranks[name] * (d_in + d_out),
            "score": scores[name] if scores else None,
        }
        for name, (d_in, d_out) in targets.items()
    }
    spent = sum(entry["parameters"] for entry in entries.values())
    return {
        "schema": "gradrank.plan/1",
        "method": {"name": method, "options": options or {}},
        "budget": {"kind": "uniform", "value": 8, "parameters": budget or spent},
        "parameters": spent,
        "targets": entries,
        "reliability": reliability,
        "provenance": {"model": "SmolLM2-135M", "base_parameters": 134_515_008},
    }


def allocate(targets, scores, budget, highest=24):
    """Spend a budget roughly in proportion to scores, greedily; good enough to look real."""
    total = sum(scores.values())
    cost = {name: d_in + d_out for name, (d_in, d_out) in targets.items()}
    low, high = 0.0, 1e9
    for _ in range(80):
        c = (low + high) / 2
        ranks = {n: min(highest, int(c * s / total)) for n, s in scores.items()}
        fits = sum(ranks[n] * cost[n] for n in targets) <= budget
        low, high = (c, high) if fits else (low, c)
    return {n: min(highest, int(low * s / total)) for n, s in scores.items()}


def losses(seed, shift, steps=60, every=10):
    """Return loss curves that fall like a short fine-tuning run."""
    rng = np.random.default_rng(seed)
    fall = [4.25 + 1.3 * math.exp(-s / 18) for s in range(steps + 1)]
    train = [[s, fall[s] + 0.16 * float(rng.standard_normal())] for s in range(1, steps + 1)]
    held_out = [[s, fall[s] + shift * s / steps] for s in range(0, steps + 1, every)]
    return {"train": train, "eval": held_out}


def record(name, targets, planned, measured=None, shift=0.0, seed=0, **changes):
    """Return a finished training record."""
    curves = losses(seed, shift)
    final = curves["eval"][-1][1]
    fields = {
        "name": name,
        "kind": "train",
        "created": "2025-05-01T12:00:00Z",
        "config": {
            "model": "SmolLM2-135M",
            "task": "rotten-tomatoes-lm",
            "method": name,
            "budget": "uniform:8",
            "steps": 60,
            "lr": 0.01,
            "seed": seed,
            "option": {"energy": 0.9} if name == "gard" else {},
        },
        "environment": {"gradrank": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 2},
        "seeds": {"run": seed, "calibration": 7},
        "plan": planned,
        "measurement": measured,
        "losses": curves,
        "metrics": {"eval_loss": final, "perplexity": math.exp(final)},
        "cost": {
            "measure_seconds": 21.4 if measured else 0.0,
            "train_seconds": 88.0 + 3 * len(name),
            "eval_seconds": 14.2,
            "steps": 60,
            "tokens": 23_040,
            "peak_memory_bytes": 1_720_000_000,
            "measure_peak_memory_bytes": 1_470_000_000,
        },
        "trainable_parameters": {"final": planned["parameters"] if planned else 0},
    }
    return RunRecord(**{**fields, **changes})


def demo_records(layers=30, seed=0):
    """Return the demo's three records: uniform, gard and waterfill at one budget."""
    targets = shapes(layers)
    measured = measurement(targets)
    budget = 8 * sum(sum(shape) for shape in targets.values())
    entries = measured["targets"]
    by_rank = {n: float(entries[n]["effective_rank"]) for n in targets}
    by_energy = {n: math.log(entries[n]["energy"] * 1e6) for n in targets}
    trust = {
        "split_half": 0.71,
        "within_shape": 0.58,
        "splits": 8,
        "threshold": 0.5,
        "recommendation": "as planned",
        "reason": "Two halves of the batches rank the targets alike.",
        "saturation": 0.62,
    }
    weak = {
        **trust,
        "split_half": 0.38,
        "within_shape": -0.12,
        "recommendation": "use uniform",
        "reason": "Two halves of the batches disagree about which targets matter.",
    }
    uniform = plan("uniform", targets, dict.fromkeys(targets, 8), budget=budget)
    gard_ranks = allocate(targets, by_rank, budget)
    gard = plan("gard", targets, gard_ranks, by_rank, trust, {"energy": 0.9}, budget)
    fill_ranks = allocate(targets, by_energy, budget, 32)
    fill = plan("waterfill", targets, fill_ranks, by_energy, weak, {}, budget)
    return [
        record("uniform", targets, uniform, None, 0.0, seed),
        record("gard", targets, gard, measured, -0.021, seed),
        record("waterfill", targets, fill, measured, 0.006, seed),
    ]
