"""Export: what is written computes what was trained, or nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gradrank as gr
from cases import CASES, Case, batches, hand_plan, randomise_adapter, tiny_llama
from gradrank.serving import installing as exporting
from gradrank.serving.check import check_inputs, logits
from gradrank.serving.installing import load_adapter
from gradrank.serving.weights import dense


def trained(case: Case, **options: Any) -> Any:
    model = case.model()
    return randomise_adapter(gr.apply(hand_plan(model), model, **options))


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "adapters": sorted(model.peft_config),
        "active": model.active_adapters,
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "weights": {name: p.clone() for name, p in model.named_parameters()},
        "rng": torch.get_rng_state().tolist(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    weights, old = after.pop("weights"), before.pop("weights")
    assert after == before
    assert weights.keys() == old.keys()
    assert all(torch.equal(weights[name], old[name]) for name in old)


# --- the stock adapter -----------------------------------------------------------------------


def test_an_adapter_reloads_bitwise_equal_in_stock_peft(case: Case, tmp_path: Path) -> None:
    model = trained(case)
    (batch,) = batches(case, 1, seed=4)
    wanted = logits(model, batch)
    assert not torch.equal(wanted, logits(case.model(), batch))
    report = gr.export(model, tmp_path / "out")
    again = PeftModel.from_pretrained(case.model(), str(tmp_path / "out"))
    assert torch.equal(logits(again, batch), wanted)
    assert (report.target, report.difference, report.tolerance) == ("peft", 0.0, 0.0)
    assert report.folder == tmp_path / "out"
    sizes = [file.stat().st_size for file in (tmp_path / "out").iterdir()]
    assert report.bytes == sum(sizes)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_the_comparison_catches_one_changed_weight(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(case)
    (batch,) = batches(case, 1)
    gr.export(model, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] += 0.01
    save_file(tensors, file)
    again = PeftModel.from_pretrained(case.model(), str(tmp_path / "out"))
    assert not torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("policy", ["constant", "alpha/r", "rslora"])
def test_scales_survive_in_every_policy(policy: str, tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(case, policy=policy)
    (batch,) = batches(case, 1)
    gr.export(model, tmp_path / "out")
    again = load_adapter(case.model(), tmp_path / "out")
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_twelve_layers_of_mixed_rank_survive(tmp_path: Path) -> None:
    base = tiny_llama(12)
    model = randomise_adapter(gr.apply(hand_plan(base, lambda i: (i * 5) % 4), base))
    gr.export(model, tmp_path / "out")
    again = load_adapter(tiny_llama(12), tmp_path / "out")
    (batch,) = batches(CASES["llama"], 1)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_saved_head_travels_with_the_adapter(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = trained(case, task_type="SEQ_CLS", modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.5
    (batch,) = batches(case, 1)
    before = state(model)
    gr.export(model, tmp_path / "out")
    assert_unchanged(model, before)
    again = load_adapter(case.model(), tmp_path / "out")
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("target", ["peft", "merged"])
def test_the_model_is_handed_back_as_it_was(case: Case, target: str, training: bool,
                                            tmp_path: Path) -> None:  # fmt: skip
    model = trained(case).train(training)
    for index, parameter in enumerate(model.parameters()):
        if index % 5 == 0:
            parameter.requires_grad_(not parameter.requires_grad)
    before = state(model)
    gr.export(model, tmp_path / "out", target)
    assert_unchanged(model, before)


def test_the_active_adapter_of_several_is_written(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(case)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("second")
    (batch,) = batches(case, 1)
    wanted, before = logits(model, batch), state(model)
    gr.export(model, tmp_path / "second")
    assert_unchanged(model, before)
    folder = tmp_path / "second"
    found = folder if (folder / "adapter_config.json").exists() else folder / "second"
    again = load_adapter(case.model(), found)
    assert torch.equal(logits(again, batch), wanted)


def test_a_bfloat16_base_reloads_equal(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = case.model().bfloat16()
    model = randomise_adapter(gr.apply(hand_plan(base), base))
    gr.export(model, tmp_path / "out")
    again = load_adapter(case.model().bfloat16(), tmp_path / "out")
    (batch,) = batches(case, 1)
    assert torch.equal(logits(again, batch), logits(model, batch))


# --- the merged model ------------------------------------------------------------------------


def test_a_merged_model_agrees_and_loads_without_peft(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(case)
    (batch,) = batches(case, 1)
    report = gr.export(model, tmp_path / "out", "merged")
    assert 0 <= report.difference <= report.tolerance
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_every_architecture_merges(case: Case, tmp_path: Path) -> None:
    report = gr.export(trained(case), tmp_path / "out", "merged")
    assert report.difference <= report.tolerance
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- failures --------------------------------------------------------------------------------


def corrupt(method: Any) -> Any:
    def write(self: Any, folder: str, **options: Any) -> None:
        method(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[next(key for key in tensors if "lora_B" in key)][0, 0] += 1e-3
        save_file(tensors, file, metadata={"format": "pt"})

    return write


def test_a_corrupted_adapter_fails_the_check_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = trained(CASES["llama"])
    before = state(model)
    monkeypatch.setattr(PeftModel, "save_pretrained", corrupt(PeftModel.save_pretrained))
    with pytest.raises(gr.PlanError, match=r"peft export differs .* nothing was written"):
        gr.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert_unchanged(model, before)


def test_a_wrong_merge_fails_the_check_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = trained(CASES["llama"])
    monkeypatch.setattr(
        "gradrank.serving.weights.merged_weight", lambda base, _, name: dense(base, name).double()
    )
    with pytest.raises(gr.PlanError, match="differs from the sum of weight and update"):
        gr.export(model, tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    model = trained(CASES["llama"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(gr.OutputError, match="not empty"):
        gr.export(model, out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("mine.txt", "precious")]
    gr.export(model, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "adapter_config.json").is_file()


def test_a_failing_export_does_not_replace_an_old_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, out = trained(CASES["llama"]), tmp_path / "out"
    gr.export(model, out)
    old = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(PeftModel, "save_pretrained", corrupt(PeftModel.save_pretrained))
    with pytest.raises(gr.PlanError):
        gr.export(model, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == old
    assert list(tmp_path.iterdir()) == [out]


def test_broken_logits_are_refused(tmp_path: Path) -> None:
    model = trained(CASES["llama"])
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(gr.MeasurementError, match="not finite"):
        gr.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_targets_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.OptionError, match=r"'merge' is unknown. Did you mean 'merged'"):
        gr.export(trained(CASES["llama"]), tmp_path / "out", "merge")
    with pytest.raises(gr.PlanError, match="LlamaForCausalLM carries no adapter"):
        gr.export(tiny_llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- companions ------------------------------------------------------------------------------


def test_the_tokenizer_is_saved_beside(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Any) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    for target in ("peft", "merged"):
        gr.export(trained(CASES["llama"]), tmp_path / target, target, tokenizer=Tokenizer())
        assert (tmp_path / target / "tokenizer.json").is_file()


def test_inputs_for_the_check_can_be_given(tmp_path: Path) -> None:
    case, seen = CASES["llama"], []
    model = trained(case)
    model.register_forward_pre_hook(
        lambda _, _args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    gr.export(model, tmp_path / "out", inputs={"input_ids": torch.ones(1, 3, dtype=torch.long)})
    assert set(seen) == {(1, 3)}


def test_check_inputs_fit_and_are_seeded(case: Case) -> None:
    model = case.model()
    first, again = check_inputs(model), check_inputs(model)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert logits(model, first).isfinite().all()


def test_a_model_without_configuration_asks_for_inputs(tmp_path: Path) -> None:
    class Out:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Out:
            return Out(self.a(x))

    model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["a"], init_lora_weights=False))
    with pytest.raises(gr.OptionError, match="inputs"):
        gr.export(model, tmp_path / "out")
    assert gr.export(model, tmp_path / "out", inputs={"x": torch.randn(2, 3)}).difference == 0


# --- loading ---------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    gr.export(trained(CASES["llama"]), tmp_path / "out")
    return tmp_path / "out"


def test_a_pickle_is_not_read(exported: Path) -> None:
    file = exported / "adapter_model.safetensors"
    torch.save(load_file(file), exported / "adapter_model.bin")
    file.unlink()
    with pytest.raises(gr.PlanError, match=r"no adapter_model.safetensors \(pickles are not read"):
        load_adapter(tiny_llama(), exported)


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.PlanError, match=r"adapter_config.json' does not exist"):
        load_adapter(tiny_llama(), tmp_path)
    with pytest.raises(gr.PlanError, match=r"adapter_config.json' does not exist"):
        load_adapter(tiny_llama(), tmp_path / "missing")


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    data = json.loads(file.read_text())
    data.update(fields)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_config(f, rank_pattern={}),
        lambda f: edit_config(f, r=5),
        lambda f: edit_config(f, target_modules=["no_such_module"]),
        lambda f: edit_config(f, target_modules=["q_proj"]),
        lambda f: edit_config(f, target_modules=["q_proj", "v_proj", "o_proj", "k_proj"]),
        lambda f: edit_config(f, peft_type="NONSENSE"),
        lambda f: (f / "adapter_config.json").write_text("{"),
        lambda f: (f / "adapter_config.json").write_text("[1]"),
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x04not safetensors"),
        lambda f: save_file({"x": torch.zeros(1)}, f / "adapter_model.safetensors"),
        lambda f: save_file({}, f / "adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(exported: Path, change: Any) -> None:
    change(exported)
    base = tiny_llama()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(gr.PlanError, match="does not fit"):
        load_adapter(base, exported)
    assert [(name, type(module)) for name, module in base.named_modules()] == before


def test_an_adapter_of_another_model_is_refused(exported: Path) -> None:
    for other in (CASES["gpt2"].model(), tiny_llama(1), CASES["bert"].model()):
        with pytest.raises(gr.PlanError, match="does not fit"):
            load_adapter(other, exported)


def test_the_name_of_the_check_adapter_never_reaches_the_files(exported: Path) -> None:
    for file in exported.iterdir():
        assert exporting._CHECK.encode() not in file.read_bytes()
