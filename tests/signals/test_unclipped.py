"""Copies of complete gradients, whatever is done to ``.grad`` before the optimizer's step."""

import pytest
import torch
from torch import nn

from gradrank.signals.unclipped import UnclippedGradients


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    (scale * net(torch.randn(6, 5, generator=generator)).square().mean()).backward()


def test_the_sum_over_micro_batches_is_copied_before_it_is_clipped(net: nn.Sequential) -> None:
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


def test_later_micro_batches_do_not_change_what_was_taken(net: nn.Sequential) -> None:
    taken = UnclippedGradients()
    taken.open([net[0].weight])
    backward(net, 0)
    first = taken.take()[0]
    kept = first.clone()
    backward(net, 1)
    assert torch.equal(first, kept)
    assert not taken.is_open


def test_a_parameter_without_a_gradient_counts_as_zero(net: nn.Sequential) -> None:
    alone = nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    taken = UnclippedGradients()
    taken.open([alone, frozen, net[0].weight])
    backward(net, 0)
    zero, still, some = taken.take()
    assert torch.equal(zero, torch.zeros(2)) and torch.equal(still, torch.zeros(3))
    assert some.count_nonzero()


def test_no_hook_stays(net: nn.Sequential) -> None:
    taken = UnclippedGradients()
    for end in (taken.take, taken.close):
        taken.open(list(net.parameters()))
        assert net[0].weight._post_accumulate_grad_hooks
        end()
        assert not net[0].weight._post_accumulate_grad_hooks
