"""Evaluation: exact, independent of batches, and without side effects."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradrank.lab.evaluate import class_metrics, evaluate, summed_loss
from oracles.evaluation import (
    classifier_loss,
    language_model_loss,
    macro_f1,
    matthews,
    mean_of_batch_means,
)

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def test_language_model_loss_is_that_of_one_token_at_a_time(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    blocks = data.eval.ids[:7]
    object.__setattr__(data, "eval", type(data.eval)(blocks))
    model.eval()
    expected = language_model_loss(model, blocks)
    for size in (1, 3, 7, 100):
        found = evaluate(model, data, size)
        assert found.loss == pytest.approx(expected, rel=1e-5)
        assert found.items == 7 * 15
        assert found.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_classifier_loss_is_that_of_one_example_at_a_time(prepare):
    model, data = prepare("tiny-bert", "tiny-sentiment")
    model.eval()
    items = [data.eval[i] for i in range(len(data.eval))]
    loss, accuracy = classifier_loss(model, items, data.collate)
    for size in (1, 7, 64):
        found = evaluate(model, data, size)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.metrics["accuracy"] == pytest.approx(accuracy)
        assert found.items == len(items)


def test_oracle_catches_a_mean_of_batch_means(prepare):
    model, data = prepare("tiny-bert", "tiny-sentiment")
    model.eval()
    items = [data.eval[i] for i in range(len(data.eval))]
    each = [classifier_loss(model, [item], data.collate)[0] for item in items]
    broken = mean_of_batch_means(each, 39)  # 39 examples, then one alone
    assert broken != pytest.approx(classifier_loss(model, items, data.collate)[0], rel=1e-5)


def test_uncounted_labels_are_left_out():
    logits = torch.randn(1, 4, 5)
    labels = torch.tensor([[1, 2, -100, 3]])
    loss, count = summed_loss(logits, labels, "lm")
    logs = torch.log_softmax(logits.double(), dim=-1)[0]
    assert count == 2
    assert loss == pytest.approx(float(-logs[0, 2] - logs[2, 3]), rel=1e-6)


@given(CLASSES)
def test_class_metrics_agree_with_their_definitions(pairs):
    expected, predicted = [p[0] for p in pairs], [p[1] for p in pairs]
    found = class_metrics(np.array(expected), np.array(predicted))
    assert found["accuracy"] == pytest.approx(np.mean(np.equal(expected, predicted)))
    assert found["macro_f1"] == pytest.approx(macro_f1(expected, predicted))
    assert found["mcc"] == pytest.approx(matthews(expected, predicted), abs=1e-9)


def test_evaluation_leaves_no_trace(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    model.train()
    frozen = model.base_model.model.model.layers[0]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    model.config.use_cache = True
    before = torch.get_rng_state()
    evaluate(model, data, 8, max_batches=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.use_cache is True
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(prepare, monkeypatch):
    model, data = prepare("tiny-llama", "tiny-lm")
    model.train()
    monkeypatch.setattr(type(model), "forward", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, data)
    assert all(module.training for module in model.modules())


def test_max_batches_takes_the_first(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    part = evaluate(model, data, 4, max_batches=2)
    assert part.items == 8 * 15
    assert part.loss != evaluate(model, data, 4).loss


def test_hopeless_loss_has_no_finite_perplexity(prepare, monkeypatch):
    model, data = prepare("tiny-llama", "tiny-lm")
    monkeypatch.setattr("gradrank.lab.evaluate.summed_loss", lambda *_a: (1e6, 1))
    assert evaluate(model, data, max_batches=1).metrics["perplexity"] == math.inf


def test_autocast_computes_in_bfloat16(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    full = evaluate(model, data, max_batches=1)
    half = evaluate(model, data, max_batches=1, autocast=torch.bfloat16)
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)
