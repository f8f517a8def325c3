"""Exact evaluation: every predicted item counts once, whatever the batch it came in."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gradrank.core.errors import DataError
from gradrank.lab.encode import TaskData, size_of


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean cross-entropy, nats per predicted item (token, or example).
        items: Predicted items.
        metrics: ``eval_loss`` and, for ``lm``, ``perplexity``; for classes ``accuracy``,
            ``macro_f1`` and ``mcc``.
        seconds: Wall time.
    """

    loss: float
    items: int
    metrics: dict[str, float]
    seconds: float


def evaluate(
    model: nn.Module,
    data: TaskData,
    batch_size: int = 8,
    max_batches: int | None = None,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate a model on the evaluation split.

    Args:
        model: The model, on its device.
        data: Encoded data.
        batch_size: Examples at a time; it does not change the result.
        max_batches: Stop after so many batches (the first examples); None takes all.
        autocast: Compute in this dtype, as training did; None computes in the model's own.

    Returns:
        Losses and metrics. Training or evaluation mode of each module, and the state of the random
        number generators, are as before.

    Raises:
        DataError: If there is nothing to predict.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    total, items = 0.0, 0
    predicted: list[int] = []
    expected: list[int] = []
    with _evaluating(model), without_cache(model), torch.no_grad():
        for batch in _batches(data, batch_size, max_batches):
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            with _casting(device, autocast):
                logits = model(**inputs).logits
            loss, count = summed_loss(logits, labels, data.kind)
            total, items = total + loss, items + count
            if data.kind != "lm":
                predicted.extend(logits.argmax(dim=-1).tolist())
                expected.extend(labels.tolist())
    if items == 0:
        raise DataError("the evaluation data has nothing to predict. Give more of it.")
    mean = total / items
    metrics = {"eval_loss": mean}
    if data.kind == "lm":
        # Beyond this a perplexity is no number worth printing, and exp() would overflow.
        metrics["perplexity"] = math.exp(mean) if mean < 700 else math.inf
    else:
        metrics |= class_metrics(np.array(expected), np.array(predicted))
    return Evaluation(mean, items, metrics, time.perf_counter() - start)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> tuple[float, int]:
    """Sum the cross-entropy over the predicted items of a batch.

    Args:
        logits: ``[batch, length, vocabulary]`` for ``lm``, else ``[batch, classes]``.
        labels: ``[batch, length]`` (-100: not counted) or ``[batch]``.
        kind: ``lm`` or another head.

    Returns:
        Sum in nats, and number of items. For ``lm`` the first token of a block is not predicted.
    """
    if kind == "lm":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)
    return float(loss.double().sum()), int((labels != -100).sum())


def class_metrics(expected: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Compute accuracy, macro F1 and the Matthews correlation.

    Args:
        expected: Class indices, ``[n]``.
        predicted: Class indices, ``[n]``.

    Returns:
        ``accuracy``; ``macro_f1``, the mean over classes that occur in either; ``mcc``, 0 where it
        is undefined (one class only).

    Source:
        Gorodkin, Computational Biology and Chemistry 28 (2004), equation 2 (the multi-class
        Matthews correlation).
    """
    size = int(max(expected.max(), predicted.max())) + 1
    table = np.zeros((size, size))
    np.add.at(table, (expected, predicted), 1)
    right, rows, columns = table.diagonal(), table.sum(axis=1), table.sum(axis=0)
    present = (rows + columns) > 0
    f1 = 2 * right[present] / (rows + columns)[present]
    count = table.sum()
    above = right.sum() * count - rows @ columns
    below = math.sqrt((count**2 - columns @ columns) * (count**2 - rows @ rows))
    return {
        "accuracy": float(right.sum() / count),
        "macro_f1": float(f1.mean()),
        "mcc": float(above / below) if below > 0 else 0.0,
    }


def _batches(data: TaskData, size: int, most: int | None) -> Iterator[dict[str, torch.Tensor]]:
    # No DataLoader: it draws from the global random number generator, which would make the
    # training after an evaluation depend on how often one evaluates.
    count = size_of(data.eval)
    for number, start in enumerate(range(0, count, size)):
        if most is not None and number >= most:
            return
        yield data.collate([data.eval[index] for index in range(start, min(start + size, count))])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
