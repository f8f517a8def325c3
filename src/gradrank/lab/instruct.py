"""Encode prompts with completions: only the completion is learnt, and it is never cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.prompts import Prompt

IGNORED = -100
_CHUNK = 1000


class Prompts(Dataset):
    """Tokenised prompts, each with its completion and the end token.

    Attributes:
        prompts: The prompts.
        ids: Token ids of each: prompt, completion, end token.
        starts: Where each completion begins in its ``ids``.
        cut: How many prompts were cut on the left.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        cut: int,
    ) -> None:
        self.prompts, self.ids, self.starts, self.cut = prompts, ids, starts, cut

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, start = list(self.ids[index]), self.starts[index]
        return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


@dataclass(frozen=True)
class PromptCollator:
    """Pad on the right to the longest of the batch; padding is neither seen nor learnt.

    Attributes:
        pad: Id of the padding token.
    """

    pad: int

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, all ``[batch, longest]``."""
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad, dtype=torch.long)
        labels = torch.full((len(items), longest), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(items), longest), dtype=torch.long)
        for row, item in enumerate(items):
            size = len(item["input_ids"])
            ids[row, :size] = torch.tensor(item["input_ids"], dtype=torch.long)
            labels[row, :size] = torch.tensor(item["labels"], dtype=torch.long)
            mask[row, :size] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any, max_length: int) -> Prompts:
    """Encode prompts for training and for the loss of their reference completions.

    Prompt and completion are tokenised apart, so that a model is trained behind exactly the tokens
    it is given when it generates.

    Args:
        prompts: The prompts.
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, tokens: prompt, completion and end token. A longer prompt
            loses its beginning (but not the tokenizer's begin token).

    Returns:
        The encoded prompts, in the same order.

    Raises:
        DataError: If the tokenizer has no end token, a prompt or completion has no tokens, or a
            completion leaves no room for a prompt.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end token to put after a completion.")
    heads = prompt_tokens([prompt.prompt for prompt in prompts], tokenizer)
    tails = plain_tokens([prompt.completion for prompt in prompts], tokenizer)
    ids, starts, cut = [], [], 0
    for number, (prompt, head, tail) in enumerate(zip(prompts, heads, tails, strict=True), start=1):
        room = max_length - len(tail) - 1
        if not tail:
            raise DataError(f"prompt {number} has the empty completion {prompt.completion!r}.")
        if room < 1:
            raise DataError(
                f"the completion of prompt {number} has {len(tail)} tokens; with the end token and "
                f"at least one token of its prompt it does not fit into max_length {max_length}. A "
                f"completion is never cut: choose a max_length of at least {len(tail) + 2}, or "
                f"leave the item out."
            )
        kept = cut_left(head, room, tokenizer)
        cut += len(kept) < len(head)
        ids.append([*kept, *tail, end])
        starts.append(len(kept))
    return Prompts(list(prompts), ids, starts, cut)


def prompt_tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise prompts as a model expects them at the start of a sequence.

    Args:
        texts: The prompts.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids of each, after the tokenizer's begin token if it sets one. No end token.

    Raises:
        DataError: If a prompt has no tokens.
    """
    begin = _begin(tokenizer)
    rows = plain_tokens(texts, tokenizer)
    empty = next((number for number, row in enumerate(rows, start=1) if not row), None)
    if empty is not None:
        raise DataError(f"prompt {empty} is empty: {texts[empty - 1]!r} has no tokens.")
    return [[*begin, *row] for row in rows]


def plain_tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise texts without any special token.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.

    Returns:
        Token ids of each.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        rows.extend(tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"])
    return rows


def cut_left(ids: Sequence[int], room: int | None, tokenizer: Any) -> list[int]:
    """Cut a prompt on the left: its end, where the question stands, is what counts.

    Args:
        ids: Token ids of a prompt, from :func:`prompt_tokens`.
        room: Most tokens that fit, at least 1; None cuts nothing.
        tokenizer: The model's tokenizer.

    Returns:
        At most ``room`` tokens. The begin token stays, unless nothing else would.
    """
    if room is None or len(ids) <= room:
        return list(ids)
    begin = _begin(tokenizer)
    if room <= len(begin):
        return list(ids[-room:])
    return [*begin, *ids[len(ids) - room + len(begin) :]]


def _begin(tokenizer: Any) -> list[int]:
    """Return the token that the tokenizer puts before a text, as a list of none or one."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []
