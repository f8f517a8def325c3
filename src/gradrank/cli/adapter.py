"""What an adapter's files say: configuration and tensor shapes, without torch and without a model.

The files are untrusted: patterns of the configuration are compared as text, never run as
expressions.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gradrank.core.errors import DataError
from gradrank.core.files import read_json
from gradrank.core.targets import Target

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is.

    Attributes:
        base_model: Name or folder of its base model, or "".
        task_type: PEFT's task type, or "".
        ranks: Rank per target.
        scales: Scale ``alpha / r`` (or ``alpha / sqrt(r)``) per target's name.
        other_parameters: Parameters of modules that are saved whole (a task head).
        dtype: Of the tensors.
        num_labels: Classes of a saved head, or None.
    """

    base_model: str
    task_type: str
    ranks: Mapping[Target, int]
    scales: Mapping[str, float]
    other_parameters: int
    dtype: str
    num_labels: int | None

    @property
    def parameters(self) -> int:
        """Parameters of all LoRA factors."""
        return sum(rank * target.cost for target, rank in self.ranks.items())


def read_adapter(folder: Path) -> AdapterFacts:
    """Read an adapter's configuration and the header of its weights.

    Args:
        folder: A PEFT adapter folder.

    Returns:
        The facts.

    Raises:
        DataError: If a file is missing, damaged, or of another kind of adapter.
    """
    config = read_json(folder / "adapter_config.json", "adapter configuration")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise DataError(f"'{folder}' is no LoRA adapter: its peft_type is {kind!r}.")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise DataError(f"'{folder}' has no adapter_model.safetensors (pickles are not read).")
    try:
        with safe_open(str(weights), framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = sorted({str(part.get_dtype()) for part in slices.values()})
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"'{weights}' is damaged: {error}.") from error
    ranks = _ranks(shapes)
    if not ranks:
        raise DataError(f"'{weights}' holds no LoRA factors of linear layers.")
    try:
        scales = {t.name: _scale(config, t.name, rank) for t, rank in ranks.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the adapter configuration in '{folder}' is malformed: {error}."
        ) from error
    spent = sum(rank * target.cost for target, rank in ranks.items())
    return AdapterFacts(
        base_model=str(config.get("base_model_name_or_path") or ""),
        task_type=str(config.get("task_type") or ""),
        ranks=ranks,
        scales=scales,
        other_parameters=sum(math.prod(shape) for shape in shapes.values()) - spent,
        dtype=", ".join(dtypes),
        num_labels=_num_labels(shapes),
    )


def _ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[Target, int]:
    found = {}
    # Files sort layer 10 before layer 2; people do not.
    for key, shape in sorted(shapes.items(), key=lambda item: _natural(item[0])):
        stem, sign, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        other = shapes.get(key.replace(".lora_A.", ".lora_B."), ())
        if sign and len(shape) == len(other) == 2 and shape[0] == other[1]:
            found[Target(stem, shape[1], other[0])] = shape[0]
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = name.split(".")
    return [(p.isdigit(), int(p) if p.isdecimal() else 0, p) for p in parts]


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that names a module, as PEFT would.

    Known forms are an anchored, escaped full name (gradrank's own) and a plain ending of the name.
    """
    for pattern, value in patterns.items():
        plain = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
        if name == plain or (not pattern.startswith("^") and name.endswith("." + plain)):
            return value
    return default


def _num_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    heads = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    sizes = [shape[0] for key, shape in shapes.items() if key.endswith(heads) and len(shape) == 2]
    return sizes[0] if sizes else None
