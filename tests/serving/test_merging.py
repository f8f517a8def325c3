"""Merged weights are the exact sums, rounded once; what rounding does is measured and told."""

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import gradrank as gr
from adapters.forms_cases import KINDS, formed, in_step
from cases import CASES, Case, hand_plan, randomise_adapter, tiny_bert, tiny_gpt2, tiny_llama
from gradrank.ops.four_bit import keep_quantised_layout
from gradrank.serving import merging
from gradrank.serving.adapter import Adapter
from gradrank.serving.check import check_inputs, logits, reference
from gradrank.serving.compression import compress
from gradrank.serving.installing import taken
from gradrank.serving.merging import Merged, Rounding, write_merged
from gradrank.serving.weights import Stock, dense
from oracles import serving as oracle


def planned(case: Case) -> Any:
    model = case.model()
    return randomise_adapter(gr.apply(hand_plan(model), model)).eval()


def wrapped(model: Any, *targets: str, **options: Any) -> Any:
    """A PEFT model with random weights in everything that it trains."""
    made = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
    model = get_peft_model(model, made).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.1 * noise).to(parameter.dtype)
    return model


def write(model: Any, folder: Path, adapter: Adapter | None = None, **options: Any) -> Merged:
    return write_merged(model, adapter or taken(model), folder, check_inputs(model), **options)


