"""Choose between allowed answers by likelihood: one pass over the prompt, none over free text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from gradrank.core.errors import OptionError
from gradrank.lab.benchmarks.prompts import Prompt
from gradrank.lab.inference import batches_by_length, evaluating, pad_left, prompt_room, takes
from gradrank.lab.instruct import cut_left, plain_tokens, prompt_tokens


@dataclass(frozen=True, slots=True)
class _Item:
    """A prompt with the words that all its choices share, and what is left of each choice.

    Attributes:
        head: Token ids of the prompt and of the shared words.
        shared: How many of them are shared words.
        rests: Further token ids of each choice, at least one.
    """

    head: list[int]
    shared: int
    rests: list[list[int]]


def choose_by_likelihood(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    batch_size: int = 8,
    max_length: int | None = None,
    normalise: bool = False,
) -> list[str]:
    """Answer multiple-choice prompts with the choice whose completion is the most probable.

    Args:
        model: The decoder, on its device, with or without a PEFT adapter.
        prompts: The prompts, with their ``choices``.
        tokenizer: The model's tokenizer, with a padding token.
        batch_size: Prompts at a time; it does not change the result beyond rounding.
        max_length: Longest sequence of prompt and completion, tokens; a longer prompt loses its
            beginning. None takes as much as the model has positions for.
        normalise: Whether to divide by the number of tokens of the completion.

    Returns:
        The chosen answer of each prompt; the first of equals.
    """
    scores = score_choices(model, prompts, tokenizer, batch_size, max_length, normalise)
    return [
        prompt.choices[max(range(len(row)), key=row.__getitem__)]
        for prompt, row in zip(prompts, scores, strict=True)
    ]


def score_choices(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    batch_size: int = 8,
    max_length: int | None = None,
    normalise: bool = False,
) -> list[list[float]]:
    """Compute the log-probability of each allowed completion behind its prompt.

    The model reads prompt and shared words once; from there the choices go on, each with a copy of
    the cached keys and values. Training or evaluation mode of each module and the state of the
    random number generators are as before.

    Args:
        model: See :func:`choose_by_likelihood`.
        prompts: See there.
        tokenizer: See there.
        batch_size: See there.
        max_length: See there.
        normalise: See there.

    Returns:
        Per prompt and choice the sum over the completion's tokens, nats (their mean, if
        normalised). The end token is not counted.
    """
    items = _encode(model, prompts, tokenizer, max_length)
    found: list[list[float]] = [[] for _ in items]
    with evaluating(model):
        for chosen in batches_by_length([len(item.head) for item in items], batch_size):
            scores = _score([items[index] for index in chosen], model, tokenizer.pad_token_id)
            for index, row in zip(chosen, scores, strict=True):
                found[index] = row
    if not normalise:
        return found
    return [
        [score / (item.shared + len(rest)) for score, rest in zip(row, item.rests, strict=True)]
        for row, item in zip(found, items, strict=True)
    ]


def _encode(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, max_length: int | None
) -> list[_Item]:
    bare = next((number for number, prompt in enumerate(prompts) if not prompt.choices), None)
    if bare is not None:
        raise OptionError(
            f"prompt {bare + 1} has no fixed choices, so it cannot be scored by likelihood. Use "
            f"scoring 'generate'."
        )
    heads = prompt_tokens([prompt.prompt for prompt in prompts], tokenizer)
    texts = [prompt.completed(choice) for prompt in prompts for choice in prompt.choices]
    tails = iter(plain_tokens(texts, tokenizer))
    items = []
    for prompt, head in zip(prompts, heads, strict=True):
        options = [next(tails) for _ in prompt.choices]
        shortest, longest = min(map(len, options)), max(map(len, options))
        if shortest == 0:
            raise OptionError(f"a choice of {prompt.choices} has no tokens and cannot be scored.")
        room = prompt_room(
            model, None if max_length is None else max_length - longest, longest, "answer tokens"
        )
        columns = zip(*options, strict=False)
        equal = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        # One token of each choice must be left to be predicted from the head.
        shared = min(equal, shortest - 1)
        kept = cut_left(head, room, tokenizer)
        rests = [option[shared:] for option in options]
        items.append(_Item([*kept, *options[0][:shared]], shared, rests))
    return items


def _score(items: list[_Item], model: Any, pad: int) -> list[list[float]]:
    """Score the choices of a batch of prompts, in nats."""
    device = next(model.parameters()).device
    ids, mask, positions = pad_left([item.head for item in items], pad, device)
    keep = max(item.shared for item in items) + 1
    more = any(len(rest) > 1 for item in items for rest in item.rests)
    extra: dict[str, Any] = {"position_ids": positions} if takes(model, "position_ids") else {}
    if takes(model, "logits_to_keep"):
        extra["logits_to_keep"] = keep
    out = model(input_ids=ids, attention_mask=mask, use_cache=more, **extra)
    logs = _log_softmax(out.logits[:, -keep:])
    scores = []
    for row, item in enumerate(items):
        words = item.head[len(item.head) - item.shared :]
        # Logits at a position predict the token after it: the last but `shared` + 1 come first.
        places = range(keep - 1 - item.shared, keep - 1)
        start = sum(
            float(logs[row, place, word]) for place, word in zip(places, words, strict=True)
        )
        scores.append([start + float(logs[row, -1, rest[0]]) for rest in item.rests])
    if more:
        _add_rests(scores, items, model, pad, mask, out.past_key_values)
    return scores


def _add_rests(
    scores: list[list[float]],
    items: list[_Item],
    model: Any,
    pad: int,
    mask: torch.Tensor,
    cache: Any,
) -> None:
    """Add what the choices' tokens after the first of their rests are worth, in place."""
    device = mask.device
    pairs = [
        (row, column)
        for row, item in enumerate(items)
        for column, rest in enumerate(item.rests)
        if len(rest) > 1
    ]
    rests = [items[row].rests[column] for row, column in pairs]
    rows = torch.tensor([row for row, _ in pairs], device=device)
    width = max(len(rest) for rest in rests) - 1
    ids = torch.full((len(rests), width), pad, dtype=torch.long)
    seen = torch.zeros((len(rests), width), dtype=torch.long)
    for index, rest in enumerate(rests):
        ids[index, : len(rest) - 1] = torch.tensor(rest[:-1])
        seen[index, : len(rest) - 1] = 1
    cache.batch_select_indices(rows)
    extra: dict[str, Any] = {}
    if takes(model, "position_ids"):
        extra["position_ids"] = mask.sum(dim=1)[rows, None] + torch.arange(width, device=device)
    out = model(
        input_ids=ids.to(device),
        attention_mask=torch.cat([mask[rows], seen.to(device)], dim=1),
        past_key_values=cache,
        use_cache=True,
        **extra,
    )
    logs = _log_softmax(out.logits)
    for index, ((row, column), rest) in enumerate(zip(pairs, rests, strict=True)):
        scores[row][column] += sum(
            float(logs[index, place, word]) for place, word in enumerate(rest[1:])
        )


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in single precision at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
