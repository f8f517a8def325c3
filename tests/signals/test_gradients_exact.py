"""The dense estimator against gradients that autograd computes itself."""

import pytest
import torch
from torch import Tensor

import gradrank as gr
from cases import Case, batches
from gradrank.signals.layers import find_sites
from gradrank.signals.measurement import Measurement
from oracles.gradients import factors, gram_of, gram_of_factors, weight_gradients

BATCHES = 4


def dense(model: torch.nn.Module, data: list, **options: object) -> Measurement:
    return gr.measure(model, data, gr.Spectrum("dense"), num_batches=len(data), **options)


def as_double(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in data
    ]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def test_dense_grams_equal_autograd_in_double_precision(case: Case) -> None:
    model, data = case.model().double(), as_double(batches(case, BATCHES))
    found = dense(model, data)
    names = [target.name for target in found.targets]
    oracle = weight_gradients(model, data, names)
    for name in names:
        error = relative(found.gram(name), gram_of(oracle[name]))
        assert error < 1e-12, name


def test_dense_grams_equal_autograd_in_single_precision(case: Case) -> None:
    model, data = case.model(), batches(case, BATCHES)
    found = dense(model, data)
    names = [target.name for target in found.targets]
    oracle = weight_gradients(model, data, names)
    for name in names:
        error = relative(found.gram(name), gram_of(oracle[name]))
        assert error < 2e-6, name


def test_two_oracles_agree_on_the_gram(case: Case) -> None:
    model, data = case.model().double(), as_double(batches(case, BATCHES))
    for site in find_sites(model)[::3]:
        name = site.target.name
        by_weight = gram_of(weight_gradients(model, data, [name])[name])
        by_factors = gram_of_factors(factors(model, data, name))
        assert relative(by_factors, by_weight) < 1e-12, name


@pytest.mark.parametrize("broken", ["transposed", "one batch late", "sum instead of mean"])
def test_the_oracle_catches_a_broken_gram(case: Case, broken: str) -> None:
    model, data = case.model(), batches(case, BATCHES)
    site = find_sites(model)[0]
    name = site.target.name
    gradients = weight_gradients(model, data, [name])[name]
    twin = {
        "transposed": [g.flip(0) if i else g for i, g in enumerate(gradients)],
        "one batch late": [*gradients[1:], gradients[0]],
        "sum instead of mean": [g * 2 for g in gradients],
    }[broken]
    assert relative(gram_of(twin), gram_of(gradients)) > 1e-2


def test_targets_are_named_shaped_and_ordered_as_in_the_model(case: Case) -> None:
    model = case.model()
    found = dense(model, batches(case, 2)).targets
    order = [name for name, _ in model.named_modules()]
    assert [t.name for t in found] == sorted((t.name for t in found), key=order.index)
    for target in found:
        weight = model.get_submodule(target.name).weight
        shape = weight.shape if target.kind == "linear" else weight.T.shape
        assert (target.d_out, target.d_in) == tuple(shape)
        assert target.kind == ("conv1d" if case.name == "gpt2" else "linear")


def test_dense_in_blocks_equals_dense_at_once(case: Case) -> None:
    model, data = case.model(), batches(case, 3)
    whole = dense(model, data)
    blocks = gr.measure(model, data, gr.Spectrum("dense", max_bytes=1), num_batches=3)
    assert blocks.targets == whole.targets
    assert list(blocks.need_spectrum().gram) == [target.name for target in whole.targets]
    for target in whole.targets:
        torch.testing.assert_close(blocks.gram(target.name), whole.gram(target.name))
