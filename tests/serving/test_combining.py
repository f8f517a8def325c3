"""Combined adapters compute the weighted sum, whatever the ranks and scales of their parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

import gradrank as gr
from cases import CASES, batches, tiny_bert, tiny_llama
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.check import logits
from gradrank.serving.combining import combine
from gradrank.serving.installing import install, taken
from oracles import serving as oracle

SHAPES = {"m.2": (6, 9), "m.10": (12, 5), "n.0": (7, 7)}


def adapter(
    ranks: dict[str, int], seed: int = 0, scaling: float = 2.0, dtype: Any = torch.float32,
    **config: Any
) -> Adapter:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for position, (name, rank) in enumerate(ranks.items()):
        d_out, d_in = SHAPES[name]
        a = torch.randn(rank, d_in, generator=generator).to(dtype)
        b = torch.randn(d_out, rank, generator=generator).to(dtype)
        updates[name] = Update(name, a, b, scaling * (position + 1))
    return Adapter(updates, config)


def assert_sum(found: Adapter, wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    size = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        own = found.updates.get(name)
        delta = oracle.product_of(own) if own else torch.zeros_like(value)
        assert float((delta - value).norm()) <= tolerance * size


def three() -> list[Adapter]:
    """Of different ranks, scales and modules."""
    return [
        adapter({"m.2": 3, "m.10": 1}, 1, 2.0),
        adapter({"n.0": 2, "m.2": 4}, 2, 0.25),
        adapter({"m.10": 5}, 3, -3.0),
    ]


# --- concatenation ---------------------------------------------------------------------------

weight = st.floats(-4, 4).map(lambda value: 0.0 if abs(value) < 0.1 else value)


@given(weights=st.tuples(weight, weight, weight).filter(any))
def test_concatenation_is_the_weighted_sum(weights: tuple[float, ...]) -> None:
    parts = three()
    found, losses = combine(parts, weights)
    assert losses is None
    assert_sum(found, oracle.weighted_sum(parts, weights))
    for name, own in found.updates.items():
        ranks = [p.ranks.get(name, 0) for p, w in zip(parts, weights, strict=True) if w]
        assert own.rank == sum(ranks)
        assert own.scaling == 1


def test_the_oracle_catches_the_scale_of_one_for_all() -> None:
    parts = three()
    right, wrong = (f(parts, (1, 1, 1)) for f in (oracle.weighted_sum, oracle.scale_of_the_first))
    assert any(float((right[n] - wrong[n]).norm()) > 0.5 * float(right[n].norm()) for n in right)


def test_the_sum_is_the_default_and_layers_are_in_order() -> None:
    parts = three()
    found, _ = combine(parts)
    assert_sum(found, oracle.weighted_sum(parts, (1, 1, 1)))
    assert list(found.updates) == ["m.2", "m.10", "n.0"]


def test_opposite_weights_cancel() -> None:
    part = three()[0]
    found, _ = combine([part, part], [1, -1])
    for name, own in found.updates.items():
        size = float(part.updates[name].delta().norm())
        assert float(own.delta().norm()) < 1e-12 * size
    with pytest.raises(gr.PlanError, match="all updates of the adapter are zero"):
        combine([part, part], [1, -1], "svd", rank=2)


def test_one_adapter_is_returned_bitwise() -> None:
    part = adapter({"m.2": 3}, scaling=4.0)
    (own,) = combine([part])[0].updates.values()
    (before,) = part.updates.values()
    assert torch.equal(own.a, before.a)
    assert torch.equal(own.b, before.b)
    assert own.scaling == 4


def test_types_are_widened_and_rounded_once() -> None:
    half = adapter({"m.2": 3}, dtype=torch.float16)
    brain = adapter({"m.2": 2}, 1, dtype=torch.bfloat16)
    assert combine([half, brain])[0].updates["m.2"].a.dtype == torch.float32
    assert combine([half, half])[0].updates["m.2"].b.dtype == torch.float16
    with pytest.raises(gr.PlanError, match=r"'m.2' is too large for float16"):
        combine([half, half], [1e6, 1])


# --- truncation ------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.0)])
def test_svd_is_the_best_approximation_of_the_sum(weights: tuple[float, ...]) -> None:
    parts = three()
    wanted = oracle.weighted_sum(parts, weights)
    found, losses = combine(parts, weights, "svd", rank=2)
    assert losses is not None
    for name, value in wanted.items():
        if not float(value.norm()):
            assert name not in found.updates
            continue
        left, values, right = torch.linalg.svd(value)
        best = (left[:, :2] * values[:2]) @ right[:2]
        own = found.updates[name]
        assert own.rank == min(2, int(torch.linalg.matrix_rank(value)))
        assert float((oracle.product_of(own) - best).norm()) < 1e-6 * float(value.norm())
        share = float(values[:2].square().sum() / values.square().sum())
        assert losses.targets[name].kept == pytest.approx(share)


@given(budget=st.integers(16, 300))
def test_svd_keeps_a_budget(budget: int) -> None:
    found, losses = combine(three(), method="svd", budget=budget)
    assert losses is not None
    assert found.parameters == losses.parameters_after <= budget


def test_enough_rank_loses_nothing() -> None:
    parts = three()
    for options in ({"rank": 12}, {"budget": 10_000}):
        found, losses = combine(parts, method="svd", **options)
        assert losses is not None
        assert losses.kept == 1
        assert_sum(found, oracle.weighted_sum(parts, (1, 1, 1)))
        # Rank 6 + 1 of a module with 5 inputs.
        assert all(own.rank <= own.target.max_rank for own in found.updates.values())


# --- what PEFT does --------------------------------------------------------------------------


NAMES = ("first", "second")


def stock(configs: list[dict[str, Any]]) -> Any:
    """A model with one adapter per configuration, all of them with weights."""
    model: Any = None
    for position, config in enumerate(configs):
        torch.manual_seed(position)
        made = LoraConfig(init_lora_weights=False, **config)
        if model is None:
            model = get_peft_model(tiny_llama(), made, adapter_name=NAMES[0])
        else:
            model.add_adapter(NAMES[position], made)
    return model.eval()


def joined(model: Any, weights: list[float], kind: str, **options: Any) -> Tensor:
    model.add_weighted_adapter(list(NAMES), weights, "joined", combination_type=kind, **options)
    model.set_adapter("joined")
    (batch,) = batches(CASES["llama"], 1)
    return logits(model, batch)


def ours(model: Any, weights: list[float], *args: Any, **options: Any) -> Tensor:
    parts = [taken(model, name) for name in NAMES]
    found, _ = combine(parts, weights, *args, **options)
    (batch,) = batches(CASES["llama"], 1)
    return logits(install(tiny_llama(), found), batch)


EQUAL = [{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}] * 2
MIXED = [
    {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
     "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"up_proj": 3}},
    {"r": 4, "lora_alpha": 4, "target_modules": ["up_proj", "v_proj"]},
]  # fmt: skip


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.4]])
def test_peft_agrees_on_equal_ranks(weights: list[float]) -> None:
    model = stock(EQUAL)
    found = ours(model, weights)
    torch.testing.assert_close(found, joined(model, weights, "cat"), rtol=1e-4, atol=1e-5)
    model = stock(EQUAL)
    found = ours(model, weights, "svd", rank=3)
    wanted = joined(model, weights, "svd", svd_rank=3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_peft_agrees_on_mixed_ranks_but_pays_for_the_largest() -> None:
    model = stock(MIXED)
    found = ours(model, [0.7, -0.4])
    parts = [taken(model, name) for name in NAMES]
    torch.testing.assert_close(found, joined(model, [0.7, -0.4], "cat"), rtol=1e-4, atol=1e-5)
    theirs, own = taken(model, "joined"), combine(parts)[0]
    assert theirs.parameters > 1.5 * own.parameters


def test_peft_gets_the_scale_of_rslora_wrong() -> None:
    """It keeps ``use_rslora`` and sets alpha to the rank, for a scale of 1 that is not 1."""
    configs = [{**config, "use_rslora": True} for config in EQUAL]
    model = stock(configs)
    parts = [taken(model, name) for name in NAMES]
    wanted = oracle.weighted_sum(parts, (1, 1))
    found, _ = combine(parts)
    assert_sum(found, wanted)
    joined(model, [1.0, 1.0], "cat")
    theirs = taken(model, "joined")
    name = next(iter(wanted))
    ratio = oracle.product_of(theirs.updates[name]).norm() / wanted[name].norm()
    assert float(ratio) == pytest.approx(6**0.5, rel=1e-4)


# --- what does not fit together ----------------------------------------------------------------


def test_other_shapes_are_refused() -> None:
    one, other = adapter({"m.2": 2}), adapter({"n.0": 2})
    renamed = replace(other.updates["n.0"], name="m.2")
    with pytest.raises(gr.PlanError, match=r"'m.2' is 6 x 9 in one adapter and 7 x 7 in adapter 2"):
        combine([one, Adapter({"m.2": renamed})])


def test_other_base_models_are_refused_unless_they_are_one() -> None:
    one = adapter({"m.2": 2}, base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    other = adapter({"m.2": 2}, 1, base_model_name_or_path="/models/base")
    with pytest.raises(gr.PlanError, match=r"'org/base' and adapter 2 '/models/base'.*same_base"):
        combine([one, other])
    found, _ = combine([one, other], same_base=True)
    assert found.config["base_model_name_or_path"] == "org/base"
    assert found.config["task_type"] == "CAUSAL_LM"
    # A name that only one of them knows is no contradiction.
    assert combine([adapter({"m.2": 2}), one])[0].config["base_model_name_or_path"] == "org/base"
    classifier = adapter({"m.2": 2}, task_type="SEQ_CLS")
    with pytest.raises(gr.PlanError, match="task_type 'CAUSAL_LM' and adapter 2 'SEQ_CLS'"):
        combine([one, classifier], same_base=True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"bias": "all"}, "trained biases"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
    ],
)
def test_more_than_updates_is_refused_by_name(config: Any, why: str) -> None:
    with pytest.raises(gr.PlanError, match=why):
        combine([adapter({"m.2": 2}), adapter({"m.2": 2}, 1, **config)])


def test_a_head_comes_from_one_adapter_only() -> None:
    def with_head(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False,
                            modules_to_save=["classifier"])  # fmt: skip
        model = get_peft_model(tiny_bert(), config)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter)
        return model

    model = with_head(1)
    plain = get_peft_model(
        tiny_bert(), LoraConfig(r=3, target_modules=["value"], init_lora_weights=False)
    )
    parts = [taken(plain), taken(model)]
    found, _ = combine(parts, [1.0, 0.5])
    assert found.features == parts[1].features
    again: Any = install(tiny_bert(), found)
    wanted = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(again.base_model.model.classifier.modules_to_save["default"].weight, wanted)
    # Its logits are those of a base with both updates and the head.
    base: Any = tiny_bert()
    with torch.no_grad():
        for name, delta in oracle.weighted_sum(parts, (1.0, 0.5)).items():
            base.get_submodule(name).weight += delta.float()
        base.classifier.load_state_dict(
            model.base_model.model.classifier.modules_to_save["default"].state_dict()
        )
    (batch,) = batches(CASES["bert"], 1)
    torch.testing.assert_close(logits(again, batch), logits(base, batch), rtol=1e-4, atol=1e-5)
    with pytest.raises(gr.PlanError, match=r"2 adapters bring modules .*'classifier.bias'"):
        combine([taken(model), taken(with_head(2))])


@pytest.mark.parametrize(
    ("weights", "options", "why"),
    [
        ([1.0], {}, "3 adapters and 1 weights"),
        ([1.0, float("nan"), 1.0], {}, "weight nan is no finite number"),
        ([1.0, True, 1.0], {}, "weight True is no finite number"),
        (None, {"method": "concat"}, "'concat' is unknown. Did you mean 'concatenate'"),
        (None, {"rank": 2}, "'rank' does not go with 'concatenate'"),
        (None, {"method": "svd"}, "needs either a rank or a budget"),
        (None, {"method": "svd", "rank": 2, "budget": 50}, "needs either a rank or a budget"),
        (None, {"method": "svd", "rank": 0}, "rank is 0"),
        (None, {"method": "svd", "rank": 2.5}, "rank is 2.5"),
    ],
)
def test_wrong_options_are_refused(weights: Any, options: Any, why: str) -> None:
    with pytest.raises(gr.OptionError, match=why):
        combine(three(), weights, **options)


def test_nothing_is_refused() -> None:
    with pytest.raises(gr.OptionError, match="no adapter was given"):
        combine([])
    with pytest.raises(gr.PlanError, match="all weights are 0"):
        combine(three(), [0, 0, 0])
