"""From a plan to a stock ``peft.LoraConfig``: anchored patterns and one constant scale."""

import re
from typing import Any

from peft import LoraConfig

from gradrank.core.errors import OptionError, PlanError, nearest
from gradrank.core.plan import Plan
from gradrank.core.scales import anchored, tidy

POLICIES = ("constant", "alpha/r", "rslora")
_OURS = ("r", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules")


def lora_config(
    plan: Plan,
    lora_alpha: float = 16,
    *,
    scaling: float | None = None,
    policy: str = "constant",
    **options: Any,
) -> LoraConfig:
    """Return the stock configuration that builds exactly the plan; see :func:`stock_config`.

    Args:
        plan: The plan, without neuron partitions.
        lora_alpha: Alpha at the plan's reference rank.
        scaling: Scale of every adapter.
        policy: ``constant``, ``alpha/r`` or ``rslora``.
        **options: Any other field of ``LoraConfig``.

    Returns:
        The configuration.

    Raises:
        PlanError: If the plan splits the rows of a target, which no configuration can say.
    """
    if plan.partitions:
        name = next(iter(plan.partitions))
        raise PlanError(
            f"the plan splits the output rows of {len(plan.partitions)} target(s) ('{name}', ...), "
            "and a stock LoraConfig would train r + r' components on every row, more than the "
            "plan's parameters. Let gradrank build the model: gradrank.apply(plan, model)."
        )
    return stock_config(plan, lora_alpha, scaling=scaling, policy=policy, **options)


def stock_config(
    plan: Plan,
    lora_alpha: float = 16,
    *,
    scaling: float | None = None,
    policy: str = "constant",
    **options: Any,
) -> LoraConfig:
    """Return the stock configuration with the plan's ranks, ``r + r'`` where rows are split.

    Every pattern is anchored and escaped, so that no name matches as a suffix of another. Rank 0
    leaves the target out. A uniform plan gives an ordinary uniform configuration, without
    patterns.

    Args:
        plan: The plan.
        lora_alpha: Alpha at the plan's reference rank.
        scaling: Scale of every adapter; default ``lora_alpha / plan.reference_rank``. For policy
            ``constant`` only.
        policy: ``constant`` (one scale for all, so that capacity is compared and not scale),
            ``alpha/r`` or ``rslora`` (``alpha / sqrt(r)``), which let the scale fall with rank.
        **options: Any other field of ``LoraConfig``: ``task_type``, ``lora_dropout``,
            ``modules_to_save``, ``init_lora_weights``, ...

    Returns:
        The configuration.

    Raises:
        PlanError: If no target has a rank.
        OptionError: If an option would contradict the plan, or the policy is unknown.
    """
    _check_options(policy, scaling, options)
    used = {planned.target.name: planned.rank for planned in plan.targets if planned.rank}
    if not used:
        raise PlanError("the plan gives rank 0 to every target, so there is no adapter to build.")
    reference = plan.reference_rank
    if policy == "constant" and scaling is None:
        scaling = lora_alpha / reference
    ranks = {anchored(name): rank for name, rank in used.items() if rank != reference}
    alphas: dict[str, float] = {}
    if policy == "constant":
        alphas = {anchored(n): tidy(scaling * rank) for n, rank in used.items() if scaling}
        lora_alpha = tidy((scaling or 0) * reference)
        alphas = {key: alpha for key, alpha in alphas.items() if alpha != lora_alpha}
    if all(p.target.kind == "conv1d" for p in plan.targets if p.rank):
        # GPT-2 stores weights as [d_in, d_out]; PEFT finds that out itself, but with a warning.
        options.setdefault("fan_in_fan_out", True)
    return LoraConfig(
        r=reference,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT divides, floats are fine
        target_modules=_target_modules(plan, list(used)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=policy == "rslora",
        **options,
    )


def _target_modules(plan: Plan, names: list[str]) -> list[str] | str:
    """A list where suffix matching cannot go astray, else one anchored expression."""
    dropped = {planned.target.name for planned in plan.targets if not planned.rank}
    clash = any(other.endswith("." + name) for other in dropped for name in names)
    if clash or plan.provenance.get("ambiguous_suffixes", True):
        return "^(?:" + "|".join(re.escape(name) for name in names) + ")$"
    return names


def _check_options(policy: str, scaling: float | None, options: dict[str, Any]) -> None:
    if policy not in POLICIES:
        raise OptionError(f"scale policy '{policy}' is unknown. {nearest(policy, POLICIES)}")
    if scaling is not None and (policy != "constant" or scaling <= 0):
        raise OptionError(
            f"scaling={scaling} needs policy='constant' and a positive value; policy is '{policy}'."
        )
    ours = sorted(set(options) & set(_OURS))
    if ours:
        raise OptionError(
            f"{', '.join(ours)} come(s) from the plan and cannot be given beside it. Edit the "
            "plan, or build the LoraConfig yourself from plan.ranks."
        )
    unknown = sorted(set(options) - set(LoraConfig.__dataclass_fields__))
    if unknown:
        hint = nearest(unknown[0], LoraConfig.__dataclass_fields__)
        raise OptionError(f"peft.LoraConfig has no field '{unknown[0]}'. {hint}")
