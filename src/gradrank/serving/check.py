"""The check after every export: the same inputs, the same logits."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradrank.core.errors import MeasurementError, OptionError
from gradrank.serving.adapter import Adapter, Update

# Rounding of float32 sums in another order, relative to the largest logit, in deep models.
_NOISE = 1e-4


@dataclass(frozen=True, slots=True)
class Reference:
    """What an export is compared with.

    Attributes:
        logits: Of the trained model on the check inputs.
        effect: Largest change of a logit that the adapter brings about.
        noise: Rounding that the base model's own type brings about.
    """

    logits: Tensor
    effect: float
    noise: float

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the largest difference that rounding of the factors can explain.

        Args:
            dtype: Of the factors that were written.
        """
        return self.noise + 8 * torch.finfo(dtype).eps * self.effect

    def difference(self, other: Tensor) -> float:
        """Return the largest absolute difference from other logits.

        Args:
            other: Logits of the same shape.
        """
        return float((other - self.logits).abs().max())


def reference(model: PeftModel, inputs: Mapping[str, Tensor]) -> Reference:
    """Compute what an export has to reproduce.

    Args:
        model: The trained model.
        inputs: The check inputs.

    Returns:
        Logits, effect of the adapter, rounding.
    """
    found = logits(model, inputs)
    with handed_back(model), warnings.catch_warnings():
        # Trained biases stay in place; the effect is then that of the factors.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with model.disable_adapter():
            plain = logits(model, inputs)
    dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
    largest = max(float(found.abs().max()), 1.0)
    noise = max(_NOISE, 8 * torch.finfo(dtype).eps) * largest
    effect = float((found - plain).abs().max()) if plain.shape == found.shape else largest
    return Reference(found, effect, noise)


def largest_error(wanted: Adapter, seen: Adapter) -> tuple[float, str]:
    """Compare all updates of two adapters, module by module.

    Logits tell of everything at once, and a small module may hide in them; here it cannot.

    Args:
        wanted: The one.
        seen: The other.

    Returns:
        Largest Frobenius norm of a difference, relative to the wanted update (to the largest one
        where nothing is wanted), and the name of its module.
    """
    norms = {name: _norm([(update, 1.0)]) for name, update in wanted.updates.items()}
    largest = max(norms.values(), default=0.0) or 1.0
    worst = (0.0, "")
    for name in {**wanted.updates, **seen.updates}:
        one, other = wanted.updates.get(name), seen.updates.get(name)
        parts = [(u, sign) for u, sign in ((one, 1.0), (other, -1.0)) if u is not None]
        worst = max(worst, (_norm(parts) / (norms.get(name) or largest), name))
    return worst


def _norm(parts: list[tuple[Update, float]]) -> float:
    """Return the Frobenius norm of a sum of updates, whose product is never formed."""
    a = torch.cat([update.a.double() for update, _ in parts])
    b = torch.cat([sign * update.scaling * update.b.double() for update, sign in parts], 1)
    # Triangular factors keep what their squares would lose to cancellation.
    return float((_triangle(b) @ _triangle(a.T).T).norm())


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R


@contextlib.contextmanager
def handed_back(model: nn.Module) -> Iterator[None]:
    """Leave a model's modes and what is trainable as they were, by name.

    Args:
        model: The model.

    Yields:
        None.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a model's logits in evaluation mode, leaving its mode as it was.

    Args:
        model: The model.
        inputs: Its inputs.

    Returns:
        Logits, float32, on the CPU.

    Raises:
        MeasurementError: If they are not finite.
    """
    with handed_back(model):
        outputs = model.eval()(**inputs)
    values = outputs.logits.float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise MeasurementError("the model's logits are not finite; the adapter is not usable.")
    return values


def check_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return seeded random inputs that fit a model: two sequences of 16 tokens, or two images.

    Args:
        model: A model with a transformers configuration.

    Returns:
        Keyword arguments.

    Raises:
        OptionError: If the configuration names neither a vocabulary nor an image size.
    """
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if vocabulary := getattr(config, "vocab_size", None):
        ids = torch.randint(0, vocabulary, (2, 16), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        return batch
    if size := getattr(config, "image_size", None):
        height, width = size if isinstance(size, tuple | list) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    raise OptionError(
        "the model's configuration names no vocabulary and no image size, so check inputs cannot "
        "be made. Pass inputs={...} with a batch that the model takes."
    )
