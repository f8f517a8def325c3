"""Study of Theorem 1 of IGU-LoRA, and of how reliable the scores of directions are.

Usage: python -m benchmarks.study_igu [--quick] [--cache FOLDER] [--out FOLDER] [--page FILE]

Trains an adapter in SVD form, measures its gradients along the path (kept in a folder, so that a
second run is arithmetic only), and writes results/studies/igu-quadrature.json, the figures in
docs/figures and the tables in docs/studies/igu-quadrature.md. About 25 minutes on two idle cores;
--quick takes a tiny random model and seconds, and is no evidence of anything.
"""

import argparse
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gradrank.core.files import write_json
from gradrank.lab import path_findings, path_noise, path_ranking
from gradrank.lab.cache import cache_root
from gradrank.lab.path_collect import QUICK, Measured, StudySize
from gradrank.lab.path_measure import PathSettings
from gradrank.lab.path_study import exact_weights
from gradrank.ops.quadrature import trapezoid
from gradrank.record import finite
from gradrank.report import figures_study

# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
LOOKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUDGETS = (10, 30, 100, 300, 1000)
SAMPLE = 20_000


def sampled(pool: path_ranking.Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients and weights of a fixed sample of elements."""
    at = torch.randperm(pool.layout.size, generator=torch.Generator().manual_seed(1))[:SAMPLE]
    return pool.grads[:, :, at].contiguous(), pool.weights[at]


def later(measured: Measured) -> dict[str, Any] | None:
    """Return trapezoid errors and components of noise at the later checkpoint."""
    found = list(measured.later())
    if not found:
        return None
    flat, lam = found[0]["flat_weights"], found[0]["lam_weights"]
    parts = path_findings.parts(measured.rig.layout, flat, lam)
    counts = (1, 2, 4, 8)
    rows: dict[str, Any] = {"losses": [list(measured.nodes), found[0]["losses"].tolist()]}
    rows["errors"], values = {}, {}
    for part in parts:
        grads = torch.stack([each[part.key][:, part.columns] for each in found])
        values[part.name] = (grads, part.weights)
        errors = path_findings.errors_between_nodes(
            grads, part, measured.nodes, [trapezoid(n) for n in counts]
        )
        rows["errors"][part.name] = dict(zip(map(str, counts), errors, strict=True))
    rows["noise"] = path_noise.noise({"λ": values["λ"]}, measured.nodes)["λ"]
    return rows


def study(settings: PathSettings, size: StudySize, folder: Path, splits: int) -> dict[str, Any]:
    """Measure, and return everything that was found."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:8.1f} s  {text}", flush=True)

    measured = Measured(settings, size, folder, say)
    found: dict[str, Any] = {
        "schema": "gradrank.study/1",
        "settings": asdict(settings) | asdict(size),
        "held_out_before": measured.start,
        "convergence": path_findings.convergence(measured),
    }
    pool, lam_grads, lam = path_ranking.pool_of(measured)
    say("noise")
    parts = path_findings.parts(pool.layout, pool.weights, lam)
    of = {p.name: (pool.grads[:, :, p.columns], p.weights) for p in parts if p.key == "grads"}
    of["λ"] = (lam_grads, lam)
    found["noise"] = path_noise.noise(of, measured.nodes)
    elements = sampled(pool)
    say("error over M")
    found["looks"] = {
        "λ": path_noise.over_looks(lam_grads, lam, measured.nodes, LOOKS),
        "elements": path_noise.over_looks(*elements, measured.nodes, LOOKS),
    }
    found["cost"] = {
        "λ": path_noise.at_cost(lam_grads, lam, measured.nodes, BUDGETS),
        "elements": path_noise.at_cost(*elements, measured.nodes, BUDGETS),
    }
    say("bias")
    mean = {"grads": pool.grads.mean(0), "lam": lam_grads.mean(0)}
    weights = {"grads": pool.weights, "lam": lam}
    found["bias"] = path_noise.bias(mean, weights, pool.layout, measured.nodes)
    found["path"] = {
        "speed": [list(measured.nodes), (mean["lam"].double() @ lam.double()).tolist()],
        "change": float(exact_weights(measured.nodes) @ mean["lam"].double() @ lam.double()),
    }
    say("rankings")
    found["rankings"] = path_ranking.rankings(measured, pool, splits)
    say("pruning")
    found["pruned"] = path_ranking.pruned(measured, pool)
    found["later"] = later(measured)
    say("done")
    return finite(found)


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, seconds")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the measurements")
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/igu-quadrature.md"))
    parser.add_argument("--splits", type=int, default=20)
    args = parser.parse_args()
    settings, size = QUICK if args.quick else (PathSettings(), StudySize())
    folder = args.cache or cache_root() / "studies"
    found = study(settings, size, folder, args.splits)
    name = "igu-quadrature-quick" if args.quick else "igu-quadrature"
    write_json(args.out / f"{name}.json", found)
    print(figures_study.write(found, args.figures, None if args.quick else args.page, name))


if __name__ == "__main__":
    main()
