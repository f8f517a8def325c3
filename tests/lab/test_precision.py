"""What is trained on a half-precision base moves as in float32: full, bitfit, every head."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import gradrank as gr
from baseline_cases import SCALE, setting_of, snapshot
from cases import CASES, VOCABULARY, batches
from gradrank.adapters.precision import to_float32
from gradrank.lab.arms import head_options
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.registry import PATHS, create_baseline
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.lab.settings import TrainSettings
from gradrank.lab.train import train

HALF = torch.bfloat16
STEPS, RATE = 4, 1e-6


def half_setting(case: str, dtype: torch.dtype = HALF) -> Setting:
    setting = setting_of(case)
    with torch.no_grad():
        for parameter in setting.model.parameters():
            if parameter.dim() == 2:
                parameter.div_(10)  # the usual size: 0.02
    setting.model.to(dtype)
    return setting


def moved(model: Any, case: str, autocast: bool, rate: float = RATE) -> dict[str, float]:
    """Share of each trained tensor that some steps have changed."""
    model.train()
    before = snapshot(model)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    for batch in batches(CASES[case], STEPS, seed=1):
        with torch.autocast("cpu", HALF, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: float((parameter.detach() != before[name]).double().mean())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def matrices(shares: dict[str, float]) -> float:
    """Smallest share among what is not an embedding, whose rows may not occur."""
    return min(share for name, share in shares.items() if "embed" not in name)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("name", "case"), [("full", "bert"), ("full", "llama"), ("bitfit", "bert")]
)
def test_what_is_trained_moves_in_half_precision_as_in_float32(name, case, autocast):
    whole = create_baseline(name).build(half_setting(case, torch.float32))
    built = create_baseline(name).build(half_setting(case))
    expected = moved(whole.model, case, autocast)
    found = moved(built.model, case, autocast)
    assert expected.keys() == found.keys()
    # Biases of keys have no gradient but rounding's; the others move everywhere.
    assert all(abs(found[n] - expected[n]) < 0.2 for n in found if "key.bias" not in n)
    assert sum(found.values()) > 0.8 * len(found)
    assert any("bfloat16" in note for note in built.notes)
    assert not any("float32" in note for note in whole.notes)


def test_pure_half_precision_would_be_noticed():
    setting = half_setting("bert")
    setting.model.requires_grad_(True)
    assert matrices(moved(setting.model, "bert", True)) < 0.2


def head(model: Any) -> dict[str, Any]:
    return {
        name: p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad
    }


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("case", ["bert", "vit"])
@pytest.mark.parametrize("name", sorted(PATHS))
def test_every_arm_trains_its_head_in_float32(name, case, autocast):
    options = {"passes": 2} if name == "eva" else {}
    built: Built = create_baseline(name, options).build(half_setting(case))
    model = built.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert head(model)
    shares = moved(model, case, autocast)
    assert min(shares[n] for n in head(model)) > 0.9
    inputs = {k: v for k, v in batches(CASES[case], 1)[0].items() if k != "labels"}
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
        assert bool(model.eval()(**inputs).logits.isfinite().all())


def plain(case: str, dtype: torch.dtype) -> nn.Module:
    return half_setting(case, dtype).model


@pytest.mark.parametrize("autocast", [True, False])
def test_apply_holds_heads_in_float32_and_leaves_the_function(autocast):
    base = plain("bert", HALF)
    plan = gr.plan(base, [], "uniform", "uniform:2")
    batch = batches(CASES["bert"], 1)[0]
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
        expected = base.eval()(**batch)
    model = gr.apply(plan, base, scaling=SCALE, modules_to_save=["classifier"])
    kept = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert set(kept.values()) == {HALF}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
        found = model.eval()(**batch)
    assert found.logits.dtype == expected.logits.dtype
    assert torch.allclose(found.logits, expected.logits, atol=2e-2)
    with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
        copied = copy.deepcopy(model)(**batch)
    assert torch.equal(copied.logits, found.logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "task"), [("tiny-bert", "tiny-sentiment"), ("tiny-vit", "tiny-images")]
)
def test_the_lab_trains_and_evaluates_a_half_precision_model(model, task, precision, tmp_path):
    examples = read_examples(DataSpec(task))
    loaded = resolve_model(
        model,
        examples.head,
        len(examples.label_names),
        dtype="bfloat16",
        device="cpu",
        label_names=examples.label_names,
    )
    data = load_task_data(examples, loaded, 32)
    plan = gr.plan(loaded.model, [], "uniform", "uniform:2")
    adapted = gr.apply(plan, loaded.model, **head_options(loaded.model, examples.head))
    settings = TrainSettings(steps=2, batch_size=2, max_eval_batches=2, precision=precision)
    outcome = train(adapted, data, settings, tmp_path)
    assert (outcome.status, outcome.message) == ("finished", "")
    assert 0 < outcome.metrics["eval_loss"] < 10


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=66,
    )
    return RobertaForSequenceClassification(config).to(HALF)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_head_of_several_layers_and_a_module_in_the_middle_run_too(autocast):
    ids = torch.arange(3, 19)[None]
    for base, names in (
        (roberta(), ["classifier"]),
        (CASES["llama"].model().to(HALF), ["embed_tokens", "lm_head"]),
    ):
        model = gr.apply(
            gr.plan(base, [], "uniform", "uniform:2"), base, modules_to_save=names
        ).train()
        labels = ids if "lm_head" in names else torch.tensor([1])
        with torch.autocast("cpu", HALF, enabled=autocast):
            model(input_ids=ids, labels=labels).loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        whole = {n: p for n, p in trained.items() if ".modules_to_save." in n}
        assert whole
        assert all(p.grad is not None and bool(p.grad.any()) for p in whole.values())


def test_a_saved_head_loads_in_stock_peft_up_to_the_rounding_of_its_base(tmp_path):
    base = plain("bert", HALF)
    model = gr.apply(
        gr.plan(base, [], "uniform", "uniform:2"), base, modules_to_save=["classifier"]
    )
    moved(model, "bert", True, rate=1e-2)
    inputs = {k: v for k, v in batches(CASES["bert"], 1)[0].items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded: Any = PeftModel.from_pretrained(plain("bert", HALF), tmp_path)  # pyright: ignore
        assert torch.allclose(loaded.eval()(**inputs).logits, expected, atol=3e-2)
        assert torch.allclose(model.merge_and_unload()(**inputs).logits, expected, atol=3e-2)


def test_casting_keeps_ties_and_packed_weights():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).to(HALF)
    model["b"].weight = model["a"].weight
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model["a"].register_parameter("packed", packed)
    kept = model["a"].weight
    assert to_float32(model) == HALF
    assert model["a"].weight is kept is model["b"].weight
    assert kept.dtype == torch.float32
    assert packed.dtype == torch.uint8
    assert to_float32(model) is None
