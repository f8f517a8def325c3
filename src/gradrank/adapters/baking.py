"""Parametrizations that stand behind ``lora_A``/``lora_B``, and how a state dict sees through them.

A form computes ``weight`` of a stock ``nn.Linear`` from learned tensors of another shape. Hooks on
that layer show the plain ``weight`` in every ``state_dict()`` and take a plain ``weight`` back in
every ``load_state_dict()``, so that PEFT, Trainer and safetensors never meet a form.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from gradrank.adapters.parametrizations import Form, same_shape
from gradrank.core.errors import OptionError

_PREFIX = "parametrizations.weight."


def install(linear: nn.Linear, form: Form) -> None:
    """Put a form behind a layer's weight, with the hooks that hide it from state dicts.

    Torch gives every parametrized layer a class with a property whose closure keeps the layer
    that it was made for; copies share that class. The property is replaced by one without a
    closure, so that a copy neither keeps the original alive nor reads a cache entry of it.

    Args:
        linear: A layer whose weight is plain.
        form: The form.
    """
    parametrize.register_parametrization(linear, "weight", form)
    type(linear).weight = property(_read_weight, _write_weight)  # pyright: ignore[reportAttributeAccessIssue]
    if form.product is not None:
        type(linear).forward = _form_product  # pyright: ignore[reportAttributeAccessIssue]
    linear.register_state_dict_post_hook(_show_plain_weight)
    linear.register_load_state_dict_pre_hook(_take_plain_weight)


def strip(linear: nn.Linear, weight: nn.Parameter) -> None:
    """Make a layer plain again.

    Unlike ``parametrize.remove_parametrizations`` this leaves the class as it is: copies share
    it, and deleting its property would break them.

    Args:
        linear: A layer with a form.
        weight: The plain weight it gets.
    """
    del linear._modules["parametrizations"]
    linear.__class__ = type(linear).__bases__[0]
    linear.register_parameter("weight", weight)
    for hooks in (linear._state_dict_hooks, linear._load_state_dict_pre_hooks):
        ours = [
            key
            for key, hook in hooks.items()
            if getattr(hook, "hook", hook) in {_show_plain_weight, _take_plain_weight}
        ]
        for key in ours:
            del hooks[key]


def form_behind(linear: nn.Module) -> Form | None:
    """Return the form behind a layer's weight, if there is one.

    Args:
        linear: Any module.

    Returns:
        The form, or None for a plain weight or a parametrization of somebody else.
    """
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    first = _behind(linear)[0]
    return first if isinstance(first, Form) else None


def learned_tensors(linear: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters behind a layer's weight.

    Args:
        linear: A layer with a form.

    Returns:
        ``original`` (or ``original0``, ``original1``) and the form's own, such as ``0.lam``.
    """
    return dict(_behind(linear).named_parameters())


def _behind(linear: Any) -> Any:
    return linear.parametrizations["weight"]


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole and detached, whatever its sharding; a collective if it is sharded.

    Args:
        tensor: A plain tensor or a DTensor.

    Returns:
        The whole tensor.
    """
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def sharded_like(tensor: Tensor, present: Tensor) -> Tensor:
    """Return a whole tensor sharded as another one is.

    Args:
        tensor: The whole tensor, equal in all processes.
        present: A plain tensor (nothing is done) or a DTensor.

    Returns:
        The tensor, or this process's view of it.
    """
    if not isinstance(present, DTensor) or isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(present.device_mesh.device_type)
    return distribute_tensor(placed, present.device_mesh, present.placements)


def _read_weight(linear: Any) -> Tensor:
    behind = _behind(linear)
    originals = list(behind._parameters.values())
    if any(isinstance(tensor, DTensor) for tensor in originals):
        # FSDP2 outside of the forward pass, where torch's checkpointing reads every attribute.
        whole = {name: gathered(tensor) for name, tensor in learned_tensors(linear).items()}
        return behind[0].compose(**whole)
    if originals and len(behind._modules) == 1:
        # What calling the list of parametrizations would do, at a fifth of the time; there is
        # more than one only where somebody else has added theirs.
        return behind._modules["0"].forward(*originals)
    return behind()


def _form_product(linear: Any, x: Tensor) -> Tensor:
    behind = _behind(linear)
    if len(behind._modules) > 1:  # somebody else has added theirs
        return nn.functional.linear(x, linear.weight, linear.bias)
    return behind._modules["0"].product(x, linear.bias, *behind._parameters.values())


def _write_weight(linear: Any, value: Tensor) -> None:
    same_shape(value, linear.weight)
    _behind(linear).right_inverse(value)


def baked_weight(linear: nn.Module, form: Form) -> Tensor:
    """Return the plain weight behind a form, as a stock adapter stores it.

    Args:
        linear: The layer.
        form: Its form.

    Returns:
        The weight, detached and whole.
    """
    with torch.no_grad():
        whole = {name: gathered(tensor) for name, tensor in learned_tensors(linear).items()}
        return form.compact(form.compose(**whole))


def _show_plain_weight(
    linear: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Replace the entries of a form by the weight it stands for."""
    form = form_behind(linear)
    if form is None:
        return
    for key in [key for key in state_dict if key.startswith(prefix + "parametrizations.")]:
        del state_dict[key]
    state_dict[prefix + "weight"] = baked_weight(linear, form)


def _take_plain_weight(
    linear: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Replace a plain weight by the entries of the form; what is not given stays as it is."""
    form = form_behind(linear)
    if form is None:
        return
    learned = learned_tensors(linear)
    key, start = prefix + "weight", prefix + _PREFIX
    found: dict[str, Tensor] = {}
    if key in state_dict:
        whole = {name: gathered(tensor) for name, tensor in learned.items()}
        try:
            found = form.parts(gathered(state_dict.pop(key)), **whole)
        except OptionError as error:
            error_msgs.append(f"{key}: {error}")
    elif any(name.startswith(start) for name in state_dict):
        return
    elif not metadata.get("assign_to_params_buffers"):
        missing_keys.append(key)
    else:
        # Assigning would swap parameters that the caller did not mean, so torch reports them.
        return
    for name, present in learned.items():
        new = sharded_like(found[name], present) if name in found else present.detach()
        state_dict[start + name] = new
