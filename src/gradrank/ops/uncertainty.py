"""Smoothed importance and its uncertainty, per element; ratio and product of the two."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradrank.ops.many import many

COMBINATIONS = ("ratio", "product")


def smooth_(mean: Tensor, deviation: Tensor, score: Tensor, beta1: float, beta2: float) -> None:
    r"""Take one score into running mean and running deviation, in place.

    :math:`\bar s \leftarrow \beta_1 \bar s + (1-\beta_1) s`, then
    :math:`U \leftarrow \beta_2 U + (1-\beta_2) |s - \bar s|` with the mean already updated. Both
    begin at zero.

    Args:
        mean: :math:`\bar s`, any shape.
        deviation: U, the same shape.
        score: s, the same shape.
        beta1: Smoothing of the mean, in [0, 1).
        beta2: Smoothing of the deviation, in [0, 1).

    Source:
        IGU-LoRA, equations 9 and 10; AdaLoRA, arXiv 2303.10512, equations 10 and 11.
    """
    smooth_all_([mean], [deviation], [score], beta1, beta2)


@torch.no_grad()
def smooth_all_(
    means: Sequence[Tensor],
    deviations: Sequence[Tensor],
    scores: Sequence[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Do :func:`smooth_` for many tensors in a handful of calls.

    Args:
        means: Running means.
        deviations: Running deviations, of the same shapes in the same order.
        scores: Scores, likewise; they are not changed.
        beta1: Smoothing of the means, in [0, 1).
        beta2: Smoothing of the deviations, in [0, 1).
    """
    if not scores:
        return
    # Hundreds of small tensors: one call for all of them, and not five for each.
    many._foreach_mul_(means, beta1)
    many._foreach_add_(means, scores, alpha=1 - beta1)
    away = many._foreach_sub(scores, means)
    many._foreach_abs_(away)
    many._foreach_mul_(deviations, beta2)
    many._foreach_add_(deviations, away, alpha=1 - beta2)


def combine(mean: Tensor, deviation: Tensor, how: str, eps: float, in_both: bool) -> Tensor:
    """Return the importance of each element.

    Args:
        mean: Running mean.
        deviation: Running deviation.
        how: ``ratio`` (IGU-LoRA's signal-to-noise ratio) or ``product`` (AdaLoRA).
        eps: What keeps the ratio finite.
        in_both: Whether it is added to the mean too, as IGU-LoRA's published code does.

    Returns:
        The importance, same shape.

    Source:
        IGU-LoRA, equation 11 (ratio); AdaLoRA, arXiv 2303.10512, equation 9 (product).
    """
    if how == "product":
        return mean * deviation
    return (mean + eps if in_both else mean) / (deviation + eps)
