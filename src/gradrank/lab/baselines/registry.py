"""The registry of baselines: one line each. Entries are import paths, so listing them is cheap."""

import importlib
from collections.abc import Mapping
from typing import Any

from gradrank.core.errors import OptionError, nearest
from gradrank.methods.registry import METHODS

_HERE = "gradrank.lab.baselines"
PATHS: dict[str, str] = {
    "rslora": f"{_HERE}.rslora:RsLora",
    "dora": f"{_HERE}.dora:Dora",
    "pissa": f"{_HERE}.pissa:Pissa",
    "olora": f"{_HERE}.olora:Olora",
    "eva": f"{_HERE}.eva:Eva",
    "lora-ga": f"{_HERE}.lora_ga:LoraGa",
    "peft-adalora": f"{_HERE}.peft_adalora:PeftAdaLora",
    "milora": f"{_HERE}.milora:Milora",
    "lora-dash": f"{_HERE}.lora_dash:LoraDash",
    "dylora": f"{_HERE}.dylora:DyLora",
    "bitfit": f"{_HERE}.bitfit:BitFit",
    "full": f"{_HERE}.full:Full",
}


def is_baseline(name: str) -> bool:
    """Tell whether a name is a baseline's; gradrank's own methods are in ``METHODS``.

    Args:
        name: The name.

    Returns:
        Whether it is.
    """
    return name in PATHS


def find_baseline(name: str) -> type:
    """Return a baseline's class.

    Args:
        name: Its name.

    Returns:
        The class.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in PATHS:
        raise OptionError(f"method '{name}' is unknown. {nearest(name, [*METHODS, *PATHS])}")
    module, _, attribute = PATHS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def create_baseline(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build a baseline by name.

    Args:
        name: Name in the registry.
        options: Its options, as text or plain values.

    Returns:
        The baseline.
    """
    # Looked up before the protocol's module, so that an unknown name costs no import of torch.
    found = find_baseline(name)
    return importlib.import_module("gradrank.methods.method").build(found, options or {})
