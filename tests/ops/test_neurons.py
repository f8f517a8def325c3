"""Row sums of the implied gradient and its picture, against explicit matrices and loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradrank.ops.neurons import gradient_map, neuron_importance
from oracles.pilora import implied_gradient, row_sums

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def factors(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((r, n), (m, r), (r, n), (m, r))
    a, b, c, d = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return a.to(dtype), b.to(dtype), c.to(dtype), d.to(dtype)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 1, 100, 200])
)
def test_row_sums_equal_the_loops_in_blocks_of_any_size(
    m: int, n: int, r: int, block: int | None
) -> None:
    given_ = factors(m, n, r, seed=m + 10 * n + 100 * r)
    expected = torch.tensor(row_sums(implied_gradient(*given_)), dtype=torch.float64)
    found = neuron_importance(*given_, block_bytes=block)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_each_half_of_the_implied_gradient_is_needed() -> None:
    A, B, grad_A, grad_B = factors(7, 5, 2)
    whole = neuron_importance(A, B, grad_A, grad_B)
    first = neuron_importance(A, B, grad_A, torch.zeros_like(grad_B))
    second = neuron_importance(A, B, torch.zeros_like(grad_A), grad_B)
    torch.testing.assert_close(first, (B @ grad_A).abs().sum(1))
    torch.testing.assert_close(second, (grad_B @ A).abs().sum(1))
    assert not torch.allclose(whole, first)
    assert not torch.allclose(whole, second)
    assert not torch.allclose(whole, first + second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    given_ = factors(40, 30, 4, dtype=dtype)
    expected = neuron_importance(*(t.double() for t in given_))
    assert expected.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        found = neuron_importance(*given_)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("what", ["sums", "map"])
def test_the_whole_matrix_is_never_held(what: str) -> None:
    m, n, r = 300, 200, 2
    given_ = factors(m, n, r, dtype=torch.float32)
    block = 4 * n * 10
    with Largest() as made:
        if what == "sums":
            neuron_importance(*given_, block_bytes=block)
        else:
            gradient_map(*given_, 8, 8, block_bytes=block)
    assert 0 < made.elements <= max(10 * n, 2 * r * m)
    with Largest() as made:
        (given_[1] @ given_[2] + given_[3] @ given_[0]).abs().sum(1)
    assert made.elements == m * n


def test_what_is_not_finite_stays_so() -> None:
    for bad in (math.nan, math.inf):
        A, B, grad_A, grad_B = factors(4, 5, 2)
        grad_B[2, 1] = bad
        assert neuron_importance(A, B, grad_A, grad_B).isfinite().tolist() == [1, 1, 0, 1]
        grad_A[0, 3] = bad
        assert not neuron_importance(A, B, grad_A, grad_B).isfinite().any()


def test_before_the_first_update_it_is_the_true_gradient_through_the_rows_of_a() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    A, scaling = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), 1.5
    B = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 6, dtype=torch.float64)
    (torch.sin(layer(x) + scaling * x @ A.T @ B.T)).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert layer.weight.grad is not None
    assert not A.grad.any()
    found = neuron_importance(A, B, A.grad, B.grad)
    assert not found.requires_grad
    seen = scaling * layer.weight.grad @ A.detach().T @ A.detach()
    torch.testing.assert_close(found, seen.abs().sum(1))


def averaged(gradient: Tensor, rows: int, columns: int) -> Tensor:
    """The mean of every cell, one after the other."""
    m, n = gradient.shape
    rows, columns = min(rows, m), min(columns, n)
    picture = torch.zeros(rows, columns, dtype=gradient.dtype)
    for i in range(rows):
        for j in range(columns):
            mine = [k for k in range(m) if k * rows // m == i]
            theirs = [k for k in range(n) if k * columns // n == j]
            picture[i, j] = gradient[mine][:, theirs].abs().mean()
    return picture


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 10), (64, 64), (2, 64)])
@pytest.mark.parametrize("block", [None, 1, 250])
def test_the_picture_is_the_mean_magnitude_per_cell(
    size: tuple[int, int], block: int | None
) -> None:
    given_ = factors(7, 10, 2)
    gradient = torch.tensor(implied_gradient(*given_), dtype=torch.float64)
    found = gradient_map(*given_, *size, block_bytes=block)
    torch.testing.assert_close(found, averaged(gradient, *size))
