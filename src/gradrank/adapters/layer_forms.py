"""What form an adapter of a layer has, what of it counts, and the tensors behind it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradrank.adapters.baking import form_behind, learned_tensors, sharded_like
from gradrank.adapters.factors import check_active, check_unmerged, linears
from gradrank.adapters.parametrizations import ComponentMask, Masked, Singular, same_shape
from gradrank.adapters.partitioned import Partitioned, PartitionMask
from gradrank.core.errors import OptionError, TargetError
from gradrank.core.partition import NeuronPartition

FORM_NAMES = {
    "mask": "a component mask",
    "svd": "the SVD form",
    "partition": "a neuron partition",
    "partition-mask": "room for a neuron partition",
}
"""What each form that :func:`form_of` returns is called in messages."""


def form_of(layer: nn.Module, adapter: str) -> str:
    """Return which form an adapter of a layer has.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        ``plain``, ``mask``, ``svd``, ``partition`` or ``partition-mask``.
    """
    form = form_behind(linears(layer, adapter)[1])
    return "plain" if form is None else form.kind


def has_fixed_shape(layer: nn.Module, adapter: str) -> bool:
    """Tell whether components of an adapter can be switched off while its shape stays.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        Whether it has a component mask, room for a partition, or the SVD form at a fixed shape.
    """
    return bool(_masks(layer, adapter))


def _masks(layer: nn.Module, adapter: str) -> list[Masked]:
    """The masks of A and B; empty where the adapter has none."""
    found = [form_behind(linear) for linear in linears(layer, adapter)]
    masks = [form for form in found if isinstance(form, Masked) and form.mask is not None]
    return masks if len(masks) == 2 else []


def set_active(layer: nn.Module, adapter: str, active: int) -> None:
    """Change how many components of an adapter of fixed shape count, in place.

    The function changes by what the components contribute: before growing, the new columns of
    ``raw_tensors(layer, adapter)["B"]``, or the new entries of ``["lam"]``, have to be zero if it
    shall stay the same.

    Args:
        layer: A LoRA layer with a component mask, with room for a partition (all rows see the same
            components afterwards), or with the SVD form at a fixed shape.
        adapter: Name of the adapter.
        active: Components that count, in ``1..r``; 0 switches the target off where there is more
            than a component mask.

    Raises:
        OptionError: If ``active`` is out of that range.
        TargetError: If the adapter has no fixed shape, or is merged.
    """
    masks = _masks(layer, adapter)
    if not masks:
        raise TargetError(
            f"adapter '{adapter}' has form '{form_of(layer, adapter)}', and only a component mask "
            "(or the SVD form at a fixed shape) has active components to set. Call attach_mask "
            "first, or attach_svd(..., fixed=True)."
        )
    check_unmerged(layer, adapter)
    check_active(active, linears(layer, adapter)[0].out_features, _least(masks))
    for mask in masks:
        mask.set_active(active)


def _least(masks: list[Masked]) -> int:
    return 0 if any(isinstance(mask, Singular | PartitionMask) for mask in masks) else 1


def partition_of(layer: nn.Module, adapter: str) -> NeuronPartition | None:
    """Return how the output rows of an adapter are split.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        The partition; None where all rows have the same components.
    """
    form = form_behind(linears(layer, adapter)[1])
    return form.partition if isinstance(form, Partitioned | PartitionMask) else None


def set_partition(layer: nn.Module, adapter: str, partition: NeuronPartition) -> None:
    """Split the rows of an adapter that has room for it, in place.

    The function changes by what the rows see afterwards and did not see before, or the reverse.

    Args:
        layer: A LoRA layer with the form ``partition-mask``.
        adapter: Name of the adapter.
        partition: The partition; both groups must have rows.

    Raises:
        OptionError: If it does not fit the layer.
        TargetError: If the adapter has another form, or is merged.
    """
    first, second = (form_behind(linear) for linear in linears(layer, adapter))
    if not isinstance(second, PartitionMask) or not isinstance(first, ComponentMask):
        raise TargetError(
            f"adapter '{adapter}' has form '{form_of(layer, adapter)}', and only rows of the form "
            "'partition-mask' can be split in place. Call attach_partition_mask first."
        )
    check_unmerged(layer, adapter)
    rows, width = second.mask.shape
    if partition.d_out != rows or not partition.is_split or partition.lora_rank > width:
        raise OptionError(
            f"a partition of {partition.d_out} rows ({partition.dominant_rows} of them dominant) "
            f"with ranks {partition.rank} and {partition.supplementary_rank} does not fit {rows} "
            f"rows with room for rank {width}. Both groups need rows, and r + r' columns."
        )
    first.set_active(partition.lora_rank)
    second.set_partition(partition)


def active_components(layer: nn.Module, adapter: str) -> int:
    """Return how many components of an adapter count.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        The active components of an adapter of fixed shape, else its rank.
    """
    masks = _masks(layer, adapter)
    return masks[1].active if masks else linears(layer, adapter)[0].out_features


def stored_components(layer: nn.Module, adapter: str) -> int:
    """Return the rank that a save of an adapter has.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        The active components, but at least 1: stock PEFT knows no rank 0, so that a target that
        is switched off is stored as one component with a zero in B.
    """
    return max(active_components(layer, adapter), 1)


def raw_tensors(layer: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return every learned tensor behind an adapter, and what restores its form.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.

    Returns:
        The live parameters (not copies, and DTensors where they are sharded): plain ``A``, ``B``;
        mask ``A``, ``B`` at full rank and ``active``; svd ``Q``, ``P``, ``lam``, at a fixed shape
        with ``active``; partition ``A``, ``B_d``, ``B_s`` and ``dominant``; partition-mask ``A``,
        ``B`` at full width, ``dominant`` and ``ranks`` (r and r'). With ``bias`` where ``lora_B``
        has one.
    """
    a, b = linears(layer, adapter)
    form = form_behind(b)
    first: Tensor = a.weight if form_behind(a) is None else learned_tensors(a)["original"]
    tensors: dict[str, Tensor] = {}
    if form is None:
        tensors |= {"A": first, "B": b.weight}
    else:
        behind = learned_tensors(b)
        if isinstance(form, ComponentMask | PartitionMask):
            tensors |= {"A": first, "B": behind["original"]}
        elif isinstance(form, Singular):
            tensors |= {"Q": first, "P": behind["original"], "lam": behind["0.lam"]}
        elif isinstance(form, Partitioned):
            tensors |= {"A": first, "B_d": behind["original0"], "B_s": behind["original1"]}
            tensors["dominant"] = form.dominant
    if isinstance(form, PartitionMask):
        tensors |= {"dominant": form.dominant, "ranks": torch.tensor(form.ranks)}
    elif has_fixed_shape(layer, adapter):
        tensors["active"] = torch.tensor(active_components(layer, adapter))
    if b.bias is not None:
        tensors["bias"] = b.bias
    return tensors


