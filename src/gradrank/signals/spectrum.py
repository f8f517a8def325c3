"""The spectrum signal: Gram matrices of mini-batch gradients, one per target (GARD)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.ops.sketch import fold, prime_at_least, random_signs, scatter_fold, seed_of
from gradrank.ops.spectrum import (
    centre,
    effective_rank,
    eigenvalues,
    fractional_rank,
    gram_matrix,
)
from gradrank.signals.parts import refuse_non_finite, to_host, under
from gradrank.signals.rows import RowStore

# A two-sided sketch of k x k numbers is folded once more to this width before it is stored: 4 KB
# per target and batch. The relative error of an inner product is about sqrt(2 / width) for this
# step, 4 %, against up to sqrt(4 / k), 17 %, for a rank-one gradient in the two-sided step.
STORED_WIDTH = 1024


@dataclass
class SpectrumStatistic:
    """Gram matrices over batches, and, until saved, the sketched gradients behind them.

    Attributes:
        gram: Per target ``[M, M]`` float64, ``S Sᵀ`` with ``S = M^{-1/2} [g_1 .. g_M]``, not
            centred.
        rows: Per target ``[M, D]`` float32, what was kept of each batch's gradient; empty after
            loading or for dense measurements, which then cannot be merged.
    """

    gram: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Number of mini-batches M."""
        return next((int(gram.shape[0]) for gram in self.gram.values()), 0)

    def effective_ranks(self, energy: float, centring: bool = False) -> dict[str, int]:
        """Return the effective rank of every target by the energy threshold.

        Args:
            energy: Threshold α in (0, 1].
            centring: Whether to remove the mean gradient first (covariance, not Gram).

        Returns:
            Rank per target, 0 for a zero gradient.

        Source:
            GARD, section 3.2.
        """
        values = self._eigenvalues(centring)
        return dict(zip(self.gram, effective_rank(values, energy).tolist(), strict=True))

    def fractional_ranks(self, energy: float, centring: bool = False) -> dict[str, float]:
        """Return the effective rank of every target, read between the whole numbers.

        Args:
            energy: Threshold α in (0, 1].
            centring: Whether to remove the mean gradient first (covariance, not Gram).

        Returns:
            Rank per target, at most :meth:`effective_ranks` and less than one below it.
        """
        values = self._eigenvalues(centring)
        return dict(zip(self.gram, fractional_rank(values, energy).tolist(), strict=True))

    def _eigenvalues(self, centring: bool) -> Tensor:
        grams = torch.stack(list(self.gram.values()))
        return eigenvalues(centre(grams) if centring else grams)

    def subset(self, indices: Sequence[int]) -> "SpectrumStatistic":
        """Return the statistic of some of the batches.

        Args:
            indices: Batch indices.

        Returns:
            The statistic that measuring only these batches would have given.
        """
        index = torch.as_tensor(list(indices), dtype=torch.long)
        scale = self.batches / max(len(indices), 1)
        gram = {name: c[index][:, index] * scale for name, c in self.gram.items()}
        return SpectrumStatistic(gram, {name: r[index] for name, r in self.rows.items()})

    @classmethod
    def merge(cls, parts: "Sequence[SpectrumStatistic]", order: Sequence[int]) -> Any:
        """Return the statistic of the batches of several parts together.

        Args:
            parts: Statistics of the same targets, taken with the same sketch.
            order: Positions of the concatenated batches in the merged order.

        Returns:
            The merged statistic.

        Raises:
            MeasurementError: If a part no longer has its sketches.
        """
        if any(not part.rows for part in parts):
            raise MeasurementError(
                "this measurement was loaded without its sketches, or taken with "
                "estimator='dense', and inner products between parts cannot be recovered. "
                "Measure again, or save with sketches=True."
            )
        index = torch.as_tensor(list(order), dtype=torch.long)
        rows = {
            name: torch.cat([part.rows[name] for part in parts])[index] for name in parts[0].rows
        }
        return cls({name: gram_matrix(r) for name, r in rows.items()}, rows)

    def join(self, more: "SpectrumStatistic") -> None:
        """Take in the same batches' statistic of further targets.

        Args:
            more: The statistic.
        """
        self.gram |= more.gram
        self.rows |= more.rows

    def tensors(self, sketches: bool) -> dict[str, Tensor]:
        """Return what is saved, by key.

        Args:
            sketches: Whether the sketched gradients are saved too.

        Returns:
            ``gram/NAME`` and, if asked for, ``rows/NAME``.
        """
        saved = {f"gram/{name}": gram for name, gram in self.gram.items()}
        if sketches:
            saved |= {f"rows/{name}": rows for name, rows in self.rows.items()}
        return saved

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Any:
        """Read back what :meth:`tensors` returned.

        Args:
            tensors: Tensors by key.

        Returns:
            The statistic.
        """
        split = {part: under(tensors, part) for part in ("gram/", "rows/")}
        return cls(split["gram/"], split["rows/"])


