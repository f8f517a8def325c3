"""llama.cpp: a GGUF adapter written directly, beside a PEFT folder that its converter reads."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from gradrank.core.errors import PlanError
from gradrank.core.scales import alpha_for
from gradrank.serving.adapter import Adapter
from gradrank.serving.engines.engine import Base, plain_only
from gradrank.serving.facts import AdapterFacts, describe
from gradrank.serving.folder import write_exact
from gradrank.serving.gguf_file import placed, read_gguf, scale, write_gguf
from gradrank.serving.gguf_names import HEADS, Family, family_of, model_type
from gradrank.serving.reading import read_adapter

FILE = "adapter.gguf"
_NO_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_RUN = "llama-server -m BASE.gguf --lora {} (llama-cli takes the same flag)"
_CONVERT = "python convert_lora_to_gguf.py --base BASE_FOLDER --outtype f32 FOLDER"


class LlamaCpp:
    """One alpha for the whole adapter; the scale of a module is alpha over its own rank."""

    name: ClassVar[str] = "llama.cpp"
    pads: ClassVar[str] = "none"
    paddings: ClassVar[tuple[str, ...]] = ("none", "groups", "all")

    def judge(self, facts: AdapterFacts) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`; its converter is judged."""
        found = [f"it has {feature}, which llama.cpp does not load" for feature in _more(facts)]
        if facts.task_type in _NO_TEXT:
            found.append(
                f"it is for {facts.task_type}, and llama.cpp serves models that write text"
            )
        if facts.config.kind == "ADALORA":
            found.append("its factors have AdaLoRA's names, which llama.cpp's converter refuses")
            return tuple(found)
        if facts.config.fields["fan_in_fan_out"]:
            found.append("llama.cpp's converter swaps the factors of layers stored transposed")
        alpha = float(facts.config.fields["lora_alpha"])
        scales = facts.scales
        wrong = {
            target.name: (scale(alpha, rank), scales[target.name])
            for target, rank in facts.ranks.items()
            if not np.isclose(scale(alpha, rank), scales[target.name], rtol=1e-6, atol=0.0)
        }
        if wrong:
            name, (engine, own) = next(iter(wrong.items()))
            why = "rsLoRA" if facts.config.fields["use_rslora"] else "alpha_pattern"
            found.append(
                f"llama.cpp's converter reads one lora_alpha ({alpha:g}) and no {why}: '{name}' "
                f"would be scaled by {engine:g} instead of {own:g} ({len(wrong)} of "
                f"{len(scales)} modules)"
            )
        return tuple(found)

    def write(self, adapter: Adapter, folder: Path, base: Base) -> None:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        plain_only(adapter, self.name)
        family = family_of(base)
        _check_base(adapter, base, family)
        made, alpha = one_alpha(adapter)
        factors = placed(made, family, base) if family else {}
        write_exact(made, folder, base.modules)
        if family:
            write_gguf(factors, alpha, family.architecture, folder / FILE)

    def read(self, folder: Path, base: Base) -> Adapter:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        family = family_of(base)
        if family and (folder / FILE).is_file():
            return read_gguf(folder / FILE, family, base)
        # What llama.cpp's converter would make of the folder.
        adapter = read_adapter(folder)
        plain_only(adapter, self.name)
        alpha = float(describe(folder).config.fields["lora_alpha"])
        updates = adapter.updates.values()
        return adapter.with_updates(replace(u, scaling=scale(alpha, u.rank)) for u in updates)

    def advice(self, adapter: Adapter, base: Base | None = None) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`.

        Args:
            adapter: What was written.
            base: The base model; without it, both ways are told.

        Returns:
            Lines.
        """
        del adapter
        run = f"serve it with {_RUN.format(FILE)}"
        if base is None:
            return (run, f"where {FILE} was not written, make it with {_CONVERT}")
        if family_of(base):
            return (run,)
        return (
            f"{FILE} was not written, because gradrank has no proven tensor names for a "
            f"'{model_type(base)}'; make it with llama.cpp's converter: {_CONVERT}",
            run,
        )


def one_alpha(adapter: Adapter) -> tuple[Adapter, float]:
    """Return the same adapter with scales that are one alpha over each module's rank.

    Args:
        adapter: The adapter; modules of rank 0 are left out.

    Returns:
        The adapter, and alpha: what most modules have already, so that most factors stay as they
        are.

    Raises:
        PlanError: If nothing is left, or a factor's type cannot hold the product.
    """
    updates = [update for update in adapter.updates.values() if update.rank]
    if not updates:
        raise PlanError("every module of the adapter has rank 0, so there is nothing to export.")
    usual = Counter(alpha_for(u.scaling, u.rank, root=False) for u in updates if u.scaling)
    # Kept in single precision by the engine, so rounded before anything is folded.
    alpha = float(np.float32(usual.most_common(1)[0][0])) if usual else 1.0
    made = adapter.with_updates(u.folded(alpha / u.rank) for u in updates)
    for update in made.updates.values():
        if not bool(torch.isfinite(update.b).all()):
            raise PlanError(
                f"the scale of '{update.name}' does not fit into {update.b.dtype}. Export in "
                "float32."
            )
    return made, alpha


def _more(facts: AdapterFacts) -> list[str]:
    found = list(facts.config.features)
    embeddings = sorted(key for key in facts.shapes if ".lora_embedding_" in key)
    if embeddings:
        found.append(f"low-rank embeddings ('{embeddings[0].partition('.lora_')[0]}')")
    return found


def _check_base(adapter: Adapter, base: Base, family: Family | None) -> None:
    heads = [name for name in HEADS if name in base.modules]
    deep = any(name.startswith(tuple(f"{head}." for head in HEADS)) for name in base.modules)
    if not heads or deep:
        raise PlanError(
            f"llama.cpp serves models that write text, and this '{model_type(base)}' has no plain "
            "language-modelling head. Export with target 'peft' or 'merged'."
        )
    tied = base.config.get("tie_word_embeddings") or (family is not None and family.tied)
    adapted = [head for head in heads if head in adapter.updates]
    if tied and adapted:
        raise PlanError(
            f"the adapter updates '{adapted[0]}', which this model shares with its embeddings; "
            "llama.cpp has no tensor of its own for it. Leave it out of the targets, or export "
            "with target 'merged'."
        )
