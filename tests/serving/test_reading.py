"""What is read from an adapter's files is what PEFT computes from them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key

import gradrank as gr
from cases import hand_plan, randomise_adapter, tiny_llama
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import check_inputs, largest_error, logits, reference
from gradrank.serving.combining import combine
from gradrank.serving.facts import describe
from gradrank.serving.installing import beside, install, taken
from gradrank.serving.padding import padded
from gradrank.serving.patterns import Patterns
from gradrank.serving.reading import read_adapter
from gradrank.serving.summing import check_sum, summed_logits

CONFIGS: dict[str, dict[str, Any]] = {
    "uniform": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 5},
    "suffix patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"q_proj": 5, r"layers\.\d+\.self_attn\.v_proj": 7},
    },
    "first pattern wins": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 6},
        "alpha_pattern": {".*q_proj": 3, "0.self_attn.q_proj": 9},
    },
    "an expression": {"target_modules": r".*\.(gate|down)_proj", "lora_alpha": 3},
    "a scale of zero": {"target_modules": ["o_proj"], "lora_alpha": 0},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "output layer": {"target_modules": ["lm_head", "o_proj"]},
}


def saved(folder: Path, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Save a stock adapter; return its updates as PEFT computes them."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    model = get_peft_model(tiny_llama(), LoraConfig(**(defaults | options)))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return deltas(model)


def deltas(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_are_those_of_peft(tmp_path: Path, name: str) -> None:
    wanted = saved(tmp_path, **CONFIGS[name])
    found = read_adapter(tmp_path)
    assert set(found.updates) == set(wanted)
    for module, update in found.updates.items():
        torch.testing.assert_close(update.delta().float(), wanted[module], rtol=1e-5, atol=1e-7)
    assert found.parameters == describe(tmp_path).parameters
    assert not found.features


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_is_read_as_the_lora_that_computes_the_same(tmp_path: Path, pruned: bool) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=5, target_r=2, total_step=10, lora_alpha=20, target_modules=["q_proj", "up_proj"]
    )
    model: Any = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    if pruned:
        # What AdaLoRA leaves behind: which triplets live, by name; one module lost all of them.
        names = [n for n, _ in model.named_parameters() if "lora_E" in n]
        keep = [[False] * 5, [True, False, True, False, False], [True] * 5, [False] * 4 + [True]]
        pattern = {
            n.removeprefix("base_model.model."): kept for n, kept in zip(names, keep, strict=True)
        }
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
        model.peft_config["default"].rank_pattern = {
            n: [True] * sum(kept) for n, kept in pattern.items()
        }
    model.save_pretrained(str(tmp_path))
    found = read_adapter(tmp_path)
    assert len(found.updates) == (3 if pruned else 4)
    for module, wanted in deltas(model).items():
        update = found.updates.get(module)
        value = torch.zeros_like(wanted) if update is None else update.delta().float()
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
    batch = check_inputs(model)
    again = install(tiny_llama(), found)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


NAMES = [
    "enc.0.q_proj",
    "enc.1.q_proj",
    "vision.enc.0.q_proj",
    "enc.10.v_proj",
    "q_proj",
    "xq_proj",
]
PATTERNS = st.sampled_from(
    ["q_proj", "^enc\\.0\\.q_proj", "^enc.0.q_proj", r"enc\.\d+\.q_proj", ".*_proj", "0.q_proj",
     "^q_proj$", r"^enc\.1(\.q|\.v)_proj", "nothing", r"^enc\.10\.v\_proj", "enc.[01].q_proj"]
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(PATTERNS, max_size=4, unique=True), st.sampled_from(NAMES))
def test_patterns_are_looked_up_as_in_peft(patterns: list[str], name: str) -> None:
    values = {pattern: index for index, pattern in enumerate(patterns)}
    wanted = values.get(get_pattern_key(list(values), name), "default")
    assert Patterns(values, "rank_pattern").find(name, "default") == wanted


def test_an_adapter_named_otherwise_is_taken_from_a_live_model() -> None:
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "mine"
    )
    assert taken(model).ranks == {f"model.layers.{i}.self_attn.q_proj": 2 for i in range(2)}


# --- plain algebra ---------------------------------------------------------------------------


def update(rank: int = 3, scaling: float = 2.5, name: str = "layers.0.q_proj") -> Update:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
    return Update(name, a, b, scaling)


@pytest.mark.parametrize("scaling", [1.0, -0.5, 1 / 3])
def test_a_folded_scale_changes_no_update(scaling: float) -> None:
    folded = update().folded(scaling)
    assert folded.scaling == scaling
    torch.testing.assert_close(folded.delta(), update().delta(), rtol=1e-6, atol=1e-7)


def test_padding_changes_no_update_and_completes_groups() -> None:
    shapes = {f"layers.0.{name}_proj": (5, 6) for name in "qkvo"}
    adapter = Adapter({"layers.0.q_proj": update()})
    assert padded(adapter, "none", shapes) is adapter
    for padding in ("groups", "all"):
        made = padded(adapter, padding, shapes)
        assert made.ranks == {f"layers.0.{name}_proj": 3 for name in "qkv"}
        assert torch.equal(made.updates["layers.0.q_proj"].delta(), update().delta())
        assert not made.updates["layers.0.k_proj"].delta().any()
    two = Adapter(
        {"layers.0.q_proj": update(), "layers.0.o_proj": update(5, name="layers.0.o_proj")}
    )
    assert padded(two, "groups", shapes).ranks["layers.0.o_proj"] == 5
    assert set(padded(two, "all", shapes).ranks.values()) == {5}
    with pytest.raises(gr.OptionError, match=r"'group' is unknown. Did you mean 'groups'"):
        padded(adapter, "group", shapes)


# --- sums ------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Adapter, Adapter]:
    saved(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"], lora_alpha=2)
    saved(tmp_path / "b", 2, target_modules=["q_proj", "down_proj"], r=2, lora_alpha=7)
    return read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")


def test_the_sum_is_checked_against_its_parts(pair: tuple[Adapter, Adapter]) -> None:
    weights = [0.5, -1.5]
    model = install(tiny_llama(), combine(pair, weights)[0])
    batch = check_inputs(model)
    wanted = reference(model, batch)
    assert check_sum(model, pair, weights, batch, wanted) < 1e-4 < wanted.effect
    # Nothing of the check is left behind.
    assert torch.equal(logits(model, batch), wanted.logits)


@pytest.mark.parametrize("broken", [[0.5, 1.5], [0.5, 0.0], [1.0, -1.5]])
def test_a_wrong_sum_is_caught(pair: tuple[Adapter, Adapter], broken: list[float]) -> None:
    model = install(tiny_llama(), combine(pair, broken)[0])
    batch = check_inputs(model)
    with pytest.raises(gr.PlanError, match="differs from the sum of the 2 adapters"):
        check_sum(model, pair, [0.5, -1.5], batch, reference(model, batch))


def test_one_adapter_with_weight_one_sums_to_itself(pair: tuple[Adapter, Adapter]) -> None:
    model = install(tiny_llama(), pair[0])
    batch = check_inputs(model)
    found = summed_logits(model, pair[:1], [1.0], batch)
    torch.testing.assert_close(found, logits(model, batch), rtol=1e-5, atol=1e-6)


# --- module by module ------------------------------------------------------------------------


def dense_error(wanted: Adapter, seen: Adapter) -> float:
    """The slow twin: every update as a whole matrix."""
    largest = max(float(u.delta().norm()) for u in wanted.updates.values())
    errors = []
    for name in {*wanted.updates, *seen.updates}:
        one, two = (a.updates[name].delta() if name in a.updates else 0 for a in (wanted, seen))
        norm = float(torch.as_tensor(one).double().norm())
        errors.append(float(torch.as_tensor(one - two).norm()) / (norm or largest))
    return max(errors)


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-7, 1.5, 0.0, -1.0])
def test_the_error_of_updates_is_that_of_whole_matrices(scale: float) -> None:
    wanted = Adapter({"a": update(name="a"), "b": update(5, name="b"), "c": update(2, name="c")})
    other = replace(update(5, name="b"), scaling=2.5 * scale)
    seen = Adapter({"a": update(name="a").padded(4), "b": other, "d": update(1, 0.1, "d")})
    error, name = largest_error(wanted, seen)
    assert error == pytest.approx(dense_error(wanted, seen), rel=1e-9)
    assert name in {-1.0: "b", 0.0: "bc"}.get(scale, "c")
    same = Adapter({**seen.updates, "c": wanted.updates["c"]})
    del same.updates["d"]
    found, name = largest_error(wanted, same)
    assert found == pytest.approx(abs(1 - scale), abs=1e-12)
    assert scale == 1 or name == "b"


# --- beside the trained one ------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda u: u.folded(1.0).__class__(u.name, u.a, u.b, u.scaling * 1.01),
        lambda u: Update(u.name, u.a.flip(0), u.b, u.scaling),
        lambda u: Update(u.name, u.a, u.b * torch.tensor(1.01), u.scaling),
    ],
)
def test_the_check_sees_one_wrong_module(damage: Callable[[Update], Update]) -> None:
    base = tiny_llama()
    model = randomise_adapter(gr.apply(hand_plan(base), base))
    adapter, batch = taken(model), check_inputs(model)
    wanted = reference(model, batch)
    name = max(adapter.updates, key=lambda key: float(adapter.updates[key].delta().norm()))
    changed = {**adapter.updates, name: damage(adapter.updates[name])}
    with beside(model, adapter.with_updates(changed.values()), "a damaged one"):
        found = logits(model, batch)
    assert wanted.difference(found) > wanted.tolerance(torch.float32)
    assert math.isclose(wanted.difference(logits(model, batch)), 0)


def test_an_adapter_on_an_output_layer_is_exported_for_llama_cpp(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["lm_head", "o_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    assert not adapter.features
    assert not adapter.other
    report = gr.export(model, tmp_path / "o", "llama.cpp")
    assert report.ranks["lm_head"] == 4
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "o"))
    batch = check_inputs(model)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
