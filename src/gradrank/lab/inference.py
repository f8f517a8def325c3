"""What generating and scoring share: no dropout, no gradients, prompts padded on the left."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from gradrank.core.errors import OptionError
from gradrank.lab.models import position_limit


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode without gradients; restore each module's mode afterwards.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def base_of(model: Any) -> Any:
    """Return the transformers model itself, without PEFT's wrapper.

    Args:
        model: The model, wrapped or not.
    """
    return model.get_base_model() if isinstance(model, PeftModel) else model


def takes(model: Any, argument: str) -> bool:
    """Say whether a model's forward pass names an argument.

    Args:
        model: The model, wrapped or not.
        argument: Its name.

    Returns:
        Whether it does.
    """
    return argument in inspect.signature(base_of(model).forward).parameters


def prompt_room(model: Any, max_length: int | None, after: int, what: str) -> int | None:
    """Return how many tokens of a prompt fit, so that what follows it still has positions.

    Args:
        model: The model, wrapped or not.
        max_length: Most tokens of a prompt that the caller wants, or None.
        after: Tokens that follow the prompt.
        what: Name of these tokens, for the message.

    Returns:
        Tokens, or None if nothing limits them.

    Raises:
        OptionError: If there is no room for a single token of the prompt.
    """
    positions = position_limit(base_of(model).config)
    limits = [] if max_length is None else [max_length]
    if positions is not None:
        limits.append(positions - after)
    room = min(limits, default=None)
    if room is not None and room < 1:
        raise OptionError(
            f"{after} {what} leave no room for a prompt: max_length is {max_length} and the model "
            f"has positions for {positions} tokens. Lower max_new_tokens or take another model."
        )
    return room


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad on the left, so that every row ends at the same column.

    Args:
        rows: Token ids of each row; none is empty.
        pad: Id of the padding token.
        device: Where the tensors go.

    Returns:
        Token ids, attention mask and position ids (0 at each row's first token), all
        ``[rows, longest]``.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, longest - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group items of similar length, longest first (the largest batch fails first, if any).

    Args:
        lengths: Length of each item.
        batch_size: Items in each batch but the last.

    Yields:
        Indices of the items of a batch.

    Raises:
        OptionError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; at least 1 is needed.")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
