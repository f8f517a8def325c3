"""The models of PiLoRA's tables as shapes: built from configurations on the meta device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from gradrank.core.targets import Target
from gradrank.signals.facts import find_targets
from gradrank.signals.layers import base_parameters


@dataclass(frozen=True)
class Shape:
    """A model without weights.

    Attributes:
        name: What the paper calls it.
        targets: Every linear layer of its blocks, in model order.
        bases: What a percentage may be taken of: parameters by a name in words.
        head: Parameters of a task head that is trained beside the adapter; 0 if there is none.
    """

    name: str
    targets: tuple[Target, ...]
    bases: Mapping[str, int]
    head: int = 0

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the linear layers inside one block, in model order."""
        return tuple(dict.fromkeys(type_of(target) for target in self.targets))

    def of_types(self, types: Sequence[str]) -> tuple[Target, ...]:
        """Return the targets of some types, of all blocks.

        Args:
            types: Names as in ``types``.
        """
        return tuple(target for target in self.targets if type_of(target) in types)

    def choices(self) -> Iterator[tuple[str, ...]]:
        """Yield every choice of at least one type."""
        for size in range(1, len(self.types) + 1):
            yield from combinations(self.types, size)


def type_of(target: Target) -> str:
    """Return the name of a target inside its block (``self_attn.q_proj``).

    Args:
        target: A target in a block.
    """
    return target.name.removeprefix(f"{target.stack}.{target.depth}.")


def build_shapes() -> dict[str, Shape]:
    """Build the four models of the paper's tables; no weights, no network, a second.

    Returns:
        The shapes by the paper's names.
    """
    shapes = (
        _llama("LLaMA2-7B", words=32000, inner=11008, key_value_heads=32),
        _llama("LLaMA3-8B", words=128256, inner=14336, key_value_heads=8),
        _roberta(),
        _clip(),
    )
    return {shape.name: shape for shape in shapes}


def _llama(name: str, words: int, inner: int, key_value_heads: int) -> Shape:
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=4096,
        intermediate_size=inner,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=key_value_heads,
    )
    model = _empty(LlamaForCausalLM, config)
    whole, embedding = base_parameters(model), words * 4096
    bases = {
        "whole model": whole,
        "without input embedding": whole - embedding,
        "without input and output embedding": whole - 2 * embedding,
    }
    return Shape(name, find_targets(model), bases)


def _roberta() -> Shape:
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    )  # a classifier of two classes is the default
    model = _empty(RobertaForSequenceClassification, config)
    encoder = base_parameters(_part(model, "roberta"))
    embeddings = base_parameters(_part(model, "roberta.embeddings"))
    bases = {
        "encoder": encoder,
        "encoder and pooler": base_parameters(_empty(RobertaModel, config)),
        "encoder and masked-word head": base_parameters(_empty(RobertaForMaskedLM, config)),
        "encoder and two-class head": base_parameters(model),
        "encoder without embeddings": encoder - embeddings,
    }
    head = base_parameters(_part(model, "classifier"))
    return Shape("RoBERTa-large", find_targets(model), bases, head)


def _clip() -> Shape:
    # The defaults of both configurations are ViT-B/32's.
    model = _empty(CLIPVisionModel, CLIPVisionConfig())
    tower = base_parameters(model)
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "embeddings." in n)
    projected = _empty(CLIPVisionModelWithProjection, CLIPVisionConfig())
    bases = {
        "vision tower": tower,
        "vision tower and projection": base_parameters(projected),
        "vision tower without embeddings": tower - embeddings,
        "both towers": base_parameters(_empty(CLIPModel, CLIPConfig())),
    }
    return Shape("CLIP ViT-B/32", find_targets(model), bases)


def _empty(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def _part(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)
