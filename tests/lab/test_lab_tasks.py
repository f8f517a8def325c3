"""The registry of tasks and the made-up data behind the tiny ones."""

import json

import numpy as np
import pytest

from gradrank.core.errors import OptionError
from gradrank.evidence.metrics import METRICS
from gradrank.lab.benchmarks.task import Loaded, Where
from gradrank.lab.models import HEADS
from gradrank.lab.synthetic import IMAGE_CLASSES, opinions, sentences, stripes
from gradrank.lab.tasks import TASKS, find_task


def test_registry_is_complete():
    assert {name for name, task in TASKS.items() if task.head != "instruct"} == {
        *("movie-review-lm", "movie-review-sentiment", "tiny-lm", "tiny-sentiment", "tiny-images"),
        *("wikitext2", "cola", "sst2", "mrpc", "qqp", "mnli", "mnli-mm", "qnli", "rte"),
        *("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn", "cifar10"),
    }
    assert {"boolq", "commonsense-170k", "gsm8k"} <= set(TASKS)
    assert all(name == task.name for name, task in TASKS.items())
    for task in TASKS.values():
        kind = {"lm": "tokens", "instruct": "answers"}.get(task.head, "classes")
        assert task.head in HEADS
        assert kind in METRICS[task.metric].kinds
        assert (task.parse is None) == (task.head != "instruct")
        assert task.source
        assert task.licence
        assert task.description


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'movie-review-lm'"):
        find_task("movie-reviews-lm")


@pytest.mark.parametrize("name", ["tiny-lm", "tiny-sentiment", "tiny-images"])
def test_tiny_tasks_are_the_same_each_time(name):
    one, two = TASKS[name].load(Where()).train, TASKS[name].load(Where()).train
    assert all(np.array_equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert one[1] == two[1]


def test_made_up_data_depends_on_its_seed():
    assert sentences(20, seed=1) != sentences(20, seed=2)
    texts, labels = opinions(50)
    assert set(labels) == {"positive", "negative"}
    assert len(texts) == len(labels) == 50
    pictures, kinds = stripes(30, size=8)
    assert pictures[0].shape == (8, 8, 3)
    assert pictures[0].dtype == np.uint8
    assert set(kinds) == set(IMAGE_CLASSES)


def test_reviews_without_clear_sentiment_are_left_out(monkeypatch, tmp_path):
    rows = [("bad", -2.0), ("so so", 0.49), ("meh", -0.5), ("fine", 0.5), ("great", 3.0)]
    (tmp_path / "sentences.jsonl").write_text(
        "".join(json.dumps({"text": text, "rating": rating}) + "\n" for text, rating in rows)
    )
    monkeypatch.setattr("gradrank.lab.tasks.fetch_asset", lambda _name, _say: tmp_path)
    texts, labels = TASKS["movie-review-sentiment"].load(Where()).train
    assert texts == ["bad", "meh", "fine", "great"]
    assert labels == ["negative", "negative", "positive", "positive"]
    assert TASKS["movie-review-lm"].load(Where()) == Loaded(([text for text, _ in rows], None))
