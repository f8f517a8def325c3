"""Evaluation: exact, independent of batches, and without side effects."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradrank.evidence.items import read_items
from gradrank.evidence.metrics import metric_values
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.benchmarks.task import Loaded, Task
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.evaluate import drawn, evaluate, item_losses
from gradrank.lab.models import resolve_model
from gradrank.lab.tasks import TASKS
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
    (loss,), (count,) = item_losses(logits, labels, "lm")
    logs = torch.log_softmax(logits.double(), dim=-1)[0]
    assert count == 2
    assert loss == pytest.approx(float(-logs[0, 2] - logs[2, 3]), rel=1e-6)


@given(CLASSES)
def test_class_metrics_agree_with_their_definitions(pairs):
    expected, predicted = [p[0] for p in pairs], [p[1] for p in pairs]
    found = metric_values({"kind": "classes", "expected": expected, "predicted": predicted})
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


def test_a_few_batches_are_drawn_from_the_whole_split(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    whole = evaluate(model, data, 4)
    part = evaluate(model, data, 4, max_batches=2)
    assert part.items == 8 * 15
    places = drawn(len(data.eval), 4, 2)
    assert part.outcomes["nll"] == pytest.approx([whole.outcomes["nll"][i] for i in places])
    assert len(set(places)) == 8
    assert places == sorted(places)
    assert places != list(range(8))


def test_the_draw_reaches_all_of_a_split_and_is_of_no_seed():
    places = drawn(4878, 4, 12)
    assert len(places) == 48
    quarters = [sum(4878 * q <= 4 * place < 4878 * (q + 1) for place in places) for q in range(4)]
    assert min(quarters) >= 5
    torch.manual_seed(1)
    assert drawn(4878, 4, 12) == places


@pytest.mark.parametrize("most", [None, 3, 9])
def test_all_examples_are_taken_where_they_fit(most):
    assert drawn(10, 4, most) == list(range(10))


def test_other_texts_of_the_same_length_are_other_items(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    same = [evaluate(model, data, size, max_batches=16 // size).outcomes for size in (4, 8)]
    other = evaluate(model, replace(data, eval=data.train), 4, max_batches=4).outcomes
    assert same[0]["count"] == other["count"]
    marks = [read_items(found).fingerprint for found in (*same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_hopeless_loss_has_no_finite_perplexity(prepare, monkeypatch):
    model, data = prepare("tiny-llama", "tiny-lm")
    monkeypatch.setattr("gradrank.lab.evaluate.item_losses", lambda *_a: ([1e6], [1]))
    assert evaluate(model, data, max_batches=1).metrics["perplexity"] == math.inf


def test_autocast_computes_in_bfloat16(prepare):
    model, data = prepare("tiny-llama", "tiny-lm")
    full = evaluate(model, data, max_batches=1)
    half = evaluate(model, data, max_batches=1, autocast=torch.bfloat16)
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)


MODELS = [
    ("tiny-llama", "tiny-lm", "tokens"),
    ("tiny-bert", "tiny-sentiment", "classes"),
    ("tiny-vit", "tiny-images", "classes"),
]


@pytest.mark.parametrize(("model", "task", "kind"), MODELS)
def test_outcomes_are_the_metrics_item_by_item(prepare, model, task, kind):
    network, data = prepare(model, task)
    found = [evaluate(network, data, size) for size in (1, 5, 64)]
    first = found[0].outcomes
    assert first["kind"] == kind
    size = len(data.eval)
    assert all(len(value) == size for value in first.values() if isinstance(value, list))
    assert all(float(f"{value:.6g}") == value for value in first["nll"])
    for other in found:
        exact = {key: value for key, value in other.outcomes.items() if key != "nll"}
        assert exact == {key: value for key, value in first.items() if key != "nll"}
        assert other.outcomes["nll"] == pytest.approx(first["nll"], rel=2e-5, abs=1e-6)
        again = metric_values(other.outcomes)
        for name, value in other.metrics.items():
            assert again[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
    counts = first.get("count", [1] * size)
    assert sum(counts) == found[0].items
    assert sum(first["nll"]) / sum(counts) == pytest.approx(found[0].loss, rel=1e-5)


def test_outcomes_are_in_the_order_of_the_split(prepare):
    model, data = prepare("tiny-bert", "tiny-sentiment")
    found = evaluate(model, data, 7).outcomes
    assert found["expected"] == [data.eval[i]["labels"] for i in range(len(data.eval))]
    model.eval()
    for index in (0, 11, 39):
        batch = data.collate([data.eval[index]])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        assert found["nll"][index] == pytest.approx(float(loss), rel=1e-5)
        assert found["predicted"][index] == int(logits.argmax())
    part = evaluate(model, data, 7, max_batches=2).outcomes
    assert part["expected"] == [found["expected"][i] for i in drawn(len(data.eval), 7, 2)]


def test_f1_is_told_for_two_classes_only(prepare):
    two = evaluate(*prepare("tiny-bert", "tiny-sentiment")).metrics
    assert {"eval_loss", "accuracy", "macro_f1", "mcc", "f1", "accuracy_f1"} == set(two)
    three = evaluate(*prepare("tiny-vit", "tiny-images")).metrics
    assert {"eval_loss", "accuracy", "macro_f1", "mcc"} == set(three)


@pytest.fixture
def instruct(monkeypatch):
    """Return a function that loads a made-up instruction task for a tiny decoder."""

    def build(scoring: str = "generate", groups: bool = True):
        prompts = [
            Prompt(f"{i}?" * (1 + i % 3), f"it is {'xy'[i % 2]}", "xy"[i % 2], group, ("x", "y"))
            for i in range(9)
            for group in (["ab"[i % 2]] if groups else [""])
        ]
        task = Task(
            name="made-up",
            head="instruct",
            metric="accuracy",
            description="d",
            source="s",
            licence="l",
            load=lambda _where: Loaded((prompts, None), (prompts, None)),
            parse=lambda text, prompt: prompt.answer if text and prompt.answer == "x" else "",
            max_new_tokens=4,
        )
        monkeypatch.setitem(TASKS, "made-up", task)
        loaded = resolve_model("tiny-llama", "instruct", device="cpu")
        examples = read_examples(DataSpec("made-up", scoring=scoring))
        return loaded.model, load_task_data(examples, loaded, 40), prompts, loaded.tokenizer

    return build


def test_instruction_items_hold_answer_and_loss_of_the_reference(instruct):
    model, data, prompts, tokenizer = instruct()
    found = [evaluate(model, data, size) for size in (1, 4, 20)]
    first = found[0].outcomes
    assert first["kind"] == "answers"
    assert first["expected"] == [prompt.answer for prompt in prompts]
    assert first["group"] == [prompt.group for prompt in prompts]
    assert first["count"] == [len(tokenizer(p.completion)["input_ids"]) + 1 for p in prompts]
    assert set(first["predicted"]) <= {"x", ""}
    for other in found:
        assert other.outcomes["predicted"] == first["predicted"]
        assert other.outcomes["nll"] == pytest.approx(first["nll"], rel=1e-4)
        assert set(other.metrics) == {"eval_loss", "accuracy"}
        assert other.loss == pytest.approx(sum(first["nll"]) / sum(first["count"]), rel=1e-4)
    # Parts count alike: all of part a may be right, none of part b.
    assert found[0].metrics["accuracy"] == sum(map(bool, first["predicted"][::2])) / 5 / 2


def test_answers_are_found_only_where_asked(instruct, monkeypatch):
    model, data, *_ = instruct(groups=False)
    found = evaluate(model, data, 4, answers=False)
    assert set(found.metrics) == {"eval_loss", "perplexity"}
    assert found.outcomes["kind"] == "tokens"
    part = evaluate(model, data, 2, max_batches=2).outcomes
    places = drawn(len(data.eval), 2, 2)
    assert len(part["predicted"]) == 4
    assert part["expected"] == [data.answering.prompts[i].answer for i in places]
    assert "group" not in part
    monkeypatch.setattr("gradrank.lab.generate.answers", lambda *_a: 1 / 0)
    model, data, *_ = instruct("likelihood")
    assert set(evaluate(model, data).outcomes["predicted"]) <= {"x", "y"}
