"""Slow twins of generating and scoring: one prompt at a time, no cache, no padding, no batch."""

import torch


def greedy(model, ids: list[int], end: int, most: int) -> list[int]:
    """Return what a greedy decoder writes behind ``ids``, without the end token."""
    written = []
    with torch.no_grad():
        for _ in range(most):
            logits = model(input_ids=torch.tensor([[*ids, *written]]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == end:
                break
            written.append(token)
    return written


def log_probability(model, head: list[int], tail: list[int]) -> float:
    """Return the log-probability of ``tail`` behind ``head``, nats, one token at a time."""
    total = 0.0
    with torch.no_grad():
        for place, token in enumerate(tail):
            ids = torch.tensor([[*head, *tail[:place]]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
            total += float(logits[token] - torch.logsumexp(logits, dim=0))
    return total


def without_first_token(model, head: list[int], tail: list[int]) -> float:
    """A broken twin: the first token of the tail is taken for given."""
    return log_probability(model, [*head, tail[0]], tail[1:])


def with_padding_seen(model, ids: list[int], end: int, most: int, pad: int) -> list[int]:
    """A broken twin: three padding tokens on the left that the model attends to."""
    return greedy(model, [pad] * 3 + ids, end, most)
