"""Two small packages that also say where adapters' capacity belongs, called as they document it.

Neither is needed by gradrank; where one is not installed its row says so (``pip install
gradrank[bench]``, or ``pip install --no-deps aletheia-lora gradience``).
"""

import contextlib
import io
import json
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

PEERS = {"aletheia": "aletheia-lora", "gradience": "gradience"}


def missing(peer: str) -> str | None:
    """Return why a peer cannot be run, or None.

    Args:
        peer: A key of ``PEERS``; anything else is there.
    """
    package = PEERS.get(peer)
    if package is None:
        return None
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"Package '{package}' is not installed (pip install --no-deps {package})."
    return None


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Single texts out of batches, as ``aletheia-lora`` wants them.

    Args:
        batches: Batches with ``input_ids``.
    """

    def __init__(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        self._items = []
        for batch in batches:
            masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            self._items += list(zip(batch["input_ids"], masks, strict=True))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self._items[index]
        return {"input_ids": ids, "attention_mask": mask}


def aletheia(
    model: Any, batches: Sequence[dict[str, torch.Tensor]], texts: int | None
) -> dict[str, Any]:
    """Let ``aletheia-lora`` probe layers and choose half of them: its documented use.

    Args:
        model: A causal language model; its parameters are frozen afterwards.
        batches: Batches of texts.
        texts: How many texts it looks at, one at a time; None: its default.

    Returns:
        ``stored_bytes`` (what has to be kept to decide again) and ``decision_bytes``, as JSON
        text, and ``texts``.
    """
    package = import_module("aletheia_lora")
    more = {} if texts is None else {"probe_batches": texts}
    scores = package.gradient_probe(
        model=model, dataset=Texts(batches), num_layers=model.config.num_hidden_layers, **more
    )
    chosen = package.select_layers(scores)
    config = package.apply_aletheia_lora(model=model, selected_layers=chosen)
    return {
        "stored_bytes": len(json.dumps(scores)),
        "decision_bytes": len(json.dumps(_plain(config.to_dict()))),
        "texts": texts or 5,
    }


def gradience(folder: Path) -> dict[str, Any]:
    """Let ``gradience`` audit a trained adapter and suggest a rank per target.

    Without ratios to the base weights (its ``--no-udr``), which its suggestions do not use.

    Args:
        folder: A saved PEFT adapter.

    Returns:
        ``stored_bytes`` and ``decision_bytes``.
    """
    audit = import_module("gradience.vnext.audit.lora_audit")
    suggestion = import_module("gradience.vnext.rank_suggestion")
    with contextlib.redirect_stderr(io.StringIO()):  # it reports progress there
        found = audit.audit_lora_peft_dir(folder, compute_udr=False)
    report = suggestion.suggest_per_layer_ranks(found.to_summary_dict(include_layers=True))
    ranks = {"default_r": report.default_r, "rank_pattern": report.rank_pattern}
    return {
        "stored_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "decision_bytes": len(json.dumps(ranks)),
    }


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a configuration."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return value if isinstance(value, str | int | float | bool | None) else str(value)
