"""A step after an edit is a step of an optimizer built that way; rollback restores everything."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.optimization import Adafactor as HubAdafactor

from gradrank.adapters.optimizers import (
    OptimizerChange,
    carry_state,
    inner_optimizer,
    refusals,
    swap,
)
from gradrank.core.errors import TargetError
from gradrank.ops.moments import Carry
from oracles.moments import factored_estimate

# Multiples of 16: a vector lane and a scalar tail may round differently.
D_IN, D_OUT, RANK = 32, 16, 4
LR = 1e-2
optim = torch.optim
Build = Callable[[list[dict[str, Any]]], Any]

# One element never touches another, so that a selection commutes with a step.
ELEMENTWISE: dict[str, Build] = {
    "adamw": lambda groups: optim.AdamW(groups, LR, weight_decay=0.1),
    "adamw-fused": lambda groups: optim.AdamW(groups, LR, fused=True),
    "adamw-foreach": lambda groups: optim.AdamW(groups, LR, foreach=True),
    "amsgrad": lambda groups: optim.Adam(groups, LR, amsgrad=True),
    "nadam": lambda groups: optim.NAdam(groups, LR),
    "radam": lambda groups: optim.RAdam(groups, LR),
    "adamax": lambda groups: optim.Adamax(groups, LR),
    "sgd": lambda groups: optim.SGD(groups, LR),
    "momentum": lambda groups: optim.SGD(groups, LR, momentum=0.9),
    "nesterov": lambda groups: optim.SGD(groups, LR, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: optim.RMSprop(groups, LR),
    "rmsprop-centred": lambda groups: optim.RMSprop(groups, LR, centered=True, momentum=0.9),
    "adagrad": lambda groups: optim.Adagrad(groups, LR),
}
OTHERS: dict[str, Build] = {
    "adafactor-torch": lambda groups: optim.Adafactor(groups, LR),
    "adafactor-hub": lambda groups: HubAdafactor(
        groups, LR, scale_parameter=False, relative_step=False, beta1=0.9
    ),
    "adafactor-hub-relative": HubAdafactor,
}
BLOCKWISE: dict[str, Build] = {}
try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None
else:
    _8 = {"lr": LR, "min_8bit_size": 1}
    BLOCKWISE = {
        "bnb-adamw8": lambda groups: bnb.optim.AdamW8bit(groups, **_8),
        "bnb-lion8": lambda groups: bnb.optim.Lion8bit(groups, **_8),
        "bnb-ademamix8": lambda groups: bnb.optim.AdEMAMix8bit(groups, **_8),
        "bnb-momentum8": lambda groups: bnb.optim.SGD8bit(groups, momentum=0.9, **_8),
        "bnb-rmsprop8": lambda groups: bnb.optim.RMSprop8bit(groups, **_8),
        "bnb-adamw32": lambda groups: bnb.optim.AdamW(groups, lr=LR),
    }
    ELEMENTWISE["bnb-adamw32"] = BLOCKWISE["bnb-adamw32"]
    ELEMENTWISE["bnb-small"] = lambda groups: bnb.optim.AdamW8bit(groups, lr=LR)
ALL = {**ELEMENTWISE, **OTHERS, **BLOCKWISE}
needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")


class Toy(optim.Optimizer):
    """An optimizer that no one has heard of: its state has a key of its own."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["trace"], state["exp_avg"] = torch.zeros_like(p), torch.zeros_like(p)
                state["trace"].add_(p.grad)
                p.data.sub_(state["trace"], alpha=group["lr"])


class Setting:
    """Two LoRA factors and a head in two groups, some steps into training."""

    def __init__(self, build: Build, steps: int = 4, rank: int = RANK, dtype: Any = None) -> None:
        self.build = build
        self.generator = torch.Generator().manual_seed(7)
        self.A = self.parameter(rank, D_IN, dtype=dtype)
        self.B = self.parameter(D_OUT, rank, dtype=dtype)
        self.head = self.parameter(5, dtype=dtype)
        self.optimizer = build([{"params": [self.head, self.A]}, {"params": [self.B]}])
        for _ in range(steps):
            self.step(*(self.random(p) for p in (self.A, self.B, self.head)))

    def random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.dtype)

    def parameter(self, *shape: int, dtype: Any = None) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self.generator).to(dtype or torch.float32))

    def step(self, *gradients: Tensor) -> None:
        for p, gradient in zip((self.A, self.B, self.head), gradients, strict=True):
            p.grad = gradient.clone()
        self.optimizer.step()

    def edit(self, carry: Carry) -> OptimizerChange:
        """Change the rank of both factors: the kept components, zeros behind them."""
        change = OptimizerChange(self.optimizer)
        for name, axis in (("A", 0), ("B", 1)):
            old = getattr(self, name)
            carried = carry_state(self.optimizer, old, self.optimizer.state[old], carry, axis)
            assert carried.reset == ()
            new = nn.Parameter(resized(old.detach(), carry, axis))
            change.replace(old, new, carried.state)
            setattr(self, name, new)
        return change


