"""Training-time forms of stock LoRA layers: component mask, SVD form, neuron partition.

A form is a parametrization of the ``nn.Linear`` modules that PEFT keeps in ``lora_A`` and
``lora_B``. PEFT's forward, merge and quantised layers work on it unchanged, and every save shows
plain weights (:mod:`gradrank.adapters.baking`). ADR 0008 lists what was tried and the limits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.baking import baked_weight, form_behind, install, learned_tensors, strip
from gradrank.adapters.directions import decompose
from gradrank.adapters.factors import (
    check_active,
    check_unmerged,
    check_whole,
    linears,
    plain_linears,
)
from gradrank.adapters.layer_forms import (
    active_components,
    form_of,
    has_fixed_shape,
    load_raw_tensors,
    partition_of,
    raw_tensors,
    set_active,
    set_partition,
    stored_components,
)
from gradrank.adapters.parametrizations import ComponentMask, Form, Singular
from gradrank.adapters.partitioned import Partitioned, PartitionMask
from gradrank.core.errors import OptionError, TargetError, nearest

INITS = ("svd", "keep")
__all__ = [
    "INITS",
    "active_components",
    "attach_mask",
    "attach_partition",
    "attach_partition_mask",
    "attach_svd",
    "detach",
    "form_of",
    "has_fixed_shape",
    "load_raw_tensors",
    "partition_of",
    "raw_tensors",
    "set_active",
    "set_partition",
    "stored_components",
]


def attach_mask(layer: nn.Module, adapter: str, active: int) -> None:
    """Let only the first components of an adapter count, at fixed shapes.

    For settings where parameters cannot change shape while training runs (DDP, FSDP2, DeepSpeed,
    ``torch.compile``). Dormant components neither contribute nor receive any gradient. The
    parameters stay the same objects, so that an optimizer keeps them.

    Args:
        layer: A plain LoRA layer on a linear target.
        adapter: Name of the adapter.
        active: Components that count, in ``1..r``.

    Raises:
        OptionError: If ``active`` is outside ``1..r``.
        TargetError: If the layer cannot carry a form, or carries one already.
    """
    a, b = plain_linears(layer, adapter)
    rank = a.out_features
    check_active(active, rank)
    install(a, ComponentMask(rank, active, 0, a.weight.device))
    install(b, ComponentMask(rank, active, 1, b.weight.device))


def attach_svd(
    layer: nn.Module, adapter: str, init: str = "svd", seed: int = 0, fixed: bool = False
) -> None:
    r"""Write an adapter as ``scaling · P diag(λ) Q`` with a trainable λ.

    ``A = Q [r, d_in]`` stays a plain weight; ``B = P λ`` has P ``[d_out, r]`` in the place of the
    weight and λ ``[r]`` beside it. P and Q are the parameters that were there; λ is new, so that
    an optimizer has to be given it.

    At a fixed shape (for DDP) components are switched off by :func:`set_active`, all of them if
    need be; all are active at first. Dormant ones neither contribute nor receive any gradient.

    Args:
        layer: A plain LoRA layer on a linear target.
        adapter: Name of the adapter.
        init: ``svd`` (λ are the singular values of ``B A``, P and Q orthonormal; the function
            stays up to rounding; for a zero update λ = 0 and P, Q random) or ``keep`` (λ = 1,
            P = B, Q = A, bitwise the same function).
        seed: Seed of what the update leaves open, such as P and Q of a zero update; the global
            random state is neither read nor changed.
        fixed: Whether the shape is fixed, with a mask over components.

    Raises:
        OptionError: If ``init`` is unknown.
        TargetError: If the layer cannot carry a form, carries one already, or has a rank above
            its widths, which leaves no orthonormal P and Q.

    Source:
        IGU-LoRA, section 3 (the form); AdaLoRA, arXiv 2303.10512, equation 3.

    Notes:
        Decomposed in float64 from QR of both factors; the ``d_out x d_in`` product is not formed.
    """
    a, b = plain_linears(layer, adapter)
    if init not in INITS:
        raise OptionError(f"init '{init}' is unknown. {nearest(init, INITS)}")
    lam = torch.ones(a.out_features, dtype=b.weight.dtype, device=b.weight.device)
    if init == "svd":
        if a.out_features > min(a.in_features, b.out_features):
            raise TargetError(
                f"adapter '{adapter}' has rank {a.out_features} on a {b.out_features} x "
                f"{a.in_features} target, so that no {a.out_features} directions are orthonormal. "
                "Use init='keep', or a lower rank."
            )
        P, lam, Q = decompose(a.weight.detach(), b.weight.detach(), seed)
        with torch.no_grad():
            a.weight.copy_(Q)
            b.weight.copy_(P)
    # The form starts from λ = 1 (see Singular.right_inverse), so λ is filled in afterwards.
    form = Singular(torch.ones_like(lam, dtype=b.weight.dtype), b.weight.requires_grad, fixed)
    install(b, form)
    if fixed:
        install(a, ComponentMask(a.out_features, a.out_features, 0, a.weight.device))
    with torch.no_grad():
        form.lam.copy_(lam)


def attach_partition(
    layer: nn.Module, adapter: str, dominant: Tensor, rank: int, supplementary_rank: int
) -> None:
    """Give dominant output rows the first components of an adapter and the others the last.

    B is stored compactly, ``B_d [|M|, r]`` and ``B_s [d_out - |M|, r']``, and expanded when it is
    used; A stays ``[r + r', d_in]``. Both blocks are new parameters, so that an optimizer has to
    be given them.

    Args:
        layer: A plain LoRA layer of rank ``r + r'`` on a linear target.
        adapter: Name of the adapter.
        dominant: Boolean mask M of output rows, ``[d_out]``; all or none may be set.
        rank: Components r of dominant rows, at least 1.
        supplementary_rank: Components r' of the other rows, 0 or more.

    Raises:
        OptionError: If the mask or the ranks do not fit, or B has nonzero entries outside the
            blocks (they would be lost, which changes the function).
        TargetError: If the layer cannot carry a form, or carries one already.

    Source:
        PiLoRA, section 3.3 (two ranks in one layer).
    """
    a, b = plain_linears(layer, adapter)
    if dominant.dtype != torch.bool or dominant.shape != (b.out_features,):
        raise OptionError(
            f"the mask of dominant rows is {dominant.dtype} {list(dominant.shape)}, and the layer "
            f"needs torch.bool [{b.out_features}], one entry per output."
        )
    if rank < 1 or supplementary_rank < 0 or rank + supplementary_rank != a.out_features:
        raise OptionError(
            f"ranks {rank} and {supplementary_rank} do not make the rank {a.out_features} of "
            f"adapter '{adapter}'. Build the layer with rank r + r', r >= 1, r' >= 0."
        )
    form = Partitioned(dominant.to(b.weight.device), rank, supplementary_rank)
    form.split(b.weight.detach())
    install(b, form)
    for block in learned_tensors(b).values():
        if not block.numel():
            block.requires_grad_(False)  # FSDP2 cannot reduce an empty gradient


def attach_partition_mask(layer: nn.Module, adapter: str, active: int) -> None:
    """Make room for a partition of the rows that comes later, at fixed shapes.

    Until :func:`set_partition` splits the rows, all of them see the first components and no
    others, as under :func:`attach_mask`. The parameters stay the same objects.

    Args:
        layer: A plain LoRA layer on a linear target, of the rank that the partition will need.
        adapter: Name of the adapter.
        active: Components that count until then, in ``0..r``; 0 switches the target off.

    Raises:
        OptionError: If ``active`` is outside that range.
        TargetError: If the layer cannot carry a form, or carries one already.
    """
    a, b = plain_linears(layer, adapter)
    rank, device = a.out_features, b.weight.device
    check_active(active, rank, 0)
    install(a, ComponentMask(rank, active, 0, a.weight.device))
    install(b, PartitionMask(b.out_features, rank, active, device))


def detach(layer: nn.Module, adapter: str) -> None:
    """Turn an adapter back into plain ``lora_A``/``lora_B`` weights of the same function, bitwise.

    An adapter of fixed shape becomes one of rank ``active``: widths, ``layer.r`` and
    ``layer.lora_alpha`` follow, ``layer.scaling`` stays; PEFT's config is the caller's. With no
    active component it becomes a zero update of rank 1. Dtype, device and ``requires_grad`` stay.
    A parameter whose shape does not change stays the same object; the others are new, and an
    optimizer has to be told.

    Args:
        layer: A LoRA layer; nothing happens to a plain one.
        adapter: Name of the adapter.

    Raises:
        TargetError: If the adapter is merged, or its tensors are sharded.
    """
    pair = linears(layer, adapter)
    forms = [form_behind(linear) for linear in pair]
    if forms == [None, None]:
        return
    check_unmerged(layer, adapter)
    check_whole(adapter, raw_tensors(layer, adapter).values())
    rank = stored_components(layer, adapter)
    for linear, form in zip(pair, forms, strict=True):
        if form is not None:
            strip(linear, _plain_parameter(linear, form))
    if rank != pair[0].out_features:
        _set_rank(layer, adapter, rank)


def _plain_parameter(linear: nn.Linear, form: Form) -> nn.Parameter:
    """The plain weight behind a form; the parameter that is there, if the shape allows it."""
    weight = baked_weight(linear, form)
    learned = learned_tensors(linear)
    present = next(iter(learned.values()))
    if "original" in learned and present.shape == weight.shape:
        with torch.no_grad():
            present.copy_(weight)
        return present
    trained = any(tensor.requires_grad for tensor in learned.values())
    return nn.Parameter(weight, requires_grad=trained)


def _set_rank(layer: Any, adapter: str, rank: int) -> None:
    ratio = rank / layer.r[adapter]
    # So that alpha / r, from which PEFT resets a scale, stays the scale that is in use.
    alpha = layer.lora_alpha[adapter] * (ratio**0.5 if layer.use_rslora.get(adapter) else ratio)
    layer.lora_alpha[adapter] = int(alpha) if float(alpha).is_integer() else alpha
    layer.r[adapter] = rank
    layer.lora_A[adapter].out_features = rank
    layer.lora_B[adapter].in_features = rank
