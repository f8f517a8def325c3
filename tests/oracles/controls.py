"""Slow twins of controls: scores from gradients and places, with loops, in float64."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def gradient_norms(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Root mean square, over batches, of the Frobenius norm of each target's gradient."""
    norms = {}
    for name, batches in gradients.items():
        total = 0.0
        for gradient in batches:
            for row in gradient.tolist():
                for entry in row:
                    total += entry * entry
        norms[name] = (total / len(batches)) ** 0.5
    return norms


def weighted_by_depth(
    norms: Mapping[str, float],
    places: Mapping[str, tuple[int, int] | None],
    first: float = 0.5,
    last: float = 1.5,
) -> dict[str, float]:
    """Norms times the line from ``first`` to ``last``; a place is (block t from 0, of T blocks).

    Targets outside blocks are weighted by the middle of the line.
    """
    scores = {}
    for name, norm in norms.items():
        place = places[name]
        weight = (first + last) / 2
        if place is not None:
            block, blocks = place
            weight = first + (last - first) * block / (blocks - 1)
        scores[name] = norm * weight
    return scores
