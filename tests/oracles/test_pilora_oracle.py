"""The twin of PiLoRA is right where the answer is known, and tells its mistakes apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.pilora_cases import (
    DECAY,
    INITIAL,
    LR,
    MAX_NORM,
    NAMES,
    fresh_groups,
    network,
    steps,
    twin,
)
from oracles.pilora import (
    MISTAKES,
    Groups,
    expanded,
    implied_gradient,
    is_hit,
    majority,
    row_sums,
)


def test_equations_7_and_8_by_hand() -> None:
    A, B = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0], [3.0]])
    found = implied_gradient(A, B, torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0], [-2.0]]))
    assert found == [[1.0, -2.0], [1.0, 19.0]]
    assert row_sums(found) == [3.0, 20.0]


def test_the_implied_gradient_is_the_change_of_the_product_to_first_order() -> None:
    torch.manual_seed(0)
    A, B, grad_A, grad_B = (torch.randn(s).double() for s in ((3, 6), (5, 3), (3, 6), (5, 3)))
    rate = 1e-7
    change = (B - rate * grad_B) @ (A - rate * grad_A) - B @ A
    found = torch.tensor(implied_gradient(A, B, grad_A, grad_B), dtype=torch.float64)
    torch.testing.assert_close(change, -rate * found, rtol=1e-5, atol=1e-12)


def test_a_hit_is_above_the_mean_and_a_majority_is_more_than_half() -> None:
    assert is_hit([1.0, 2.0, 6.0]) == [False, False, True]
    assert is_hit([2.0, 2.0]) == [False, False]
    assert majority([0, 1, 2, 3], 4) == [0, 0, 0, 1]
    assert majority([0, 1, 2, 3], 3) == [0, 0, 1, 1]


def test_equation_9_puts_compact_rows_where_the_mask_is() -> None:
    B = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert expanded([0, 1, 0, 1], B).tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert expanded([0, 0], B[:0]).tolist() == [[0, 0], [0, 0]]


def test_the_second_stage_is_its_merged_weight() -> None:
    run = twin(network())
    layer = run.layers["first"]
    mask = [1, 0, 0, 1, 1, 0, 1, 0, 0]
    factors = [torch.randn(s).double() for s in ((3, 6), (4, 3), (1, 6), (5, 1))]
    layer.groups = Groups(mask, *factors)
    x = torch.randn(4, 6).double()
    merged = layer.W + layer.scaling * layer.groups.update()
    torch.testing.assert_close(layer(x), x @ merged.T + layer.bias)


# --- the whole run, against PEFT's layers and torch's optimizer ----------------------------------


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)


def trained(model: Any, optimizer: torch.optim.Optimizer, data: Any) -> list[float]:
    losses, parameters = [], [p for group in optimizer.param_groups for p in group["params"]]
    for micro_batches in data:
        optimizer.zero_grad()
        total = 0.0
        for x, y in micro_batches:
            loss = ((model(x) - y) ** 2).mean() / len(micro_batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        losses.append(total)
    return losses


class Partitioned(torch.nn.Module):
    """A second route to stage 2: one full-width LoRA, multiplied by a mask of its B."""

    def __init__(self, base: Any, scaling: float, groups: Groups) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        chosen = torch.tensor(groups.mask).double()[:, None]
        r, s = len(groups.A_d), len(groups.A_s)
        self.mask = torch.cat([chosen.expand(-1, r), 1 - chosen.expand(-1, s)], 1)
        self.A = torch.nn.Parameter(torch.cat([groups.A_d, groups.A_s]).clone())
        self.B = torch.nn.Parameter(torch.zeros(len(groups.mask), r + s).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * x @ self.A.T @ (self.mask * self.B).T


def test_both_stages_equal_stock_lora_and_a_masked_lora() -> None:
    model, data = network(), steps()
    run = twin(model)
    run.first_stage(data[:INITIAL])
    lora = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(
        run.losses, trained(model, adamw(lora), data[:INITIAL]), rtol=1e-9, atol=0
    )
    start = fresh_groups(run.masks())
    assert any(0 < sum(g.mask) < len(g.mask) for g in start.values())
    net = model.base_model.model
    for name in NAMES:
        old = net.get_submodule(name)
        setattr(net, name, Partitioned(old.base_layer, old.scaling["default"], start[name]))
    parameters = [p for p in net.parameters() if p.requires_grad]
    run.second_stage(data[INITIAL:], start)
    masked = trained(net, adamw(parameters), data[INITIAL:])
    torch.testing.assert_close(run.losses[INITIAL:], masked, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_changes_the_hits_and_leaves_training_alone(mistake: str) -> None:
    model, data = network(), steps()[:INITIAL]
    right, wrong = twin(model), twin(model, broken=mistake)
    right.first_stage(data)
    wrong.first_stage(data)
    assert right.losses == wrong.losses
    assert right.looks == wrong.looks == 3
    assert right.hits != wrong.hits
    assert right.masks() != wrong.masks()


def test_a_single_row_is_never_above_its_own_mean() -> None:
    run = twin(network())
    run.first_stage(steps()[:INITIAL])
    assert run.hits["head"] == [0]
