"""What PEFT's configuration says of a module: pattern of its name, alpha of its scale."""

import math
import re


def anchored(name: str) -> str:
    r"""Return the pattern that means just one module: PEFT's patterns are ends of names.

    Args:
        name: Full name of the module.

    Examples:
        >>> anchored("enc.q")
        '^enc\\.q'
    """
    return "^" + re.escape(name)


def tidy(alpha: float) -> float:
    """Return an alpha as a whole number if it is one.

    Args:
        alpha: The alpha.
    """
    return int(alpha) if float(alpha).is_integer() else alpha


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
