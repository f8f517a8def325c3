"""The whole study of path integrals in one call: measurements in, plain data out."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.igu_quadrature import findings as path_findings
from benchmarks.igu_quadrature import noise as path_noise
from benchmarks.igu_quadrature import ranking as path_ranking
from benchmarks.igu_quadrature.collect import Measured, StudySize
from benchmarks.igu_quadrature.measure import PathSettings
from benchmarks.igu_quadrature.scores import Pool
from benchmarks.igu_quadrature.study import exact_weights
from torch import Tensor

from gradrank.ops.quadrature import trapezoid
from gradrank.record import finite

SCHEMA = "gradrank.study/1"
_SAMPLE = 20_000


def study(
    settings: PathSettings,
    size: StudySize,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure, and return everything that was found.

    Args:
        settings: What is trained.
        size: How much is measured, and how often arithmetic is repeated.
        folder: Where measurements are kept; what is there already is not measured again.
        say: Receives a line for each piece of work.

    Returns:
        Plain data: ``convergence`` (error over N), ``noise`` (components of one look's error),
        ``looks`` (error over M), ``cost`` (error at equal cost), ``bias`` (of the printed weights),
        ``path``, ``rankings``, ``pruned`` and ``later`` (the second checkpoint).

    Source:
        IGU-LoRA, theorem 1 and equations 3 to 11.
    """
    measured = Measured(settings, size, folder, say)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": asdict(settings) | asdict(size),
        "losses": measured.losses(),
        "convergence": path_findings.convergence(measured),
    }
    pool, lam_grads, lam = path_ranking.pool_of(measured)
    say("noise, bias and cost")
    found |= _arithmetic(measured, pool, lam_grads, lam)
    say("rankings")
    found["rankings"] = path_ranking.rankings(measured, pool)
    found["pruned"] = path_ranking.pruned(measured, pool)
    found["later"] = _later(measured)
    return finite(found)


def _arithmetic(measured: Measured, pool: Pool, lam_grads: Tensor, lam: Tensor) -> dict[str, Any]:
    nodes, size = measured.nodes, measured.size
    of = {
        part.name: (pool.grads[:, :, part.columns], part.weights)
        for part in path_findings.parts(pool.layout, pool.weights, lam)
        if part.key == "grads"
    }
    of["λ"] = (lam_grads, lam)
    some = torch.randperm(pool.layout.size, generator=torch.Generator().manual_seed(1))[:_SAMPLE]
    both = {"λ": of["λ"], "elements": (pool.grads[:, :, some].contiguous(), pool.weights[some])}
    mean = {"grads": pool.grads.mean(0), "lam": lam_grads.mean(0)}
    speed = mean["lam"].double() @ lam.double()
    return {
        "noise": path_noise.noise(of, nodes),
        "looks": {
            name: path_noise.over_looks(*pair, nodes, size.looks, repeats=size.repeats)
            for name, pair in both.items()
        },
        "cost": {
            name: path_noise.at_cost(*pair, nodes, size.budgets, repeats=5 * size.repeats)
            for name, pair in both.items()
        },
        "bias": path_noise.bias(mean, {"grads": pool.weights, "lam": lam}, pool.layout, nodes),
        "path": {
            "points": list(nodes),
            "speed": speed.tolist(),
            "change": float(exact_weights(nodes) @ speed),
        },
    }


def _later(measured: Measured) -> dict[str, Any] | None:
    """Trapezoid errors and components of noise at the later checkpoint."""
    found = list(measured.later())
    if not found:
        return None
    parts = path_findings.parts(
        measured.rig.layout, found[0]["flat_weights"], found[0]["lam_weights"]
    )
    counts, nodes = (1, 2, 4, 8), measured.nodes
    errors, values = {}, {}
    for part in parts:
        grads = torch.stack([each[part.key][:, part.columns] for each in found])
        values[part.name] = (grads, part.weights)
        rules = [trapezoid(n) for n in counts]
        row = path_findings.errors_between_nodes(grads, part, nodes, rules)
        errors[part.name] = dict(zip(map(str, counts), row, strict=True))
    return {
        "losses": [list(nodes), torch.stack([f["losses"] for f in found]).mean(0).tolist()],
        "errors": errors,
        "noise": path_noise.noise({"λ": values["λ"]}, nodes)["λ"],
        "size of λ": float(found[0]["lam_weights"].abs().mean()),
    }
