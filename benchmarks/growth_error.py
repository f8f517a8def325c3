"""Growth study, part ``error``: what a sketch size costs in accuracy, on real text.

One backward pass of a mini-batch shows its inputs and output gradients to every sketch and to the
exact gradient alike, so that all sizes and seeds see the same numbers.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradrank.allocation import allocate_gains, proportional
from gradrank.core.targets import Target, cost_of_rank_one
from gradrank.evidence.stability import share_in_common
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.ops.agreement import spearman
from gradrank.ops.sketch import seed_of
from gradrank.ops.spectrum import effective_rank, eigenvalues, gram_matrix
from gradrank.signals.layers import Site, find_sites
from gradrank.signals.mean_gradient import WHOLE, MeanGradientProbe
from gradrank.signals.observe import Observer
from gradrank.signals.spectrum import DenseProbe, SketchProbe
from gradrank.signals.untouched import untouched

Row = dict[str, Any]
ENERGIES = (0.9, 0.5)
UNIFORM = 8
"""Plans are compared at the budget of uniform LoRA of this rank."""
LEADING = 8
"""Singular values whose error is averaged."""


@dataclass(frozen=True)
class ErrorSize:
    """How much is measured.

    Attributes:
        model: As ``gradrank.lab.models`` knows it.
        batches: Mini-batches M of one calibration; a second one shows what another sample does.
        batch: Examples of a mini-batch.
        length: Tokens of an example.
        sizes: Sketch sizes k.
        gauss: Sizes of the Gaussian sketch, for comparison.
        directions: Directions asked of the mean-gradient sketch.
        seeds: Sketch seeds.
        groups: The blocks are measured in so many interleaved groups, to bound the memory of the
            exact gradients.
    """

    model: str = "smollm2-135m"
    batches: int = 16
    batch: int = 4
    length: int = 48
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    gauss: tuple[int, ...] = (32, 64, 128)
    directions: tuple[int, ...] = (10, 20, 40, 80)
    seeds: int = 4
    groups: int = 3


FULL = ErrorSize()
QUICK = ErrorSize(
    "tiny-llama", 4, 2, 12, sizes=(4, 64), gauss=(8,), directions=(9,), seeds=2, groups=1
)


class GaussProbe:
    """Two-sided Gaussian sketch, stored whole, as a comparison."""

    def __init__(self, targets: Sequence[Target], size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._current: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {target.name: [] for target in targets}
        self._matrices: dict[object, Tensor] = {}

    def _matrix(self, key: object, width: int) -> Tensor:
        if key not in self._matrices:
            generator = torch.Generator().manual_seed(seed_of(self._seed, "gauss", key, width))
            matrix = torch.randn(width, self._size, generator=generator)
            self._matrices[key] = matrix / self._size**0.5
        return self._matrices[key]

    def share_key(self, target: Target) -> object:
        """Share projections between targets of one input width."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> Tensor:
        """Return ``XV``, ``[T, k]``."""
        return x @ self._matrix(("in", target.d_in), target.d_in)

    def on_output_grad(self, target: Target, kept: Tensor, delta: Tensor) -> None:
        """Add ``(ΔU)ᵀ (XV)``."""
        part = (delta @ self._matrix(target.name, target.d_out)).T @ kept
        self._current[target.name] = self._current.get(target.name, 0) + part

    def end_batch(self, batch: int) -> None:
        """Store the mini-batch's sketch."""
        for name, part in self._current.items():
            self._rows[name].append(part.reshape(-1))
        self._current = {}

    def grams(self) -> dict[str, Tensor]:
        """Return the Gram matrices over mini-batches."""
        return {name: gram_matrix(torch.stack(rows)) for name, rows in self._rows.items()}


