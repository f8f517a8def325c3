"""What counts as a task head: trained in full with every arm, and never a target."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import gradrank as gr
from cases import tiny_llama
from gradrank.core.errors import DataError
from gradrank.lab.arms import head_modules, head_options, head_parameters
from gradrank.lab.baselines.arm import frozen
from gradrank.lab.models import resolve_model
from gradrank.lab.tiny import byte_tokenizer
from gradrank.signals.facts import find_targets

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
WORDS: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 66}
DISTILBERT = DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=2, vocab_size=300)
DEBERTA = DebertaV2Config(**SIZES, **WORDS, pooler_hidden_size=32)
XLNET = XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=2, d_inner=48)

# Model, its head, its targets outside blocks, and how many targets it has in all.
KNOWN: dict[str, tuple[Callable[[], Any], tuple[str, ...], list[str], int]] = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES, **WORDS)),
        ("classifier",),
        ["bert.pooler.dense"],
        13,
    ),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, **WORDS)),
        ("classifier",),
        [],
        12,
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES)), ("classifier",), [], 12),
    "dinov2": (
        lambda: Dinov2ForImageClassification(
            Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        ),
        ("classifier",),
        [],
        12,
    ),
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, **WORDS, pad_token_id=0)),
        ("score",),
        [],
        14,
    ),
    "llama-lm": (tiny_llama, (), [], 14),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(DISTILBERT),
        ("classifier", "pre_classifier"),
        [],
        12,
    ),
    "deberta": (
        lambda: DebertaV2ForSequenceClassification(DEBERTA),
        ("classifier", "pooler"),
        [],
        12,
    ),
    "xlnet": (
        lambda: XLNetForSequenceClassification(XLNET),
        ("sequence_summary", "logits_proj"),
        [],
        4,
    ),
    # Without a head, a pooler on top is the pre-trained one.
    "bert-bare": (lambda: BertModel(BertConfig(**SIZES, **WORDS)), (), ["pooler.dense"], 13),
}


@pytest.mark.parametrize("name", KNOWN)
def test_heads_and_targets_of_known_models(name):
    build, head, outside, count = KNOWN[name]
    model = build()
    targets = find_targets(model)
    if name != "bert-bare":
        assert head_modules(model) == head
    assert [t.name for t in targets if t.depth is None] == outside
    assert len(targets) == count


@pytest.mark.parametrize("name", ["distilbert", "deberta", "bert"])
def test_the_whole_head_is_trained_beside_an_adapter_and_counted(name):
    model = KNOWN[name][0]()
    names = head_modules(model)
    sizes = {head: sum(p.numel() for p in model.get_submodule(head).parameters()) for head in names}
    assert sum(p.numel() for p in head_parameters(model)) == sum(sizes.values())
    frozen(model, names)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == set(names)
    targets = find_targets(model)
    plan = gr.plan(model, [], "uniform", "uniform:2")
    adapted = gr.apply(plan, model, **head_options(model, "classification"))
    trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
    assert sum(n for name, n in trained.items() if ".lora_" in name) == plan.parameters
    assert sum(n for name, n in trained.items() if ".lora_" not in name) == sum(sizes.values())
    assert sum(p.numel() for p in head_parameters(adapted)) == sum(sizes.values())
    assert find_targets(adapted) == targets  # the adapted model is the same model
    adapted(input_ids=torch.arange(3, 13)[None], labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None for p in head_parameters(adapted))


def saved(base: Any, folder: Any) -> str:
    base.save_pretrained(folder)
    byte_tokenizer(markers=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("base", "head"),
    [
        (lambda: DistilBertModel(DISTILBERT), ("classifier", "pre_classifier")),
        (lambda: DebertaV2Model(DEBERTA), ("classifier", "pooler")),
    ],
)
def test_a_head_is_all_that_is_new_in_a_loaded_model(base, head, tmp_path):
    loaded = resolve_model(saved(base(), tmp_path), "classification", 2, device="cpu", seed=0)
    other = resolve_model(str(tmp_path), "classification", 2, device="cpu", seed=1)
    assert head_modules(loaded.model) == head
    again = dict(other.model.named_parameters())
    new = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, again[n])}
    assert {name.split(".")[0] for name in new} == set(head)
    assert not {t.name for t in find_targets(loaded.model)} & {n.rpartition(".")[0] for n in new}


def test_random_matrices_outside_any_known_head_are_refused(tmp_path):
    small = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small |= {"cls_token_id": 1, "sep_token_id": 2}
    base = ModernBertModel(ModernBertConfig(**SIZES, **small))
    with pytest.raises(DataError, match=r"no weights for 'head\.dense\.weight'.*stay random"):
        resolve_model(saved(base, tmp_path), "classification", 2, device="cpu")
