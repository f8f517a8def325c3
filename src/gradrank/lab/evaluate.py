"""Exact evaluation: every predicted item counts once, whatever the batch it came in."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gradrank.core.errors import DataError
from gradrank.evidence.metrics import METRICS, metric_values
from gradrank.lab import generate
from gradrank.lab.choose import choose_by_likelihood
from gradrank.lab.encode import Answering, TaskData, size_of
from gradrank.lab.inference import evaluating

CLASSIFIED = ("classification", "image")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean cross-entropy, nats per predicted item (token, or example).
        items: Predicted items.
        metrics: All of :data:`gradrank.evidence.metrics.METRICS` that apply: ``eval_loss``; for
            tokens ``perplexity``; for classes ``accuracy``, ``macro_f1`` and ``mcc``, for two of
            them ``f1`` and ``accuracy_f1``; for answers ``accuracy``.
        seconds: Wall time.
        outcomes: What was predicted for each example, in the order of the split, as
            :class:`gradrank.RunRecord` keeps it under ``items``; numbers to 6 significant digits.
    """

    loss: float
    items: int
    metrics: dict[str, float]
    seconds: float
    outcomes: dict[str, Any] = field(default_factory=dict)


def evaluate(
    model: nn.Module,
    data: TaskData,
    batch_size: int = 8,
    max_batches: int | None = None,
    autocast: torch.dtype | None = None,
    answers: bool = True,
) -> Evaluation:
    """Evaluate a model on the evaluation split.

    Args:
        model: The model, on its device.
        data: Encoded data.
        batch_size: Examples at a time; it does not change the result.
        max_batches: Take at most so many batches; None takes all. Where there are more, examples
            are drawn from the whole split, see :func:`drawn`.
        autocast: Compute in this dtype, as training did; None computes in the model's own.
        answers: Whether the answers of an instruction task are found too, which takes longer than
            its loss.

    Returns:
        Losses and metrics. Training or evaluation mode of each module, and the state of the random
        number generators, are as before.

    Raises:
        DataError: If there is nothing to predict.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    nll: list[float] = []
    count: list[int] = []
    predicted: list[int] = []
    expected: list[int] = []
    classes = data.kind in CLASSIFIED
    read = hashlib.sha256()
    places = drawn(size_of(data.eval), batch_size, max_batches)
    with evaluating(model), without_cache(model):
        for batch in _batches(data, batch_size, places):
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            with _casting(device, autocast):
                logits = model(**inputs).logits
            losses, counts = item_losses(logits, labels, data.kind)
            nll.extend(losses)
            count.extend(counts)
            if classes:
                predicted.extend(logits.argmax(dim=-1).tolist())
                expected.extend(labels.tolist())
            else:
                read.update(labels[labels != -100].cpu().numpy().tobytes())
    if sum(count) == 0:
        raise DataError("the evaluation data has nothing to predict. Give more of it.")
    found: dict[str, Any] = {
        "kind": "tokens",
        "nll": nll,
        "count": count,
        "digest": read.hexdigest(),
    }
    if classes:
        found = {"kind": "classes", "expected": expected, "predicted": predicted, "nll": nll}
    elif data.answering is not None and answers:
        with _casting(device, autocast):
            found = {**found, **_answers(model, data.answering, batch_size, places)}
    metrics = _metrics(found, data.num_labels)
    seconds = time.perf_counter() - start
    rounded = {**found, "nll": [_six_digits(value) for value in nll]}
    return Evaluation(metrics["eval_loss"], sum(count), metrics, seconds, rounded)


def _metrics(items: dict[str, Any], classes: int | None) -> dict[str, float]:
    found = metric_values(items)
    # Two of three classes may be all that occur, and class 1 is then no positive class.
    of_two = {name for name, metric in METRICS.items() if metric.binary}
    return {name: value for name, value in found.items() if classes == 2 or name not in of_two}


def _answers(
    model: Any, asked: Answering, batch_size: int, places: Sequence[int]
) -> dict[str, Any]:
    """Let the model answer these prompts; return what is kept of that."""
    prompts = [asked.prompts[place] for place in places]
    if asked.scoring == "likelihood":
        found = choose_by_likelihood(
            model, prompts, asked.tokenizer, batch_size, max_length=asked.max_length
        )
    else:
        found = generate.answers(
            model,
            prompts,
            asked.tokenizer,
            asked.parse,
            asked.max_new_tokens,
            batch_size,
            asked.max_length,
        )
    kept: dict[str, Any] = {
        "kind": "answers",
        "expected": [prompt.answer for prompt in prompts],
        "predicted": found,
    }
    if any(prompt.group for prompt in prompts):
        kept["group"] = [prompt.group for prompt in prompts]
    return kept


def item_losses(
    logits: torch.Tensor, labels: torch.Tensor, kind: str
) -> tuple[list[float], list[int]]:
    """Sum the cross-entropy of each example of a batch.

    Args:
        logits: ``[batch, length, vocabulary]`` for tokens, ``[batch, classes]`` for classes.
        labels: ``[batch, length]`` (-100: not counted) or ``[batch]``.
        kind: The head.

    Returns:
        Per example the sum in nats, and the number of predicted items. The first token of a
        sequence is not predicted.
    """
    batch = len(labels)
    if kind not in CLASSIFIED:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)
    sums = loss.double().reshape(batch, -1).sum(dim=1)
    return sums.tolist(), (labels != -100).reshape(batch, -1).sum(dim=1).tolist()


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def drawn(count: int, size: int, most: int | None) -> list[int]:
    """Say which examples an evaluation of a few batches looks at.

    The first ones would be another population: the beginning of one document, or one class of a
    file that is sorted. The draw does not depend on a run's seed, so that all runs are compared on
    the same examples.

    Args:
        count: Examples of the split.
        size: Examples in a batch.
        most: Batches at most; None takes all examples.

    Returns:
        Their places in ascending order.
    """
    if most is None or most * size >= count:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, most * size, replace=False).tolist())


def _batches(data: TaskData, size: int, places: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
    # No DataLoader: it draws from the global random number generator, which would make the
    # training after an evaluation depend on how often one evaluates.
    for start in range(0, len(places), size):
        yield data.collate([data.eval[place] for place in places[start : start + size]])


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep a decoder from storing keys and values that nobody reads.

    It costs a sixth of the forward pass. The setting is put back afterwards (the Trainer would
    leave it changed), because it belongs to the model that is saved.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        config.use_cache = before  # pyright: ignore[reportOptionalMemberAccess]


def _casting(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
