"""Write and read a LoRA adapter in llama.cpp's own format, GGUF."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradrank.core.errors import DataError, PlanError
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.engines.engine import Base
from gradrank.serving.gguf_names import Family, Names, package

_ARCHITECTURE, _KIND = "general.architecture", "general.type"
_ADAPTER, _ALPHA = "adapter.type", "adapter.lora.alpha"
_A, _B = ".lora_a", ".lora_b"
# What a damaged file makes the reader raise.
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, MemoryError,
           AttributeError, UnicodeDecodeError)  # fmt: skip


def placed(adapter: Adapter, family: Family, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Return an adapter's factors as llama.cpp wants them.

    Args:
        adapter: The adapter.
        family: What is known of the base model.
        base: The base model.

    Returns:
        ``(a, b)`` by name of the weight in llama.cpp: ``a [r, d_in]`` as it is, the rows of
        ``b [d_out, r]`` in llama.cpp's order.

    Raises:
        PlanError: If llama.cpp has no place for a module.
    """
    names = Names(family, base)
    tensors = names.tensors(adapter.updates)
    missing = [name for name in adapter.updates if name not in tensors]
    if missing:
        raise PlanError(
            f"llama.cpp's architecture '{family.architecture}' has no tensor for '{missing[0]}' "
            f"({len(missing)} of {len(adapter.updates)} modules). Export with target 'merged'."
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, update in adapter.updates.items():
        rows = names.rows(name, update.b.shape[0])
        b = update.b if rows is None else update.b[rows]
        if tensors[name] in found:
            raise PlanError(f"llama.cpp has one tensor '{tensors[name]}' for two modules.")
        found[tensors[name]] = (update.a, b)
    return found


def write_gguf(
    factors: dict[str, tuple[Tensor, Tensor]], alpha: float, architecture: str, path: Path
) -> None:
    """Write factors as an adapter.

    Args:
        factors: See :func:`placed`.
        alpha: What llama.cpp divides by the rank of every tensor to get its scale.
        architecture: llama.cpp's name of the kind of model.
        path: The file.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(_ADAPTER, "lora")
    writer.add_float32(_ALPHA, alpha)
    for name, pair in factors.items():
        for sign, factor in zip((_A, _B), pair, strict=True):
            values, kind = _plain(factor)
            writer.add_tensor(name + sign, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, family: Family, base: Base) -> Adapter:
    """Read an adapter by llama.cpp's rule: ``alpha`` over the rank of the tensor itself.

    Args:
        path: The file.
        family: What is known of the base model.
        base: The base model, with its modules.

    Returns:
        The adapter that llama.cpp computes with, by modules of transformers.

    Raises:
        DataError: If it is damaged, no adapter, or one of another kind of model.
        PlanError: If the base model has no such modules.
    """
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
        values = {key: _value(reader, key) for key in (_ARCHITECTURE, _KIND, _ADAPTER, _ALPHA)}
        # Tensors that share bytes would take more memory than the file has.
        if sum(int(item.n_bytes) for item in reader.tensors) > path.stat().st_size:
            raise DataError(f"'{path}' holds tensors that overlap.")
        tensors = {str(item.name): _tensor(item) for item in reader.tensors}
    except _DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{path}' is damaged: {str(error)[:200]}.") from error
    for key, wanted in ((_KIND, "adapter"), (_ADAPTER, "lora"),
                        (_ARCHITECTURE, family.architecture)):  # fmt: skip
        if values[key] != wanted:
            raise DataError(f"'{path}' says {key} = {str(values[key])[:40]!r}, not '{wanted}'.")
    alpha = values[_ALPHA]
    if not isinstance(alpha, float | None) or not math.isfinite(alpha or 0.0):
        raise DataError(f"'{path}' says {_ALPHA} = {str(alpha)[:40]!r}.")
    names = Names(family, base)
    modules = {tensor: module for module, tensor in names.tensors(base.modules).items()}
    updates = {}
    for name, (a, b) in _pairs(tensors, path).items():
        if name not in modules:
            raise PlanError(f"the base model has no tensor '{name[:100]}', which '{path}' updates.")
        rows = names.rows(modules[name], b.shape[0])
        ordered = b if rows is None else b[torch.argsort(rows)]
        update = Update(modules[name], a, ordered, scale(alpha, a.shape[0]))
        updates[update.name] = update
    return Adapter(updates, {"fan_in_fan_out": family.transposed})


def scale(alpha: float | None, rank: int) -> float:
    """Return the scale that llama.cpp gives an update, in its own precision.

    Args:
        alpha: The adapter's alpha; None or 0 mean a scale of 1.
        rank: Of the tensor.
    """
    return float(np.float32(alpha) / np.float32(rank)) if alpha else 1.0


def _plain(factor: Tensor) -> tuple[np.ndarray, str]:
    values = factor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:  # which numpy lacks
        return values.view(torch.uint8).numpy(), "BF16"
    if values.dtype == torch.float16:
        return values.numpy(), "F16"
    return values.float().numpy(), "F32"


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _tensor(item: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(item.shape))
    kind = item.tensor_type.name
    data = np.array(item.data)
    if kind == "BF16":
        return torch.from_numpy(data).view(torch.bfloat16).reshape(shape)
    if kind not in {"F16", "F32"}:
        raise DataError(f"tensor '{item.name[:100]}' has type {kind}; F32, F16 and BF16 are read.")
    return torch.from_numpy(data).reshape(shape)


def _pairs(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a in tensors.items():
        name, sign, rest = key.partition(_A)
        if not sign or rest:
            if key.removesuffix(_B) + _A not in tensors:
                raise DataError(f"'{path}' holds a tensor '{key[:100]}', which is in no pair.")
            continue
        b = tensors.get(name + _B)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise DataError(f"'{path}': the factors of '{name[:100]}' do not fit one another.")
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise DataError(f"'{path}': the factors of '{name[:100]}' hold NaN or infinity.")
        found[name] = (a, b)
    return found
