"""The penalty's gradient, against autograd on the penalty written out in loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradrank.ops.orthogonality import penalty_gradient


def penalty(vectors: Tensor, whole: bool) -> Tensor:
    """Squared deviation of every inner product of two directions from what it should be."""
    total = vectors.new_zeros(())
    for i in range(len(vectors)):
        for j in range(len(vectors)):
            shared = (vectors[i] * vectors[j]).sum()
            if i != j:
                total = total + shared**2
            elif whole:
                total = total + (shared - 1) ** 2
    return total


def by_autograd(vectors: Tensor, whole: bool) -> Tensor:
    given = vectors.clone().requires_grad_()
    return torch.autograd.grad(penalty(given, whole), given, allow_unused=False)[0]


@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_the_gradient_is_that_of_the_penalty(rank: int, width: int, whole: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    if rank == 1 and not whole:
        assert not penalty_gradient(vectors, whole).any(), "nothing to share"
        return
    assert torch.allclose(penalty_gradient(vectors, whole), by_autograd(vectors, whole))


def test_the_comparison_catches_half_the_gradient_and_the_other_penalty() -> None:
    vectors = torch.randn(3, 5, dtype=torch.float64)
    want = by_autograd(vectors, True)
    assert not torch.allclose(penalty_gradient(vectors) / 2, want)
    assert not torch.allclose(penalty_gradient(vectors, whole=False), want)


@pytest.mark.parametrize("whole", [False, True])
def test_orthonormal_directions_are_left_alone(whole: bool) -> None:
    vectors = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].T
    assert penalty_gradient(vectors, whole).abs().max() < 1e-14


def test_lengths_count_only_where_the_whole_penalty_is_asked_for() -> None:
    stretched = torch.diag(torch.tensor([3.0, 0.5, 2.0]))
    assert not penalty_gradient(stretched, whole=False).any()
    assert penalty_gradient(stretched, whole=True).diagonal().tolist() == [96.0, -1.5, 24.0]


def test_following_it_makes_directions_orthonormal() -> None:
    vectors = torch.randn(3, 8, dtype=torch.float64) / 3
    for _ in range(400):
        vectors = vectors - 0.02 * penalty_gradient(vectors)
    assert torch.allclose(vectors @ vectors.T, torch.eye(3).double(), atol=1e-6)


def test_no_graph_is_recorded_and_nothing_is_changed() -> None:
    vectors = torch.randn(3, 5, requires_grad=True)
    before = vectors.detach().clone()
    assert not penalty_gradient(vectors).requires_grad
    assert torch.equal(vectors, before)
