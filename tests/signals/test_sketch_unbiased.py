"""Sketched Gram matrices: right on average over seeds, whatever the shape of the module."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradrank.core.targets import Target
from gradrank.ops import sketch as sketches
from gradrank.signals import spectrum
from gradrank.signals.spectrum import STORED_WIDTH, DenseProbe, SketchProbe
from oracles.gradients import gram_of
from oracles.sketching import standard_errors_away

SHAPES = [(40, 24), (24, 40), (40, 6), (6, 40), (33, 31)]
SEEDS = 600
SIZE = 8


def gradients(shape: tuple[int, int], batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Per batch X ``[T, d_in]`` and Δ ``[T, d_out]``, correlated between batches."""
    generator = torch.Generator().manual_seed(sum(shape))
    d_out, d_in = shape
    x0, d0 = torch.randn(5, d_in, generator=generator), torch.randn(5, d_out, generator=generator)
    return [
        (
            x0 + torch.randn(5, d_in, generator=generator),
            d0 + torch.randn(5, d_out, generator=generator),
        )
        for _ in range(batches)
    ]


def grams(shape: tuple[int, int], size: int = SIZE, seeds: int = SEEDS) -> tuple[Tensor, Tensor]:
    """Sketched Gram matrices of many seeds ``[seeds, M, M]``, and the exact one."""
    data = gradients(shape)
    target = Target("some.layer", shape[1], shape[0])
    found = []
    for seed in range(seeds):
        probe = SketchProbe([target], size, seed)
        for index, (x, delta) in enumerate(data):
            probe.on_output_grad(target, probe.on_input(target, x), delta)
            probe.end_batch(index)
        found.append(probe.finish().gram[target.name])
    exact = gram_of([(delta.T @ x).double() for x, delta in data])
    return torch.stack(found), exact


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_seeds_is_the_dense_gram(shape: tuple[int, int]) -> None:
    found, exact = grams(shape)
    assert found.std(dim=0).min() > 0
    assert float(standard_errors_away(found, exact).max()) < 4


def test_the_second_fold_is_unbiased_too() -> None:
    found, exact = grams((50, 48), size=40, seeds=200)
    assert STORED_WIDTH < 40 * 40
    assert found.std(dim=0).min() > 0
    assert float(standard_errors_away(found, exact).max()) < 4


def test_targets_that_fit_are_exact() -> None:
    found, exact = grams((16, 16), size=16, seeds=3)
    for gram in found:
        torch.testing.assert_close(gram, exact, rtol=1e-5, atol=0)


def no_signs(length: int, seed: int) -> Tensor:
    return torch.ones(length)


def scaled_fold(x: Tensor, signs: Tensor, size: int) -> Tensor:
    return sketches.fold(x, signs, size) / size**0.5


def forgets_the_rest(x: Tensor, signs: Tensor, size: int) -> Tensor:
    whole = x.shape[-1] - x.shape[-1] % size
    return sketches.fold(x[..., :whole], signs[:whole], size)


@pytest.mark.parametrize(
    ("name", "twin"),
    [("random_signs", no_signs), ("fold", scaled_fold), ("fold", forgets_the_rest)],
    ids=["no signs", "scaled by sqrt(k)", "remainder forgotten"],
)
def test_the_interval_catches_a_broken_sketch(
    monkeypatch: pytest.MonkeyPatch, name: str, twin: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(spectrum, name, twin)
    found, exact = grams((33, 31), seeds=200)
    assert float(standard_errors_away(found, exact).max()) > 4


def test_relative_error_falls_with_the_sketch_size_as_the_module_says() -> None:
    errors = []
    for size in (4, 8, 16):
        found, exact = grams((64, 64), size=size, seeds=60)
        errors.append(float(((found - exact).square().mean().sqrt()) / exact.trace() * 3))
    assert errors[0] > errors[1] > errors[2]
    # About sqrt(4 / k) of a squared norm in the worst case.
    assert errors[2] < (4 / 16) ** 0.5


def test_signs_depend_on_the_name_outside_and_on_the_width_inside() -> None:
    targets = [Target("a", 20, 30), Target("b", 20, 30), Target("c", 21, 30)]
    probe = SketchProbe(targets, 4, 0)
    x = torch.randn(5, 20)
    assert torch.equal(probe.on_input(targets[0], x), probe.on_input(targets[1], x))
    assert probe.share_key(targets[0]) == probe.share_key(targets[1])
    assert probe.share_key(targets[0]) != probe.share_key(targets[2])
    for target in targets[:2]:
        probe.on_output_grad(target, probe.on_input(target, x), torch.ones(5, 30))
    probe.end_batch(0)
    rows = probe.finish().rows
    assert not torch.allclose(rows["a"], rows["b"])


def test_dense_and_sketch_give_zero_for_a_target_without_gradient() -> None:
    targets = [Target("used", 6, 5), Target("unused", 6, 5)]
    for probe in (SketchProbe(targets, 4, 0), DenseProbe(targets)):
        for index in range(3):
            x = torch.randn(2, 6)
            probe.on_output_grad(targets[0], probe.on_input(targets[0], x), torch.randn(2, 5))
            probe.end_batch(index)
        gram = probe.finish().gram
        assert gram["used"].shape == gram["unused"].shape == (3, 3)
        assert not gram["unused"].any()
