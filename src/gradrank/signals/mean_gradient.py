"""The mean-gradient signal: singular values of each target's gradient averaged over batches.

This is the spectrum that a rank-k update of the weight can follow. It has nothing to do with the
spectrum over batches of :mod:`gradrank.signals.spectrum`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import MeasurementError
from gradrank.core.targets import Target
from gradrank.ops.rows import row_factors
from gradrank.ops.sketch import (
    fold,
    prime_at_least,
    random_signs,
    seed_of,
    singular_values_from_sketches,
)
from gradrank.signals.parts import refuse_non_finite

WHOLE, EVEN, ODD = "whole", "even", "odd"
_ROWS = "rows-"


@dataclass
class MeanGradientStatistic:
    """Leading singular values of the mean gradient, of all batches and of two halves.

    Attributes:
        values: ``{part: {target: [k] float64, descending}}``; parts are ``whole``, ``even`` and
            ``odd`` (batches of even and odd index). Unit: loss per weight.
        sketches: ``{part: {target: (Y [d_out, k], W [c, d_in])}}``, sums over batches; empty
            after loading, and then the statistic cannot be merged.
        counts: Batches per part.
        seed: Seed of the sketch.
        rows: ``{part: {target: F [d_out, k] float32}}``, the row factors of the mean gradient
            (``F Fᵀ`` approximates ``G Gᵀ``), from which the energies of any set of output rows
            follow; empty unless they were asked for. ``4 k`` bytes per row and part.
    """

    values: dict[str, dict[str, Tensor]]
    sketches: dict[str, dict[str, tuple[Tensor, Tensor]]]
    counts: dict[str, int]
    seed: int = 0
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def batches(self) -> int:
        """Number of mini-batches M."""
        return self.counts[WHOLE]

    def half(self, part: str) -> "MeanGradientStatistic":
        """Return the statistic of the even or the odd batches.

        Args:
            part: ``"even"`` or ``"odd"``.

        Returns:
            A statistic whose ``whole`` is that half.
        """
        rows = {WHOLE: self.rows[part]} if self.rows else {}
        return MeanGradientStatistic(
            {WHOLE: self.values[part]}, {}, {WHOLE: self.counts[part]}, self.seed, rows
        )

    def need_rows(self) -> dict[str, Tensor]:
        """Return the row factors of all batches, ``[d_out, k]`` float32 per target.

        Returns:
            The factors.

        Raises:
            MeasurementError: If they were not kept.
        """
        if WHOLE not in self.rows:
            raise MeasurementError(
                "this measurement of the mean gradient kept no row factors, which partitions of "
                "rows need. Measure again with signal=MeanGradient(rows=True), or choose the "
                "method before measuring."
            )
        return self.rows[WHOLE]

    @classmethod
    def merge(
        cls, parts: "Sequence[MeanGradientStatistic]", rows: bool = False
    ) -> "MeanGradientStatistic":
        """Return the statistic of the batches of several parts together.

        Args:
            parts: Statistics of the same targets, taken with the same sketch.
            rows: Whether to keep row factors.

        Returns:
            The merged statistic. Even and odd batches stay with their halves.

        Raises:
            MeasurementError: If a part no longer has its sketches.
        """
        if any(not part.sketches for part in parts):
            raise MeasurementError(
                "this measurement was loaded without its sketches and cannot be merged. Measure "
                "again, or merge before saving."
            )
        sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        counts = {half: sum(part.counts[half] for part in parts) for half in (EVEN, ODD)}
        for half in (EVEN, ODD):
            sums[half] = {
                name: (
                    torch.stack([part.sketches[half][name][0] for part in parts]).sum(0),
                    torch.stack([part.sketches[half][name][1] for part in parts]).sum(0),
                )
                for name in parts[0].sketches[half]
            }
        return from_sketches(sums, counts, parts[0].seed, rows)

    def join(self, more: "MeanGradientStatistic") -> None:
        """Take in the same batches' statistic of further targets.

        Args:
            more: The statistic.
        """
        mine, further = (
            (self.values, self.sketches, self.rows),
            (more.values, more.sketches, more.rows),
        )
        for parts, new in zip(mine, further, strict=True):
            for part, named in new.items():
                parts[part] |= named  # pyright: ignore[reportArgumentType]

    def tensors(self, sketches: bool) -> dict[str, Tensor]:
        """Return what is saved: singular values and row factors (the sketches are not).

        Args:
            sketches: Accepted for symmetry with other statistics.

        Returns:
            ``PART/NAME`` and ``rows-PART/NAME``.
        """
        kinds = (("", self.values), (_ROWS, self.rows))
        return {
            f"{prefix}{part}/{name}": tensor
            for prefix, kind in kinds
            for part, named in kind.items()
            for name, tensor in named.items()
        }

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], counts: dict[str, int]
    ) -> "MeanGradientStatistic":
        """Read back what :meth:`tensors` returned.

        Args:
            tensors: Tensors by key.
            counts: Batches per part.

        Returns:
            The statistic, without sketches.
        """
        values: dict[str, dict[str, Tensor]] = {WHOLE: {}, EVEN: {}, ODD: {}}
        rows: dict[str, dict[str, Tensor]] = {WHOLE: {}, EVEN: {}, ODD: {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            kind = rows if part.startswith(_ROWS) else values
            kind[part.removeprefix(_ROWS)][name] = tensor
        return cls(values, {}, counts, rows=rows if any(rows.values()) else {})


class MeanGradientProbe:
    """Range and co-range sketches of the summed gradient, for even and odd batches apart.

    Keeps each target's input until its output gradient arrives: ``T x d_in`` numbers per distinct
    input, as ordinary training of the weights would.

    Attributes:
        size: Width k of the range sketch ``Y = G V``.
        corange: Height of the co-range sketch ``W = Uᵀ G``.
    """

    def __init__(
        self, targets: Sequence[Target], directions: int, seed: int, rows: bool = False
    ) -> None:
        self.size = prime_at_least(directions)
        self.corange = prime_at_least(2 * self.size + 1)
        self._seed = seed
        self._rows = rows
        self._targets = list(targets)
        self._in_signs = {
            width: random_signs(width, seed_of(seed, "range", width))
            for width in {target.d_in for target in targets}
        }
        self._out_signs = {t.name: out_signs(seed, t.name, t.d_out) for t in targets}
        self._touched: set[str] = set()
        self._sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {EVEN: {}, ODD: {}}
        self._counts = {EVEN: 0, ODD: 0}

    def share_key(self, target: Target) -> object:
        """Share the kept input between targets of one input width."""
        return target.d_in

    def on_input(self, target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input ``X [T, d_in]`` and ``XV [T, k]``."""
        signs = self._in_signs[target.d_in] = self._in_signs[target.d_in].to(x.device)
        return x, fold(x, signs, self.size)

    def on_output_grad(self, target: Target, kept: tuple[Tensor, Tensor], delta: Tensor) -> None:
        """Add ``Δᵀ (XV)`` and ``(ΔU)ᵀ X``."""
        x, projected = kept
        signs = self._out_signs[target.name] = self._out_signs[target.name].to(delta.device)
        range_part = delta.float().T @ projected
        corange_part = fold(delta, signs, self.corange).T @ x.float()
        # Straight to the sums: sketches of the batch alone would be as large again.
        self._touched.add(target.name)
        _add(self._sums[self._half], target.name, (range_part, corange_part))

    def end_batch(self, batch: int) -> None:
        """Close a mini-batch: refuse NaN and infinity, and turn to the other half.

        Args:
            batch: Index of the batch, for the message; batches come in turn, even and odd.
        """
        sums = self._sums[self._half]
        touched = [target.name for target in self._targets if target.name in self._touched]
        # Sums that were finite before tell whether this batch was.
        refuse_non_finite({name: sums[name][0] for name in touched}, batch)
        self._counts[self._half] += 1
        self._touched = set()

    @property
    def _half(self) -> str:
        return ODD if self._counts[EVEN] > self._counts[ODD] else EVEN

    def finish(self) -> MeanGradientStatistic:
        """Return the statistic, on the host, and forget the batches."""
        counts, found = self._counts, self._sums
        self._counts, self._sums = {EVEN: 0, ODD: 0}, {EVEN: {}, ODD: {}}
        sums = {
            half: {t.name: _on_host(named.get(t.name) or self._nothing(t)) for t in self._targets}
            for half, named in found.items()
        }
        return from_sketches(sums, counts, self._seed, self._rows)

    def reserve(self) -> None:
        """Make the sums of both halves beforehand, as they are from the third batch on."""
        for sums in self._sums.values():
            sums |= {target.name: self._nothing(target) for target in self._targets}

    def _nothing(self, target: Target) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(target.d_out, min(self.size, target.d_in)),
            torch.zeros(min(self.corange, target.d_out), target.d_in),
        )


