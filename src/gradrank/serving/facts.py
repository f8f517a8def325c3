"""What an adapter's files say without reading its weights: configuration and tensor shapes.

The files are untrusted. Everything here takes bounded time and memory, whatever they hold.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gradrank.core.errors import DataError
from gradrank.core.targets import Target
from gradrank.serving.configuration import MOST_RANK, Configuration, read_configuration

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LARGEST_HEADER = 32 * 2**20
_MOST_TENSORS = 200_000
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LONGEST_NAME = 500
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is.

    Attributes:
        config: Its configuration.
        ranks: Rank per target.
        shapes: Shape of every tensor, by key without PEFT's prefix.
        dtype: Of the tensors.
        bytes: Size of the weights' file.
    """

    config: Configuration
    ranks: Mapping[Target, int]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    bytes: int

    @property
    def base_model(self) -> str:
        """Name or folder of its base model, or ""."""
        return str(self.config.fields["base_model_name_or_path"] or "")

    @property
    def task_type(self) -> str:
        """PEFT's task type, or ""."""
        return str(self.config.fields["task_type"] or "")

    @property
    def scales(self) -> dict[str, float]:
        """Scale of the update per target's name."""
        return {t.name: self.config.scale(t.name, rank) for t, rank in self.ranks.items()}

    @property
    def parameters(self) -> int:
        """Parameters of all LoRA factors."""
        return sum(rank * target.cost for target, rank in self.ranks.items())

    @property
    def other_parameters(self) -> int:
        """Parameters of everything else that is stored, such as a task head."""
        spent = self.parameters
        if self.config.kind == "ADALORA":
            spent += sum(self.ranks.values())
        return sum(math.prod(shape) for shape in self.shapes.values()) - spent

    @property
    def num_labels(self) -> int | None:
        """Classes of a saved head, or None."""
        heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
        sizes = [s[0] for key, s in self.shapes.items() if key.endswith(heads) and len(s) == 2]
        return sizes[0] if sizes else None


def describe(folder: Path) -> AdapterFacts:
    """Read an adapter's configuration and the header of its weights.

    Args:
        folder: A PEFT adapter folder.

    Returns:
        The facts.

    Raises:
        DataError: If a file is missing, damaged, absurd, or of another kind of adapter.
    """
    config = read_configuration(folder)
    weights = folder / FILE
    shapes, dtypes, size = _header(weights)
    ranks = _ranks(shapes, weights)
    if not ranks:
        raise DataError(f"'{weights}' holds no LoRA factors of linear layers.")
    for target, rank in ranks.items():
        config.scale(target.name, rank)  # refuses what is no number
    return AdapterFacts(config, ranks, shapes, ", ".join(sorted(dtypes)), size)


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], set[str], int]:
    """Return shapes and types of all tensors, and the size of the file."""
    if not path.is_file():
        raise DataError(f"'{path.parent}' has no {FILE} (pickles are not read).")
    size = path.stat().st_size
    _check_size(path, size)
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = list(file.keys())
            if len(names) > _MOST_TENSORS:
                raise DataError(
                    f"'{path}' holds {len(names):,} tensors; at most {_MOST_TENSORS:,} are read."
                )
            for name in names:
                _check_name(name, path)
            slices = {name: file.get_slice(name) for name in names}
            dtypes = {str(part.get_dtype()) for part in slices.values()}
            shapes = {
                name.removeprefix(PREFIX): tuple(part.get_shape()) for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{path}' is damaged: {str(error)[:200]}.") from error
    odd = sorted(dtypes - set(_DTYPES))
    if odd:
        raise DataError(f"'{path}' holds tensors of type {odd[0]}; known: {', '.join(_DTYPES)}.")
    if len(shapes) != len(names):
        raise DataError(f"'{path}' holds a tensor twice, with and without the prefix '{PREFIX}'.")
    return shapes, dtypes, size


def _check_size(path: Path, size: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory // 2:
        raise DataError(
            f"'{path}' has {size / 2**30:,.1f} GiB, more than half of this machine's memory, and "
            "was not read."
        )
    with path.open("rb") as stream:
        start = stream.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header > size - 8:
        raise DataError(f"'{path}' is damaged: it is cut off, or no safetensors file at all.")
    if header > _LARGEST_HEADER:
        raise DataError(
            f"'{path}' has a header of {header >> 20} MiB; at most {_LARGEST_HEADER >> 20} are "
            "read."
        )


def _check_name(name: str, path: Path) -> None:
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise DataError(f"'{path}' holds a tensor {name[:60]!r}, which is no name of a parameter.")


def _ranks(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[Target, int]:
    found: dict[Target, int] = {}
    # Files sort layer 10 before layer 2; people do not.
    for key in sorted(shapes, key=natural):
        stem, sign, rest = key.partition(".lora_A")
        if not sign or rest not in {"", ".weight"}:
            continue
        a, b = shapes[key], shapes.get(f"{stem}.lora_B{rest}", ())
        if len(a) != len(b) or len(a) < 2:
            raise DataError(f"'{path}': the factors of '{stem}' have shapes {a} and {b}.")
        if len(a) != 2:
            raise DataError(
                f"'{path}': '{stem}' is a convolution ({a}); only linear layers are read."
            )
        if a[0] != b[1] or not a[1] or not b[0]:
            raise DataError(f"'{path}': the factors of '{stem}' do not fit: {a} and {b}.")
        if a[0] > MOST_RANK:
            raise DataError(f"'{path}': '{stem}' has rank {a[0]:,}; at most {MOST_RANK:,} is read.")
        if a[0]:
            found[Target(stem, a[1], b[0])] = a[0]
    return found


def natural(name: str) -> list[Any]:
    """Return a key that sorts layer 2 before layer 10.

    Args:
        name: A module's name.
    """
    return [
        (p.isdigit(), int(p) if p.isdecimal() and len(p) < 9 else 0, p) for p in name.split(".")
    ]
