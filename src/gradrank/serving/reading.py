"""Read an adapter's weights, from its folder or from a live model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradrank.core.errors import DataError
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.facts import FILE, PREFIX, AdapterFacts, describe


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter: stock LoRA as it is, AdaLoRA as the plain LoRA that computes the same.

    Nothing of the configuration is run: names come from the tensors, ranks from their shapes.

    Args:
        folder: A PEFT adapter folder.

    Returns:
        The adapter.

    Raises:
        DataError: If a file is missing, damaged or absurd, or a weight is not finite.
    """
    folder = Path(folder)
    facts = describe(folder)
    tensors = _tensors(folder / FILE, facts)
    updates, taken = {}, set()
    scales = facts.scales
    for target in facts.ranks:
        name = target.name
        own = {key: f"{name}.{key}" for key in _factors(facts)}
        a, b = tensors[own[_A(facts)]], tensors[own[_B(facts)]]
        if facts.config.kind == "ADALORA":
            a = _with_singular(a, tensors.get(own["lora_E"]), name)
        updates[name] = Update(name, a, b, scales[name])
        taken |= set(own.values())
    other = {key: tensor for key, tensor in tensors.items() if key not in taken}
    other = {
        key: tensor
        for key, tensor in other.items()
        # Of an output layer that it adapts, PEFT saves the frozen weight too.
        if not _empty_factor(key, tensor) and key.removesuffix(".base_layer.weight") not in updates
    }
    return Adapter(updates, dict(facts.config.fields), other, features(facts, other))


def _factors(facts: AdapterFacts) -> tuple[str, ...]:
    ada = facts.config.kind == "ADALORA"
    return ("lora_A", "lora_B", "lora_E") if ada else ("lora_A.weight", "lora_B.weight")


def _A(facts: AdapterFacts) -> str:  # noqa: N802 - PEFT's name of the factor
    return _factors(facts)[0]


def _B(facts: AdapterFacts) -> str:  # noqa: N802 - PEFT's name of the factor
    return _factors(facts)[1]


def _empty_factor(key: str, tensor: Tensor) -> bool:
    return not tensor.numel() and ".lora_" in key


def _with_singular(a: Tensor, singular: Tensor | None, name: str) -> Tensor:
    """Return ``A`` with AdaLoRA's singular values multiplied in, as PEFT's forward does."""
    if singular is None or singular.shape != (a.shape[0], 1):
        shape = None if singular is None else tuple(singular.shape)
        raise DataError(f"the singular values of '{name}' have shape {shape}.")
    return a * singular


def features(facts: AdapterFacts, other: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return what a plain LoRA engine cannot express.

    Args:
        facts: Of the adapter.
        other: The tensors that are no factors of linear modules.
    """
    found = list(facts.config.features)
    embeddings = sorted(key for key in other if ".lora_embedding_" in key)
    if embeddings:
        found.append(f"low-rank embeddings ('{embeddings[0].partition('.lora_')[0]}')")
    known = bool(facts.config.features) or embeddings
    if other and not known:
        found.append(f"further weights ('{min(other)}')")
    return tuple(found)


def _tensors(path: Path, facts: AdapterFacts) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor: Any = file.get_tensor(name)
                if not bool(torch.isfinite(tensor).all()):
                    raise DataError(
                        f"'{path}': tensor '{name}' holds NaN or infinity; the adapter is not "
                        "usable."
                    )
                found[name.removeprefix(PREFIX)] = tensor
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{path}' is damaged: {str(error)[:200]}.") from error
    missing = set(facts.shapes) - set(found)
    if missing:
        raise DataError(f"'{path}' changed while it was read.")
    return found
