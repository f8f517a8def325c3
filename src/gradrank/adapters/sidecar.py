"""The sidecar: everything a checkpoint must hold beside the adapter, in one safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradrank.adapters.baking import gathered, sharded_like
from gradrank.adapters.layer_forms import load_raw_tensors, raw_tensors
from gradrank.adapters.view import PREFIX, lora_sites
from gradrank.core.errors import DataError, PlanError
from gradrank.core.files import write_atomic
from gradrank.core.partition import NeuronPartition
from gradrank.core.text import parse_json

FILE = "gradrank_capacity.safetensors"
SCHEMA = "gradrank.capacity/1"
_ADAPTER = "adapter_model.safetensors"
_LORA_A = ".lora_A.weight"


def write(path: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a sidecar atomically.

    Args:
        path: The file.
        facts: Plain data.
        tensors: Tensors by key.
    """
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    # safetensors keeps no empty file apart from a broken one; a tensor says that it is whole.
    stored["schema"] = torch.tensor([1])
    text = {"gradrank": json.dumps({"schema": SCHEMA, **facts}, allow_nan=False)}
    write_atomic(path, lambda temporary: save_file(stored, temporary, metadata=text))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a sidecar.

    Args:
        path: The file.

    Returns:
        Plain data, and tensors by key.

    Raises:
        DataError: If it is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise DataError(
            f"'{path.parent.name}' holds no {path.name}: it was not written by this method, or "
            "not to the end. Resume from another checkpoint, or start again."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get("gradrank", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"'{path.name}' in '{path.parent.name}' is damaged: {error}.") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise DataError(f"'{path.name}' in '{path.parent.name}' is no sidecar ('{SCHEMA}').")
    tensors.pop("schema", None)
    return facts, tensors


def stored_ranks(folder: Path, adapter: str = "default") -> dict[str, int]:
    """Return the ranks of an adapter on disk, by the shapes of its weights.

    Args:
        folder: Folder with a stock PEFT adapter.
        adapter: Its name; PEFT puts every adapter but ``default`` into a folder of its own.

    Returns:
        Rank by target name.

    Raises:
        DataError: If there is no adapter, or it is damaged.
    """
    path = _file(folder, adapter)
    if not path.is_file():
        raise DataError(f"'{folder.name}' holds no {_ADAPTER}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {
                key.removeprefix(PREFIX).removesuffix(_LORA_A): int(
                    file.get_slice(key).get_shape()[0]
                )
                for key in file.keys()  # noqa: SIM118
                if key.endswith(_LORA_A)
            }
    except (SafetensorError, OSError, ValueError, IndexError) as error:
        raise DataError(f"'{path.name}' in '{folder.name}' is damaged: {error}.") from error


def stored_partitions(path: Path) -> dict[str, NeuronPartition]:
    """Return the neuron partitions that a sidecar tells of.

    Args:
        path: The sidecar.

    Returns:
        Partition by target name; empty if it tells of none.

    Raises:
        DataError: If the sidecar is missing or damaged.
    """
    return partitions_in(read(path)[0], path)


def partitions_in(facts: Mapping[str, Any], path: Path) -> dict[str, NeuronPartition]:
    """Return the neuron partitions among what :func:`read` returned.

    Args:
        facts: A sidecar's plain data.
        path: The sidecar, for messages.

    Returns:
        Partition by target name; empty if there is none.

    Raises:
        DataError: If they are damaged.
    """
    found: Any = facts.get("partitions", {})
    if not isinstance(found, dict):
        raise DataError(f"'{path.name}' in '{path.parent.name}' is damaged: no partitions by name.")
    try:
        return {name: NeuronPartition.from_dict(data) for name, data in found.items()}
    except PlanError as error:
        raise DataError(f"'{path.name}' in '{path.parent.name}' is damaged: {error}") from error


@torch.no_grad()
def load_sharded(model: nn.Module, folder: Path, adapter: str) -> None:
    """Load a stock adapter into a sharded model (FSDP2), task head included.

    Args:
        model: The PEFT model, sharded, with component masks that have the stored ranks.
        folder: Folder with the adapter.
        adapter: Name of the adapter.

    Raises:
        DataError: If the adapter is damaged or has a tensor that the model has no place for.
    """
    try:
        stored = load_file(_file(folder, adapter))
    except (SafetensorError, OSError) as error:
        raise DataError(f"'{_ADAPTER}' in '{folder.name}' is damaged: {error}.") from error
    places = dict(model.named_parameters())
    sites = lora_sites(model, adapter)
    for key, value in stored.items():
        name, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if name in sites and factor in {"A", "B"}:
            module = sites[name].linear(factor)
            module.load_state_dict({"weight": value})
            continue
        owner, _, leaf = key.rpartition(".")
        head = f"{owner}.modules_to_save.{adapter}.{leaf}"
        place = places.get(key, places.get(head))
        if place is None:
            raise DataError(f"'{key}' in '{folder.name}' has no place in the model.")
        place.copy_(sharded_like(value.to(place.dtype), place))


def formed_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return what stands behind masks, SVD forms and partitions, dormant components included.

    Args:
        model: The PEFT model.
        adapter: Name of the adapter.

    Returns:
        Whole tensors by ``TARGET/NAME``; a collective call where they are sharded.
    """
    return {
        f"{name}/{key}": gathered(tensor)
        for name, site in lora_sites(model, adapter).items()
        if site.form != "plain"
        for key, tensor in raw_tensors(site.layer, adapter).items()
    }


def load_formed(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`formed_tensors` returned.

    Args:
        model: The PEFT model, with the same forms and shapes.
        adapter: Name of the adapter.
        tensors: Whole tensors by ``TARGET/NAME``.
    """
    for name, site in lora_sites(model, adapter).items():
        if site.form != "plain":
            mine = {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}/")
            }
            load_raw_tensors(site.layer, adapter, mine)


def _file(folder: Path, adapter: str) -> Path:
    own = folder / adapter / _ADAPTER
    return own if own.is_file() else folder / _ADAPTER
