"""What is known of a model without measuring anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradrank.core.targets import Target
from gradrank.signals.layers import ALL_LINEAR, ambiguous_suffixes, base_parameters, find_sites


def find_targets(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> tuple[Target, ...]:
    """Return the targets of a model without measuring anything.

    Args:
        model: The model.
        targets: ``"all-linear"`` or names of modules.

    Returns:
        The targets, in model order.
    """
    return tuple(site.target for site in find_sites(model, targets))


def model_facts(model: nn.Module, targets: str | Sequence[str] = ALL_LINEAR) -> dict[str, Any]:
    """Return the facts about a model that a plan keeps when nothing was measured.

    Args:
        model: The model.
        targets: ``"all-linear"`` or names of modules.

    Returns:
        Model class and name, its parameters, and whether target names are ambiguous suffixes.
    """
    return {
        "model": type(model).__name__,
        "model_name": model_name(model),
        "base_parameters": base_parameters(model),
        "ambiguous_suffixes": ambiguous_suffixes(model, find_targets(model, targets)),
    }


def model_name(model: nn.Module) -> str | None:
    """Return the name that a model was loaded by; of a folder only its last part.

    Args:
        model: The model.

    Returns:
        The name, or None if the model does not know it. Plans are shared, so no path of this
        machine goes into them.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return (Path(name).name if Path(name).is_dir() else name) or None
