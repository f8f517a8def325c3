"""What an adapter's configuration says, with every field checked before anything relies on it."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradrank.core.errors import DataError
from gradrank.core.files import read_json
from gradrank.serving.patterns import Patterns

FILE = "adapter_config.json"
MOST_RANK = 16_384
_LARGEST = 32 * 2**20
# One expression may list every module of a large model.
_LONGEST_TARGETS = 2**20
_KINDS = ("LORA", "ADALORA")
# Begin from the base model's own weights and change them, so the factors alone mean nothing.
_CHANGES_BASE = re.compile(r"pissa(_niter_\d{1,3})?|olora")
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
# Fields that change what is computed and that are not read here, with the values that are harmless.
_UNREAD = (
    "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    "megatron_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# Fields that leave out some of what the targets match.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_TEXTS = ("base_model_name_or_path", "task_type", "revision", "bias")
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True)
class Configuration:
    """A checked configuration.

    Attributes:
        kind: ``LORA`` or ``ADALORA``.
        fields: The configuration, as far as it is passed on.
        rank: The rank that modules have for which no pattern says another one.
        alphas: Alpha by pattern.
        ranks: Rank by pattern.
        features: What a plain LoRA engine cannot express, in words.
        targets: ``target_modules``: ends of names, one expression, or None if they say nothing.
        narrowed: Whether further fields choose among what the targets match.
    """

    kind: str
    fields: Mapping[str, Any]
    rank: int
    alphas: Patterns
    ranks: Patterns
    features: tuple[str, ...]
    targets: frozenset[str] | Patterns | None
    narrowed: bool

    def scale(self, name: str, rank: int) -> float:
        """Return the scale of a module's update.

        Args:
            name: Full name of the module.
            rank: Its rank.

        Raises:
            DataError: If alpha is no number, or the scale is not finite.
        """
        alpha = self.alphas.find(name, self.fields["lora_alpha"])
        if self.kind == "ADALORA":
            # PEFT divides by the rank that the adapter began with, and by a little more.
            return float(self.fields["lora_alpha"] or self.rank) / (self.rank + 1e-5)
        value = _number(alpha, f"alpha of '{name}'")
        return value / (math.sqrt(rank) if self.fields["use_rslora"] else rank)

    def lacks(self, modules: Iterable[str], present: Collection[str]) -> list[str]:
        """Return the modules that the targets name and that are not present.

        Args:
            modules: Names of the base model's modules that can be adapted.
            present: Names of those that the weights are for.

        Returns:
            Names; empty also where further fields choose among what the targets match.
        """
        if self.targets is None or self.narrowed:
            return []
        return [n for n in modules if n not in present and self.names(n)]

    def names(self, module: str) -> bool:
        """Return whether the targets name a module.

        Args:
            module: Full name of the module.
        """
        if isinstance(self.targets, Patterns):
            return bool(self.targets.find(module, False))
        return self.targets is None or _ends_in(module, self.targets)

    def told_rank(self, name: str) -> Any:
        """Return the rank that PEFT would build for a module.

        Args:
            name: Full name of the module.
        """
        return self.ranks.find(name, self.rank)


def read_configuration(folder: Path) -> Configuration:
    """Read ``adapter_config.json``.

    Args:
        folder: An adapter's folder.

    Returns:
        The configuration.

    Raises:
        DataError: If it is missing, too large, malformed, of another kind of adapter, or asks for
            something that is not read here, by name.
    """
    path = folder / FILE
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise DataError(f"'{path}' is larger than {_LARGEST >> 20} MiB and was not read.")
    raw = read_json(path, "adapter configuration")
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind not in _KINDS:
        raise DataError(
            f"'{folder}' is no LoRA or AdaLoRA adapter: its peft_type is {str(kind)[:40]!r}. "
            "Only adapters that PEFT saved as LORA or ADALORA are read."
        )
    for name in _UNREAD:
        if raw.get(name):
            raise DataError(
                f"the adapter in '{folder}' uses '{name}', which gradrank does not read: its "
                "updates are not plain low-rank products of single modules. Use PEFT itself."
            )
    try:
        return _checked(kind, raw)
    except DataError as error:
        raise DataError(f"the configuration in '{folder}' is malformed: {error}") from error


def _checked(kind: str, raw: Mapping[str, Any]) -> Configuration:
    fields: dict[str, Any] = {}
    for name in _TEXTS:
        fields[name] = _typed(raw, name, str, None)
    for name in _FLAGS:
        fields[name] = bool(_typed(raw, name, bool, False))
    fields["lora_alpha"] = _number(raw.get("lora_alpha", 8), "lora_alpha")
    fields["lora_dropout"] = _number(raw.get("lora_dropout", 0.0), "lora_dropout")
    fields["modules_to_save"] = _names(raw, "modules_to_save")
    fields["trainable_token_indices"] = _typed(raw, "trainable_token_indices", (list, dict), None)
    start = raw.get("init_lora_weights", True)
    changes = isinstance(start, str) and bool(_CHANGES_BASE.fullmatch(start))
    if not changes and not (isinstance(start, bool | str | None) and start in _PLAIN_STARTS):
        raise DataError(f"init_lora_weights is {str(start)[:40]!r}, which gradrank does not read.")
    fields["init_lora_weights"] = start if changes else True
    fields["bias"] = fields["bias"] or "none"
    if fields["bias"] not in {"none", "all", "lora_only"}:
        raise DataError(f"bias is {fields['bias'][:40]!r}.")
    rank = raw.get("init_r" if kind == "ADALORA" else "r", 12 if kind == "ADALORA" else 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MOST_RANK:
        raise DataError(
            f"the rank is {str(rank)[:40]!r}; a whole number from 1 to {MOST_RANK:,} is needed."
        )
    patterns = {"alpha_pattern": {}, "rank_pattern": {}}
    for name in patterns if kind == "LORA" else ():
        patterns[name] = _typed(raw, name, dict, None) or {}
    return Configuration(
        kind=kind,
        fields=fields,
        rank=rank,
        alphas=Patterns(patterns["alpha_pattern"], "alpha_pattern"),
        ranks=Patterns(patterns["rank_pattern"], "rank_pattern"),
        features=_features(fields),
        targets=_targets(raw),
        narrowed=any(raw.get(name) for name in _NARROWING),
    )


def _features(fields: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if fields["use_dora"]:
        found.append("DoRA magnitudes (use_dora)")
    if fields["bias"] != "none":
        found.append(f"trained biases (bias={fields['bias']!r})")
    if fields["lora_bias"]:
        found.append("biases of the factors (lora_bias)")
    if fields["modules_to_save"]:
        names = ", ".join(fields["modules_to_save"][:4])
        found.append(f"modules that are saved whole (modules_to_save: {names})")
    if fields["trainable_token_indices"]:
        found.append("trained tokens (trainable_token_indices)")
    if isinstance(fields["init_lora_weights"], str):
        found.append(
            f"a start that changes the base weights (init_lora_weights="
            f"{fields['init_lora_weights']!r})"
        )
    return tuple(found)


def _ends_in(name: str, ends: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))


def _targets(raw: Mapping[str, Any]) -> frozenset[str] | Patterns | None:
    value = _typed(raw, "target_modules", (list, str), None)
    if value is None or value == "all-linear":
        return None
    if isinstance(value, str):
        return Patterns({f"^(?:{value})": True}, "target_modules", longest=_LONGEST_TARGETS)
    if not all(isinstance(item, str) for item in value):
        raise DataError("'target_modules' holds something else than names.")
    return frozenset(value)


def _typed(raw: Mapping[str, Any], name: str, kinds: Any, default: Any) -> Any:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds):
        raise DataError(f"'{name}' is {str(value)[:40]!r}.")
    return value


def _names(raw: Mapping[str, Any], name: str) -> list[str]:
    found = _typed(raw, name, list, None) or []
    for item in found:
        if not isinstance(item, str) or not re.fullmatch(r"[\w.-]{1,500}", item):
            raise DataError(f"'{name}' holds {str(item)[:40]!r}, which is no name of a module.")
    return list(found)


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise DataError(f"{what} is {str(value)[:40]!r}, which is no number.")
    if not abs(value) < 1e9:  # of any length: 10**400 has no float
        raise DataError(f"{what} is {str(value)[:40]}; a number below a billion is needed.")
    return value
