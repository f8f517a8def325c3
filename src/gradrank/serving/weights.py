"""A model's tensors with an adapter's updates added in, under the names of the stock model."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn

from gradrank.core.errors import PlanError
from gradrank.serving.adapter import Adapter

_BITSANDBYTES = ("Params4bit", "Int8Params")


def quantised(module: nn.Module) -> bool:
    """Tell whether a module's own weight is stored in codes.

    Args:
        module: A module of a base model.

    Returns:
        Whether :func:`dense` has to restore it; False for what only passes another's weight on.
    """
    # PEFT's layers show the weight of the layer inside them as if it were theirs.
    own = {**module._parameters, **module._buffers}
    if "W_q" in own or "qweight" in own:
        return True
    weight = own.get("weight")
    if not isinstance(weight, Tensor):
        return False
    special = type(weight).__module__.startswith("torchao.")
    # Of floating-point types, those of one byte need scales that are kept elsewhere.
    return special or not weight.is_floating_point() or weight.element_size() < 2


def dense(module: nn.Module, name: str) -> Tensor:
    """Return a module's weight as it computes with it.

    Args:
        module: A linear layer, plain or quantised.
        name: Its name, for messages.

    Returns:
        The weight as stored (GPT-2 stores ``[d_in, d_out]``), floating-point.

    Raises:
        PlanError: If the kind of quantisation is not known.
    """
    known: Any = module
    if not quantised(module):
        return known.weight.detach()
    codes = getattr(module, "weight", None)
    try:
        if type(codes).__name__ in _BITSANDBYTES:
            found = dequantize_bnb_weight(known.weight, state=getattr(module, "state", None))
        else:
            found = dequantize_module_weight(module)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        found = codes
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.element_size() < 2:
        raise PlanError(
            f"'{name}' is a quantised {type(module).__name__} whose weight gradrank cannot "
            "restore. Load the full-precision base model and merge the adapter into that."
        )
    return found.detach()


def merged_weight(base: nn.Module, adapter: Adapter, name: str) -> Tensor:
    r"""Return :math:`W + \Delta W` of one module, before any rounding.

    With DoRA it is :math:`m (W + \Delta W) / \|W + \Delta W\|`, with the norms of the rows.

    Args:
        base: The module of the base model.
        adapter: The adapter.
        name: The module's name.

    Returns:
        The weight, float64 on the CPU, in the layout in which the module stores it.

    Raises:
        PlanError: If the update does not fit the module.
    """
    stored, update = dense(base, name).cpu().double(), adapter.updates[name]
    across = type(base).__name__ == "Conv1D"
    whole = stored.T if across else stored
    delta = update.delta()
    if whole.shape != delta.shape:
        raise PlanError(
            f"the update of '{name}' is {tuple(delta.shape)} and its weight {tuple(whole.shape)}; "
            f"a {type(base).__name__} cannot be merged."
        )
    whole = whole + delta
    magnitude = adapter.other.get(f"{name}.lora_magnitude_vector")
    if magnitude is not None:
        whole *= (magnitude.double().flatten() / whole.norm(dim=1)).unsqueeze(1)
    return whole.T if across else whole


class Stock:
    """The tensors of a PEFT model's base with one adapter added in.

    Attributes:
        tensors: Tensor by the name that it has in the stock model. What the adapter does not
            touch shares its storage with the live model, which is not changed.
    """

    def __init__(
        self, inner: nn.Module, adapter: Adapter, active: str, dtype: torch.dtype | None
    ) -> None:
        """Collect the tensors.

        Args:
            inner: The base model, with PEFT's layers in it.
            adapter: What to add.
            active: Its name in the live model, for modules that are saved whole.
            dtype: Of all floating-point tensors; default: their own, and for quantised weights
                that of the model's other parameters.

        Raises:
            PlanError: If a module cannot be merged, by name.
        """
        self.tensors: dict[str, Tensor] = {}
        self._adapter, self._active, self._dtype = adapter, active, dtype
        self._plain = dtype or float_dtype(inner)
        # Tied weights have to stay one tensor when they are cast.
        self._cast: dict[tuple[int, torch.Size], Tensor] = {}
        self._visit(inner, "")
        missing = [name for name in adapter.updates if f"{name}.weight" not in self.tensors]
        if missing:
            raise PlanError(f"the model has no module '{missing[0]}' to merge an update into.")

    def _visit(self, module: nn.Module, name: str) -> None:
        if isinstance(module, ModulesToSaveWrapper):
            held = module.modules_to_save
            own = self._active in held
            self._visit(held[self._active] if own else module.original_module, name)
        elif isinstance(module, TrainableTokensWrapper):
            self._visit(module.original_module, name)
            tokens: Any = module.token_adapter
            if self._active in tokens.trainable_tokens_delta:
                self._put(f"{name}.weight", tokens.get_merged_weights([self._active]))
        elif isinstance(module, BaseTunerLayer):
            self._layer(module, name)
        else:
            self._own(module, name)
            for key, child in module.named_children():
                self._visit(child, f"{name}.{key}" if name else key)

    def _layer(self, layer: Any, name: str) -> None:
        if layer.merged:
            raise PlanError(
                f"'{name}' has an adapter merged into its weight already. Call "
                "model.unmerge_adapter() first."
            )
        base = layer.get_base_layer()
        self._visit(base, name)
        other = self._adapter.other
        if name in self._adapter.updates:
            self._put(
                f"{name}.weight", merged_weight(base, self._adapter, name), self._dtype_of(base)
            )
        elif f"{name}.lora_embedding_A" in other:
            if self._active in layer.lora_variant:
                raise PlanError(f"the embedding '{name}' has DoRA, which cannot be merged here.")
            delta = layer.get_delta_weight(self._active)
            self._put(f"{name}.weight", base.weight.double() + delta.double(), base.weight.dtype)
        shift = other.get(f"{name}.lora_B.bias")
        if shift is not None:
            if getattr(base, "bias", None) is None:
                raise PlanError(
                    f"'{name}' has no bias into which the bias of its factor (lora_bias) could go."
                )
            scale = self._adapter.updates[name].scaling
            bias = base.bias.detach().cpu().double() + scale * shift.double()
            self._put(f"{name}.bias", bias, base.bias.dtype)

    def _own(self, module: nn.Module, name: str) -> None:
        if quantised(module):
            self._put(f"{name}.weight", dense(module, name), self._plain)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                self._put(f"{name}.bias", bias)
            return
        for key, tensor in _held(module):
            self._put(f"{name}.{key}" if name else key, tensor)

    def _dtype_of(self, base: Any) -> torch.dtype:
        return self._plain if quantised(base) else base.weight.dtype

    def _put(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        tensor = tensor.detach()
        if tensor.is_meta:
            raise PlanError(f"'{name}' is not in memory (offloaded), so it cannot be merged.")
        wanted = (self._dtype or dtype or tensor.dtype) if tensor.is_floating_point() else None
        if wanted is not None and wanted != tensor.dtype:
            key = (tensor.data_ptr(), tensor.shape)
            # What is computed here is freed soon, and its address used again.
            tied = name not in self.tensors and dtype is None
            tensor = self._cast.setdefault(key, tensor.to(wanted)) if tied else tensor.to(wanted)
        self.tensors[name] = tensor


def float_dtype(inner: nn.Module) -> torch.dtype:
    """Return the type of a model's weights, of those that are not stored in codes.

    Args:
        inner: The base model, with PEFT's layers in it.
    """
    for name, parameter in inner.named_parameters():
        plain = parameter.is_floating_point() and parameter.element_size() > 1
        if plain and ".lora_" not in name and ".modules_to_save." not in name:
            return parameter.dtype
    return torch.float32


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters and those of its buffers that are saved."""
    for key, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
        yield key, tensor
    for key, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
        if key not in module._non_persistent_buffers_set:
            yield key, tensor
