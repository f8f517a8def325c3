"""Registered tasks: data with a head, a metric, a source and a licence."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradrank.core.errors import OptionError, nearest
from gradrank.lab.assets import ASSETS, fetch_asset
from gradrank.lab.synthetic import opinions, sentences, stripes

Say = Callable[[str], None] | None
Columns = tuple[list[Any], list[Any] | None]


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: The name users give.
        head: ``lm``, ``classification`` or ``image``.
        metric: The final metric that counts (``eval_loss``: lower is better).
        description: What is in it.
        source: Where it comes from.
        licence: Licence of the data.
        load: Returns the inputs (texts or pictures) and the labels (None for ``lm``); fetches
            the data if need be.
    """

    name: str
    head: str
    metric: str
    description: str
    source: str
    licence: str
    load: Callable[[Say], Columns]


def _reviews(say: Say) -> list[dict[str, Any]]:
    path = fetch_asset("movie-reviews", say) / "sentences.jsonl"
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _review_texts(say: Say) -> Columns:
    return [row["text"] for row in _reviews(say)], None


def _review_sentiment(say: Say) -> Columns:
    # Sentences that the raters found neutral on average have no sentiment to predict.
    rows = [row for row in _reviews(say) if abs(row["rating"]) >= 0.5]
    labels = ["positive" if row["rating"] > 0 else "negative" for row in rows]
    return [row["text"] for row in rows], labels


def _tiny_lm(_say: Say) -> Columns:
    return sentences(), None


def _tiny_sentiment(_say: Say) -> Columns:
    return opinions()


def _tiny_images(_say: Say) -> Columns:
    return stripes()


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
