"""Scales of LoRA updates, and the alphas that PEFT computes them from."""

import math


def alpha_for(scaling: float, rank: int, root: bool) -> float:
    """Return the alpha from which PEFT computes a scale, to the last bit where that exists.

    Args:
        scaling: The scale.
        rank: Rank of the layer.
        root: Whether PEFT divides by the root of the rank (rsLoRA) or by the rank.

    Returns:
        The alpha; a whole number where it is one.

    Examples:
        >>> alpha_for(2.0, 7, root=False)
        14
    """
    divisor = math.sqrt(rank) if root else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    whole = float(round(alpha))
    exact = next((a for a in (whole, *near) if a / divisor == scaling), alpha)
    return int(exact) if exact.is_integer() else exact