class ExactProbe(DenseProbe):
    """Exact gradients, from which Gram matrices and singular values are read."""

    def exact(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return Gram matrices, and singular values of the mean gradients; forget the rest."""
        grams, singular = {}, {}
        for target in self._targets:
            rows = torch.stack(self._rows.pop(target.name))
            grams[target.name] = gram_matrix(rows)
            mean = rows.mean(0).reshape(target.d_out, target.d_in).double()
            small = mean @ mean.T if target.d_out <= target.d_in else mean.T @ mean
            singular[target.name] = eigenvalues(small).sqrt()
        return grams, singular


def cells(size: ErrorSize) -> Iterable[tuple[str, Callable[[], Row]]]:
    """Yield the groups of blocks by name, each with the work that gives its row."""
    for group in range(size.groups):
        yield f"blocks {group} of {size.groups}", lambda group=group: measured(size, group)


def measured(size: ErrorSize, group: int) -> Row:
    """Measure one group of blocks and compare all sketches with the exact gradients."""
    loaded = resolve_model(size.model, "lm", device="cpu", dtype="float32")
    model: Any = loaded.model
    data = load_task_data(read_examples(DataSpec("movie-review-lm")), loaded, size.length)
    items: Any = data.train
    batches = [
        data.collate([items[i] for i in range(start, start + size.batch)])
        for start in range(0, 2 * size.batches * size.batch, size.batch)
    ]
    sites = [site for site in find_sites(model) if (site.target.depth or 0) % size.groups == group]
    targets = [site.target for site in sites]
    seeds = range(size.seeds)
    exact = ExactProbe(targets)
    folds = {(k, s): SketchProbe(targets, k, s) for k in size.sizes for s in seeds}
    gauss = {(k, s): GaussProbe(targets, k, s) for k in size.gauss for s in seeds[:2]}
    # Their arithmetic is slow, so that one group and two seeds have to do.
    asked = size.directions if group == 0 else ()
    means = {(k, s): MeanGradientProbe(targets, k, s) for k in asked for s in seeds[:2]}
    watch(
        model,
        sites,
        batches[: size.batches],
        [exact, *folds.values(), *gauss.values(), *means.values()],
    )
    grams, singular = exact.exact()
    other = ExactProbe(targets)
    watch(model, sites, batches[size.batches :], [other])
    again, singular_again = other.exact()
    spectra = [
        {"sketch": "fold", "k": k, "buckets": p.size, "seed": s}
        | agreement(targets, grams, p.finish().gram)
        for (k, s), p in folds.items()
    ]
    spectra += [
        {"sketch": "gauss", "k": k, "buckets": k, "seed": s} | agreement(targets, grams, p.grams())
        for (k, s), p in gauss.items()
    ]
    row: Row = {
        "targets": len(targets),
        "widths": sorted({width for t in targets for width in (t.d_in, t.d_out)}),
        "dense_ranks": ranges(grams),
        "spectra": spectra,
        "other_batches": agreement(targets, grams, again),
        "directions": [
            {"directions": k, "kept": p.size, "seed": s}
            | fidelity(targets, singular, p.finish().values[WHOLE])
            for (k, s), p in means.items()
        ],
    }
    if asked:
        # Small singular values of another sample are other ones: their error says nothing.
        other_values = fidelity(targets, singular, singular_again) | {"second_half": None}
        row["directions_other_batches"] = other_values
    return row


def watch(model: Any, sites: Sequence[Site], batches: Sequence[Any], probes: Sequence[Any]) -> None:
    """Show mini-batches to all probes at once."""
    with untouched(model, 0), Observer(sites, probes):
        for index, batch in enumerate(batches):
            model(**batch).loss.backward()
            for probe in probes:
                probe.end_batch(index)


def agreement(
    targets: Sequence[Target], truth: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Row:
    """Return how far Gram matrices, effective ranks and GARD's plan are from the exact ones."""
    errors = {n: float((found[n] - gram).norm() / gram.norm()) for n, gram in truth.items()}
    row: Row = {
        "gram_error": round(statistics.mean(errors.values()), 5),
        "gram_error_worst": round(max(errors.values()), 5),
        "worst_target": max(errors, key=lambda name: errors[name]),
    }
    for energy in ENERGIES:
        exact, ranks = ranks_of(truth, energy), ranks_of(found, energy)
        apart = (ranks - exact).abs().double()
        plans = [
            proportional(
                targets,
                dict(zip(truth, map(float, values.tolist()), strict=True)),
                UNIFORM * cost_of_rank_one(targets),
            )
            for values in (exact, ranks)
        ]
        row[str(energy)] = {
            "equal": round(float((apart == 0).double().mean()), 5),
            "apart_mean": round(float(apart.mean()), 5),
            "apart_most": int(apart.max()),
            "spearman": number(spearman(ranks.double(), exact.double())),
            "plan_elsewhere": elsewhere(targets, *plans),
        }
    return row


def fidelity(
    targets: Sequence[Target], truth: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Row:
    """Return how far singular values of mean gradients and water-filling's plan are from exact."""
    leading, first, last, plans = [], [], [], []
    for target in targets:
        exact, values = truth[target.name].double(), found[target.name].double()
        count = min(len(exact), len(values))
        off = (values[:count] - exact[:count]).abs() / exact[:count].clamp_min(1e-12 * exact[0])
        first.append(float(off[0]))
        leading.append(float(off[:LEADING].mean()))
        half = max(1, count // 2)
        last.append(float(off[half:].mean()) if count > half else 0.0)
    for values in (truth, found):
        gains = {name: (part**2).tolist() for name, part in values.items()}
        plans.append(allocate_gains(targets, gains, UNIFORM * cost_of_rank_one(targets)))
    return {
        "first": round(statistics.mean(first), 5),
        "first_worst": round(max(first), 5),
        "leading": round(statistics.mean(leading), 5),
        "leading_worst": round(max(leading), 5),
        "second_half": round(statistics.mean(last), 5),
        "plan_elsewhere": elsewhere(targets, *plans),
    }


def elsewhere(
    targets: Sequence[Target], first: Mapping[str, int], second: Mapping[str, int]
) -> float | None:
    """Return the share of the parameters that two plans put on different targets."""
    spent = [{t.name: plan[t.name] * t.cost for t in targets} for plan in (first, second)]
    share = share_in_common(*spent)
    return None if share is None else round(1 - share, 5)


def ranks_of(grams: Mapping[str, Tensor], energy: float) -> Tensor:
    """Return the effective ranks, ``[targets]``."""
    return effective_rank(eigenvalues(torch.stack(list(grams.values()))), energy)


def ranges(grams: Mapping[str, Tensor]) -> Row:
    """Return the smallest, mean and largest effective rank by energy threshold."""
    found = {energy: ranks_of(grams, energy) for energy in ENERGIES}
    return {
        str(e): [int(r.min()), round(float(r.double().mean()), 3), int(r.max())]
        for e, r in found.items()
    }


def number(value: float) -> float | None:
    """Return a rounded number, None for NaN (JSON has none)."""
    return None if value != value else round(value, 5)  # noqa: PLR0124
