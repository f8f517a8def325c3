"""Greedy generation in batches: the same text for the same prompt, whatever else is configured."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import GenerationConfig

from gradrank.core.errors import DataError, OptionError
from gradrank.lab.benchmarks.prompts import Parse, Prompt
from gradrank.lab.inference import base_of, batches_by_length, evaluating, pad_left, prompt_room
from gradrank.lab.instruct import cut_left, prompt_tokens


def answers(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    parse: Parse,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[str]:
    """Let a model answer prompts, and read its answers.

    Args:
        model: The decoder, on its device, with or without a PEFT adapter.
        prompts: The prompts.
        tokenizer: The model's tokenizer, with a padding token.
        parse: Finds the answer in what was written for a prompt.
        max_new_tokens: Most tokens that are written.
        batch_size: Prompts at a time; it does not change the result beyond rounding.
        max_length: Longest prompt, tokens; what is longer loses its beginning. None takes as much
            as the model has positions for.

    Returns:
        An answer for each prompt; empty where none was found.
    """
    texts = generate(
        model,
        [prompt.prompt for prompt in prompts],
        tokenizer,
        max_new_tokens,
        batch_size,
        max_length,
    )
    return [parse(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]


def generate(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[str]:
    """Continue texts with the most probable token at each step, up to the end token.

    The state of the random number generators, the training or evaluation mode of each module and
    the model's own generation settings are as before; those settings have no influence.

    Args:
        model: The decoder, on its device, with or without a PEFT adapter.
        texts: What to continue.
        tokenizer: The model's tokenizer, with a padding token.
        max_new_tokens: Most tokens that are written.
        batch_size: Texts at a time; it does not change the result beyond rounding.
        max_length: Longest text, tokens; None takes as much as the model has positions for.

    Returns:
        The continuations, without special tokens.

    Raises:
        OptionError: If ``max_new_tokens`` is out of range.
        DataError: If the tokenizer lacks an end or padding token.
    """
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed.")
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or end is None:
        raise DataError("generating needs a tokenizer with a padding token and an end token.")
    room = prompt_room(model, max_length, max_new_tokens, "new tokens")
    rows = [cut_left(ids, room, tokenizer) for ids in prompt_tokens(texts, tokenizer)]
    device = next(model.parameters()).device
    written = [""] * len(rows)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with evaluating(model), _settings(model, greedy):
        for chosen in batches_by_length([len(row) for row in rows], batch_size):
            ids, mask, _ = pad_left([rows[index] for index in chosen], pad, device)
            found = model.generate(input_ids=ids, attention_mask=mask)
            new = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, new, strict=True):
                written[index] = text
    return written


@contextlib.contextmanager
def _settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation settings for a while.

    Settings that are passed to ``generate`` are completed from the model's own, so that a published
    temperature or repetition penalty would leak in.
    """
    base = base_of(model)
    before = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = before
