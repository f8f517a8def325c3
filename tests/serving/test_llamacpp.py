"""llama.cpp's form of an adapter: names, order of rows and scales, written and read back."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import gradrank as gr
from cases import CASES, hand_plan, randomise_adapter, tiny_t5
from gguf_cases import DECODERS, VOCABULARY
from gradrank.core.errors import DataError, OptionError, PlanError
from gradrank.serving import gguf_names
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import logits
from gradrank.serving.engines.engine import Base
from gradrank.serving.engines.llamacpp import FILE, LlamaCpp, one_alpha
from gradrank.serving.facts import describe
from gradrank.serving.gguf_names import FAMILIES, interleaved
from gradrank.serving.installing import taken
from gradrank.signals.facts import find_targets
from oracles.gguf_rotation import rotation

ENGINE = LlamaCpp()
# A folder with llama.cpp's sources, whose own converter is then asked too.
SOURCES = os.environ.get("GRADRANK_LLAMA_CPP")


def trained(name: str = "llama", targets: Any = "all-linear", **options: Any) -> Any:
    model = DECODERS[name].model()
    return randomise_adapter(gr.apply(hand_plan(model, targets=targets), model, **options), 0.15)


def base_of(model: Any, **config: Any) -> Base:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    names = (n.replace(".base_layer", "") for n, _ in inner.named_modules() if ".lora_" not in n)
    return Base({**inner.config.to_dict(), **config}, tuple(names))


def unmoved(d_out: int, heads: int) -> Tensor:
    return torch.arange(d_out)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stored(folder: Path) -> dict[str, Any]:
    return {item.name: item for item in gguf.GGUFReader(folder / FILE).tensors}


def assert_same(one: Adapter, other: Adapter) -> None:
    assert one.ranks == other.ranks
    for name, update in one.updates.items():
        wanted, found = update.delta(), other.updates[name].delta()
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


# --- what is written -------------------------------------------------------------------------


def test_every_proven_family_has_a_tiny_model() -> None:
    kinds = {decoder.model().config.model_type for decoder in DECODERS.values()}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("name", DECODERS)
def test_an_export_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    model = trained(name)
    report = gr.export(model, tmp_path / "out", "llama.cpp", inputs=batch())
    assert report.difference <= report.tolerance
    assert report.effect > 1000 * report.tolerance
    file = gguf.GGUFReader(tmp_path / "out" / FILE)
    values = {key: file.fields[key].contents() for key in file.fields if "." in key and
              not key.startswith("GGUF.")}  # fmt: skip
    alpha = values.pop("adapter.lora.alpha")
    assert values == {
        "general.architecture": DECODERS[name].architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == alpha
    assert len(file.tensors) == 2 * len(report.ranks)
    assert all(item.tensor_type.name == "F32" for item in file.tensors)


@pytest.mark.skipif(SOURCES is None, reason="GRADRANK_LLAMA_CPP names no llama.cpp sources")
@pytest.mark.parametrize("name", DECODERS)
def test_its_own_converter_makes_the_same_file_of_the_folder(name: str, tmp_path: Path) -> None:
    model, base, out = trained(name), tmp_path / "base", tmp_path / "out"
    gr.export(model, out, "llama.cpp", inputs=batch())
    inner = model.get_base_model()
    inner.config.architectures = [type(inner).__name__]
    inner.config.save_pretrained(base)
    command = [sys.executable, f"{SOURCES}/convert_lora_to_gguf.py", "--outtype", "f32",
               "--base", str(base), "--outfile", str(tmp_path / FILE), str(out)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = stored(out), stored(tmp_path)
    assert ours.keys() == theirs.keys()
    equal = all(np.array_equal(item.data, theirs[key].data) for key, item in ours.items())
    # The converter swaps the factors of layers that are stored transposed; judge says so.
    assert equal == (name != "gpt2")


def test_rows_of_queries_and_keys_stand_as_the_engine_rotates_them(tmp_path: Path) -> None:
    model = trained()
    adapter, config = taken(model), model.config
    ENGINE.write(adapter, tmp_path, base_of(model))
    assert config.num_key_value_heads < config.num_attention_heads
    made, _ = one_alpha(adapter)
    checked = set()
    for name, update in made.updates.items():
        _, _, layer, _, last = name.split(".")
        order = list(range(update.b.shape[0]))
        if last in {"q_proj", "k_proj"}:
            heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
            order = rotation(len(order), heads)
        short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
                 "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
                 "down_proj": "ffn_down"}[last]  # fmt: skip
        tensors = stored(tmp_path)
        b = torch.from_numpy(tensors[f"blk.{layer}.{short}.weight.lora_b"].data.copy())
        a = torch.from_numpy(tensors[f"blk.{layer}.{short}.weight.lora_a"].data.copy())
        assert torch.equal(a, update.a)
        assert torch.equal(b, update.b[order])
        checked.add(last)
    assert {"q_proj", "k_proj"} <= checked


@given(st.integers(1, 6), st.integers(1, 8))
def test_the_order_of_rows_is_the_oracles(heads: int, half: int) -> None:
    assert interleaved(2 * half * heads, heads).tolist() == rotation(2 * half * heads, heads)


def test_the_oracle_catches_the_heads_of_the_other_matrix() -> None:
    assert interleaved(32, 4).tolist() != rotation(32, 2)
    assert interleaved(32, 2).tolist() != list(range(32))


@pytest.mark.parametrize("policy", ["constant", "alpha/r", "rslora"])
def test_one_alpha_says_every_scale(policy: str, tmp_path: Path) -> None:
    model = trained(policy=policy)
    adapter = taken(model)
    ENGINE.write(adapter, tmp_path, base_of(model))
    assert_same(adapter, ENGINE.read(tmp_path, base_of(model)))
    (tmp_path / FILE).unlink()  # what the engine's own converter makes of the folder
    assert_same(adapter, ENGINE.read(tmp_path, base_of(model)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert not config["alpha_pattern"]
    assert isinstance(config["target_modules"], list)
    again = PeftModel.from_pretrained(DECODERS["llama"].model(), str(tmp_path))
    assert torch.allclose(logits(again, batch()), logits(model, batch()), atol=1e-4)
    assert describe(tmp_path).ranks.keys() == describe_targets(adapter)
    assert ENGINE.judge(describe(tmp_path)) == ()


def describe_targets(adapter: Adapter) -> Any:
    return {update.target for update in adapter.updates.values()}


def test_factors_that_have_the_common_alpha_are_kept_bitwise() -> None:
    updates = {
        name: Update(name, torch.randn(rank, 6), torch.randn(4, rank), alpha / rank)
        for name, rank, alpha in (("x", 3, 16.0), ("y", 7, 16.0), ("z", 2, 8.0), ("w", 1, 0.0))
    }
    made, alpha = one_alpha(Adapter(updates))
    assert alpha == 16.0
    for name in ("x", "y"):
        assert torch.equal(made.updates[name].b, updates[name].b)
    assert torch.equal(made.updates["z"].b, updates["z"].b / 2)
    assert not made.updates["w"].b.any()


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_half_precision_is_kept(dtype: str, kind: str, tmp_path: Path) -> None:
    model = trained()
    report = gr.export(model, tmp_path / "out", "llama.cpp", dtype=dtype)
    assert 0 < report.difference <= report.tolerance
    assert {item.tensor_type.name for item in stored(tmp_path / "out").values()} == {kind}
    seen = ENGINE.read(tmp_path / "out", base_of(model))
    assert {u.b.dtype for u in seen.updates.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("padding", ["none", "groups", "all"])
def test_padding_changes_nothing_but_the_ranks(padding: str, tmp_path: Path) -> None:
    model = trained()
    report = gr.export(model, tmp_path / "out", "llama.cpp", padding=padding)
    assert report.difference <= report.tolerance
    sizes = {int(item.shape[1]) for name, item in stored(tmp_path / "out").items()
             if name.endswith(".lora_a")}  # fmt: skip
    assert (len(sizes) == 1) == (padding == "all")


def test_an_output_matrix_of_its_own_can_be_adapted(tmp_path: Path) -> None:
    names = [target.name for target in find_targets(DECODERS["llama"].model(), "all-linear")]
    model = trained(targets=["lm_head", *names])
    # PEFT saves a copy of the frozen matrix beside the factors.
    adapter = replace(taken(model), other={}, features=())
    assert "lm_head" in adapter.updates
    ENGINE.write(adapter, tmp_path, base_of(model))
    assert "output.weight.lora_a" in stored(tmp_path)
    assert_same(adapter, ENGINE.read(tmp_path, base_of(model)))


def test_a_wrong_order_is_caught_by_reading_it_rightly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained()
    with monkeypatch.context() as patched:
        patched.setattr(gguf_names, "interleaved", unmoved)
        ENGINE.write(taken(model), tmp_path, base_of(model))
    seen = ENGINE.read(tmp_path, base_of(model))
    with pytest.raises(AssertionError):
        assert_same(one_alpha(taken(model))[0], seen)


# --- kinds of models that are not proven, or not served -----------------------------------------


def test_an_unknown_kind_gets_the_folder_and_the_converters_command(tmp_path: Path) -> None:
    model = trained()
    base = base_of(model, model_type="somewhat-new")
    ENGINE.write(taken(model), tmp_path, base)
    assert not (tmp_path / FILE).exists()
    assert_same(taken(model), ENGINE.read(tmp_path, base))
    told = " ".join(ENGINE.advice(taken(model), base))
    assert "'somewhat-new'" in told
    assert "convert_lora_to_gguf.py" in told
    known = " ".join(ENGINE.advice(taken(model), base_of(model)))
    assert f"--lora {FILE}" in known
    assert "convert" not in known
    assert "convert" in " ".join(ENGINE.advice(taken(model)))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_that_write_no_text_are_refused(kind: str, tmp_path: Path) -> None:
    model = CASES[kind].model()
    model = randomise_adapter(gr.apply(hand_plan(model), model))
    with pytest.raises(PlanError, match=f"'{kind}' has no plain language-modelling head"):
        gr.export(model, tmp_path / "out", "llama.cpp")
    assert not list(tmp_path.iterdir())


def test_encoder_decoders_get_the_folder(tmp_path: Path) -> None:
    model = tiny_t5()
    model = randomise_adapter(gr.apply(hand_plan(model), model), 0.05)
    gr.export(model, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_a_head_that_is_shared_with_the_embeddings_is_refused(name: str, tmp_path: Path) -> None:
    adapter = Adapter({"lm_head": Update("lm_head", torch.randn(1, 64), torch.randn(300, 1), 1.0)})
    with pytest.raises(PlanError, match="shares with its embeddings"):
        ENGINE.write(adapter, tmp_path, base_of(DECODERS[name].model()))
    assert not list(tmp_path.iterdir())


def test_what_the_engine_cannot_express_is_refused(tmp_path: Path) -> None:
    base = DECODERS["llama"].model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(PlanError, match="DoRA"):
        gr.export(model, tmp_path / "out", "llama.cpp", inputs=batch())
    adapter = taken(trained())
    update = next(iter(adapter.updates.values()))
    odd = {**adapter.updates, "model.layers.0.odd": replace(update, name="model.layers.0.odd")}
    empty = {update.name: replace(update, a=update.a[:0], b=update.b[:, :0])}
    huge = {update.name: replace(update.to(torch.float16), scaling=1e9)}
    even = {update.name: replace(update, scaling=1.0), "x": replace(update.to(torch.float16),
            name="model.layers.1.self_attn.v_proj", scaling=1e9)}  # fmt: skip
    for updates, message in (
        (odd, "no tensor for 'model.layers.0.odd'"),
        (empty, "rank 0"),
        ({}, "updates no module"),
        (even, "does not fit into torch.float16"),
    ):
        with pytest.raises(PlanError, match=message):
            ENGINE.write(replace(adapter, updates=updates), tmp_path, base_of(base))
    assert not list(tmp_path.iterdir())
    ENGINE.write(replace(adapter, updates=huge), tmp_path, base_of(base))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": -1}, "layers"),
        ({"num_hidden_layers": "many", "n_layer": None}, "layers"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_key_value_heads": 7}, "no 7 heads"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = trained()
    with pytest.raises(PlanError, match=message):
        ENGINE.write(taken(model), tmp_path, base_of(model, **config))
    assert not list(tmp_path.iterdir())


def test_without_the_package_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OptionError, match=r"gradrank\[train\]"):
        gr.export(trained(), tmp_path / "out", "llama.cpp")
    assert not list(tmp_path.iterdir())


# --- stored adapters, judged --------------------------------------------------------------------


def saved(config: LoraConfig, folder: Path, name: str = "llama") -> tuple[str, ...]:
    randomise_adapter(get_peft_model(DECODERS[name].model(), config)).save_pretrained(folder)
    return ENGINE.judge(describe(folder))


def test_a_plain_adapter_with_mixed_ranks_is_right_as_it_is(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                        rank_pattern={"v_proj": 2})  # fmt: skip
    assert saved(config, tmp_path) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 8}}, "by 8 instead of 4"),
        ({"use_rslora": True}, "no rsLoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "lora_only"}, "biases"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "low-rank embeddings"),
        ({"task_type": "SEQ_CLS"}, "models that write text"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_its_converter_would_get_wrong(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fields = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **options}
    task = fields.pop("task_type", None)
    found = saved(LoraConfig(**fields), tmp_path)
    if task:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": task}))
        found = ENGINE.judge(describe(tmp_path))
    assert len(found) == 1
    assert message in found[0]


def test_transposed_layers_and_adalora_are_judged_wrong(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    (reason,) = saved(config, tmp_path / "gpt2", "gpt2")
    assert "transposed" in reason
    ada = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    get_peft_model(DECODERS["llama"].model(), ada).save_pretrained(tmp_path / "ada")
    (reason,) = ENGINE.judge(describe(tmp_path / "ada"))
    assert "AdaLoRA" in reason


# --- files from elsewhere -----------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Base]:
    model = trained()
    ENGINE.write(taken(model), tmp_path, base_of(model))
    return tmp_path, base_of(model)


@pytest.mark.parametrize("keep", [0, 3, 8, 24, 60, 300, 2000, -1])
def test_a_file_that_is_cut_off_is_refused(keep: int, written: tuple[Path, Base]) -> None:
    folder, base = written
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:keep])
    with pytest.raises(DataError, match="damaged"):
        ENGINE.read(folder, base)


def test_changed_bytes_are_refused_or_read_as_an_adapter(written: tuple[Path, Base]) -> None:
    folder, base = written
    content = (folder / FILE).read_bytes()
    generator = torch.Generator().manual_seed(2)
    refused = 0
    for _ in range(150):
        changed = bytearray(content)
        for place in torch.randint(0, 1500, (2,), generator=generator).tolist():
            changed[place] = int(torch.randint(0, 256, (1,), generator=generator))
        (folder / FILE).write_bytes(bytes(changed))
        try:
            ENGINE.read(folder, base)
        except (DataError, PlanError):
            refused += 1
    assert refused > 100


def rewrite(folder: Path, **changes: Any) -> None:
    tensors = {name: item.data.copy() for name, item in stored(folder).items()}
    for name in list(tensors):
        if changes.get("drop") == name:
            del tensors[name]
        elif changes.get("rename") == name:
            tensors["blk.77.odd"] = tensors.pop(name)
        elif changes.get("spoil") == name:
            tensors[name][0, 0] = float("nan")
        elif changes.get("narrow") == name:
            tensors[name] = tensors[name][:, :-1].copy()
    if "more" in changes:
        tensors |= {f"{changes['more']}.lora_{sign}": tensors[f"blk.0.attn_q.weight.lora_{sign}"]
                    for sign in "ab"}  # fmt: skip
    writer = gguf.GGUFWriter(folder / FILE, changes.get("architecture", "llama"))
    writer.add_type(changes.get("kind", "adapter"))
    writer.add_string("adapter.type", changes.get("adapter", "lora"))
    alpha = changes.get("alpha", 16.0)
    if isinstance(alpha, str):
        writer.add_string("adapter.lora.alpha", alpha)
    elif alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


B = "blk.0.attn_q.weight.lora_b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture = 'qwen2'"),
        ({"kind": "model"}, "general.type = 'model'"),
        ({"adapter": "other"}, "adapter.type = 'other'"),
        ({"alpha": "much"}, "adapter.lora.alpha = 'much'"),
        ({"alpha": float("nan")}, "adapter.lora.alpha = 'nan'"),
        ({"spoil": B}, "NaN"),
        ({"drop": B}, "do not fit"),
        ({"drop": B.replace("_b", "_a")}, "in no pair"),
        ({"narrow": B}, "do not fit"),
        ({"rename": B}, "do not fit"),
        ({"more": "blk.9.attn_q.weight"}, "no tensor 'blk.9.attn_q.weight'"),
    ],
)
def test_an_adapter_that_says_something_else_is_refused(
    changes: dict[str, Any], message: str, written: tuple[Path, Base]
) -> None:
    folder, base = written
    rewrite(folder, **changes)
    with pytest.raises((DataError, PlanError), match=message):
        ENGINE.read(folder, base)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_no_alpha_means_a_scale_of_one(alpha: float | None, written: tuple[Path, Base]) -> None:
    folder, base = written
    rewrite(folder, alpha=alpha)
    assert {u.scaling for u in ENGINE.read(folder, base).updates.values()} == {1.0}