def resized(tensor: Tensor, carry: Carry, axis: int) -> Tensor:
    kept = tensor.index_select(axis, torch.tensor(carry.indices))
    shape = list(tensor.shape)
    shape[axis] = carry.fresh + carry.blank
    return torch.cat([kept, tensor.new_zeros(shape)], axis)


def snapshot(optimizer: Any) -> dict[int, dict[str, Any]]:
    return {id(p): copy.deepcopy(dict(s)) for p, s in optimizer.state.items()}


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_selecting_and_stepping_commute_bitwise(name: str) -> None:
    kept = torch.tensor([2, 0])
    whole, edited = (Setting(ELEMENTWISE[name]) for _ in range(2))
    edited.edit(Carry.select(kept.tolist()))
    for _ in range(3):
        dA, dB, dh = (whole.random(p) for p in (whole.A, whole.B, whole.head))
        whole.step(dA, dB, dh)
        edited.step(dA[kept], dB[:, kept], dh)
    assert torch.equal(edited.A, whole.A[kept])
    assert torch.equal(edited.B, whole.B[:, kept])
    assert torch.equal(edited.head, whole.head)
    for p, q, axis in ((edited.A, whole.A, 0), (edited.B, whole.B, 1)):
        for key, value in whole.optimizer.state[q].items():
            moment = isinstance(value, Tensor) and value.shape == q.shape
            wanted = value.index_select(axis, kept) if moment else value
            assert equal(edited.optimizer.state[p][key], wanted), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_a_step_after_an_edit_is_that_of_an_optimizer_built_that_way(
    name: str, dtype: torch.dtype
) -> None:
    edited = Setting(ALL[name], dtype=dtype)
    edited.edit(Carry.select([3, 1], fresh=2, blank=1))
    built = Setting(ALL[name], steps=0, rank=5, dtype=dtype)
    for mine, other in ((built.A, edited.A), (built.B, edited.B), (built.head, edited.head)):
        mine.data.copy_(other.data)
    if dtype == torch.float32:
        built.optimizer.load_state_dict(copy.deepcopy(edited.optimizer.state_dict()))
    else:
        # Loading would round every state to the parameter's dtype, NAdam's scalars included.
        for mine, other in ((built.A, edited.A), (built.B, edited.B), (built.head, edited.head)):
            if other in edited.optimizer.state:
                built.optimizer.state[mine] = copy.deepcopy(edited.optimizer.state[other])
    gradients = [edited.random(p) for p in (edited.A, edited.B, edited.head)]
    for _ in range(2):
        edited.step(*gradients)
        built.step(*gradients)
    for mine, other in ((built.A, edited.A), (built.B, edited.B), (built.head, edited.head)):
        assert torch.equal(mine, other)
        assert torch.isfinite(mine).all()
        state = built.optimizer.state[mine]
        assert equal(dict(state), dict(edited.optimizer.state[other]))


@pytest.mark.parametrize("name", [name for name in ALL if name != "sgd"])
def test_the_comparison_sees_a_state_that_was_lost(name: str) -> None:
    edited, reset = (Setting(ALL[name]) for _ in range(2))
    edited.edit(Carry.select([3, 1]))
    reset.edit(Carry.select([3, 1]))
    reset.optimizer.state[reset.A] = {}
    gradients = [edited.random(p) for p in (edited.A, edited.B, edited.head)]
    for setting in (edited, reset):
        setting.step(*gradients)
    assert not torch.equal(edited.A, reset.A)
    assert torch.equal(edited.B, reset.B)