def rows(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The base weights of what an adapter updates, ``[d_out, d_in]``."""
    found, places = {}, dict(model.named_modules())
    for name in adapter.updates:
        layer: Any = places[name]
        base = layer.get_base_layer()
        across = type(base).__name__ == "Conv1D"
        found[name] = dense(base, name).T if across else dense(base, name)
    return found


def agrees(model: Any, merged: Merged) -> None:
    found = reference(model, check_inputs(model))
    assert merged.difference(found) <= merged.tolerance(found) < found.effect


# --- full precision --------------------------------------------------------------------------


def test_every_weight_is_the_exact_sum_rounded_once(case: Case, tmp_path: Path) -> None:
    model = planned(case)
    adapter = taken(model)
    merged = write(model, tmp_path)
    wanted = oracle.merged(rows(model.get_base_model(), adapter), adapter)
    kind: Any = type(model.get_base_model())
    again: Any = kind.from_pretrained(tmp_path).eval()
    for name, value in wanted.items():
        module = again.get_submodule(name)
        found = module.weight.detach()
        found = found.T if type(module).__name__ == "Conv1D" else found
        # An entry halfway between two floats may fall to either side.
        steps = (found - value.float()).abs() / torch.finfo(torch.float32).eps / value.abs().float()
        assert float((steps > 0).float().mean()) < 1e-3
        assert float(steps.max()) <= 1
        exact = float((found.double() - value).norm() / value.norm())
        assert merged.rounding[name].weight == pytest.approx(exact, rel=1e-6)
    untouched = set(again.state_dict()) - {f"{name}.weight" for name in wanted}
    before = case.model().state_dict()
    assert all(torch.equal(again.state_dict()[key], before[key]) for key in untouched)
    assert torch.equal(logits(again, check_inputs(again)), merged.logits)
    agrees(model, merged)


def test_the_oracle_catches_two_roundings() -> None:
    model = planned(CASES["llama"]).to(torch.bfloat16)
    adapter = taken(model)
    base = rows(model.get_base_model(), adapter)
    once, twice = oracle.merged(base, adapter), oracle.merged_in_steps(base, adapter)
    assert any(not torch.equal(once[n].to(torch.bfloat16), twice[n]) for n in once)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_type_is_reported(dtype: str, tmp_path: Path) -> None:
    model = planned(CASES["llama"])
    adapter = taken(model)
    merged = write(model, tmp_path, dtype=dtype)
    kind = getattr(torch, dtype)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {kind}
    for name, value in oracle.merged(rows(model.get_base_model(), adapter), adapter).items():
        error = (value.to(kind).double() - value).norm()
        delta = oracle.product_of(adapter.updates[name]).norm()
        assert merged.rounding[name].weight == pytest.approx(float(error / value.norm()), rel=1e-3)
        assert merged.rounding[name].update == pytest.approx(float(error / delta), rel=1e-3)
    agrees(model, merged)
    text = " ".join(merged.lines())
    assert dtype in text
    assert "median" in text
    assert "largest" in text


@pytest.mark.parametrize("family", [tiny_gpt2, tiny_llama])
def test_dora_is_merged_with_its_magnitudes(family: Any, tmp_path: Path) -> None:
    conv = family is tiny_gpt2
    target = "c_attn" if conv else "q_proj"
    model = wrapped(family(), target, use_dora=True, fan_in_fan_out=conv)
    adapter = taken(model)
    names = {key: key.removesuffix(".lora_magnitude_vector") for key in adapter.other}
    magnitudes = {name: adapter.other[key] for key, name in names.items()}
    write(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = oracle.merged(rows(model.get_base_model(), adapter), adapter, magnitudes)
    for name, value in wanted.items():
        found = tensors[f"{name}.weight"]
        torch.testing.assert_close((found.T if conv else found).double(), value,
                                   rtol=1e-6, atol=1e-9)  # fmt: skip


# The effect of an adapter with biases is measured without them.
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        (tiny_bert, ["query"], {"modules_to_save": ["classifier"]}),
        (tiny_bert, ["query"], {"bias": "all"}),
        (tiny_llama, ["q_proj"], {"trainable_token_indices": [1, 2]}),
        (tiny_llama, ["q_proj", "embed_tokens"], {}),
    ],
    ids=["head", "biases", "tokens", "embedding"],
)
def test_what_else_was_trained_is_merged(family: Any, targets: Any, options: Any,
                                         tmp_path: Path) -> None:  # fmt: skip
    model = wrapped(family(), *targets, **options)
    merged = write(model, tmp_path)
    assert merged.difference(reference(model, check_inputs(model))) < 1e-6
    # The updates of linear modules alone are something else.
    bare: Any = family()
    with torch.no_grad():
        for name, own in taken(model).updates.items():
            bare.get_submodule(name).weight += oracle.product_of(own).float()
    assert float((logits(bare, check_inputs(bare)) - merged.logits).abs().max()) > 1e-2


# PEFT says what is tested here, and takes the one-dimensional bias of a factor for a broken shard.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_biases_of_factors_go_into_the_bias_or_are_refused(tmp_path: Path) -> None:
    model = wrapped(tiny_bert(), "query", lora_bias=True)
    merged = write(model, tmp_path)
    found = reference(model, check_inputs(model))
    assert merged.difference(found) < 1e-6
    with pytest.raises(gr.PlanError, match=r"'model.layers.0.self_attn.q_proj' has no bias"):
        write(wrapped(tiny_llama(), "q_proj", lora_bias=True), tmp_path)


@pytest.mark.parametrize("form", KINDS)
def test_forms_are_merged_as_they_compute(form: str, tmp_path: Path) -> None:
    agrees(model := in_step(formed(form), form).eval(), write(model, tmp_path))


def test_adalora_is_merged(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=10,
                           init_lora_weights=False)  # fmt: skip
    agrees(model := get_peft_model(tiny_llama(), config).eval(), write(model, tmp_path))


# --- tied weights ----------------------------------------------------------------------------


def is_tied(folder: Path) -> bool:
    again = AutoModelForCausalLM.from_pretrained(folder)
    return again.get_input_embeddings().weight is again.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_stay_tied(dtype: str | None, tmp_path: Path) -> None:
    model = wrapped(tiny_llama(tie_word_embeddings=True), "q_proj")
    write(model, tmp_path, dtype=dtype)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert is_tied(tmp_path)


# PEFT's warnings about tied targets: what they warn of is what is solved here.
@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"targets": ["lm_head"]}, {"targets": ["embed_tokens"]}],
)
def test_weights_that_training_made_differ_are_untied(options: Any, tmp_path: Path) -> None:
    targets = options.pop("targets", [])
    model = wrapped(tiny_llama(tie_word_embeddings=True), "q_proj", *targets, **options)
    agrees(model, write(model, tmp_path))
    assert not is_tied(tmp_path)
    assert model.get_base_model().config.tie_word_embeddings


# --- the live model --------------------------------------------------------------------------


def test_the_live_model_is_not_touched_and_not_copied(case: Case, tmp_path: Path) -> None:
    model = planned(case)
    inner: Any = model.get_base_model()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    config, state = copy.deepcopy(inner.config.to_dict()), torch.get_rng_state()
    write(model, tmp_path, dtype="bfloat16")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and torch.equal(p, copied) for n, (p, copied) in before.items())
    assert inner.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    adapter = taken(model)
    shared = Stock(inner, adapter, "default", None).tensors
    live = {p.data_ptr() for p, _ in before.values()}
    copies = [name for name, tensor in shared.items() if tensor.data_ptr() not in live]
    assert {name.removesuffix(".weight") for name in copies} <= set(adapter.updates)


def test_a_smaller_adapter_is_merged_instead_of_the_live_one(tmp_path: Path) -> None:
    model = planned(CASES["llama"])
    smaller, losses = compress(taken(model), "uniform:1")
    assert losses.kept < 1
    write(model, tmp_path, smaller)
    tensors = load_file(tmp_path / "model.safetensors")
    base = CASES["llama"].model().state_dict()
    for name in taken(model).updates:
        change = tensors[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        wanted = smaller.updates[name].delta() if name in smaller.updates else 0 * change
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-6)


# --- quantised bases -------------------------------------------------------------------------


@pytest.fixture
def quiet_logs() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def in_codes(bits: int, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    # Rows of whole blocks of 64: bitsandbytes reads shorter ones wrongly on CPUs with AVX-512.
    tiny_llama(hidden_size=64, intermediate_size=128).to(dtype).save_pretrained(folder)
    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                   "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=dtype
    )
    keep_quantised_layout(model)
    return model


@pytest.mark.usefixtures("quiet_logs")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_becomes_a_plain_model(bits: int, dtype: str | None,
                                                tmp_path: Path) -> None:  # fmt: skip
    model = wrapped(in_codes(bits, tmp_path / "base"), "q_proj", "down_proj")
    codes = {name: p.clone() for name, p in model.named_parameters()}
    adapter, inputs = taken(model), check_inputs(model)
    live = logits(model, inputs)
    merged = write(model, tmp_path / "out", dtype=dtype)
    assert not merged.requantised
    assert merged.wanted is not None
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    kind = getattr(torch, dtype) if dtype else torch.float32
    assert merged.dtype == kind
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    sums = oracle.merged(rows(model.get_base_model(), adapter), adapter)
    for name, value in sums.items():
        torch.testing.assert_close(tensors[f"{name}.weight"].double(), value.to(kind).double(),
                                   rtol=torch.finfo(kind).eps, atol=1e-12)  # fmt: skip
    other: Any = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(tensors[f"{name}.weight"], dense(other, name).to(kind))
    agrees(model, merged)
    # And the live model computes as before, bit for bit.
    assert torch.equal(logits(model, inputs), live)
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters())


@pytest.mark.usefixtures("quiet_logs")
def test_rounding_of_activations_is_no_error_of_merging(tmp_path: Path) -> None:
    model = wrapped(in_codes(8, tmp_path / "base"), "q_proj")
    merged = write(model, tmp_path / "out")
    found = reference(model, check_inputs(model))
    assert merged.wanted is not None
    running = found.difference(merged.logits)
    assert merged.difference(found) < 0.01 * running


@pytest.mark.usefixtures("quiet_logs")
@pytest.mark.parametrize("bits", [4, 8])
def test_requantising_reports_what_it_costs(bits: int, tmp_path: Path) -> None:
    model = wrapped(in_codes(bits, tmp_path / "base"), "q_proj", "down_proj")
    adapter = taken(model)
    merged = write(model, tmp_path / "out", requantise=True)
    assert merged.requantised
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    keep_quantised_layout(again)
    assert again.is_quantized
    assert torch.equal(logits(again, check_inputs(again)), merged.logits)
    sums = oracle.merged(rows(model.get_base_model(), adapter), adapter)
    for name, value in sums.items():
        error = (dense(again.get_submodule(name), name).double() - value).norm()
        share, delta = error / value.norm(), oracle.product_of(adapter.updates[name]).norm()
        assert merged.rounding[name].weight == pytest.approx(float(share))
        assert merged.rounding[name].update == pytest.approx(float(error / delta))
        # 4 bits of a normal distribution: about a tenth; 8 bits: about half a percent.
        assert (0.05 if bits == 4 else 0.002) < float(share) < (0.2 if bits == 4 else 0.02)
    found = reference(model, check_inputs(model))
    assert 0 < merged.difference(found) <= merged.tolerance(found) == found.effect / 2
    assert "requantised" in merged.lines()[0]


@pytest.mark.usefixtures("quiet_logs")
def test_an_update_that_requantising_rounds_away_is_refused(tmp_path: Path) -> None:
    """Which is the usual case: trained updates are far smaller than a step between two codes."""
    model = wrapped(in_codes(4, tmp_path / "base"), "q_proj", "down_proj")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    with pytest.raises(gr.PlanError, match=r"rounds the updates away: .* times the norm"):
        write(model, tmp_path / "out", requantise=True)
    plain = write(model, tmp_path / "plain")
    assert max(own.update for own in plain.rounding.values()) < 1e-3


@pytest.mark.usefixtures("quiet_logs")
def test_layers_that_were_quantised_by_hand_are_merged(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
    packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False)
    model.model.layers[0].mlp.up_proj = packed.to("cpu")
    keep_quantised_layout(model)
    model = wrapped(model, "q_proj")
    agrees(model, write(model, tmp_path))
    with pytest.raises(gr.PlanError, match="not loaded with a quantization_config"):
        write(model, tmp_path, requantise=True)


def test_what_cannot_be_restored_is_refused_by_name(tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    layer: Any = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
    weight = layer.weight
    del layer.weight
    layer.register_buffer("qweight", weight.to(torch.int8))
    adapter, batch = taken(model), {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    layer.forward = lambda x: nn.functional.linear(x, weight)
    with pytest.raises(gr.PlanError, match=r"'model.layers.1.mlp.up_proj' is a quantised Linear"):
        write_merged(model, adapter, tmp_path, batch)
    del layer.qweight
    layer.register_buffer("weight", weight.to(torch.float8_e4m3fn))
    with pytest.raises(gr.PlanError, match="cannot restore"):
        write_merged(model, adapter, tmp_path, batch)


# --- refusals and checks ---------------------------------------------------------------------


def test_options_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    with pytest.raises(gr.OptionError, match="not quantised, so there is nothing to requantise"):
        write(model, tmp_path, requantise=True)
    with pytest.raises(gr.OptionError, match="dtype 'bfloat16' does not go with requantising"):
        merging._check_requantise(model, True, "bfloat16")


def test_a_model_of_no_library_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    model = get_peft_model(net, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(gr.PlanError, match="Sequential has no from_pretrained"):
        write_merged(model, taken(model), tmp_path, {"input": torch.ones(1, 3)})


def test_an_adapter_that_is_merged_already_is_refused(tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    adapter = taken(model)
    model.merge_adapter()
    with pytest.raises(gr.PlanError, match="has an adapter merged into its weight already"):
        write(model, tmp_path, adapter)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    adapter = taken(model)
    (name, own), *_ = adapter.updates.items()
    wide = replace(own, a=torch.cat([own.a, own.a], 1))
    with pytest.raises(gr.PlanError, match=rf"the update of '{name}' is \(32, 64\)"):
        write(model, tmp_path, adapter.with_updates([wide]))
    with pytest.raises(gr.PlanError, match="the model has no module 'elsewhere'"):
        write(model, tmp_path, adapter.with_updates([replace(own, name="elsewhere")]))


def test_weights_elsewhere_than_in_memory_are_refused(tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    adapter, batch = taken(model), check_inputs(model)
    layer: Any = model.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
    layer.to("meta")
    with pytest.raises(gr.PlanError, match=r"up_proj.weight' is not in memory \(offloaded\)"):
        write_merged(model, adapter, tmp_path, batch)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_one_changed_entry_in_the_files_is_caught(
    dtype: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama(), "q_proj")
    saved = PreTrainedModel.save_pretrained

    def corrupt(self: Any, folder: Any, **options: Any) -> None:
        weight = self.get_submodule("model.layers.0.self_attn.q_proj").weight
        weight.data[0, 0] += 0.1
        saved(self, folder, **options)

    write(model, tmp_path / "right", dtype=dtype)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", corrupt)
    with pytest.raises(gr.PlanError, match=r"q_proj' differs from the sum of weight and update"):
        write(model, tmp_path / "wrong", dtype=dtype)


def test_tolerances_are_what_the_docs_say() -> None:
    model = wrapped(tiny_llama(), "q_proj")
    found = reference(model, check_inputs(model))
    largest = max(1.0, float(found.logits.abs().max()))
    plain = Merged(found.logits)
    assert plain.difference(found) == 0
    assert plain.tolerance(found) == pytest.approx(1e-4 * largest)
    brain = replace(plain, dtype=torch.bfloat16)
    assert brain.tolerance(found) == pytest.approx(max(largest / 16, found.effect / 2))
    half = replace(plain, dtype=torch.float16)
    assert half.tolerance(found) == pytest.approx(
        max(largest / 128, min(found.effect / 2, largest / 16))
    )
    assert replace(plain, requantised=True).tolerance(found) == found.effect / 2
    assert replace(plain, wanted=found.logits + 1).difference(found) == pytest.approx(1)


def test_the_worst_module_is_named() -> None:
    rounding = {"a": Rounding(1e-3, 0.5), "b": Rounding(2e-3, 0.1), "c": Rounding(1e-4, 0.01)}
    weights, updates = Merged(torch.zeros(1), rounding=rounding).lines()
    assert weights.endswith("median 0.001, largest 0.002")
    assert updates.endswith("median 0.1, largest 0.5 ('a')")
    assert Merged(torch.zeros(1)).lines() == ()
