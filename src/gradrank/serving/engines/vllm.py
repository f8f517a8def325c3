"""vLLM: ranks as they are, every scale folded into B, the largest rank in the configuration.

Release 0.11.0 reads neither ``rank_pattern`` nor ``alpha_pattern``; release 0.33.0 reads both. What
is written here has scale 1 by either rule, and by PEFT's.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

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

# What --max-lora-rank takes in both releases (0.33.0 takes 1 as well).
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Served by some model classes only, and not proven here.
_UNPROVEN = ("lm_head", "embed_out", "output_layer")
_SCORES = {"classifier", "score"}


class Vllm:
    """One global scale; buffers of the server's largest rank, into which any smaller one fits."""

    name: ClassVar[str] = "vllm"
    pads: ClassVar[str] = "none"
    paddings: ClassVar[tuple[str, ...]] = ("none", "groups", "all")

    def judge(self, facts: AdapterFacts) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        if facts.config.kind == "ADALORA":
            return ("vLLM reads LoRA only; AdaLoRA's factors have names that it refuses",)
        found = list(_more(facts))
        highest = max(facts.ranks.values())
        if highest > MAX_RANKS[-1]:
            found.append(f"its largest rank is {highest}; vLLM takes {MAX_RANKS[-1]} at most")
        fields = facts.config.fields
        root = fields["use_rslora"]
        read = fields["lora_alpha"] / (math.sqrt(facts.config.rank) if root else facts.config.rank)
        scales = facts.scales
        wrong = [name for name, own in scales.items() if not math.isclose(own, read, rel_tol=1e-6)]
        if wrong:
            found.append(
                "vLLM 0.11.0 ignores alpha_pattern and rank_pattern (0.33.0 reads them): "
                f"'{wrong[0]}' would be scaled by {read:.4g} instead of {scales[wrong[0]]:.4g} "
                f"({len(wrong)} of {len(scales)} modules)"
            )
        return tuple(found)

    def write(self, adapter: Adapter, folder: Path, base: Base) -> None:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        plain_only(adapter, self.name)
        made = _unscaled(adapter)
        most = made.max_rank
        write_exact(made, folder, base.modules, rank=most, alpha=most)

    def read(self, folder: Path, base: Base) -> Adapter:
        """Read a folder by vLLM's rule. This is a test double of vLLM's loading code.

        Written after ``vllm/lora/{peft_helper,models,lora_weights,utils}.py`` and
        ``vllm/lora/layers/*`` of release 0.11.0, and compared with that code as it runs
        (``benchmarks/proof_vllm.py``); for files without patterns release 0.33.0 does the same.
        The largest rank of the server is the one that :meth:`advice` names.

        Args:
            folder: An adapter's folder.
            base: The base model.

        Returns:
            What vLLM would compute with: factors in buffers of its largest rank, scale 1.

        Raises:
            PlanError: If vLLM would refuse the folder.
        """
        config = read_json(folder / CONFIG, "adapter configuration")
        scale, rank = _scale(config)
        most = largest_rank(rank)
        pairs = _pairs(load_file(folder / WEIGHTS))
        known = {name.rpartition(".")[2] for name in base.modules}
        found: dict[str, Update] = {}
        for name, (a, b) in pairs.items():
            if known and name.rpartition(".")[2] not in known:
                raise PlanError(f"vLLM would refuse '{name}': the model has no such module.")
            if a.shape[0] > most or b.shape[1] > most:
                raise PlanError(
                    f"vLLM would fail on '{name}': rank {a.shape[0]} does not fit into buffers of "
                    f"rank {most}, which the configuration's r = {rank} asks for."
                )
            # Only the end of a name is compared; a wrong beginning is passed over in silence.
            if known and name not in base.modules:
                continue
            wide = a.new_zeros(most, a.shape[1])
            high = b.new_zeros(b.shape[0], most)
            wide[: a.shape[0]], high[:, : b.shape[1]] = a, b * scale
            found[name] = Update(name, wide, high, 1.0)
        return Adapter(found)

    def advice(self, adapter: Adapter, base: Base | None = None) -> tuple[str, ...]:
        """See :class:`gradrank.serving.engines.engine.Engine`."""
        del base
        flags = f"--enable-lora --max-lora-rank {largest_rank(adapter.max_rank)}"
        return (f"serve it with vllm serve BASE {flags} --lora-modules NAME=FOLDER",)