@pytest.mark.parametrize("name", ALL)
def test_keeping_all_is_a_bitwise_no_op(name: str) -> None:
    plain, kept = (Setting(ALL[name]) for _ in range(2))
    state = kept.optimizer.state[kept.A]
    carried = carry_state(kept.optimizer, kept.A, state, Carry.keep(RANK), 0)
    assert equal(carried.state, dict(state))
    kept.edit(Carry.keep(RANK))
    gradients = [plain.random(p) for p in (plain.A, plain.B, plain.head)]
    for setting in (plain, kept):
        setting.step(*gradients)
    assert torch.equal(plain.A, kept.A)
    assert torch.equal(plain.B, kept.B)


# The 8-bit step of bitsandbytes on a CPU rounds zero moments up to their neighbours.
@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("8")])
def test_blank_components_rest_at_zero(name: str) -> None:
    setting = Setting(ALL[name])
    setting.edit(Carry.select([0, 1, 2], blank=2))
    for _ in range(3):
        dA, dB, dh = (setting.random(p) for p in (setting.A, setting.B, setting.head))
        dA[3:], dB[:, 3:] = 0, 0
        setting.step(dA, dB, dh)
    assert torch.isfinite(setting.A).all()
    assert torch.isfinite(setting.B).all()
    assert not setting.A[3:].any()
    assert not setting.B[:, 3:].any()


@pytest.mark.parametrize("name", ["adamw", "amsgrad", "adamw-fused", "adagrad"])
def test_the_first_step_of_a_fresh_component_is_at_most_a_learning_rate(name: str) -> None:
    setting = Setting(ELEMENTWISE[name], steps=300)
    setting.edit(Carry.select(range(RANK), fresh=2))
    dA, dB, dh = (setting.random(p) for p in (setting.A, setting.B, setting.head))
    setting.step(3 * dA, 3 * dB, dh)
    assert 0 < float(setting.A.detach()[RANK:].abs().max()) <= LR
    assert 0 < float(setting.B.detach()[:, RANK:].abs().max()) <= LR


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", OTHERS)
def test_adafactor_keeps_the_estimate_of_kept_components(name: str, axis: int) -> None:
    setting = Setting(OTHERS[name])
    old = setting.B if axis else setting.A
    state = setting.optimizer.state[old]
    row, column = (
        ("row_var", "col_var") if "row_var" in state else ("exp_avg_sq_row", "exp_avg_sq_col")
    )
    before = factored_estimate(state[row], state[column]).index_select(axis, torch.tensor([3, 1]))
    new = carry_state(
        setting.optimizer, old, state, Carry.select([3, 1], fresh=1, blank=1), axis
    ).state
    assert new[row].dim() == state[row].dim()
    found = factored_estimate(new[row], new[column]).narrow(axis, 0, 2)
    torch.testing.assert_close(found, before, rtol=1e-6, atol=0)
    # A twin that slices the one vector and leaves the other as it was.
    sliced = {row: new[row], column: state[column]} if axis == 0 else None
    if sliced:
        twin = factored_estimate(sliced[row], sliced[column])[:2]
        assert not torch.allclose(twin, before, rtol=1e-2)


@given(seed=st.integers(0, 50), nesterov=st.booleans())
def test_momentum_in_a_rotated_basis_is_the_rotated_run(seed: int, nesterov: bool) -> None:
    # For an orthogonal change of basis weights and gradients turn alike, and SGD turns with them.
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)).Q
    gradients = torch.randn(6, RANK, D_IN, generator=generator, dtype=torch.float64)
    old = nn.Parameter(torch.randn(RANK, D_IN, generator=generator, dtype=torch.float64))
    optimizer = optim.SGD([old], LR, momentum=0.9, nesterov=nesterov)
    for gradient in gradients[:4]:
        old.grad = gradient
        optimizer.step()
    new = nn.Parameter(Q @ old.detach())
    carried = carry_state(optimizer, old, optimizer.state[old], Carry.rotate(Q), 0)
    other = optim.SGD([new], LR, momentum=0.9, nesterov=nesterov)
    other.state[new] = carried.state
    for gradient in gradients[4:]:
        old.grad, new.grad = gradient, Q @ gradient
        optimizer.step()
        other.step()
    torch.testing.assert_close(new.data, Q @ old.data, rtol=1e-12, atol=1e-12)


