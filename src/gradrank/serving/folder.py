"""Write an adapter as a PEFT folder: safetensors and a configuration without open patterns."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gradrank.core.errors import PlanError
from gradrank.core.scales import alpha_for, anchored, tidy
from gradrank.serving.adapter import Adapter
from gradrank.serving.configuration import FILE as CONFIG
from gradrank.serving.facts import FILE as WEIGHTS
from gradrank.serving.facts import PREFIX

# What PEFT keeps in a saved configuration and engines never look at.
_FIXED = {"peft_type": "LORA", "inference_mode": True, "layers_to_transform": None}


def write_exact(
    adapter: Adapter,
    folder: Path,
    modules: Collection[str] = (),
    *,
    rank: int | None = None,
    alpha: float | None = None,
) -> None:
    """Write an adapter with the rank and the scale of every module in anchored patterns.

    Stock PEFT then computes with just these, whatever the general rank and alpha are. Engines
    that look at the general ones only want certain values there.

    Args:
        adapter: The adapter.
        folder: An existing folder.
        modules: Names of all modules of the base model. Where one ends in the name of another,
            which is adapted, targets are written as one anchored expression instead of a list.
        rank: The configuration's ``r``; default: the commonest rank.
        alpha: The configuration's ``lora_alpha``; default: the commonest alpha.

    Raises:
        PlanError: If the adapter updates nothing.
    """
    if not adapter.updates:
        raise PlanError("the adapter updates no module, so there is nothing to write.")
    ranks = adapter.ranks
    alphas = {name: alpha_for(u.scaling, u.rank, root=False) for name, u in adapter.updates.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    if rank is None:
        rank = common
    if alpha is None:
        usual = [alphas[name] for name, own in ranks.items() if own == common]
        alpha = Counter(usual).most_common(1)[0][0]
    fields = {
        "r": rank,
        "lora_alpha": tidy(alpha),
        "rank_pattern": {anchored(n): own for n, own in ranks.items() if own != rank},
        "alpha_pattern": {anchored(n): own for n, own in alphas.items() if own != alpha},
    }
    _write(adapter, folder, fields, modules)


def stored(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors by the keys of PEFT's files.

    Args:
        adapter: The adapter.
    """
    found: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = update.a
        found[f"{PREFIX}{name}.lora_B.weight"] = update.b
    found |= {PREFIX + key: tensor for key, tensor in adapter.other.items()}
    # Two names of one storage are refused by safetensors, and views drag whole storages along.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}


def _write(
    adapter: Adapter, folder: Path, fields: Mapping[str, Any], modules: Collection[str]
) -> None:
    kept = {key: value for key, value in adapter.config.items() if value is not None}
    config = {
        **kept,
        "rank_pattern": {},
        "alpha_pattern": {},
        **fields,
        **_FIXED,
        "use_rslora": False,
        "target_modules": _targets([*adapter.updates, *_embeddings(adapter)], modules),
    }
    save_file(stored(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _embeddings(adapter: Adapter) -> list[str]:
    sign = ".lora_embedding_A"
    return sorted(key.removesuffix(sign) for key in adapter.other if key.endswith(sign))


def _targets(names: list[str], modules: Collection[str]) -> list[str] | str:
    chosen = set(names)
    for module in modules:
        parts = module.split(".")
        if any(".".join(parts[i:]) in chosen for i in range(1, len(parts))) and (
            module not in chosen
        ):
            return "^(?:" + "|".join(re.escape(name) for name in names) + ")$"
    return names