def load_raw_tensors(layer: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`raw_tensors` gave, in place and exactly.

    Args:
        layer: A LoRA layer with the same form and the same shapes.
        adapter: Name of the adapter.
        tensors: Whole tensors; they are sharded here where the layer's are DTensors.

    Raises:
        OptionError: If names, shapes or dtypes differ; nothing is changed then.
    """
    present = raw_tensors(layer, adapter)
    if set(present) != set(tensors):
        raise OptionError(
            f"adapter '{adapter}' has form '{form_of(layer, adapter)}' with tensors "
            f"{sorted(present)}, and {sorted(tensors)} were given. Attach the form that they were "
            "saved from first."
        )
    for name, mine in present.items():
        same_shape(tensors[name], mine)
        if tensors[name].dtype != mine.dtype:
            raise OptionError(
                f"tensor '{name}' is {tensors[name].dtype} and the layer's is {mine.dtype}; "
                "copying would round. Load the model in the dtype it was trained in."
            )
    form = form_behind(linears(layer, adapter)[1])
    if isinstance(form, Partitioned):
        same_shape(tensors["dominant"].nonzero(), form.dominant.nonzero())
        form.set_rows(tensors["dominant"].to(form.dominant.device))
    elif isinstance(form, PartitionMask):
        _split_as(layer, adapter, tensors)
    if "active" in present:
        set_active(layer, adapter, int(tensors["active"]))
    with torch.no_grad():
        # In one order in all processes: sharding is a collective.
        for name, mine in present.items():
            if name not in {"active", "dominant", "ranks"}:
                mine.copy_(sharded_like(tensors[name], mine))


def _split_as(layer: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    rank, rest = (int(number) for number in tensors["ranks"])
    dominant = tensors["dominant"]
    if bool(dominant.all()):
        set_active(layer, adapter, rank)
    else:
        set_partition(layer, adapter, NeuronPartition.of(dominant.tolist(), rank, rest))
