"""Tiny models and batches, built in code from configurations: no hub, no files.

Every case is a seeded thunk, so that one test runs over all architectures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from gradrank.core.budget import Budget
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.signals.facts import find_targets, model_facts

VOCABULARY = 97


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]


def tiny_llama(layers: int = 2, **extra: Any) -> nn.Module:
    """Grouped-query attention: 4 heads, 2 key-value heads."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **{"hidden_size": 32, "intermediate_size": 48, **extra},
        )
    )


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            num_labels=3,
        )
    )


def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )


def tiny_t5() -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
            max_position_embeddings=64,
        )
    )


def _ids(generator: torch.Generator, rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def lm_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classification_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = _ids(generator)
    labels = torch.randint(0, 3, (3,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def image_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (3,), generator=generator)}


def seq2seq_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(generator), "labels": _ids(generator, length=5)}


CASES = {
    case.name: case
    for case in (
        Case("llama", tiny_llama, lm_batch),
        Case("gpt2", tiny_gpt2, lm_batch),
        Case("bert", tiny_bert, classification_batch),
        Case("vit", tiny_vit, image_batch),
        Case("t5", tiny_t5, seq2seq_batch),
    )
}


def batches(case: Case, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [case.batch(generator) for _ in range(count)]


def hand_plan(
    model: nn.Module,
    rank: Callable[[int], int] = lambda index: (2, 0, 3, 1)[index % 4],
    targets: str | list[str] = "all-linear",
    budget: int | None = None,
) -> Plan:
    """A plan with the rank of the i-th target given by a function; by default mixed, with zeros."""
    planned = tuple(
        PlannedTarget(target, min(rank(index), target.max_rank))
        for index, target in enumerate(find_targets(model, targets))
    )
    spent = sum(item.parameters for item in planned)
    whole = budget or max(spent, 1)
    facts = model_facts(model, targets)
    return Plan("hand", {}, Budget.parameters(whole), whole, planned, provenance=facts)


def randomise_adapter(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Give an adapter weights as if it had been trained, so that B is not zero."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = scale * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return model
