"""Batches and their losses: how a model is called, and how many items its loss averages."""

from typing import Any

import torch
from torch import Tensor, nn

from gradrank.core.errors import MeasurementError


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the model's own loss on a batch of keyword arguments.

    Args:
        model: A model in the manner of transformers: called with the batch, gives ``.loss``.
        batch: Mapping with labels.

    Returns:
        Scalar loss.

    Raises:
        MeasurementError: If the batch is no mapping, or the model gives no loss.
    """
    if not hasattr(batch, "keys"):
        raise MeasurementError(
            f"a batch is a {type(batch).__name__}, not a mapping of model inputs. Give mappings "
            "with labels, or a loss_function(model, batch)."
        )
    loss = loss_of(model(**batch))
    if loss is None:
        raise MeasurementError(
            f"the model gave no loss for a batch with the keys {sorted(batch.keys())}. Add "
            "'labels' to the batch, or give a loss_function(model, batch)."
        )
    return loss


def loss_of(outputs: Any) -> Any:
    """Return the loss in what a model returned, or None.

    Args:
        outputs: A mapping with ``loss``, an object with that attribute, or anything else.
    """
    return outputs.get("loss") if hasattr(outputs, "get") else getattr(outputs, "loss", None)


def count_items(model: nn.Module, batch: Any) -> int:
    """Return how many items a batch's mean loss averages over.

    Args:
        model: The model; causal language models predict one token fewer than they are given.
        batch: Mapping with labels; labels of -100 do not count.

    Returns:
        The number of labelled items, at least 1; 1 for batches without labels.
    """
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor):
        return 1
    if labels.is_floating_point():
        return max(int(labels.shape[0]), 1)
    causal = labels.dim() == 2 and "CausalLM" in type(inner_model(model)).__name__
    kept = labels[:, 1:] if causal or _is_lm_head(model, labels) else labels
    return max(int((kept != -100).sum()), 1)


def _is_lm_head(model: nn.Module, labels: Tensor) -> bool:
    return labels.dim() == 2 and type(inner_model(model)).__name__.endswith("LMHeadModel")


def inner_model(model: nn.Module) -> Any:
    """Return the model inside DDP and PEFT wrappings."""
    inner: Any = getattr(model, "module", model)
    get_base = getattr(inner, "get_base_model", None)
    return get_base() if callable(get_base) else inner


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; mappings, lists and tuples are gone into.

    Args:
        batch: A tensor, a container of tensors, or anything else (returned as it is).
        device: The device.

    Returns:
        The batch.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def sizes(batch: Any) -> tuple[int, int]:
    """Return (examples, tokens) of a micro-batch, as far as its tensors tell."""
    values = batch.values() if hasattr(batch, "values") else []
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return 0, 0
    examples = int(tensors[0].shape[0]) if tensors[0].dim() else 1
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    mask = batch.get("attention_mask") if hasattr(batch, "get") else None
    if isinstance(ids, Tensor):
        return examples, int(mask.sum()) if isinstance(mask, Tensor) else ids.numel()
    return examples, examples
