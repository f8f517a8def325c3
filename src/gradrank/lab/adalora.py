"""PEFT's own AdaLoRA as a baseline: configured with a matched scale, and its parameters counted.

PEFT's code is used as it is shipped (0.21); :mod:`gradrank.lab.adalora_run` drives it. What has to
be known to read its numbers:

- **Scale.** The update is ``lora_alpha / (ranknum + 1e-5) · B diag(λ) A``. ``ranknum`` is the
  *initial* rank and stays so while ranks fall, in a reloaded adapter too, so the scale is one
  constant; ``use_rslora``, ``rank_pattern`` and ``alpha_pattern`` of LoRA are ignored. The default
  alpha (8) at a large initial rank makes a far smaller update than LoRA's usual scale. *Matched*
  means here: the same factors give the same update as a LoRA layer with ``scaling``, at every
  moment. (A divisor that followed the rank could match at one moment only.) It does not mean that
  one learning rate fits both: λ starts at zero between two random factors of size 0.02.
- **Regulariser.** It is added to ``outputs.loss`` inside the model, in evaluation mode too (compare
  losses from logits), and is missing where the loss is made outside (label smoothing, a loss
  function of the Trainer), or where ``get_peft_model`` gets no ``task_type``: wrap models with
  :func:`gradrank.lab.adalora_model.attach_adalora`. With accumulation it counts once per
  micro-batch.
- **Budget.** Ranks are counted, not parameters, and the threshold runs over all targets, so the
  final parameters follow from where the ranks went. Ties at the threshold are all pruned.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError, OptionError
from gradrank.core.targets import Target
from gradrank.signals.layers import unwrapped

_OURS = {"r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
# SVDLinear divides by the rank plus this.
_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class TargetRank:
    """A mean final rank, and what it may cost.

    Attributes:
        rank: Mean rank per target.
        uniform: Parameters if every target ends with this rank.
        worst: Parameters if the costliest targets keep all they began with.
        budget: What was asked for, parameters.
    """

    rank: int
    uniform: int
    worst: int
    budget: int

    @property
    def guaranteed(self) -> bool:
        """Whether the budget holds wherever the ranks go."""
        return self.worst <= self.budget


@dataclass(frozen=True, slots=True)
class AdaLoraUse:
    """What an AdaLoRA adapter has in use at one moment.

    Attributes:
        ranks: Directions with λ ≠ 0, by target.
        parameters: ``rank · (d_in + d_out)`` by target: what a stock LoRA adapter of these
            directions holds, and how gradrank counts budgets (λ goes into a factor).
        held: Numbers that the optimizer trains, λ and pruned directions included; PEFT's AdaLoRA
            never changes it.
    """

    ranks: Mapping[str, int]
    parameters: Mapping[str, int]
    held: int

    @property
    def total(self) -> int:
        """Parameters in use on all targets."""
        return sum(self.parameters.values())


def choose_target_rank(
    targets: Sequence[Target],
    initial_rank: int,
    budget: "str | int | Budget",
    *,
    base_parameters: int = 0,
    strict: bool = False,
) -> TargetRank:
    """Return the largest mean rank whose final parameters stay within a budget, where it can.

    PEFT prunes to a number of ranks. Where all targets cost the same, so do all outcomes. Elsewhere
    ``uniform`` ranks are what the choice rests on, and the outcome may cost more or less:
    :meth:`gradrank.lab.adalora_run.AdaLoraDriver.finish` counts what it did.

    Args:
        targets: The targets.
        initial_rank: Rank of every target at the start.
        budget: Parameters, ``"uniform:8"``, a percentage or a Budget.
        base_parameters: Parameters of the base model; for percentages only.
        strict: Keep the budget wherever the ranks go, at the price of a lower mean.

    Returns:
        The rank, at most ``initial_rank - 1`` (PEFT fails where there is nothing to prune).

    Raises:
        BudgetError: If not even a mean rank of 1 fits.
        OptionError: If ``initial_rank`` is below 2, or there are no targets.
    """
    if initial_rank < 2 or not targets:
        raise OptionError(
            f"initial_rank is {initial_rank} on {len(targets)} targets; AdaLoRA needs targets and "
            "an initial rank of at least 2, to have something to prune."
        )
    limit = Budget.parse(budget).resolve(targets, base_parameters)
    for rank in range(initial_rank - 1, 0, -1):
        uniform = rank * sum(target.cost for target in targets)
        worst = _costliest(targets, rank, initial_rank)
        if (worst if strict else uniform) <= limit:
            return TargetRank(rank, uniform, worst, limit)
    raise BudgetError(
        f"{limit:,} parameters are not enough for a mean rank of 1 on {len(targets)} targets. "
        f"Raise the budget{', or give strict=False' if strict else ''}."
    )


def _costliest(targets: Sequence[Target], rank: int, most: int) -> int:
    """Parameters if the costliest targets take ``rank`` per target in all, ``most`` each."""
    left, total = rank * len(targets), 0
    for cost in sorted((target.cost for target in targets), reverse=True):
        taken = min(most, left)
        left, total = left - taken, total + taken * cost
    return total


def adalora_config(
    targets: Sequence[Target],
    *,
    initial_rank: int,
    target_rank: int,
    total_steps: int,
    warmup: int,
    final: int,
    interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.5,
    scaling: float = 1.0,
    **options: Any,
) -> AdaLoraConfig:
    """Return PEFT's configuration of AdaLoRA with the scale of a LoRA layer.

    Args:
        targets: The targets.
        initial_rank: Rank of every target at the start (``init_r``).
        target_rank: Mean rank at the end (``target_r``).
        total_steps: Optimizer steps of the run.
        warmup: First steps, with all ranks (``tinit``).
        final: Last steps, with fixed ranks (``tfinal``). PEFT's defaults of 0 for both are of
            little use; its authors' GLUE runs leave about a tenth and a half.
        interval: Steps between allocations (``deltaT``), which fall on its multiples.
        beta1: Smoothing of the sensitivity.
        beta2: Smoothing of its uncertainty.
        orthogonality: Weight of the regulariser (``orth_reg_weight``).
        scaling: Scale of the update, as ``lora_alpha / r`` of the LoRA to compare with.
        **options: Further fields: ``task_type``, ``lora_dropout``, ``modules_to_save``, ...

    Returns:
        The configuration.

    Raises:
        OptionError: If a value is outside its range, or an option is set by the arguments or
            ignored by PEFT's AdaLoRA.

    Source:
        AdaLoRA, arXiv 2303.10512, section 3.
    """
    checks = (
        (bool(targets), "there are no targets"),
        (
            1 <= target_rank < initial_rank,
            f"target_rank {target_rank} is not below initial_rank {initial_rank}, or not positive",
        ),
        (
            warmup >= 0 and final >= 0 and warmup < total_steps - final,
            f"warmup {warmup} and final {final} leave none of {total_steps} steps to prune in",
        ),
        (interval >= 1, f"interval {interval} is below 1"),
        (0 < beta1 < 1 and 0 < beta2 < 1, f"beta1 {beta1} or beta2 {beta2} is not inside (0, 1)"),
        (orthogonality >= 0, f"orthogonality {orthogonality} is negative"),
        (0 < scaling < math.inf, f"scaling {scaling} is not positive"),
    )
    wrong = [problem for fine, problem in checks if not fine]
    clash = sorted(set(options) & _OURS)
    if clash:
        wrong.append(f"{', '.join(clash)} come(s) from the arguments, or has no effect in AdaLoRA")
    if wrong:
        raise OptionError(f"PEFT's AdaLoRA cannot be set up: {'; '.join(wrong)}.")
    if all(target.kind == "conv1d" for target in targets):
        options.setdefault("fan_in_fan_out", True)  # PEFT finds out itself, but with a warning
    names = "|".join(re.escape(target.name) for target in targets)
    return AdaLoraConfig(
        target_modules=f"^(?:{names})$",
        init_r=initial_rank,
        target_r=target_rank,
        total_step=total_steps,
        tinit=warmup,
        tfinal=final,
        deltaT=interval,
        beta1=beta1,
        beta2=beta2,
        orth_reg_weight=orthogonality,
        lora_alpha=scaling * (initial_rank + _EPSILON),  # pyright: ignore[reportArgumentType]
        **options,
    )


@torch.no_grad()
def adalora_use(model: nn.Module) -> AdaLoraUse:
    """Count what an AdaLoRA adapter has in use now.

    Args:
        model: A PEFT model with AdaLoRA.

    Returns:
        Ranks and parameters. At the very start every λ is zero, and so is every rank.
    """
    tuner = tuner_of(model)
    adapter = tuner.trainable_adapter_name
    layers = adalora_layers(model)
    ranks = {name: int(layer.lora_E[adapter].count_nonzero()) for name, layer in layers.items()}
    parameters = {name: ranks[name] * cost_of(layer) for name, layer in layers.items()}
    held = sum(
        factors[adapter].numel()
        for layer in layers.values()
        for factors in (layer.lora_A, layer.lora_B, layer.lora_E)
    )
    return AdaLoraUse(ranks, parameters, held)


def adalora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of the trainable AdaLoRA adapter, by target name.

    Args:
        model: A PEFT model with AdaLoRA.

    Returns:
        PEFT's layers, in model order.
    """
    tuner = tuner_of(model)
    return {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, AdaLoraLayer) and tuner.trainable_adapter_name in layer.lora_E
    }


def cost_of(layer: Any) -> int:
    """Return the parameters of one direction of a layer, ``d_in + d_out`` (λ is not counted).

    Args:
        layer: PEFT's layer.
    """
    return int(layer.in_features) + int(layer.out_features)


def tuner_of(model: nn.Module) -> Any:
    """Return the part of a PEFT model that prunes.

    Args:
        model: A PEFT model with AdaLoRA, possibly wrapped for several processes.

    Returns:
        PEFT's ``AdaLoraModel``.

    Raises:
        OptionError: If the model has no trainable AdaLoRA adapter.
    """
    tuner = getattr(unwrapped(model), "base_model", None)
    if not isinstance(tuner, AdaLoraModel) or not hasattr(tuner, "rankallocator"):
        raise OptionError(
            f"a {type(unwrapped(model)).__name__} carries no trainable AdaLoRA adapter. Wrap the "
            "base model with attach_adalora(model, adalora_config(...)) first."
        )
    return tuner