def test_a_rotated_centred_rmsprop_has_no_negative_variance() -> None:
    # Gradients that hardly vary: the squared mean is nearly all of the mean square.
    old = nn.Parameter(torch.zeros(2, 3))
    optimizer = optim.RMSprop([old], LR, alpha=0.5, centered=True)
    for _ in range(30):
        old.grad = torch.ones(2, 3)
        optimizer.step()
    matrix = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    state = carry_state(optimizer, old, optimizer.state[old], Carry.rotate(matrix), 0).state
    new = nn.Parameter(torch.zeros(2, 3))
    swap(optimizer, old, new, state)
    new.grad = matrix @ torch.ones(2, 3) * 1.1
    optimizer.step()
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("name", ALL)
def test_a_rotation_leaves_a_state_to_step_with(name: str) -> None:
    setting = Setting(ALL[name])
    matrix = torch.randn(3, RANK, generator=setting.generator)
    for parameter, axis in ((setting.A, 0), (setting.B, 1)):
        state = setting.optimizer.state[parameter]
        carry = Carry.rotate(matrix, fresh=1)
        carried = carry_state(setting.optimizer, parameter, state, carry, axis)
        assert carried.reset == ()
        assert carried.state.keys() == state.keys()
        shape = list(parameter.shape)
        shape[axis] = 4
        new = nn.Parameter(torch.zeros(shape))
        swap(setting.optimizer, parameter, new, carried.state)
        new.grad = torch.randn(shape, generator=setting.generator)
    setting.head.grad = None
    setting.optimizer.step()
    for group in setting.optimizer.param_groups:
        for parameter in group["params"]:
            assert torch.isfinite(parameter).all()


@pytest.mark.parametrize("name", ALL)
def test_carrying_touches_nothing_and_shares_nothing(name: str) -> None:
    setting = Setting(ALL[name])
    A, state = setting.A, setting.optimizer.state[setting.A]
    before = copy.deepcopy(dict(state))
    for carry in (Carry.keep(RANK), Carry.select([1, 0], fresh=1), Carry.rotate(torch.eye(4))):
        carry_state(setting.optimizer, A, state, carry, 0)
    assert equal(dict(setting.optimizer.state[A]), before)
    setting.edit(Carry.keep(RANK))
    for _ in range(3):
        setting.step(*(setting.random(p) for p in (setting.A, setting.B, setting.head)))
    assert A not in setting.optimizer.state
    assert equal(dict(state), before), "a step with the new state must not reach the old one"


