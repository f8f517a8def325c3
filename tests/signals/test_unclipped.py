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


class Processes:
    """Two processes in one: what each puts into a collective call is known to the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.summed = False
        monkeypatch.setattr(unclipped.dist, "get_world_size", lambda: 2)

    def averaged(self, own: list[Any], shared: list[Any]) -> list[list[torch.Tensor]]:
        tables = [self._table(*pair) for pair in zip(own, shared, strict=True)]
        self._patch.setattr(unclipped, "gather", lambda _: tables)
        return [self._one(own, shared, rank) for rank in (0, 1)]

    def _table(self, own: list[Any], shared: list[Any]) -> torch.Tensor:
        sent: list[torch.Tensor] = []

        def gather(table: torch.Tensor) -> list[torch.Tensor]:
            sent.append(table)
            return [table, table]

        self._patch.setattr(unclipped, "gather", gather)
        self._patch.setattr(unclipped, "sum_over_processes", lambda _: None)
        unclipped.averaged(own, shared)
        return sent[0]

    def _one(self, own: list[Any], shared: list[Any], rank: int) -> list[torch.Tensor]:
        def add(tensors: list[torch.Tensor]) -> None:
            self.summed = True
            for tensor, other in zip(tensors, own[1 - rank], strict=True):
                tensor.add_(other)

        self._patch.setattr(unclipped, "sum_over_processes", add)
        return unclipped.averaged(own[rank], shared[rank])


KINDS = (torch.float32, torch.bfloat16, torch.float32, torch.float64)


def two(seed: int = 0) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Gradients of two processes, and their mean."""
    generator = torch.Generator().manual_seed(seed)
    own = [
        [torch.randn(i + 3, 200, generator=generator).to(k) for i, k in enumerate(KINDS)]
        for _ in range(2)
    ]
    return own, [(a + b) / 2 for a, b in zip(*own, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 64.0])
def test_what_clipping_left_of_the_mean_is_enough(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    processes, (own, mean) = Processes(monkeypatch), two()
    left = [grad * scale for grad in mean]
    first, second = processes.averaged(own, [left, left])
    assert not processes.summed, "the gradients themselves have travelled"
    for found, other, wanted in zip(first, second, mean, strict=True):
        assert torch.equal(found, other)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(first[3], mean[3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("what", ["by value", "not averaged", "gone", "one is gone", "opposite"])
def test_gradients_travel_where_the_mean_cannot_be_known_otherwise(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    processes, (own, mean) = Processes(monkeypatch), two()
    left: dict[str, list[Any]] = {
        "by value": [[grad.clamp(-0.1, 0.1) * (i + 1) for i, grad in enumerate(mean)]] * 2,
        "not averaged": own,
        "gone": [[None] * 4] * 2,
        "one is gone": [[None, *mean[1:]]] * 2,
        "opposite": [[-grad for grad in mean]] * 2,
    }
    first, second = processes.averaged(own, left[what])
    assert processes.summed
    for found, other, wanted in zip(first, second, mean, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
        assert torch.equal(found, other)


def test_what_is_zero_everywhere_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, (own, mean) = Processes(monkeypatch), two()
    zeros = [torch.zeros(2, 2)]
    own = [[*zeros, *mine] for mine in own]
    first, _ = processes.averaged(own, [[None, *mean]] * 2)
    assert not processes.summed
    assert torch.equal(first[0], zeros[0])
    nothing, _ = processes.averaged([zeros, zeros], [[None], [None]])
    assert torch.equal(nothing[0], zeros[0])
    assert not processes.summed
