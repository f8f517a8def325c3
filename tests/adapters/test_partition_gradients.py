"""Gradients of the compact form: against finite differences, and against rows one by one."""

import pytest
import torch
from torch import Tensor

import gradrank as gr
from adapters.partition_cases import partitions, shake
from adapters.surgery_cases import sites, trained
from cases import CASES
from gradrank.adapters.partitioned import Partitioned

DOMINANT = torch.tensor([True, False, False, True, True, False, False])


def blocks(rank: int, rest: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = (3, rank), (4, rest)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return made[0].requires_grad_(), made[1].requires_grad_()


@pytest.mark.parametrize(("rank", "rest"), [(3, 1), (2, 2), (1, 3), (3, 0)])
def test_both_derivatives_agree_with_finite_differences(rank: int, rest: int) -> None:
    form, given = Partitioned(DOMINANT, rank, rest), blocks(rank, rest)
    assert torch.autograd.gradcheck(form, given)

    def curved(upper: Tensor, lower: Tensor) -> Tensor:
        whole = form(upper, lower)
        return (whole.T @ whole.sin()).square()

    assert torch.autograd.gradgradcheck(curved, given)


def by_row(upper: Tensor, lower: Tensor) -> Tensor:
    """Equation 9, row by row: the k-th dominant row is row k of its block."""
    rest, rank = lower.shape[1], upper.shape[1]
    rows, count = [], {True: 0, False: 0}
    for dominant in DOMINANT.tolist():
        block, before, behind = (upper, 0, rest) if dominant else (lower, rank, 0)
        row = block[count[dominant]]
        rows.append(torch.cat([row.new_zeros(before), row, row.new_zeros(behind)]))
        count[dominant] += 1
    return torch.stack(rows)


@pytest.mark.parametrize(("rank", "rest"), [(3, 1), (1, 3), (3, 0)])
def test_the_form_and_its_gradients_are_those_of_the_rows_one_by_one(rank: int, rest: int) -> None:
    form, given = Partitioned(DOMINANT, rank, rest), blocks(rank, rest)
    found, wanted = form(*given), by_row(*given)
    assert torch.equal(found, wanted)
    weights = torch.randn(found.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((w * weights).sum(), given) for w in (found, wanted)]
    assert all(map(torch.equal, *grads))


def test_the_rows_one_by_one_catch_blocks_that_are_swapped() -> None:
    form, (upper, lower) = Partitioned(DOMINANT, 2, 2), blocks(2, 2)
    assert not torch.equal(form(upper.flip(0), lower), by_row(upper, lower))
    assert not torch.equal(Partitioned(~DOMINANT, 2, 2)(lower, upper), by_row(upper, lower))


@pytest.mark.parametrize("name", ["gpt2", "vit"])  # those that compute in float64 throughout
def test_a_whole_model_agrees_with_central_differences(name: str) -> None:
    case = CASES[name]
    model, _ = trained(case)
    model.double()
    gr.edit(model, partitions(model, "warm", rank=3, rest=2))
    shake(model)
    batch = case.batch(torch.Generator().manual_seed(4))
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].double()

    def loss() -> Tensor:
        return model(**batch).logits.sin().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    for site in list(sites(model).values())[::3]:
        for raw in site.learned().values():
            place = tuple(int(torch.randint(n, (1,), generator=generator)) for n in raw.shape)
            values = []
            with torch.no_grad():
                for move in (1e-5, -2e-5):
                    raw[place] += move
                    values.append(float(loss()))
                raw[place] += 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert raw.grad is not None
            assert slope == pytest.approx(float(raw.grad[place]), rel=1e-4, abs=1e-8)
