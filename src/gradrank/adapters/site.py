"""One live LoRA layer: its rank, its form, and the parameters that an optimizer holds of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gradrank.adapters.baking import form_behind, learned_tensors
from gradrank.adapters.layer_forms import (
    active_components,
    form_of,
    has_fixed_shape,
    partition_of,
)
from gradrank.core.partition import NeuronPartition

_BEHIND = {"lam": "0.lam", "B_d": "original0", "B_s": "original1"}


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One live LoRA layer.

    Attributes:
        name: Name of the adapted module in the base model.
        layer: PEFT's layer.
        adapter: Name of the adapter.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def rank(self) -> int:
        """Rank in use; at a fixed shape the active components alone, of a partition ``r + r'``."""
        return active_components(self.layer, self.adapter)

    @property
    def partition(self) -> NeuronPartition | None:
        """How the output rows are split into two groups; None: they all have ``rank``."""
        found = partition_of(self.layer, self.adapter)
        return found if found is not None and found.is_split else None

    @property
    def parameters(self) -> int:
        """Adapter parameters in use, as a stock adapter would need them: lam is folded into B."""
        d_in, d_out = self.linear("A").in_features, self.linear("B").out_features
        split = self.partition
        return self.rank * (d_in + d_out) if split is None else split.parameters(d_in)

    @property
    def form(self) -> str:
        """``plain``, ``mask``, ``svd``, ``partition`` or ``partition-mask`` (of a fixed shape)."""
        return form_of(self.layer, self.adapter)

    @property
    def masked(self) -> bool:
        """Whether the layer has a fixed shape, of which ``rank`` components are in use."""
        return has_fixed_shape(self.layer, self.adapter)

    @property
    def scaling(self) -> float:
        """Scale of the update, ``scaling * B A`` or ``scaling * P diag(lam) Q``."""
        return float(self.layer.scaling[self.adapter])

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the learned tensors.

        ``"A"``, ``"B"``, and ``"lam"`` in the SVD form; ``"A"``, ``"B_d"``, ``"B_s"`` of a compact
        partition.
        """
        more = {"svd": ("A", "B", "lam"), "partition": ("A", "B_d", "B_s")}
        return more.get(self.form, ("A", "B"))

    def linear(self, factor: str) -> nn.Linear:
        """Return the linear module that holds a factor.

        Args:
            factor: One of ``factors``.
        """
        return (self.layer.lora_A if factor == "A" else self.layer.lora_B)[self.adapter]

    def raw(self, factor: str) -> nn.Parameter:
        """Return the parameter behind a factor: what the optimizer holds.

        Args:
            factor: ``"A"`` (``[r, d_in]``; Q in the SVD form), ``"B"`` (``[d_out, r]``; P in the
                SVD form), ``"lam"`` (``[r]``), or the blocks of a compact partition, ``"B_d"``
                (``[|M|, r]``) and ``"B_s"`` (``[d_out - |M|, r']``, empty and not trained where r'
                is 0).
        """
        linear: Any = self.linear(factor)
        form = form_behind(linear)
        if form is None:
            return linear.weight
        return learned_tensors(linear)[_BEHIND.get(factor, "original")]

    def learned(self) -> dict[str, nn.Parameter]:
        """Return all parameters behind the adapter, by factor."""
        return {factor: self.raw(factor) for factor in self.factors}

    def assign(self, factor: str, parameter: nn.Parameter) -> None:
        """Put another parameter behind a factor, of any shape.

        Shapes of the other factors, the widths of the linear modules and the rank that PEFT
        knows are the caller's.

        Args:
            factor: One of ``factors``.
            parameter: What comes in the place of ``raw(factor)``.
        """
        linear: Any = self.linear(factor)
        form = form_behind(linear)
        if form is None:
            linear.weight = parameter
        elif factor == "lam":
            form.lam = parameter
        else:
            setattr(linear.parametrizations["weight"], _BEHIND.get(factor, "original"), parameter)
