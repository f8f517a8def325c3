"""Gradients on the path: closed forms, explicit copies of whole models, finite differences."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Case, batches
from gradrank.core.errors import MeasurementError
from gradrank.ops.quadrature import trapezoid
from gradrank.signals.path import FACTORS, Branch, at_point, gradients
from oracles import igu as oracle
from signals.path_cases import (
    FORMS,
    UNIT,
    branches,
    in_float64,
    of_case,
    polynomial,
    scalings,
    updates,
    used,
)

Found = dict[str, dict[str, Tensor]]


def factors_of(made: list[Branch]) -> list[str]:
    return list(made[0].learned)


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def on_path(model: Any, batch: dict[str, Tensor], alpha: float) -> tuple[float, Found]:
    """Loss and gradients, as a scoring pass takes them, of the components in use."""
    made = branches(model)
    with at_point(made, alpha):
        loss = loss_of(model, batch)
        found = gradients(loss, made, factors_of(made))
    cut = {
        b.name: {f: g.narrow(1 if f == "B" else 0, 0, b.rank) for f, g in found[b.name].items()}
        for b in made
    }
    return float(loss.detach()), cut


def close(one: Found, other: Found, rtol: float = 1e-9, atol: float = 1e-11) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.allclose(one[n][f].double(), other[n][f].double(), rtol, atol)
        for n in one
        for f in one[n]
    )


def integral(model: Any, segments: int) -> Found:
    rule = trapezoid(segments)
    total: Found = {}
    for alpha, weight in zip(rule.points, rule.weights, strict=True):
        for name, found in on_path(model, {"x": UNIT}, alpha)[1].items():
            sums = total.setdefault(name, {})
            for factor, grad in found.items():
                sums[factor] = sums.get(factor, torch.zeros_like(grad)) + weight * grad
    return total


def exact(model: Any, broken: bool = False) -> Found:
    """The path integral in closed form."""
    (branch,) = branches(model)
    scaling, update = scalings(model)[branch.name], updates(model)[branch.name]
    loss = model.base_model.model.loss_of
    mean = loss.mean_gradient_with_chain_factor(update) if broken else loss.mean_gradient(update)
    return {branch.name: oracle.by_factor(mean, used(branch), scaling)}


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_at_a_point_have_no_chain_factor(form: str, alpha: float) -> None:
    model = polynomial(form)
    (branch,) = branches(model)
    scaling, update = scalings(model)[branch.name], updates(model)[branch.name]
    assert scaling == 2.0
    loss = model.base_model.model.loss_of
    value, found = on_path(model, {"x": UNIT}, alpha)
    assert value == pytest.approx(float(loss(alpha * update)))
    want = {branch.name: oracle.by_factor(loss.gradient(update, alpha), used(branch), scaling)}
    assert close(found, want)
    if alpha not in {0.0, 1.0}:
        chained = {branch.name: {f: alpha * g for f, g in want[branch.name].items()}}
        assert not close(found, chained, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_one_segment_is_exact_on_a_quadratic_loss(form: str) -> None:
    model = polynomial(form, quartic=False)
    want = exact(model)
    assert close(integral(model, 1), want)
    assert close(integral(model, 7), want)
    assert not close(integral(model, 1), exact(model, broken=True), rtol=1e-2)


def test_on_a_quartic_loss_the_error_falls_with_the_square_of_n() -> None:
    model = polynomial()
    want = exact(model)
    coarse, fine = integral(model, 4), integral(model, 8)
    assert not close(coarse, want, rtol=1e-3)
    # g is a cubic of α, on which one step of Richardson's extrapolation is exact.
    name = next(iter(want))
    better = {f: (4 * fine[name][f] - coarse[name][f]) / 3 for f in FACTORS}
    assert close({name: better}, want)
    assert not close({name: better}, exact(model, broken=True), rtol=1e-2)


# --- whole models --------------------------------------------------------------------------------


def from_dense(model: Any, bare: Any, case: Case, batch: Any, alpha: float) -> tuple[float, Found]:
    """The same from a copy without any adapter whose weights are ``W0 + α ΔW``."""
    loss, dense = oracle.at_dense_weights(
        bare, updates(model), alpha, lambda copied: loss_of(copied, batch), case.name == "gpt2"
    )
    scale = scalings(model)
    return loss, {
        b.name: _fast_by_factor(dense[b.name].double(), used(b), scale[b.name])
        for b in branches(model)
    }


def _fast_by_factor(G: Tensor, factors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    P, Q = factors["B"], factors["A"]
    lam = factors.get("lam", torch.ones(P.shape[1], dtype=P.dtype))
    found = {
        "A": scaling * lam[:, None] * (P.T @ G),
        "B": scaling * (G @ Q.T) * lam,
        "lam": scaling * ((P.T @ G) * Q).sum(1),
    }
    return {name: found[name] for name in factors}


def test_the_fast_form_of_the_oracle_is_the_loops() -> None:
    model = polynomial()
    (branch,) = branches(model)
    G = torch.randn(4, 5, dtype=torch.float64)
    slow = oracle.by_factor(G, used(branch), 2.0)
    assert close({"m": _fast_by_factor(G, used(branch), 2.0)}, {"m": slow})


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_explicit_copies_on_every_architecture(
    case: Case, form: str
) -> None:
    model, bare = of_case(case, form)
    batch = in_float64(batches(case, 1)[0])
    # Norms of some architectures compute in float32, whatever the model's dtype.
    loose = {"rtol": 1e-3, "atol": 2e-6} if case.name in {"llama", "t5"} else {}
    for alpha in (0.0, 0.4, 1.0):
        loss, found = on_path(model, batch, alpha)
        value, want = from_dense(model, bare, case, batch, alpha)
        assert loss == pytest.approx(value, rel=1e-6)
        assert close(found, want, **loose), (alpha, form)
    _, elsewhere = from_dense(model, bare, case, batch, 0.6)
    assert not close(on_path(model, batch, 0.4)[1], elsewhere, rtol=1e-2, atol=1e-6)


def test_gradients_equal_finite_differences() -> None:
    """Not along the path: around the point ``α ΔW``, moving one element of one factor."""
    # Causal language models compute their loss in float32, too coarse for differences.
    model, bare = of_case("bert")
    batch, alpha, eps = batches(CASES["bert"], 1)[0], 0.35, 1e-5
    _, found = on_path(model, batch, alpha)
    scale = scalings(model)
    base = {name: alpha * update for name, update in updates(model).items()}

    def loss_at(name: str, shift: Tensor) -> float:
        moved = base | {name: base[name] + shift}
        return oracle.at_dense_weights(bare, moved, 1.0, lambda m: loss_of(m, batch))[0]

    for branch in branches(model)[::3]:
        factors = used(branch)
        P, Q, lam, s = factors["B"], factors["A"], factors["lam"], scale[branch.name]
        row = torch.zeros(len(P)).double()
        row[2] = 1.0
        shifts = {
            ("lam", (0,)): s * torch.outer(P[:, 0], Q[0]),
            ("B", (2, 1)): s * lam[1] * torch.outer(row, Q[1]),
        }
        for (factor, where), shift in shifts.items():
            up, down = loss_at(branch.name, eps * shift), loss_at(branch.name, -eps * shift)
            got = float(found[branch.name][factor][where])
            assert got == pytest.approx((up - down) / (2 * eps), rel=1e-4, abs=1e-8)


def test_the_end_of_the_path_is_the_training_gradient_bitwise() -> None:
    model, _ = of_case("llama", double=False)
    batch = batches(CASES["llama"], 1)[0]
    _, found = on_path(model, batch, 1.0)
    loss_of(model, batch).backward()
    for branch in branches(model):
        for factor, tensor in branch.learned.items():
            assert torch.equal(found[branch.name][factor], tensor.grad)


@pytest.mark.parametrize("form", FORMS)
def test_the_start_of_the_path_is_the_pre_trained_model_bitwise(form: str) -> None:
    model, bare = of_case("llama", form, double=False)
    batch = batches(CASES["llama"], 1)[0]
    with at_point(branches(model), 0.0):
        assert torch.equal(model(**batch).logits, bare(**batch).logits)
    assert not torch.equal(model(**batch).logits, bare(**batch).logits)


# --- the settings of real training ---------------------------------------------------------------


def scaled_copy(model: Any, batch: dict[str, Tensor], alpha: float) -> Found:
    """Gradients of a copy with α in its layers' scale, divided by the factor α that they have."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= alpha
    _, found = on_path(twin, batch, 1.0)
    return {n: {f: g / alpha for f, g in factors.items()} for n, factors in found.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.8])