@pytest.mark.parametrize("name", ALL)
def test_rollback_restores_objects_order_and_bits(name: str) -> None:
    setting = Setting(ALL[name])
    optimizer = setting.optimizer
    objects = [(g["params"], list(g["params"])) for g in optimizer.param_groups]
    keys, states = list(optimizer.state), [id(s) for s in optimizer.state.values()]
    tensors = [{k: id(v) for k, v in s.items()} for s in optimizer.state.values()]
    before = snapshot(optimizer)
    A = setting.A
    change = setting.edit(Carry.select([2, 1]))
    change.remove(setting.B)
    assert optimizer.param_groups[1]["params"] == []
    assert all(setting.A is not key for key in keys)
    change.rollback()
    for (params, saved), group in zip(objects, optimizer.param_groups, strict=True):
        assert group["params"] is params
        assert [id(p) for p in params] == [id(p) for p in saved]
    assert [id(p) for p in optimizer.state] == [id(p) for p in keys]
    assert [id(s) for s in optimizer.state.values()] == states
    assert [{k: id(v) for k, v in s.items()} for s in optimizer.state.values()] == tensors
    assert equal(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["params"][1] is A


@pytest.mark.parametrize("name", ALL)
def test_an_emptied_group_stays_and_the_optimizer_steps_on(name: str) -> None:
    setting = Setting(ALL[name])
    for group in setting.optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"] or LR)
    schedule = optim.lr_scheduler.LambdaLR(
        setting.optimizer, [lambda _: 0.5, lambda _: 0.25], last_epoch=0
    )
    change = OptimizerChange(setting.optimizer)
    change.remove(setting.B)
    assert len(setting.optimizer.param_groups) == 2
    assert setting.B not in setting.optimizer.state
    before = setting.A.detach().clone()
    setting.step(*(setting.random(p) for p in (setting.A, setting.B, setting.head)))
    schedule.step()
    assert not torch.equal(setting.A, before)
    assert len(setting.optimizer.state_dict()["param_groups"]) == 2


def test_swapping_keeps_group_position_and_options() -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    setting.optimizer.param_groups[0]["lr"] = 0.5
    new = nn.Parameter(torch.zeros(2, D_IN))
    swap(setting.optimizer, setting.A, new, None)
    group = setting.optimizer.param_groups[0]
    assert group["params"][0] is setting.head
    assert group["params"][1] is new
    assert group["lr"] == 0.5
    assert new not in setting.optimizer.state
    assert setting.A not in setting.optimizer.state
    new.grad, setting.B.grad = torch.ones_like(new), None
    setting.optimizer.step()
    assert float(setting.optimizer.state[new]["step"]) == 1


def test_the_state_alone_can_be_exchanged() -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    carry = Carry.select([1, 3], blank=2)
    state = carry_state(
        setting.optimizer, setting.A, setting.optimizer.state[setting.A], carry, 0
    ).state
    change = OptimizerChange(setting.optimizer)
    change.replace(setting.A, setting.A, state)
    assert equal(dict(setting.optimizer.state[setting.A]), state)
    assert setting.optimizer.param_groups[0]["params"][1] is setting.A
    change.rollback()
    assert not equal(dict(setting.optimizer.state[setting.A]), state)


def test_a_parameter_must_be_there_and_a_new_one_must_not() -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    stranger = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(TargetError, match=r"no such parameter of shape \(3, 3\)"):
        swap(setting.optimizer, stranger, setting.A, None)
    with pytest.raises(TargetError, match="already"):
        swap(setting.optimizer, setting.A, setting.B, None)
    with pytest.raises(TargetError, match="no such parameter"):
        OptimizerChange(setting.optimizer).remove(stranger)
    assert setting.optimizer.param_groups[0]["params"][1] is setting.A


def test_an_unknown_state_is_reset_whole_and_named() -> None:
    setting = Setting(Toy)
    state = setting.optimizer.state[setting.A]
    carried = carry_state(setting.optimizer, setting.A, state, Carry.select([0]), 0)
    assert carried.state == {}
    assert len(carried.reset) == 1
    assert carried.reset[0].startswith("trace (Tensor (4, 32)")
    assert "Toy" in carried.reset[0]
    same = carry_state(setting.optimizer, setting.A, state, Carry.keep(RANK), 0)
    assert equal(same.state, dict(state)), "what changes nothing loses nothing"
    swap(setting.optimizer, setting.A, nn.Parameter(setting.A.detach()[:1]), carried.state)
    new = setting.optimizer.param_groups[0]["params"][1]
    new.grad = torch.ones_like(new)
    setting.optimizer.step()
    assert torch.equal(setting.optimizer.state[new]["trace"], new.grad)


class Packed(Tensor):
    """A tensor subclass, as quantised or sharded states are."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exp_avg", torch.zeros(2, D_IN)),
        ("exp_avg", torch.zeros(RANK, D_IN, dtype=torch.int8)),
        ("exp_avg", torch.zeros(RANK, D_IN).as_subclass(Packed)),
        ("exp_avg_sq", 3),
        ("step", torch.zeros(2)),
        ("row_var", torch.zeros(RANK, 1)),
        ("hessian", torch.zeros(RANK, D_IN)),
        ("projector", object()),
    ],
)
def test_a_known_key_with_another_layout_is_reset(key: str, value: Any) -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    state = {**setting.optimizer.state[setting.A], key: value}
    carried = carry_state(setting.optimizer, setting.A, state, Carry.select([0]), 0)
    assert carried.state == {}
    assert [reason.split()[0] for reason in carried.reset] == [key]


def test_nothing_to_carry_is_no_reset_to_warn_of() -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    never = carry_state(setting.optimizer, setting.A, {}, Carry.select([0]), 0)
    assert (never.state, never.reset) == ({}, ())
    state = setting.optimizer.state[setting.A]
    gone = carry_state(setting.optimizer, setting.A, state, Carry.select([], fresh=2), 0)
    assert (gone.state, gone.reset) == ({}, ())
    with pytest.raises(ValueError, match="beyond the 4 components"):
        carry_state(setting.optimizer, setting.A, state, Carry.select([4]), 0)


def test_wrappers_of_accelerate_are_opened() -> None:
    setting = Setting(ELEMENTWISE["adamw"])
    wrapped: Any = setting.optimizer
    for _ in range(2):
        inner, wrapped = wrapped, AcceleratedOptimizer.__new__(AcceleratedOptimizer)
        wrapped.optimizer = inner
    assert inner_optimizer(wrapped) is setting.optimizer
    assert inner_optimizer(setting.optimizer) is setting.optimizer
    carried = carry_state(wrapped, setting.A, wrapped.state[setting.A], Carry.select([1]), 0)
    change = OptimizerChange(wrapped)
    new = nn.Parameter(torch.zeros(1, D_IN))
    change.replace(setting.A, new, carried.state)
    assert setting.optimizer.param_groups[0]["params"][1] is new
    change.rollback()
    assert setting.optimizer.param_groups[0]["params"][1] is setting.A
    assert refusals(wrapped, {"A": setting.A}) == []


def test_every_reason_is_listed_at_once() -> None:
    flattening = type("DeepSpeedZeroOptimizer", (optim.AdamW,), {"__module__": "deepspeed.runtime"})
    setting = Setting(lambda groups: flattening(groups, LR))
    stranger, flat = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    flat._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    setting.optimizer.param_groups[1]["params"].append(setting.A)
    setting.B.register_post_accumulate_grad_hook(print)
    found = refusals(
        setting.optimizer,
        {"a": setting.A, "b": setting.B, "head": setting.head, "new": stranger, "flat": flat},
    )
    assert len(found) == 5
    for reason, words in zip(
        found,
        [
            ("DeepSpeedZeroOptimizer flattens", "fixed-shape"),
            ("new, flat:", "not in the optimizer"),
            ("a:", "more than once"),
            ("flat:", "FSDP"),
            ("b:", "hook"),
        ],
        strict=True,
    ):
        assert all(word in reason for word in words), reason


def test_refusals_name_families_and_shorten_lists() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    (reason,) = refusals(optim.LBFGS([parameter]), [parameter])
    assert "LBFGS" in reason
    (reason,) = refusals(optim.SparseAdam([parameter]), [parameter])
    assert "SparseAdam" in reason
    strangers = [nn.Parameter(torch.zeros(2, i)) for i in range(1, 6)]
    (reason,) = refusals(optim.AdamW([parameter]), strangers)
    assert reason.startswith("#0 (2, 1), #1 (2, 2), #2 (2, 3) and 2 more: not in the optimizer")
    (reason,) = refusals(object(), [parameter])
    assert "not in the optimizer" in reason


@pytest.mark.parametrize("name", ALL)
def test_what_works_is_not_refused(name: str) -> None:
    setting = Setting(ALL[name])
    assert refusals(setting.optimizer, {"A": setting.A, "B": setting.B}) == []


def dense(state: dict[str, Any], slot: int) -> Tensor:
    """State in 32 bits, element after element from the map of codes and the block's scale."""
    values = state[f"state{slot}"]
    if values.dtype == torch.float32:
        return values.clone()
    found = state[f"qmap{slot}"][values.flatten().long()]
    scales = state[f"absmax{slot}"].flatten()
    half = values.numel() // (2 if state[f"absmax{slot}"].dim() == 2 else 1)
    blocks = -(-half // 256)
    for i in range(found.numel()):
        found[i] *= scales[(i // half) * blocks + (i % half) // 256]
    return found.reshape(values.shape)


@needs_bnb
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name in BLOCKWISE if name.endswith("8")])
def test_8_bit_moments_move_by_one_rounding(name: str, axis: int) -> None:
    setting = Setting(BLOCKWISE[name], rank=20)
    parameter = setting.B if axis else setting.A
    state = setting.optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8
    kept = torch.tensor([17, 3, 5, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10, 12])
    carry = Carry.select(kept.tolist(), fresh=2, blank=1)
    new = carry_state(setting.optimizer, parameter, state, carry, axis).state
    for slot in (1, 2):
        if f"state{slot}" not in state:
            continue
        assert new[f"state{slot}"].dtype == torch.uint8
        before, after = dense(state, slot), dense(new, slot)
        at = axis + before.dim() - 2
        carried, fresh, blank = after.split([14, 2, 1], dim=at)
        wanted = before.index_select(at, kept)
        gap = float(state[f"qmap{slot}"].diff().max()) * float(new[f"absmax{slot}"].max())
        assert float((carried - wanted).abs().max()) <= gap
        assert not torch.allclose(carried, wanted.flip(at), atol=gap), "too coarse a comparison"
        assert not blank.any()
        second = float(name == "bnb-rmsprop8" or slot == 2)
        mean = wanted.mean(at, keepdim=True) * second
        assert float((fresh - mean).abs().max()) <= gap


@needs_bnb
def test_8_bit_moments_follow_the_size_that_bitsandbytes_asks_for() -> None:
    size = RANK * D_IN
    setting = Setting(lambda groups: bnb.optim.AdamW8bit(groups, lr=LR, min_8bit_size=size))
    optimizer, A = setting.optimizer, setting.A
    assert optimizer.state[A]["state1"].dtype == torch.uint8
    smaller = carry_state(optimizer, A, optimizer.state[A], Carry.select([2, 0]), 0).state
    assert smaller.keys() == {"step", "state1", "state2"}
    assert torch.equal(smaller["state1"], dense(optimizer.state[A], 1)[[2, 0]])
    assert torch.equal(smaller["state2"], dense(optimizer.state[A], 2)[[2, 0]])
    B = setting.B
    assert optimizer.state[B]["state1"].dtype == torch.float32
    larger = carry_state(optimizer, B, optimizer.state[B], Carry.select(range(4), fresh=4), 1)
    assert larger.state["state2"].dtype == torch.uint8
    assert larger.state["qmap2"] is not larger.state["qmap1"]
    gap = float(larger.state["qmap2"].diff().max() * larger.state["absmax2"].max())
    moved = dense(larger.state, 2)[:, :4]
    assert float((moved - optimizer.state[B]["state2"]).abs().max()) <= gap


@needs_bnb
@pytest.mark.parametrize("wrong", ["absmax", "map", "key", "kernel"])
def test_an_8_bit_layout_of_another_version_is_reset(wrong: str) -> None:
    setting = Setting(BLOCKWISE["bnb-adamw8"])
    state = dict(setting.optimizer.state[setting.A])
    if wrong == "absmax":
        state["absmax1"] = torch.zeros(7)
    elif wrong == "map":
        del state["qmap2"]
    elif wrong == "key":
        state["new_max1"] = torch.zeros(1)
    else:
        setting.optimizer.optimizer_name = "novel"
    carried = carry_state(setting.optimizer, setting.A, state, Carry.select([0]), 0)
    assert carried.state == {}
    expected = {"absmax": "absmax1", "map": "qmap2", "key": "new_max1", "kernel": "state1"}
    assert any(reason.startswith(expected[wrong] + " (") for reason in carried.reset)


@needs_bnb
def test_overrides_and_paging_of_bitsandbytes_are_refused(monkeypatch: Any) -> None:
    setting = Setting(BLOCKWISE["bnb-adamw8"])
    named = {"A": setting.A, "B": setting.B}
    manager = setting.optimizer.mng
    with monkeypatch.context() as patch:
        patch.setitem(manager.pid2config, id(setting.A), {"optim_bits": 32})
        (reason,) = refusals(setting.optimizer, named)
        assert reason.startswith("A: under an override")
    with monkeypatch.context() as patch:
        patch.setitem(manager.index2config, (1, 0), {"optim_bits": 32})
        (reason,) = refusals(setting.optimizer, named)
        assert reason.startswith("B: under an override")
    setting.optimizer.state[setting.B]["state1"].is_paged = True
    (reason,) = refusals(setting.optimizer, named)
    assert reason.startswith("B: paged by bitsandbytes")


@needs_bnb
def test_a_paged_optimizer_is_refused_where_it_would_page() -> None:
    large = nn.Parameter(torch.zeros(100, 1000, device="meta"))
    small = nn.Parameter(torch.zeros(100, 10, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = bnb.optim.PagedAdamW8bit([large, small], lr=LR)
    (reason,) = refusals(optimizer, {"large": large, "small": small})
    assert reason.startswith("large: paged")


def test_names_of_parameters_follow_a_removal_and_come_back() -> None:
    layers = {name: nn.Parameter(torch.zeros(2)) for name in "abc"}
    optimizer = torch.optim.AdamW(list(layers.items()))
    change = OptimizerChange(optimizer)
    change.remove(layers["b"])
    assert optimizer.param_groups[0]["param_names"] == ["a", "c"]
    change.rollback()
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]
    assert optimizer.param_groups[0]["params"] == list(layers.values())