def out_signs(seed: int, name: str, d_out: int) -> Tensor:
    """Return the signs of the co-range sketch of one target.

    Args:
        seed: Seed of the sketch.
        name: Name of the target.
        d_out: Its output features.

    Returns:
        ``[d_out]``.
    """
    return random_signs(d_out, seed_of(seed, "corange", name))


def from_sketches(
    sums: dict[str, dict[str, tuple[Tensor, Tensor]]],
    counts: dict[str, int],
    seed: int,
    rows: bool = False,
) -> MeanGradientStatistic:
    """Finish a statistic from summed sketches of the two halves.

    Args:
        sums: ``{"even" | "odd": {target: (Y, W)}}``.
        counts: Batches of the two halves.
        seed: Seed of the sketch.
        rows: Whether to keep row factors.

    Returns:
        The statistic.
    """
    values: dict[str, dict[str, Tensor]] = {WHOLE: {}, EVEN: {}, ODD: {}}
    kept: dict[str, dict[str, Tensor]] = {WHOLE: {}, EVEN: {}, ODD: {}}
    whole = {**counts, WHOLE: counts[EVEN] + counts[ODD]}
    for name, (even_y, even_w) in sums[EVEN].items():
        odd_y, odd_w = sums[ODD][name]
        signs = out_signs(seed, name, even_y.shape[0])
        pairs = {
            EVEN: (even_y, even_w),
            ODD: (odd_y, odd_w),
            WHOLE: (even_y.cpu() + odd_y.cpu(), even_w.cpu() + odd_w.cpu()),
        }
        for part, (y, w) in pairs.items():
            scale = 1 / max(whole[part], 1)
            y, w = y.cpu() * scale, w.cpu() * scale  # noqa: PLW2901
            values[part][name] = singular_values_from_sketches(y, w, signs)
            if rows:
                kept[part][name] = row_factors(y, w, signs)
    return MeanGradientStatistic(values, sums, whole, seed, kept if rows else {})


def _on_host(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].cpu(), pair[1].cpu()


def _add(sums: dict[str, Any], name: str, pair: tuple[Tensor, Tensor]) -> None:
    if name in sums:
        sums[name] = (sums[name][0].add_(pair[0]), sums[name][1].add_(pair[1]))
    else:
        sums[name] = pair
