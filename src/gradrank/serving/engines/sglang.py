"""SGLang: one rank everywhere, every scale folded into B, whole q/k/v and gate/up groups."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from gradrank.core.errors import PlanError
from gradrank.core.files import read_json
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.configuration import FILE as CONFIG
from gradrank.serving.engines.engine import Base, plain_only
from gradrank.serving.facts import FILE as WEIGHTS
from gradrank.serving.facts import PREFIX, AdapterFacts
from gradrank.serving.folder import write_exact
from gradrank.serving.padding import GROUPS
from gradrank.serving.patterns import Patterns

_LAYER = re.compile(r"layers\.(\d+)\.")
_QKV, _GATE_UP = GROUPS
_FUSED = {_QKV: "qkv_proj", _GATE_UP: "gate_up_proj"}
# Modules of ordinary decoders for which the engine keeps buffers without a word of the model's.
_SERVED = (*_QKV, *_GATE_UP, "o_proj", "down_proj", *_FUSED.values())
# Served as well, in buffers of their own, which are not proven here.
_OUTSIDE = ("lm_head", "embed_tokens")


class Sglang:
    """One buffer per fused group and layer, copied into only if the shapes agree."""

    name: ClassVar[str] = "sglang"
    pads: ClassVar[str] = "all"
    paddings: ClassVar[tuple[str, ...]] = ("all",)

    def judge(self, facts: AdapterFacts) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        config = facts.config
        if config.kind == "ADALORA":
            return ("SGLang asserts that an adapter is LoRA, and this one is AdaLoRA",)
        found = [f"it has {item}, which SGLang refuses or leaves out" for item in config.features]
        if isinstance(config.targets, Patterns):
            found.append("its target_modules is an expression; SGLang takes a list of names only")
        ranks = {target.name: rank for target, rank in facts.ranks.items()}
        found += _problems(ranks)[:1]
        uneven = [name for name, rank in ranks.items() if rank != config.rank]
        if uneven:
            found.append(
                f"SGLang copies factors into buffers of rank {config.rank} and refuses others: "
                f"'{uneven[0]}' has rank {ranks[uneven[0]]} ({len(uneven)} of {len(ranks)} modules)"
            )
        read, scales = config.fields["lora_alpha"] / config.rank, facts.scales
        wrong = [name for name, own in scales.items() if not math.isclose(own, read, rel_tol=1e-6)]
        if wrong:
            why = "use_rslora" if config.fields["use_rslora"] else "alpha_pattern"
            found.append(
                f"SGLang ignores {why}: '{wrong[0]}' would be scaled by {read:.4g} instead of "
                f"{scales[wrong[0]]:.4g} ({len(wrong)} of {len(scales)} modules)"
            )
        return tuple(found)

    def write(self, adapter: Adapter, folder: Path, base: Base) -> None:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        plain_only(adapter, self.name)
        uneven = sorted(set(adapter.ranks.values()))
        if len(uneven) > 1:
            raise PlanError(
                f"SGLang serves one rank only, and the adapter has {uneven[0]} to {uneven[-1]}. "
                "Export with padding 'all'."
            )
        if not adapter.max_rank:
            raise PlanError("every module of the adapter has rank 0; there is nothing to export.")
        problems = _problems(adapter.ranks)
        outside = [name for name in adapter.ranks if name.rpartition(".")[2] in _OUTSIDE]
        problems += [f"gradrank has no proof that SGLang serves '{n}' rightly" for n in outside]
        if problems:
            raise PlanError(f"{problems[0]}. Leave it out, or export with target 'merged'.")
        made = adapter.with_updates(u.folded() for u in adapter.updates.values())
        for update in made.updates.values():
            if not bool(update.b.isfinite().all()):
                raise PlanError(
                    f"the scale of '{update.name}' does not fit into {update.b.dtype}. Export in "
                    "float32."
                )
        # Without the base model's names, targets stay a list: an expression would be refused.
        most = made.max_rank
        write_exact(made, folder, rank=most, alpha=most)

    def read(self, folder: Path, base: Base) -> Adapter:
        """Read a folder by SGLang's rule. This is a test double of SGLang's loading code.

        Written after ``sglang/srt/lora/{lora_config,lora,mem_pool,lora_manager,utils}.py`` of
        release 0.5.23, and compared with that code as it runs (``benchmarks/proof_sglang.py``).

        Args:
            folder: An adapter's folder.
            base: The base model.

        Returns:
            What SGLang would compute with.

        Raises:
            PlanError: If SGLang would refuse the folder or fail on it.
        """
        rank, scale = _stated(read_json(folder / CONFIG, "adapter configuration"))
        if (folder / "added_tokens.json").is_file():
            raise PlanError("SGLang would refuse the adapter: it adds tokens.")
        layers: dict[int, dict[str, dict[str, Tensor]]] = {}
        for name, both in _pairs(load_file(folder / WEIGHTS)).items():
            place = _LAYER.search(f"{name}.")
            assert place is not None
            layers.setdefault(int(place[1]), {})[name] = both
        count = base.config.get("num_hidden_layers")
        if count is not None and layers and max(layers) >= count:
            raise PlanError(f"SGLang would fail on layer {max(layers)}: the model has {count}.")
        found: dict[str, Update] = {}
        for modules in layers.values():
            for name, (a, b) in _layer(modules, rank).items():
                found[name] = Update(name, a, b, scale)
        return Adapter(found)

    def advice(self, adapter: Adapter, base: Base | None = None) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        del base
        targets = sorted({name.rpartition(".")[2] for name in adapter.updates})
        return (
            "serve it with python -m sglang.launch_server --model-path BASE --enable-lora "
            f"--lora-paths NAME=FOLDER --max-lora-rank {adapter.max_rank} --lora-target-modules "
            + " ".join(targets),
        )


def _problems(names: Collection[str]) -> list[str]:
    """Return why SGLang would fail on, or pass over, modules of these names."""
    present, found = set(names), []
    slots: dict[tuple[str, str], str] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        place = _LAYER.search(f"{name}.")
        if last in _OUTSIDE:
            continue
        if place is None:
            found.append(f"'{name}' is in no 'layers.N', so SGLang passes over it in silence")
            continue
        if last not in _SERVED or ".experts." in name:
            found.append(f"SGLang keeps no buffer for '{name}' in ordinary decoders")
            continue
        twin = slots.setdefault((place[1], last), name)
        if twin != name:
            found.append(f"SGLang keeps one buffer for '{twin}' and '{name}'")
        have = {other for group in GROUPS for other in group if f"{stem}.{other}" in present}
        lacking = _lacking(last, have)
        if lacking:
            found.append(f"SGLang fuses '{name}' with '{stem}.{lacking}', which is not there")
    return found


def _lacking(last: str, have: set[str]) -> str | None:
    """Return the member that a fused group cannot do without, if it is absent."""
    if last in _QKV:
        return next((other for other in ("q_proj", "v_proj") if other not in have), None)
    return "gate_proj" if last == "up_proj" and "gate_proj" not in have else None


def _stated(config: Any) -> tuple[int, float]:
    """Return the rank and the scale that a configuration states."""
    if str(config["peft_type"]).lower() != "lora" or config.get("use_dora"):
        raise PlanError("SGLang would refuse the configuration: it is no plain LoRA.")
    targets = config["target_modules"]
    if isinstance(targets, str) and targets not in {"all", "all-linear"}:
        raise PlanError("SGLang would refuse the configuration: its targets are an expression.")
    return config["r"], config["lora_alpha"] / config["r"]


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return factors by module name, for everything that is in some layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if any(f".{name}.lora_" in f".{key}" for name in _OUTSIDE):
            raise PlanError(f"this test double does not cover '{key}'.")
        # Passed over in silence: what is in no layer, and a bias, whose place its factor takes.
        if not _LAYER.search(key) or key.endswith(".lora_B.bias"):
            continue
        name, sign, factor = key.removesuffix(".weight").rpartition(".lora_")
        if not sign or not key.endswith(".weight"):
            raise PlanError(f"SGLang would put the weight '{key}' where factors belong.")
        found.setdefault(name.removeprefix(PREFIX), {})[factor] = tensor
    lone = [name for name, both in found.items() if both.keys() != {"A", "B"}]
    if lone:
        raise PlanError(f"SGLang would fail on '{lone[0]}', which has one factor only.")
    return found


def _layer(modules: Mapping[str, dict[str, Tensor]], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both factors of every module of one layer, as its buffers would hold them."""
    left = {name: (both["A"], both["B"]) for name, both in modules.items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    slots: set[str] = set()
    for name in modules:
        stem, _, last = name.rpartition(".")
        group = next((group for group in GROUPS if group[0] == last), None)
        slot = _FUSED[group] if group else last
        if group:
            found |= _fused(left, stem, group, rank)
        elif last not in _SERVED:
            raise PlanError(f"SGLang keeps no buffer for '{name}' in ordinary decoders.")
        elif last not in {*_QKV, *_GATE_UP}:
            found[name] = left.pop(name)
        else:
            continue
        if slot in slots:
            raise PlanError(f"SGLang would load '{name}' over another module of its layer.")
        slots.add(slot)
    if left:
        raise PlanError(f"SGLang would fail on '{min(left)}', whose fused group lacks its first.")
    for name, (a, b) in found.items():
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise PlanError(
                f"SGLang would fail on '{name}': its factors {tuple(a.shape)} and "
                f"{tuple(b.shape)} do not fill buffers of rank {rank}."
            )
    return found


def _fused(
    left: dict[str, tuple[Tensor, Tensor]], stem: str, group: tuple[str, ...], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Take a fused group and return what each of its members is given."""
    members = [left.pop(f"{stem}.{member}", None) for member in group]
    last = members[-1]
    if last is None and group == _GATE_UP:
        last = members[-1] = _zeros(members[0])
    if last is None:
        raise PlanError(f"SGLang would fail on '{stem}.{group[-1]}', which is not there.")
    parts = [_zeros(last) if part is None else part for part in members]
    if len({b.shape[1] for _, b in parts}) > 1:
        ranks = ", ".join(str(b.shape[1]) for _, b in parts)
        raise PlanError(
            f"SGLang would fail on '{stem}.{group[0]}', fused with others of rank {ranks}."
        )
    joined = torch.cat([a for a, _ in parts])
    if joined.shape[0] != rank * len(group):
        raise PlanError(
            f"SGLang would fail on '{stem}.{group[0]}': its fused group has {joined.shape[0]} rows "
            f"where the buffer has {rank * len(group)}."
        )
    blocks = joined.split(rank)
    return {
        f"{stem}.{member}": (block, b)
        for member, block, (_, b) in zip(group, blocks, parts, strict=True)
    }


def _zeros(like: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    assert like is not None
    return torch.zeros_like(like[0]), torch.zeros_like(like[1])
