"""Wrap a model with PEFT's AdaLoRA so that its regulariser is in the loss and its scale is fixed.

``get_peft_model`` of PEFT 0.21 alone does neither everywhere:

- Without a ``task_type`` (pictures have none) it builds a plain ``PeftModel``, whose forward calls
  the base model and never ``AdaLoraModel.forward``, where the orthogonal regulariser is added.
- On a base in bfloat16 or float16 it makes new float32 parameters of all that an adapter holds,
  among them ``ranknum``, the divisor of the scale, which is trainable from then on.
"""

from typing import Any

from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from gradrank.adapters.apply import all_or_nothing
from gradrank.adapters.precision import train_in_float32
from gradrank.lab.adalora import adalora_layers


class TunerPeftModel(PeftModel):
    """A ``PeftModel`` of no task type whose forward is that of its tuner.

    It differs from a plain one in its forward alone; what is saved and loaded is the same.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the tuner's forward, as the classes for a task type do.

        Args:
            *args: What the base model takes.
            **kwargs: What the base model takes; what is meant for PEFT's own hooks is left out.

        Returns:
            The base model's output; AdaLoRA has added its regulariser to ``loss``.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            own = self.special_peft_forward_args
            return self.base_model(*args, **{n: v for n, v in kwargs.items() if n not in own})


def attach_adalora(model: nn.Module, config: AdaLoraConfig) -> PeftModel:
    """Wrap a base model with PEFT's AdaLoRA.

    Args:
        model: The base model; its modules are wrapped in place, and left as they were if PEFT
            refuses.
        config: See :func:`gradrank.lab.adalora.adalora_config`.

    Returns:
        The PEFT model: factors, λ and the task head are trainable, nothing else; all of these are
        in float32 at least.
    """
    with all_or_nothing(model):
        wrapped: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        if type(wrapped).forward is PeftModel.forward:
            wrapped.__class__ = TunerPeftModel
        for layer in adalora_layers(wrapped).values():
            layer.ranknum.requires_grad_(False)
        train_in_float32(wrapped)
    return wrapped