def largest_rank(rank: int) -> int:
    """Return the smallest ``--max-lora-rank`` that a rank fits into.

    Args:
        rank: A rank.

    Raises:
        PlanError: If there is none.

    Examples:
        >>> largest_rank(5), largest_rank(16), largest_rank(257)
        (8, 16, 320)
    """
    fitting = [most for most in MAX_RANKS if most >= rank]
    if not fitting:
        raise PlanError(
            f"rank {rank} is more than vLLM's --max-lora-rank can be ({MAX_RANKS[-1]}). Give the "
            "adapter a smaller budget, or export with target 'merged'."
        )
    return fitting[0]


def _unscaled(adapter: Adapter) -> Adapter:
    """Return the same adapter with scale 1 everywhere, or refuse what vLLM does not serve."""
    made = adapter.with_updates(u.folded() for u in adapter.updates.values() if u.rank)
    if not made.updates:
        raise PlanError("every module of the adapter has rank 0, so there is nothing to export.")
    largest_rank(made.max_rank)
    for update in made.updates.values():
        reason = _unserved(update.name)
        if reason:
            raise PlanError(
                f"'{update.name}' is {reason}. Leave it out, or export with target 'merged'."
            )
        if not bool(update.b.isfinite().all()):
            raise PlanError(
                f"the scale of '{update.name}' does not fit into {update.b.dtype}. Export in "
                "float32."
            )
    return made


def _unserved(name: str) -> str:
    if ".experts." in f"{name}.":
        return "an expert, which vLLM serves for some models and layouts only"
    if name.rpartition(".")[2] in _UNPROVEN:
        return "an output layer, whose adapters vLLM serves for some models only"
    return ""


def _more(facts: AdapterFacts) -> list[str]:
    """Return what an adapter has beside factors of linear modules that vLLM refuses or ignores."""
    found = [f"it has {item}, which vLLM does not load" for item in facts.config.features]
    heads = set(facts.config.fields["modules_to_save"])
    if heads and heads <= _SCORES:
        found = [
            f"{item} in release 0.11.0 (0.33.0 does)" if "modules_to_save" in item else item
            for item in found
        ]
    names = (target.name for target in facts.ranks)
    found += [f"'{name}' is {reason}" for name in names if (reason := _unserved(name))][:1]
    layers = [key for key in facts.shapes if ".lora_embedding_" in key or ".base_layer." in key]
    odd = [key for key in layers if ".embed_tokens.lora_" not in f".{key}"]
    if odd:
        found.append(f"vLLM 0.11.0 refuses its weight '{odd[0]}'")
    return found


def _scale(config: Any) -> tuple[float, int]:
    """Return the global scale and the rank that a configuration states."""
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if missing:
        raise PlanError(f"vLLM would refuse the configuration: it lacks '{missing[0]}'.")
    if config.get("use_dora") or config.get("modules_to_save"):
        raise PlanError("vLLM would refuse the configuration: DoRA, or modules saved whole.")
    if config.get("bias", "none") != "none":
        raise PlanError("vLLM would refuse the configuration: trained biases.")
    rank, alpha = config["r"], config["lora_alpha"]
    if rank <= 0:
        raise PlanError(f"vLLM would refuse the configuration: its rank is {rank}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both factors by module name, as the names of the tensors say."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, last = key.rpartition(".")
        name, _, factor = stem.rpartition(".")
        if last != "weight" or factor not in {"lora_A", "lora_B"}:
            raise PlanError(f"vLLM would refuse the weight '{key}'.")
        halves.setdefault(name.removeprefix(PREFIX), {})[factor] = tensor
    lone = [name for name, both in halves.items() if len(both) != 2]
    if lone:
        raise PlanError(f"vLLM would fail on '{lone[0]}', which has one factor only.")
    return {name: (both["lora_A"], both["lora_B"]) for name, both in halves.items()}
