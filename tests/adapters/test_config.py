"""From a plan to a stock LoraConfig: exact ranks, one scale, no pattern that goes astray."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import gradrank as gr
from cases import CASES, Case, hand_plan, tiny_llama
from gradrank.adapters.apply import adapter_ranks
from gradrank.adapters.config import lora_config


def scales(model: nn.Module) -> dict[str, float]:
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def used(plan: gr.Plan) -> dict[str, int]:
    return {name: rank for name, rank in plan.ranks.items() if rank}


def test_peft_builds_exactly_the_ranks_and_one_scale(case: Case) -> None:
    model = case.model()
    plan = hand_plan(model)
    assert 0 in plan.ranks.values()
    wrapped = get_peft_model(model, plan.lora_config(lora_alpha=16))
    assert adapter_ranks(wrapped) == used(plan)
    wanted = 16 / plan.reference_rank
    assert all(math.isclose(s, wanted, rel_tol=1e-12) for s in scales(wrapped).values())


def test_twelve_layers_do_not_mix_1_with_11() -> None:
    model = tiny_llama(12)
    plan = hand_plan(model, lambda index: (index * 5) % 4)
    wrapped = get_peft_model(model, plan.lora_config())
    assert adapter_ranks(wrapped) == used(plan)
    assert len(set(scales(wrapped).values())) == 1


def test_a_uniform_plan_is_an_ordinary_uniform_configuration() -> None:
    model = tiny_llama()
    plan = hand_plan(model, lambda _: 4)
    config = plan.lora_config(lora_alpha=32, lora_dropout=0.1, task_type="CAUSAL_LM")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (4, 32)
    assert config.rank_pattern == {}
    assert config.alpha_pattern == {}
    assert config.target_modules == set(plan.ranks)
    assert config.lora_dropout == 0.1
    assert config.task_type == "CAUSAL_LM"


def test_patterns_are_anchored_and_escaped() -> None:
    plan = hand_plan(tiny_llama())
    config = plan.lora_config()
    assert "^model\\.layers\\.0\\.self_attn\\.v_proj" in config.rank_pattern
    for pattern in [*config.rank_pattern, *config.alpha_pattern]:
        assert pattern.startswith("^model\\.layers\\.")


@pytest.mark.parametrize("alpha", [16, 1, 7.5])
@pytest.mark.parametrize("policy", ["constant", "alpha/r", "rslora"])
def test_scale_policies(policy: str, alpha: float) -> None:
    model = tiny_llama()
    plan = hand_plan(model)
    wrapped = get_peft_model(model, plan.lora_config(alpha, policy=policy))
    for name, scale in scales(wrapped).items():
        rank = plan.ranks[name]
        wanted = {
            "constant": alpha / plan.reference_rank,
            "alpha/r": alpha / rank,
            "rslora": alpha / math.sqrt(rank),
        }[policy]
        assert scale == pytest.approx(wanted, rel=1e-12), name


def test_a_scale_can_be_given() -> None:
    model = tiny_llama()
    wrapped = get_peft_model(model, lora_config(hand_plan(model), scaling=0.7))
    assert list(scales(wrapped).values()) == pytest.approx([0.7] * len(scales(wrapped)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 4}, "r come.s. from the plan"),
        ({"target_modules": ["q_proj"], "rank_pattern": {}}, "rank_pattern, target_modules come"),
        ({"alpha_pattern": {}}, "alpha_pattern"),
        ({"use_rslora": True}, "use_rslora"),
        ({"lora_droput": 0.1}, "'lora_droput'. Did you mean 'lora_dropout'"),
        ({"policy": "alpha"}, "'alpha' is unknown. .*Known: alpha/r, constant, rslora"),
        ({"scaling": 0}, "positive"),
        ({"scaling": -1.0}, "positive"),
        ({"scaling": 1.0, "policy": "rslora"}, "policy='constant'"),
    ],
)
def test_what_contradicts_the_plan_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(gr.OptionError, match=says):
        hand_plan(tiny_llama()).lora_config(**options)


def test_a_plan_without_any_rank_is_refused() -> None:
    with pytest.raises(gr.PlanError, match="rank 0 to every target"):
        hand_plan(tiny_llama(), lambda _: 0).lora_config()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(torch.tanh(self.q(x)))


class Clash(nn.Module):
    """``enc.q`` is a dotted suffix of ``vision.enc.q``; ``a+b`` is an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = Attention()
        self.vision = nn.ModuleDict({"enc": Attention(), "a+b": Attention(), "aab": Attention()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.enc, *self.vision.values()):
            x = part(x)
        return x


@pytest.mark.parametrize(
    "ranks",
    [(2, 0, 0, 0), (0, 0, 3, 1), (1, 2, 3, 4), (3, 3, 3, 3), (0, 2, 1, 0), (2, 1, 0, 0)],
)
@pytest.mark.parametrize("chosen", [["enc.q", "enc.v"], "all-linear"])
def test_clashing_suffixes_get_their_own_ranks(ranks: tuple[int, ...], chosen: Any) -> None:
    model = Clash()
    plan = hand_plan(model, lambda index: ranks[index % 4], chosen)
    wrapped = get_peft_model(model, plan.lora_config())
    assert adapter_ranks(wrapped) == used(plan)


def test_targets_that_are_not_in_the_plan_stay_unadapted_despite_their_suffix() -> None:
    model = Clash()
    plan = hand_plan(model, lambda _: 2, ["re:enc.q"])
    assert list(plan.ranks) == ["enc.q"]
    wrapped = get_peft_model(model, plan.lora_config())
    assert adapter_ranks(wrapped) == {"enc.q": 2}


def test_a_plan_without_provenance_is_taken_for_ambiguous() -> None:
    plan = hand_plan(Clash(), lambda _: 2, ["re:enc.q"])
    bare = gr.Plan(plan.method, {}, plan.budget, plan.budget_parameters, plan.targets)
    wrapped = get_peft_model(Clash(), bare.lora_config())
    assert adapter_ranks(wrapped) == {"enc.q": 2}


def test_names_with_regex_characters_are_literal() -> None:
    model = Clash()
    plan = hand_plan(model, lambda index: 1 + index % 3, [r"re:vision\.a\+b\..", "vision.aab.q"])
    assert list(plan.ranks) == ["vision.a+b.q", "vision.a+b.v", "vision.aab.q"]
    wrapped = get_peft_model(model, plan.lora_config())
    assert adapter_ranks(wrapped) == plan.ranks


def test_conv1d_plans_set_the_layout_that_peft_wants() -> None:
    # Otherwise PEFT warns, and warnings are errors here.
    model = CASES["gpt2"].model()
    config = hand_plan(model).lora_config()
    assert config.fan_in_fan_out
    get_peft_model(model, config)
    assert not hand_plan(tiny_llama()).lora_config().fan_in_fan_out
