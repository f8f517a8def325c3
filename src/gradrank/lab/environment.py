"""What a run ran on: device, dtype, versions. No host, user or path names."""

import functools
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gradrank.core.errors import OptionError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGES = ("gradrank", "torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Describe where a run ran, for its record.

    Args:
        device: The device of the model.
        dtype: The dtype of the base model's weights.

    Returns:
        ``python``, ``system``, ``machine``, ``processors``, ``threads`` (of PyTorch), ``device``,
        ``dtype``, ``versions`` and ``source`` (see :func:`source_digest`); nothing that names a
        person, a host or a folder.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processors": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {package: version(package) for package in _PACKAGES if version(package)},
        "source": source_digest(),
    }


@functools.cache
def source_digest() -> str:
    """Return a checksum of gradrank's own code, which tells development versions apart.

    Returns:
        Twelve hexadecimal digits of the SHA-256 of all of the package's Python files, by name.
    """
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version(package: str) -> str:
    """Return the installed version of a package, or an empty string.

    Args:
        package: Its distribution name.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def resolve_device(device: str = "auto") -> torch.device:
    """Turn a device name into a device.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Returns:
        The device.

    Raises:
        OptionError: If the name is unknown or there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"unknown device '{device}'. Known: auto, cpu, cuda.") from error
    if chosen.type not in {"cpu", "cuda"}:
        raise OptionError(f"device '{device}' is not supported. Known: auto, cpu, cuda.")
    if (chosen.index or 0) > 0:
        raise OptionError(
            f"device '{device}': a run uses the first GPU in sight. Set CUDA_VISIBLE_DEVICES="
            f"{chosen.index} and choose 'cuda'."
        )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device '{device}' is not there: PyTorch {torch.__version__} sees no CUDA device. "
            f"Choose 'cpu' or 'auto', or install a CUDA build of PyTorch."
        )
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn a dtype name into a dtype.

    Args:
        dtype: ``auto`` (bfloat16 on a GPU that has it, else float32) or a name in ``DTYPES``.
        device: Where the model will be.

    Returns:
        The dtype of the base model's weights.

    Raises:
        OptionError: If the name is unknown, or a CPU is asked for float16.
    """
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype '{dtype}'. {nearest(dtype, [*DTYPES, 'auto'])}")
    if dtype == "float16" and device.type == "cpu":
        raise OptionError("dtype 'float16' is not usable for training on a CPU. Use 'float32'.")
    return DTYPES[dtype]
