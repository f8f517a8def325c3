"""The registry of tasks: one entry each."""

import json
from typing import Any

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.assets import ASSETS, fetch_asset
from gradrank.lab.benchmarks import commonsense, gsm8k
from gradrank.lab.benchmarks.glue import GLUE_TASKS
from gradrank.lab.benchmarks.images import IMAGE_TASKS
from gradrank.lab.benchmarks.task import Loaded, Say, Task, Where
from gradrank.lab.benchmarks.wikitext import WIKITEXT_TASKS
from gradrank.lab.synthetic import opinions, sentences, stripes


def _reviews(say: Say) -> list[dict[str, Any]]:
    path = fetch_asset("movie-reviews", say) / "sentences.jsonl"
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _review_texts(where: Where) -> Loaded:
    return Loaded(([row["text"] for row in _reviews(where.say)], None))


def _review_sentiment(where: Where) -> Loaded:
    # Sentences that the raters found neutral on average have no sentiment to predict.
    rows = [row for row in _reviews(where.say) if abs(row["rating"]) >= 0.5]
    labels = ["positive" if row["rating"] > 0 else "negative" for row in rows]
    return Loaded(([row["text"] for row in rows], labels))


def _tiny_lm(_where: Where) -> Loaded:
    return Loaded((sentences(), None))


def _tiny_sentiment(_where: Where) -> Loaded:
    return Loaded(opinions())


def _tiny_images(_where: Where) -> Loaded:
    return Loaded(stripes())


_REVIEWS = ASSETS["movie-reviews"]
_MADE = "made by gradrank.lab.synthetic"

_TASKS = (
    Task(
        name="movie-review-lm",
        head="lm",
        metric="eval_loss",
        description="Language modelling on 10,605 movie-review sentences.",
        source=_REVIEWS.source,
        licence=_REVIEWS.licence,
        load=_review_texts,
    ),
    Task(
        name="movie-review-sentiment",
        head="classification",
        metric="accuracy",
        description="Sentiment of 10,072 movie-review sentences with a mean rating beyond 0.5.",
        source=_REVIEWS.source,
        licence=_REVIEWS.licence,
        load=_review_sentiment,
    ),
    Task(
        name="tiny-lm",
        head="lm",
        metric="eval_loss",
        description="600 sentences of a small grammar; no network, seconds.",
        source=_MADE,
        licence="Apache-2.0",
        load=_tiny_lm,
    ),
    Task(
        name="tiny-sentiment",
        head="classification",
        metric="accuracy",
        description="400 made-up opinions in two classes; no network, seconds.",
        source=_MADE,
        licence="Apache-2.0",
        load=_tiny_sentiment,
    ),
    Task(
        name="tiny-images",
        head="image",
        metric="accuracy",
        description="240 pictures of stripes in three directions; no network, seconds.",
        source=_MADE,
        licence="Apache-2.0",
        load=_tiny_images,
    ),
    *WIKITEXT_TASKS,
    *GLUE_TASKS,
    *commonsense.TASKS,
    *gsm8k.TASKS,
    *IMAGE_TASKS,
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Look a task up.

    Args:
        name: Its name.

    Returns:
        The task.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in TASKS:
        raise OptionError(f"unknown task '{name}'. {nearest(name, TASKS)}")
    return TASKS[name]
