"""The registry: one line per method. Entries are import paths, so that listing names is cheap."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from gradrank.core.errors import OptionError, nearest

_PATHS = {
    "uniform": "gradrank.methods.uniform:Uniform",
    "subset": "gradrank.methods.subset:Subset",
    "gard": "gradrank.methods.gard:Gard",
    "gard-dynamic": "gradrank.methods.gard_dynamic:DynamicGard",
    "waterfill": "gradrank.methods.waterfill:Waterfill",
    "igu": "gradrank.methods.igu:Igu",
    "igu-direction": "gradrank.methods.igu_direction:IguDirection",
    "adalora": "gradrank.methods.adalora:AdaLora",
    "elalora": "gradrank.methods.elalora:ElaLora",
    "hybrid": "gradrank.methods.hybrid:Hybrid",
    "pilora": "gradrank.methods.pilora:PiLora",
    "gradient-norm": "gradrank.methods.gradient_norm:GradientNorm",
    "depth": "gradrank.methods.depth:Depth",
    "random": "gradrank.methods.random_scores:RandomScores",
    "reversed": "gradrank.methods.reversed_order:Reversed",
    "permuted": "gradrank.methods.permuted:Permuted",
}


class _Registry(Mapping[str, type]):
    """Read-only mapping from method name to class; a class is imported when it is looked up."""

    def __getitem__(self, name: str) -> type:
        if name not in _PATHS:
            raise OptionError(f"method '{name}' is unknown. {nearest(name, _PATHS)}")
        module, _, attribute = _PATHS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in _PATHS

    def __iter__(self) -> Iterator[str]:
        return iter(_PATHS)

    def __len__(self) -> int:
        return len(_PATHS)


METHODS: Mapping[str, type] = _Registry()


def create(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build a method by name.

    Args:
        name: Name in the registry.
        options: Its options, as text or plain values.

    Returns:
        The method.
    """
    # Looked up before the protocol's module, so that an unknown name costs no import of torch.
    found = METHODS[name]
    return importlib.import_module("gradrank.methods.method").build(found, options or {})
