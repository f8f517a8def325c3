"""vLLM: what is written has the trained logits by vLLM's rule, and the ordinary save has not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import gradrank as gr
from cases import CASES, batches, hand_plan, randomise_adapter, tiny_llama
from gradrank.core.errors import PlanError
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import logits
from gradrank.serving.engines.engine import Base
from gradrank.serving.engines.vllm import MAX_RANKS, Vllm, largest_rank
from gradrank.serving.export import export
from gradrank.serving.facts import describe
from gradrank.serving.installing import load_adapter, taken

ENGINE = Vllm()
BASE = Base({}, tuple(name for name, _ in tiny_llama().named_modules()))


def trained(policy: str = "constant") -> Any:
    base = tiny_llama()
    return randomise_adapter(gr.apply(hand_plan(base), base, policy=policy))


def stock(folder: Path, **options: Any) -> Path:
    """An ordinary PEFT save of rank 4 and scale 2."""
    model: Any = get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    randomise_adapter(model).save_pretrained(str(folder))
    return folder


def update(name: str, rank: int, scaling: float = 1.0, d_in: int = 6, d_out: int = 5) -> Update:
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, d_in, generator=generator)
    return Update(name, a, torch.randn(d_out, rank, generator=generator), scaling)


def adapter(*updates: Update, **options: Any) -> Adapter:
    return Adapter({own.name: own for own in updates}, **options)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["constant", "alpha/r", "rslora"])
@pytest.mark.parametrize("padding", [None, "groups", "all"])
def test_the_export_has_the_trained_logits(
    policy: str, padding: str | None, tmp_path: Path
) -> None:
    model = trained(policy)
    report = export(model, tmp_path / "out", "vllm", padding=padding)
    assert report.difference <= report.tolerance < report.effect / 100
    (batch,) = batches(CASES["llama"], 1)
    again = logits(load_adapter(tiny_llama(), tmp_path / "out"), batch)
    torch.testing.assert_close(again, logits(model, batch), rtol=0, atol=1e-5)


def test_ranks_stay_and_one_configuration_says_it_all(tmp_path: Path) -> None:
    made = adapter(update("layers.0.q_proj", 2, 0.5), update("layers.0.o_proj", 5, 3.0))
    ENGINE.write(made, tmp_path, Base())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {tuple(t.shape) for key, t in tensors.items() if "lora_A" in key}
    assert shapes == {(2, 6), (5, 6)}
    read = ENGINE.read(tmp_path, Base())
    assert all(own.rank == 8 and own.scaling == 1.0 for own in read.updates.values())
    for name, own in made.updates.items():
        torch.testing.assert_close(read.updates[name].delta(), own.delta(), rtol=1e-6, atol=1e-6)


def test_modules_of_rank_zero_are_left_out(tmp_path: Path) -> None:
    ENGINE.write(adapter(update("a.b", 3), update("a.c", 0)), tmp_path, Base())
    assert set(ENGINE.read(tmp_path, Base()).updates) == {"a.b"}
    with pytest.raises(PlanError, match="rank 0, so there is nothing"):
        ENGINE.write(adapter(update("a.c", 0)), tmp_path, Base())


# --- the test double catches what is known to go wrong ---------------------------------------


@pytest.mark.parametrize(("policy", "right"), [("constant", True), ("alpha/r", False)])
def test_an_ordinary_save_is_scaled_wrongly_unless_all_scales_agree(
    policy: str, right: bool, tmp_path: Path
) -> None:
    model = trained(policy)
    model.save_pretrained(str(tmp_path))
    own, read = taken(model).updates, ENGINE.read(tmp_path, BASE).updates
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    general = config["lora_alpha"] / config["r"]
    for name, true in own.items():
        expected = true.delta() * (general / true.scaling)
        torch.testing.assert_close(read[name].delta(), expected, rtol=1e-5, atol=1e-6)
    wrong = [name for name, true in own.items() if not math.isclose(true.scaling, general)]
    assert bool(wrong) is not right
    assert (ENGINE.judge(describe(tmp_path)) == ()) is right


def test_the_double_reads_rslora_from_the_general_rank(tmp_path: Path) -> None:
    stock(tmp_path, use_rslora=True, target_modules=["o_proj"])
    read = ENGINE.read(tmp_path, BASE).updates["model.layers.0.self_attn.o_proj"]
    true = describe(tmp_path).scales["model.layers.0.self_attn.o_proj"]
    assert true == 8 / math.sqrt(4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    delta = true * (tensors[key.format("B")].double() @ tensors[key.format("A")].double())
    torch.testing.assert_close(read.delta(), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "saved whole"),
        ({"bias": "all"}, "biases"),
        ({"r": 0}, "its rank is 0"),
    ],
)
def test_the_double_refuses_what_vllm_refuses(change: Any, words: str, tmp_path: Path) -> None:
    edit(stock(tmp_path, target_modules=["o_proj"]), **change)
    with pytest.raises(PlanError, match=words):
        ENGINE.read(tmp_path, BASE)


def test_the_double_refuses_a_rank_beyond_the_buffers(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"], rank_pattern={"layers.1.*": 9})
    with pytest.raises(PlanError, match="rank 9 does not fit into buffers of rank 8"):
        ENGINE.read(tmp_path, BASE)


def test_the_double_passes_over_a_wrong_beginning_and_refuses_a_wrong_end(tmp_path: Path) -> None:
    ENGINE.write(adapter(update("other.layers.0.o_proj", 2)), tmp_path, Base())
    assert not ENGINE.read(tmp_path, BASE).updates
    ENGINE.write(adapter(update("model.layers.0.wo", 2)), tmp_path, Base())
    with pytest.raises(PlanError, match="no such module"):
        ENGINE.read(tmp_path, BASE)


@pytest.mark.parametrize(("key", "words"), [("x.y.bias", "refuse the weight"),
                                            ("x.y.lora_A.weight", "one factor only")])  # fmt: skip
def test_the_double_refuses_strange_weights(key: str, words: str, tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"])
    save_file({key: torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PlanError, match=words):
        ENGINE.read(tmp_path, Base())


def test_a_wrong_scale_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Vllm, made: Adapter, folder: Path, base: Base) -> None:
        original(self, made, folder, base)
        edit(folder, lora_alpha=1)

    original = Vllm.write
    monkeypatch.setattr(Vllm, "write", careless)
    with pytest.raises(PlanError, match=r"changes the update of .* nothing was written"):
        export(trained(), tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (adapter(update("lm_head", 2)), "'lm_head' is an output layer"),
        (adapter(update("model.layers.0.mlp.experts.3.up_proj", 2)), "is an expert"),
        (adapter(update("a.b", 513)), "rank 513 is more than"),
        (adapter(update("a.b", 2), features=("DoRA magnitudes",)), "DoRA magnitudes.*'merged'"),
        (adapter(), "updates no module"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_name(made: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        ENGINE.write(made, tmp_path, Base())
    assert not list(tmp_path.iterdir())


def test_a_scale_beyond_the_type_is_refused(tmp_path: Path) -> None:
    made = adapter(update("a.b", 2, 1e6)).to(torch.float16)
    with pytest.raises(PlanError, match=r"does not fit into torch\.float16"):
        ENGINE.write(made, tmp_path, Base())


# --- judgements and advice -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["o_proj"], "use_rslora": True},
    ],
)
def test_an_ordinary_uniform_adapter_is_served(options: Any, tmp_path: Path) -> None:
    assert ENGINE.judge(describe(stock(tmp_path, **options))) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha_pattern": {"layers.1.*": 12}}, "would be scaled by 2 instead of 3 (1 of 2 mod"),
        ({"rank_pattern": {"layers.1.*": 2}}, "would be scaled by 2 instead of 4 (1 of 2 mod"),
        ({"rank_pattern": {"layers.1.*": 600}}, "vLLM takes 512 at most"),
        ({"use_dora": True}, "DoRA magnitudes (use_dora), which vLLM does not load"),
        ({"bias": "all"}, "trained biases (bias='all')"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: norm"),
    ],
)
def test_what_would_go_wrong_is_told(options: Any, words: str, tmp_path: Path) -> None:
    found = ENGINE.judge(describe(stock(tmp_path, target_modules=["o_proj"], **options)))
    assert words in "\n".join(found)


def test_our_own_export_is_served(tmp_path: Path) -> None:
    export(trained("alpha/r"), tmp_path / "out", "vllm")
    assert ENGINE.judge(describe(tmp_path / "out")) == ()
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert again.active_adapters == ["default"]


def test_adalora_is_not_served(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"])
    edit(tmp_path, peft_type="ADALORA", init_r=4)
    file = tmp_path / "adapter_model.safetensors"
    kept = load_file(file)
    tensors = {key.removesuffix(".weight"): tensor for key, tensor in kept.items()}
    save_file(tensors, file)
    assert "AdaLoRA" in ENGINE.judge(describe(tmp_path))[0]


def test_the_advice_names_the_smallest_rank_that_fits() -> None:
    (line,) = ENGINE.advice(adapter(update("a.b", 9)))
    assert "--enable-lora --max-lora-rank 16 --lora-modules NAME=FOLDER" in line
    for rank in (1, 8, 9, 257, 321, 512):
        most = largest_rank(rank)
        assert most in MAX_RANKS
        assert most >= rank
        assert all(other < rank for other in MAX_RANKS if other < most)
