"""What a sketch size buys: error of the Gram matrix and agreement of effective ranks with dense.

Usage: python benchmarks/bench_sketch.py [--model smollm2-135m] [--task movie-review-lm]

One dense measurement is the truth. Each sketch of size k measures the same batches; the table
gives the relative Frobenius error of the Gram matrices (mean and worst over targets), the share
of targets whose effective rank (energy 0.9) equals the dense one, the largest difference, and the
Spearman correlation of the effective ranks. ``fold`` is the library's sketch; ``gauss`` is a
Gaussian two-sided sketch of the same size, stored whole, for comparison.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradrank.core.targets import Target
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.ops.agreement import spearman
from gradrank.ops.sketch import seed_of
from gradrank.ops.spectrum import effective_rank, eigenvalues, gram_matrix
from gradrank.signals.layers import Site, find_sites
from gradrank.signals.measure import Spectrum, run
from gradrank.signals.observe import Observer
from gradrank.signals.untouched import untouched


class GaussProbe:
    """Two-sided Gaussian sketch, as a comparison."""

    def __init__(self, targets: list[Target], size: int) -> None:
        self._size = size
        self._current: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {target.name: [] for target in targets}
        self._matrices: dict[object, Tensor] = {}

    def _matrix(self, key: object, width: int) -> Tensor:
        if key not in self._matrices:
            generator = torch.Generator().manual_seed(seed_of("gauss", key, width))
            matrix = torch.randn(width, self._size, generator=generator)
            self._matrices[key] = matrix / self._size**0.5
        return self._matrices[key]

    def share_key(self, target: Target) -> object:
        """Share projections between targets of one input width."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> Tensor:
        """Return ``XV``."""
        return x @ self._matrix(target.d_in, target.d_in)

    def on_output_grad(self, target: Target, kept: Tensor, delta: Tensor) -> None:
        """Add ``(ΔU)ᵀ (XV)``."""
        part = (delta @ self._matrix(target.name, target.d_out)).T @ kept
        self._current[target.name] = self._current.get(target.name, 0) + part

    def end_batch(self) -> None:
        """Store the batch's sketch."""
        for name, part in self._current.items():
            self.rows[name].append(part.reshape(-1))
        self._current = {}


def gauss(model: Any, sites: list[Site], batches: list[Any], size: int) -> dict[str, Tensor]:
    """Return Gram matrices by the Gaussian sketch."""
    probe = GaussProbe([site.target for site in sites], size)
    with untouched(model, 0), Observer(sites, [probe]):
        for batch in batches:
            model(**batch).loss.backward()
            probe.end_batch()
    return {name: gram_matrix(torch.stack(rows)) for name, rows in probe.rows.items()}


def compare(truth: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Return the errors of one sketch."""
    errors = torch.tensor([float((found[n] - c).norm() / c.norm()) for n, c in truth.items()])
    exact = effective_rank(eigenvalues(torch.stack(list(truth.values()))))
    ranks = effective_rank(eigenvalues(torch.stack([found[n] for n in truth])))
    return {
        "gram_error_mean": float(errors.mean()),
        "gram_error_worst": float(errors.max()),
        "equal_rank_share": float((ranks == exact).double().mean()),
        "largest_rank_difference": int((ranks - exact).abs().max()),
        "rank_spearman": spearman(ranks, exact),
        "dense_rank_min": int(exact.min()),
        "dense_rank_max": int(exact.max()),
    }


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="movie-review-lm")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--gauss", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--blocks", type=int, default=0, help="use only targets of so many blocks")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = resolve_model(args.model, "lm")
    data = load_task_data(read_examples(DataSpec(args.task)), loaded, args.length)
    items: Any = data.train
    batches = [
        data.collate([items[i] for i in range(b * args.batch, (b + 1) * args.batch)])
        for b in range(args.batches)
    ]
    sites = find_sites(loaded.model)
    if args.blocks:
        sites = [site for site in sites if (site.target.depth or 0) < args.blocks]
    groups = [[batch] for batch in batches]
    dense = run(loaded.model, sites, groups, (Spectrum("dense"),), 0)
    truth = {site.target.name: dense.gram(site.target.name) for site in sites}
    rows: dict[str, dict[str, float]] = {}
    for size in args.sizes:
        sketch = run(loaded.model, sites, groups, (Spectrum("sketch", size),), 0)
        rows[f"fold k={size}"] = compare(truth, {n: sketch.gram(n) for n in truth})
    for size in args.gauss:
        rows[f"gauss k={size}"] = compare(truth, gauss(loaded.model, sites, batches, size))
    keys = list(next(iter(rows.values())))
    print(f"{len(truth)} targets, M = {args.batches}")
    print(f"{'sketch':<14}" + "".join(f"{key:>24}" for key in keys))
    for name, row in rows.items():
        print(f"{name:<14}" + "".join(f"{row[key]:>24.3f}" for key in keys))
    if args.out:
        settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
