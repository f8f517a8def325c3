"""Slow, obviously right evaluation: one example and one token at a time, in float64."""

import math

import torch


def language_model_loss(model, blocks) -> float:
    """Mean negative log-likelihood of every token but the first of each block, nats per token."""
    total, count = 0.0, 0
    for block in blocks:
        for position in range(1, len(block)):
            with torch.no_grad():
                logits = model(input_ids=block[None, :position]).logits[0, -1].double()
            probability = torch.softmax(logits, dim=0)[block[position]]
            total -= math.log(float(probability))
            count += 1
    return total / count


def classifier_loss(model, items, collate) -> tuple[float, float]:
    """Mean negative log-likelihood of the right class, nats per example, and accuracy."""
    total, right = 0.0, 0
    for item in items:
        batch = collate([item])
        label = int(batch.pop("labels")[0])
        with torch.no_grad():
            logits = model(**batch).logits[0].double()
        total -= math.log(float(torch.softmax(logits, dim=0)[label]))
        right += int(int(logits.argmax()) == label)
    return total / len(items), right / len(items)


def mean_of_batch_means(losses, batch_size) -> float:
    """The broken twin: averages batches, so a short last batch counts as much as a full one."""
    means = [
        sum(losses[start : start + batch_size]) / len(losses[start : start + batch_size])
        for start in range(0, len(losses), batch_size)
    ]
    return sum(means) / len(means)


def macro_f1(expected, predicted) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    scores = []
    for name in sorted(set(expected) | set(predicted)):
        hits = sum(e == p == name for e, p in zip(expected, predicted, strict=True))
        if hits == 0:
            scores.append(0.0)
            continue
        precision = hits / sum(p == name for p in predicted)
        recall = hits / sum(e == name for e in expected)
        scores.append(2 * precision * recall / (precision + recall))
    return sum(scores) / len(scores)


def matthews(expected, predicted) -> float:
    """Correlation of the one-hot codes of both (Gorodkin 2004), 0 where it is undefined."""
    names = sorted(set(expected) | set(predicted))
    count = len(expected)

    def covariance(one, two) -> float:
        total = 0.0
        for name in names:
            mean_one = sum(v == name for v in one) / count
            mean_two = sum(v == name for v in two) / count
            for a, b in zip(one, two, strict=True):
                total += ((a == name) - mean_one) * ((b == name) - mean_two)
        return total

    below = math.sqrt(covariance(expected, expected) * covariance(predicted, predicted))
    return covariance(expected, predicted) / below if below > 1e-12 else 0.0
