"""Copies of complete gradients, whatever is done to ``.grad`` before the optimizer's step."""

from typing import Any

import pytest
import torch
from torch import nn

from gradrank.signals import unclipped
from gradrank.signals.unclipped import UnclippedGradients


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    (scale * net(torch.randn(6, 5, generator=generator)).square().mean()).backward()


def test_the_sum_over_micro_batches_is_copied_before_it_is_clipped(net: Any) -> None:
    parameters = [net[0].weight, net[2].weight]
    taken = UnclippedGradients()
    taken.open(parameters)
    for seed in range(3):
        backward(net, seed, 10.0)
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    nn.utils.clip_grad_value_(net.parameters(), 1e-5)
    assert norm > 1e-3, "nothing was clipped"
    found = taken.take()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], parameters[0].grad)


def test_later_micro_batches_do_not_change_what_was_taken(net: Any) -> None:
    taken = UnclippedGradients()
    taken.open([net[0].weight])
    backward(net, 0)
    first = taken.take()[0]
    kept = first.clone()
    backward(net, 1)
    assert torch.equal(first, kept)
    assert not taken.is_open


def test_a_parameter_without_a_gradient_counts_as_zero(net: Any) -> None:
    alone = nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    taken = UnclippedGradients()
    taken.open([alone, frozen, net[0].weight])
    backward(net, 0)
    zero, still, some = taken.take()
    assert torch.equal(zero, torch.zeros(2))
    assert torch.equal(still, torch.zeros(3))
    assert some.count_nonzero()


def test_no_hook_stays(net: Any) -> None:
    taken = UnclippedGradients()
    for end in (taken.take, taken.close):
        taken.open(list(net.parameters()))
        assert net[0].weight._post_accumulate_grad_hooks
        end()
        assert not net[0].weight._post_accumulate_grad_hooks


def test_opening_again_forgets_what_was_copied(net: Any) -> None:
    taken = UnclippedGradients()
    taken.open([net[0].weight])
    backward(net, 0)
    taken.open([net[2].weight])
    assert not net[0].weight._post_accumulate_grad_hooks
    assert torch.equal(taken.take()[0], torch.zeros_like(net[2].weight))
    assert taken.take() == []


def test_gradients_of_a_new_step_replace_the_old_ones(net: Any) -> None:
    """As after a step that a gradient scaler skipped: nothing of it stays in the copy."""
    taken = UnclippedGradients()
    taken.open([net[0].weight])
    backward(net, 0, float("inf"))
    net.zero_grad()
    backward(net, 1)
    wanted = net[0].weight.grad
    assert wanted is not None
    assert torch.equal(taken.take()[0], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_keep_the_type_of_the_gradients(net: Any, dtype: torch.dtype) -> None:
    taken = UnclippedGradients()
    parameter = net[0].to(dtype).weight
    taken.open([parameter])
    (parameter.square().sum() + parameter.sum()).backward()
    (found,) = taken.take()
    assert found.dtype == dtype
    assert parameter.grad is not None
    assert torch.equal(found, parameter.grad)


def test_a_parameter_that_is_used_twice_is_copied_whole(net: Any) -> None:
    """Also under gradient checkpointing, where a gradient may arrive in parts."""
    parameter = net[2].weight
    taken = UnclippedGradients()
    taken.open([parameter])
    (parameter.square().sum() + 3 * parameter.sum()).backward()
    assert torch.equal(taken.take()[0], 2 * parameter.detach() + 3)


def test_the_mean_over_processes_keeps_types_shapes_and_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a second process that holds the same, three times as large."""
    monkeypatch.setattr(unclipped.dist, "all_reduce", lambda flat: flat.mul_(4))
    monkeypatch.setattr(unclipped.dist, "get_world_size", lambda: 2)
    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    given = [torch.full((i + 1, 2), float(i), dtype=kind) for i, kind in enumerate(kinds)]
    found = unclipped.averaged(given)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in given]
    assert [t.unique().tolist() for t in found] == [[0.0], [2.0], [4.0], [6.0]]
    assert given[3].unique().tolist() == [3.0], "what was given has changed"
