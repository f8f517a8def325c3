"""Gradients of the compact form: against finite differences, and against plain operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradrank as gr
from adapters.partition_cases import partitions, shake
from adapters.surgery_cases import sites, trained
from cases import CASES
from gradrank.adapters.partitioned import Expand, Partitioned, _expanded

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


@pytest.mark.parametrize(("rank", "rest"), [(3, 1), (1, 3), (3, 0)])
def test_the_fused_form_is_the_plain_one(rank: int, rest: int) -> None:
    form, given = Partitioned(DOMINANT, rank, rest), blocks(rank, rest)
    found, wanted = form(*given), _expanded(*given, form.upper, form.lower)
    assert torch.equal(found, wanted)
    weights = torch.randn(found.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((w * weights).sum(), given) for w in (found, wanted)]
    assert all(map(torch.equal, *grads))


def test_finite_differences_catch_blocks_that_are_swapped() -> None:
    class Swapped(Expand):
        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
            left, right, *_ = Expand.backward(ctx, *grads)
            return left.flip(0), right, None, None

    form = Partitioned(DOMINANT, 3, 1)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda *given: Swapped.apply(*given, form.upper, form.lower), blocks(3, 1)
        )


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
