"""Singular values and balanced factors of a product that is never formed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradrank.ops.products import balanced, singular_values
from oracles import lowrank as oracle


def factors(rank: int, d_in: int, d_out: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    B = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return A, B * 0.7 ** torch.arange(rank)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))


@given(shapes)
def test_values_are_those_of_the_dense_product(shape: tuple[int, int, int, int]) -> None:
    A, B = factors(*shape)
    found, wanted = singular_values(A, B), torch.linalg.svdvals(B @ A)
    wanted = wanted[wanted > 1e-12 * wanted[0]]
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-12)


@given(shapes, st.integers(1, 7))
def test_factors_are_the_best_approximation(shape: tuple[int, int, int, int], rank: int) -> None:
    A, B = factors(*shape)
    rank = min(rank, *A.shape, B.shape[0])
    left, right = balanced(A, B, rank)
    assert left.shape == (rank, A.shape[1])
    assert right.shape == (B.shape[0], rank)
    size = float((B @ A).norm())
    assert float((right @ left - oracle.best_approximation(A, B, rank)).norm()) < 1e-12 * size
    values = torch.linalg.svdvals(B @ A)[:rank]
    for gram in (left @ left.T, right.T @ right):
        assert torch.allclose(gram, values.diag(), atol=1e-12 * size)


def test_the_oracle_catches_keeping_the_first_components() -> None:
    A, B = factors(5, 7, 6, 0)
    left, right = balanced(A, B, 2)
    assert float((right @ left - oracle.first_components(A, B, 2)).norm()) > 0.1


def test_what_cancels_is_no_direction() -> None:
    A, B = factors(3, 7, 6, 0)
    assert singular_values(torch.cat([A, A]), torch.cat([B, -B], 1)).numel() == 0
    assert singular_values(torch.cat([A, 0 * A]), torch.cat([B, B], 1)).numel() == 3
    assert singular_values(A[:0], B[:, :0]).numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_types_are_widened(dtype: torch.dtype) -> None:
    A, B = (factor.to(dtype) for factor in factors(4, 7, 6, 1))
    assert singular_values(A, B).dtype == torch.float64
    left, right = balanced(A, B, 4)
    assert torch.allclose(right @ left, B.double() @ A.double(), atol=1e-12)