def test_under_dropout_the_same_units_fall_out(alpha: float) -> None:
    model, _ = of_case("gpt2", lora_dropout=0.4)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0:
            module.p = 0.2
    batch = batches(CASES["gpt2"], 1)[0]
    torch.manual_seed(3)
    _, found = on_path(model, batch, alpha)
    torch.manual_seed(3)
    # At the start of the path the copy is taken a hair behind it.
    want = scaled_copy(model, batch, alpha or 1e-6)
    assert close(found, want, **({} if alpha else {"rtol": 1e-3, "atol": 5e-5}))
    torch.manual_seed(4)
    assert not close(on_path(model, batch, alpha)[1], want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_gradient_checkpointing_they_are_the_same(name: str) -> None:
    model, _ = of_case(name, lora_dropout=0.3)
    batch = batches(CASES[name], 1)[0]
    torch.manual_seed(3)
    _, plain = on_path(model, batch, 0.3)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    _, saved = on_path(model, batch, 0.3)
    assert close(saved, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj", "lm_head"]])
def test_reentrant_checkpointing_is_refused_with_the_remedy(targets: Any) -> None:
    """Parameters inside a checkpoint are no part of the graph: none may count as unused."""
    model, _ = of_case("llama", double=False, target_modules=targets)
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    batch = batches(CASES["llama"], 1)[0]
    with pytest.raises(MeasurementError, match="'use_reentrant': False"):
        on_path(model, batch, 0.5)


def whole(found: Found) -> Tensor:
    return torch.cat([g.reshape(-1) for factors in found.values() for g in factors.values()])


def test_under_autocast_they_are_those_of_float32_up_to_rounding() -> None:
    model, _ = of_case("llama", double=False)
    batch = batches(CASES["llama"], 1)[0]
    _, want = on_path(model, batch, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = on_path(model, batch, 0.5)
    _, elsewhere = on_path(model, batch, 0.0)
    right = whole(want)
    rounding = float((whole(found) - right).norm() / right.norm())
    moved = float((whole(elsewhere) - right).norm() / right.norm())
    assert 0 < rounding < 0.15
    assert moved > 3 * rounding, "another point of the path is farther away than the rounding"


# --- what it leaves behind -----------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind_even_after_an_exception() -> None:
    model, _ = of_case("llama")
    batch = batches(CASES["llama"], 1)[0]
    bare = hooks(model)
    before = model(**batch).logits.detach()
    on_path(model, batch, 0.5)
    assert hooks(model) == bare

    def fail() -> None:
        with at_point(branches(model), 0.5):
            assert hooks(model) > bare
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert hooks(model) == bare
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, before)


def test_no_grad_field_is_touched() -> None:
    model, _ = of_case("llama")
    data = batches(CASES["llama"], 2)
    loss_of(model, data[0]).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    on_path(model, data[1], 0.5)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_target_that_the_loss_does_not_see_gets_zeros() -> None:
    model = polynomial()
    (branch,) = branches(model)
    idle = {f: nn.Parameter(torch.ones_like(t)) for f, t in branch.learned.items()}
    made = [branch, Branch("idle", nn.Identity(), nn.Identity(), idle, 3)]
    found = gradients(model(UNIT)["loss"], made, FACTORS)
    assert all(found[branch.name][f].any() for f in FACTORS)
    assert not any(found["idle"][f].any() for f in FACTORS)
    assert found["idle"]["B"].shape == branch.learned["B"].shape
    with pytest.raises(MeasurementError, match="depends on none of the 1 adapters"):
        gradients(model(UNIT)["loss"], made[1:], FACTORS)


def test_other_errors_of_torch_pass_through() -> None:
    model = polynomial()
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(torch.tensor(1.0), branches(model), FACTORS)