class SketchProbe:
    """Two-sided sign-fold sketches of each batch's gradient, ``Uᵀ G V = (ΔU)ᵀ (XV)``.

    U is seeded by the target's name. V is seeded by the width of the input alone, so that targets
    that read the same tensor (q, k and v; gate and up) share one projection.

    Attributes:
        size: Sketch size k on either side, the smallest prime that is not below what was asked.
    """

    def __init__(self, targets: Sequence[Target], size: int, seed: int) -> None:
        self.size = prime_at_least(size)
        self._seed = seed
        self._targets = list(targets)
        self._in_signs = {
            width: random_signs(width, seed_of(seed, "in", width))
            for width in {target.d_in for target in targets}
        }
        self._out_signs = {
            target.name: random_signs(target.d_out, seed_of(seed, "out", target.name))
            for target in targets
        }
        self._current: dict[str, Tensor] = {}
        self._rows = RowStore({target.name: self._row_width(target) for target in targets})

    def share_key(self, target: Target) -> object:
        """Share projections between targets of one input width."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> Tensor:
        """Return ``XV``, ``[T, k]``: all that is kept of the input."""
        signs = self._in_signs[target.d_in] = self._in_signs[target.d_in].to(x.device)
        return fold(x, signs, self.size)

    def on_output_grad(self, target: Target, kept: Tensor, delta: Tensor) -> None:
        """Add ``(ΔU)ᵀ (XV)``, folded to its stored width, to the batch's sketch."""
        signs = self._out_signs[target.name] = self._out_signs[target.name].to(delta.device)
        sketch = fold(delta, signs, self.size).T @ kept
        seed = seed_of(self._seed, "row", *sketch.shape)
        part = scatter_fold(sketch.reshape(1, -1), STORED_WIDTH, seed)[0]
        previous = self._current.get(target.name)
        self._current[target.name] = part if previous is None else previous.add_(part)

    def end_batch(self, batch: int) -> None:
        """Close a mini-batch: store its sketches, and refuse NaN and infinity.

        Args:
            batch: Index of the batch, for the message.
        """
        self._rows.add(self.take_batch(batch))

    def take_batch(self, batch: int) -> dict[str, Tensor]:
        """Close a mini-batch and hand out its sketches instead of storing them.

        Args:
            batch: Index of the batch, for the message about NaN and infinity.

        Returns:
            Per target ``[D]`` float32, on the CPU; zeros where no gradient arrived.
        """
        current, self._current = self._current, {}
        rows = to_host(current)
        refuse_non_finite(rows, batch)
        zeros = {t.name: self._row_width(t) for t in self._targets if t.name not in rows}
        rows |= {name: torch.zeros(width) for name, width in zeros.items()}
        return {target.name: rows[target.name] for target in self._targets}

    def finish(self) -> SpectrumStatistic:
        """Return the statistic and forget the batches."""
        rows = self._rows.take()
        return SpectrumStatistic({name: gram_matrix(r) for name, r in rows.items()}, rows)

    def _row_width(self, target: Target) -> int:
        return min(min(target.d_in, self.size) * min(target.d_out, self.size), STORED_WIDTH)


class DenseProbe:
    """Exact gradients of a block of targets, kept until their Gram matrices are formed."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = list(targets)
        self._current: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {target.name: [] for target in targets}

    def share_key(self, target: Target) -> object:
        """Inputs are kept as they are, so one reference serves all."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> Tensor:
        """Return the input itself, ``[T, d_in]``."""
        return x

    def on_output_grad(self, target: Target, kept: Tensor, delta: Tensor) -> None:
        """Add ``Δᵀ X`` to the batch's gradient, in float32 or, for a float64 model, float64."""
        dtype = torch.promote_types(torch.promote_types(delta.dtype, kept.dtype), torch.float32)
        part = delta.to(dtype).T @ kept.to(dtype)
        previous = self._current.get(target.name)
        self._current[target.name] = part if previous is None else previous.add_(part)

    def end_batch(self, batch: int) -> None:
        """Close a mini-batch: store its gradients, and refuse NaN and infinity.

        Args:
            batch: Index of the batch, for the message.
        """
        for name, row in self.take_batch(batch).items():
            self._rows[name].append(row)

    def take_batch(self, batch: int) -> dict[str, Tensor]:
        """Close a mini-batch and hand out its gradients instead of storing them.

        Args:
            batch: Index of the batch, for the message about NaN and infinity.

        Returns:
            Per target ``[d_out * d_in]`` on the CPU; zeros where no gradient arrived.
        """
        current, self._current = self._current, {}
        refuse_non_finite(current, batch)
        zeros = {t.name: (t.d_out, t.d_in) for t in self._targets if t.name not in current}
        current |= {name: torch.zeros(shape) for name, shape in zeros.items()}
        return {t.name: current[t.name].reshape(-1).cpu() for t in self._targets}

    def finish(self) -> SpectrumStatistic:
        """Return the Gram matrices and forget the gradients."""
        gram = {}
        for name in list(self._rows):
            gram[name] = gram_matrix(torch.stack(self._rows.pop(name)))
        return SpectrumStatistic(gram)
