"""Build the PeftModel of a plan, and check that it is what the plan says."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gradrank.adapters.config import stock_config
from gradrank.adapters.forms import attach_partition
from gradrank.adapters.precision import train_in_float32
from gradrank.adapters.view import lora_sites
from gradrank.core.errors import OptionError, PlanError, TargetError
from gradrank.core.plan import Plan
from gradrank.ops.four_bit import keep_quantised_layout
from gradrank.signals.layers import find_sites

_ZERO_B = (True, "gaussian")


def apply_plan(plan: Plan, model: nn.Module, lora_alpha: float = 16, **options: Any) -> PeftModel:
    """Wrap a base model with the LoRA layers of a plan.

    Where the plan splits the output rows of a target, its layer has rank ``r + r'`` and the form
    of :func:`gradrank.adapters.forms.attach_partition`; every save of it is stock LoRA.

    Args:
        plan: The plan.
        model: The base model; its modules are wrapped in place, as PEFT does.
        lora_alpha: Alpha at the reference rank.
        **options: Further options of :func:`gradrank.adapters.config.lora_config`.

    Returns:
        The PEFT model, whose adapter has exactly ``plan.parameters`` parameters. 4-bit layers of
        bitsandbytes in it are kept trainable through (:mod:`gradrank.ops.four_bit`), and what is
        trained is held in float32 (:mod:`gradrank.adapters.precision`).

    Raises:
        PlanError: If the model lacks a target, has it in another shape, or already carries an
            adapter; or if ``init_lora_weights`` would fill rows of B that a partition leaves
            out. The model is left as it was, as it is after an error of PEFT's.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise PlanError(
            "the model carries an adapter already. Pass the base model, or merge the adapter "
            "first (model.merge_and_unload())."
        )
    _check_fit(plan, model)
    config = stock_config(plan, lora_alpha, **options)
    if plan.partitions and config.init_lora_weights not in _ZERO_B:
        raise PlanError(
            f"init_lora_weights={config.init_lora_weights!r} does not begin with B = 0, and the "
            "plan splits output rows, each of which sees some columns of B only. Use True or "
            "'gaussian', or a plan without partitions."
        )
    with all_or_nothing(model):
        wrapped = get_peft_model(model, config)
        built = adapter_ranks(wrapped)
        expected = {name: rank for name, rank in plan.ranks.items() if rank}
        if built != expected:
            wrong = sorted(set(built.items()) ^ set(expected.items()))[:4]
            raise PlanError(f"PEFT built other ranks than the plan: {wrong}.")
        _split_rows(plan, wrapped)
        keep_quantised_layout(wrapped)
        train_in_float32(wrapped)
    return wrapped


def _split_rows(plan: Plan, model: PeftModel) -> None:
    sites = lora_sites(model, "default")
    for name, split in plan.partitions.items():
        rows = torch.tensor(split.mask)
        try:
            attach_partition(
                sites[name].layer, "default", rows, split.rank, split.supplementary_rank
            )
        except (OptionError, TargetError) as error:
            raise PlanError(f"the rows of '{name}' cannot be split: {error}") from error
    used = sum(site.parameters for site in sites.values())
    if used != plan.parameters:
        raise PlanError(f"the adapter has {used:,} parameters, and the plan {plan.parameters:,}.")


def adapter_ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """Return the LoRA rank of every adapted module, by its name in the base model.

    Under a component mask it is the number of components in use, of a partition ``r + r'``.

    Args:
        model: A PEFT model.
        adapter: Name of the adapter.

    Returns:
        Rank per module, in model order.
    """
    ranks = {
        name.removeprefix("base_model.model."): int(layer.r[adapter])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }
    return ranks | {name: site.rank for name, site in lora_sites(model, adapter).items()}


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Count trainable parameters, the adapter's and others (a task head) apart.

    Args:
        model: The model.

    Returns:
        ``{"adapter": n, "other": n}``.
    """
    counts = {"adapter": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["adapter" if ".lora_" in name else "other"] += parameter.numel()
    return counts


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put back modules and flags if something fails while PEFT wraps a model in place.

    Args:
        model: The base model.

    Yields:
        None.
    """
    children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = hasattr(model, "peft_config")
    try:
        yield
    except BaseException:
        for module, name, child in children:
            setattr(module, name, child)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if not known and hasattr(model, "peft_config"):
            del model.peft_config
        raise


def _check_fit(plan: Plan, model: nn.Module) -> None:
    wanted = {p.target.name: p.target for p in plan.targets if p.rank}
    if not wanted:
        raise PlanError("the plan gives rank 0 to every target, so there is no adapter to build.")
    modules = {name for name, _ in model.named_modules()}
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise PlanError(
            f"the model has no module '{missing[0]}' ({len(missing)} of {len(wanted)} targets of "
            "the plan are missing). The plan was made for another model."
        )
    try:
        sites = find_sites(model, list(wanted))
    except TargetError as error:
        raise PlanError(f"the plan does not fit the model: {error}") from error
    for site in sites:
        made, found = wanted.get(site.target.name, site.target), site.target
        if (made.d_in, made.d_out) != (found.d_in, found.d_out):
            raise PlanError(
                f"'{made.name}' is {made.d_out} x {made.d_in} in the plan and {found.d_out} x "
                f"{found.d_in} in the model. The plan was made for another model."
            )
