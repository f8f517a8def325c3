"""SGLang: what is written fills its buffers and has the trained logits; ordinary saves do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import gradrank as gr
from cases import CASES, batches, hand_plan, randomise_adapter, tiny_llama
from gradrank.core.errors import OptionError, PlanError
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import logits
from gradrank.serving.engines.engine import Base
from gradrank.serving.engines.sglang import Sglang
from gradrank.serving.export import export
from gradrank.serving.facts import describe
from gradrank.serving.installing import load_adapter

ENGINE = Sglang()
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def trained(policy: str = "constant") -> Any:
    base = tiny_llama()
    return randomise_adapter(gr.apply(hand_plan(base), base, policy=policy))


def stock(folder: Path, **options: Any) -> Path:
    """An ordinary PEFT save of rank 4 and scale 2."""
    model: Any = get_peft_model(tiny_llama(), LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    randomise_adapter(model).save_pretrained(str(folder))
    return folder


def update(name: str, rank: int = 3, scaling: float = 1.0) -> Update:
    generator = torch.Generator().manual_seed(len(name))
    a = torch.randn(rank, 6, generator=generator)
    return Update(name, a, torch.randn(5, rank, generator=generator), scaling)


def adapter(*updates: Update, **options: Any) -> Adapter:
    return Adapter({own.name: own for own in updates}, **options)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["constant", "alpha/r", "rslora"])
def test_the_export_has_the_trained_logits(policy: str, tmp_path: Path) -> None:
    model = trained(policy)
    report = export(model, tmp_path / "out", "sglang")
    assert report.difference <= report.tolerance < report.effect / 100
    (batch,) = batches(CASES["llama"], 1)
    again = logits(load_adapter(tiny_llama(), tmp_path / "out"), batch)
    torch.testing.assert_close(again, logits(model, batch), rtol=0, atol=1e-5)


def test_every_fused_group_is_whole_and_of_one_rank(tmp_path: Path) -> None:
    model = trained()
    export(model, tmp_path / "out", "sglang")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert isinstance(config["target_modules"], list)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {3}
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        stems = {key.partition(f".{name}.")[0] for key in tensors for name in names
                 if f".{name}." in key}  # fmt: skip
        assert stems
        for stem in stems:
            assert all(f"{stem}.{name}.lora_A.weight" in tensors for name in names)


def test_another_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="padding 'none' does not serve sglang"):
        export(trained(), tmp_path / "out", "sglang", padding="none")


def test_scales_are_folded(tmp_path: Path) -> None:
    made = adapter(update(f"{ATTENTION}.o_proj", 3, 0.5), update(f"{MLP}.down_proj", 3, 3.0))
    ENGINE.write(made, tmp_path, Base())
    read = ENGINE.read(tmp_path, Base()).updates
    assert set(read) == set(made.updates)
    for name, own in made.updates.items():
        assert read[name].scaling == 1.0
        torch.testing.assert_close(read[name].delta(), own.delta(), rtol=1e-6, atol=1e-6)


# --- the test double catches what is known to go wrong ---------------------------------------


def test_an_ordinary_save_of_mixed_ranks_fails(tmp_path: Path) -> None:
    trained().save_pretrained(str(tmp_path))
    with pytest.raises(PlanError, match="SGLang would fail on 'model"):
        ENGINE.read(tmp_path, Base())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["o_proj"], "rank_pattern": {"layers.1.*": 9}}, "buffers of rank 4"),
        ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}, "rank 4, 2, 2"),
        ({"target_modules": ["q_proj"]}, "v_proj', which is not there"),
        ({"target_modules": ["k_proj", "v_proj"]}, "fused group lacks its first"),
        ({"target_modules": ["up_proj"]}, "fused group lacks its first"),
        ({"target_modules": ".*o_proj"}, "its targets are an expression"),
        ({"target_modules": ["o_proj"], "use_dora": True}, "no plain LoRA"),
        ({"target_modules": ["o_proj"], "modules_to_save": ["norm"]}, "where factors belong"),
    ],
)
def test_the_double_refuses_what_sglang_fails_on(options: Any, words: str, tmp_path: Path) -> None:
    stock(tmp_path, **options)
    with pytest.raises(PlanError, match=words):
        ENGINE.read(tmp_path, Base())


def test_ranks_that_only_sum_up_are_refused(tmp_path: Path) -> None:
    ranks = {"q_proj": 2, "k_proj": 3, "v_proj": 4}
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{ATTENTION}.{name}.lora_A.weight"] = torch.ones(rank, 6)
        tensors[f"{ATTENTION}.{name}.lora_B.weight"] = torch.ones(5, 3)
    stock(tmp_path, r=3, target_modules=["o_proj"])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    # As in the engine, rows of A are cut where equal ranks would end.
    read = ENGINE.read(tmp_path, Base()).updates
    assert {own.a.shape[0] for own in read.values()} == {3}
    tensors[f"{ATTENTION}.v_proj.lora_A.weight"] = torch.ones(5, 6)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PlanError, match="10 rows where the buffer has 9"):
        ENGINE.read(tmp_path, Base())


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"target_modules": ["o_proj"], "alpha_pattern": {"layers.1.*": 12}}, 1 / 1.5),
        ({"target_modules": ["o_proj"], "use_rslora": True}, 1 / 2),
        ({"target_modules": ["o_proj"]}, 1.0),
    ],
)
def test_the_double_knows_one_scale(options: Any, factor: float, tmp_path: Path) -> None:
    scales = describe(stock(tmp_path, **options)).scales
    name = "model.layers.1.self_attn.o_proj"
    read = ENGINE.read(tmp_path, Base()).updates[name]
    assert read.scaling == pytest.approx(scales[name] * factor)
    assert (ENGINE.judge(describe(tmp_path)) == ()) is (factor == 1.0)


def test_absent_members_that_sglang_makes_up_are_zero(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["q_proj", "v_proj", "gate_proj"])
    assert ENGINE.judge(describe(tmp_path)) == ()
    read = ENGINE.read(tmp_path, Base()).updates
    assert not read[f"{ATTENTION}.k_proj"].delta().any()
    assert not read[f"{MLP}.up_proj"].delta().any()
    assert read[f"{ATTENTION}.v_proj"].delta().any()


def test_the_double_passes_over_what_is_in_no_layer(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"])
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": torch.ones(2, 2)}, file)
    assert len(ENGINE.read(tmp_path, Base()).updates) == 2


def test_the_double_refuses_tokens_layers_and_lone_factors(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"])
    with pytest.raises(PlanError, match="fail on layer 1: the model has 1"):
        ENGINE.read(tmp_path, Base({"num_hidden_layers": 1}))
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(PlanError, match="it adds tokens"):
        ENGINE.read(tmp_path, Base())
    (tmp_path / "added_tokens.json").unlink()
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{MLP}.down_proj.lora_A.weight": torch.ones(4, 2)}, file)
    with pytest.raises(PlanError, match="one factor only"):
        ENGINE.read(tmp_path, Base())
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 2)}, file)
    with pytest.raises(PlanError, match="does not cover"):
        ENGINE.read(tmp_path, Base())


def test_a_wrong_scale_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Sglang, made: Adapter, folder: Path, base: Base) -> None:
        original(self, made, folder, base)
        edit(folder, lora_alpha=1)

    original = Sglang.write
    monkeypatch.setattr(Sglang, "write", careless)
    with pytest.raises(PlanError, match=r"changes the update of .* nothing was written"):
        export(trained(), tmp_path / "out", "sglang")
    assert not (tmp_path / "out").exists()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (adapter(update(f"{MLP}.down_proj", 2), update(f"{ATTENTION}.o_proj", 3)), "padding 'all'"),
        (adapter(update(f"{ATTENTION}.q_proj")), "with 'model.layers.0.self_attn.v_proj'"),
        (adapter(update(f"{MLP}.up_proj")), "with 'model.layers.0.mlp.gate_proj'"),
        (adapter(update("transformer.h.0.attn.c_attn")), "in no 'layers.N'"),
        (adapter(update("model.layers.0.mlp.fc1")), "no buffer for 'model.layers.0.mlp.fc1'"),
        (adapter(update("lm_head")), "no proof that SGLang serves 'lm_head'"),
        (adapter(update("model.layers.0.mlp.experts.1.down_proj")), "keeps no buffer"),
        (
            adapter(update("text.layers.0.o_proj"), update("image.layers.0.o_proj")),
            "one buffer for",
        ),
        (adapter(update(f"{ATTENTION}.o_proj"), features=("DoRA",)), "DoRA.*'merged'"),
        (adapter(update(f"{ATTENTION}.o_proj", 0)), "rank 0"),
        (adapter(), "updates no module"),
    ],
)
def test_what_sglang_cannot_serve_is_refused_by_name(made: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        ENGINE.write(made, tmp_path, Base())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["gpt2", "bert"])
def test_other_architectures_are_refused(case: str, tmp_path: Path) -> None:
    base = CASES[case].model()
    model = randomise_adapter(gr.apply(hand_plan(base), base))
    with pytest.raises(PlanError, match=r"in no 'layers\.N'"):
        export(model, tmp_path / "out", "sglang")  # type: ignore[arg-type]


# --- judgements and advice -------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["gate_proj"], ["o_proj", "down_proj"]]
)
def test_an_ordinary_uniform_adapter_is_served(targets: Any, tmp_path: Path) -> None:
    assert ENGINE.judge(describe(stock(tmp_path, target_modules=targets))) == ()
    ENGINE.read(tmp_path, Base())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_proj"]}, "with 'model.layers.0.self_attn.v_proj'"),
        ({"target_modules": ["k_proj", "v_proj"]}, "with 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": ["up_proj"]}, "with 'model.layers.0.mlp.gate_proj'"),
        ({"target_modules": ".*o_proj"}, "takes a list of names only"),
        ({"target_modules": ["o_proj"], "use_rslora": True}, "ignores use_rslora"),
        ({"target_modules": ["o_proj"], "alpha_pattern": {"layers.1.*": 12}}, "2 instead of 3"),
        ({"target_modules": ["o_proj"], "rank_pattern": {"layers.1.*": 9}}, "has rank 9 (1 of 2"),
        ({"target_modules": ["o_proj"], "use_dora": True}, "DoRA magnitudes"),
        ({"target_modules": ["o_proj"], "bias": "all"}, "trained biases (bias='all')"),
        ({"target_modules": ["o_proj"], "modules_to_save": ["norm"]}, "modules_to_save: norm"),
    ],
)
def test_what_would_go_wrong_is_told(options: Any, words: str, tmp_path: Path) -> None:
    assert words in "\n".join(ENGINE.judge(describe(stock(tmp_path, **options))))


def test_our_own_export_is_served(tmp_path: Path) -> None:
    export(trained("alpha/r"), tmp_path / "out", "sglang")
    assert ENGINE.judge(describe(tmp_path / "out")) == ()
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    assert again.active_adapters == ["default"]


def test_adalora_is_not_served(tmp_path: Path) -> None:
    stock(tmp_path, target_modules=["o_proj"])
    edit(tmp_path, peft_type="ADALORA", init_r=4)
    file = tmp_path / "adapter_model.safetensors"
    kept = load_file(file)
    save_file({key.removesuffix(".weight"): tensor for key, tensor in kept.items()}, file)
    assert "AdaLoRA" in ENGINE.judge(describe(tmp_path))[0]


def test_the_advice_names_rank_and_modules() -> None:
    (line,) = ENGINE.advice(adapter(update(f"{ATTENTION}.o_proj"), update(f"{MLP}.down_proj")))
    assert "--enable-lora --lora-paths NAME=FOLDER --max-lora-rank 3" in line
    assert line.endswith("--lora-target-modules down_proj o_proj")
