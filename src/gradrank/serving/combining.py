"""One adapter that computes the weighted sum of several, whatever their ranks and scales."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradrank.core.errors import OptionError, PlanError, nearest
from gradrank.serving.adapter import Adapter, Update
from gradrank.serving.compression import Losses, common_scale, compress, refuse, truncate
from gradrank.serving.facts import natural

METHODS = ("concatenate", "svd")
# What has to be the same where two configurations both say it.
_SAME = ("base_model_name_or_path", "revision", "task_type")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "concatenate",
    *,
    rank: int | None = None,
    budget: Any = None,
    base_parameters: int | None = None,
    same_base: bool = False,
) -> tuple[Adapter, Losses | None]:
    r"""Combine adapters of one base model: :math:`\sum_i w_i s_i B_i A_i` for every module.

    Every update enters with its own scale, which may differ per adapter and per module; a module
    may be in some adapters only. ``concatenate`` puts the factors side by side: exact, and ranks
    add up. ``svd`` takes the best approximation of that sum within a budget or a rank. Weights go
    into ``B``, so they may be negative; an adapter with weight 0 takes no room.

    All updates of the result have one scale: that of the adapters if they have one only, else 1.
    Modules that are saved whole (task heads) may come from one adapter and pass unchanged,
    whatever its weight. Options of training, such as dropout, are those of the first adapter.

    Args:
        adapters: The adapters, at least one.
        weights: One per adapter; default: 1 each, the sum.
        method: ``concatenate`` or ``svd``.
        rank: For ``svd``: largest rank of every module.
        budget: For ``svd``: budget in parameters, see
            :func:`gradrank.serving.compression.compress`.
        base_parameters: Parameters of the base model, which a percentage needs.
        same_base: Whether to trust that adapters which name different base models have the same
            one, under two names.

    Returns:
        The combined adapter, and what ``svd`` lost against the exact sum (None for
        ``concatenate``).

    Raises:
        OptionError: If weights, method, rank and budget do not fit together.
        PlanError: If the adapters do not fit together, or are more than low-rank updates, by name.
        BudgetError: If not even one direction fits the budget.
    """
    factors = _checked_weights(adapters, weights)
    _check_method(method, rank, budget)
    for adapter in adapters:
        refuse(adapter, "combined")
    _check_fit(adapters, same_base)
    other = _whole(adapters)
    dtype = _dtype(adapters)
    lead = replace(adapters[0], config=_config(adapters), other=other, features=_features(adapters))
    wide = [adapter.to(torch.float64) for adapter in adapters]
    scale = common_scale(_updates(adapters))
    whole = lead.with_updates(_concatenated(wide, factors, scale))
    if not whole.updates:
        raise PlanError("all weights are 0, so nothing is left of the adapters.")
    if method == "concatenate":
        return _rounded(whole, dtype), None
    if rank is not None:
        smaller, losses = truncate(whole, rank)
    else:
        smaller, losses = compress(whole, budget, base_parameters=base_parameters)
    return _rounded(smaller, dtype), losses


def _concatenated(
    adapters: Sequence[Adapter], weights: Sequence[float], scale: float
) -> Iterator[Update]:
    names = {name for adapter in adapters for name in adapter.updates}
    for name in sorted(names, key=natural):
        parts = [
            (adapter.updates[name], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.updates and weight and adapter.updates[name].scaling
        ]
        if parts:
            a = torch.cat([update.a for update, _ in parts])
            b = torch.cat([(w * u.scaling / scale) * u.b for u, w in parts], 1)
            yield Update(name, a, b, scale)


def _checked_weights(
    adapters: Sequence[Adapter], weights: Sequence[float] | None
) -> tuple[float, ...]:
    if not adapters:
        raise OptionError("no adapter was given. Name at least one.")
    if weights is None:
        return (1.0,) * len(adapters)
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise OptionError(f"weight {weight!r} is no finite number.")
    if len(weights) != len(adapters):
        raise OptionError(
            f"there are {len(adapters)} adapters and {len(weights)} weights. Give one weight per "
            "adapter, in the same order."
        )
    return tuple(float(weight) for weight in weights)


def _check_method(method: str, rank: int | None, budget: Any) -> None:
    if method not in METHODS:
        raise OptionError(f"combination '{method}' is unknown. {nearest(method, METHODS)}")
    limits = [name for name, given in (("rank", rank), ("budget", budget)) if given is not None]
    if method == "concatenate" and limits:
        raise OptionError(
            f"'{limits[0]}' does not go with 'concatenate', which is exact. Use method 'svd'."
        )
    if method == "svd" and len(limits) != 1:
        raise OptionError("method 'svd' needs either a rank or a budget, and not both.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank is {rank!r}; a whole number of at least 1 is needed.")


def _check_fit(adapters: Sequence[Adapter], same_base: bool) -> None:
    """Refuse adapters of different base models, tasks or shapes."""
    first = adapters[0]
    seen: dict[str, Update] = {}
    for position, adapter in enumerate(adapters, 1):
        for field in _SAME:
            here, there = first.config.get(field), adapter.config.get(field)
            named = field == "task_type" or not same_base
            if here and there and here != there and named:
                hint = "" if field == "task_type" else " If it is one model, say same_base=True."
                raise PlanError(
                    f"adapter 1 has {field} '{here}' and adapter {position} '{there}', so they "
                    f"cannot be combined.{hint}"
                )
        for name, update in adapter.updates.items():
            known = seen.setdefault(name, update).target
            if update.target != known:
                raise PlanError(
                    f"'{name}' is {known.d_out} x {known.d_in} in one adapter and "
                    f"{update.target.d_out} x {update.target.d_in} in adapter {position}; they "
                    "belong to different base models."
                )


def _whole(adapters: Sequence[Adapter]) -> Mapping[str, Tensor]:
    """Return the modules that are saved whole; refuse what a weighted sum has no meaning for."""
    bringing = [adapter for adapter in adapters if adapter.other]
    for adapter in adapters:
        config = adapter.config
        biases, tokens = config.get("bias", "none") != "none", config.get("trainable_token_indices")
        if len(adapters) > 1 and (biases or tokens):
            what = f"trained biases (bias={config['bias']!r})" if biases else "trained tokens"
            raise PlanError(
                f"an adapter has {what}, which a weighted sum of updates does not cover. Merge it "
                "into the base model instead."
            )
    if len(bringing) > 1:
        keys = [next(iter(adapter.other)) for adapter in bringing[:2]]
        raise PlanError(
            f"{len(bringing)} adapters bring modules that are saved whole ('{keys[0]}', "
            f"'{keys[1]}'); only one of them may."
        )
    return bringing[0].other if bringing else {}


def _config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    whole = next((adapter for adapter in adapters if adapter.other), adapters[0])
    config = {**adapters[0].config, "modules_to_save": whole.config.get("modules_to_save")}
    for field in _SAME:
        said = (adapter.config.get(field) for adapter in adapters)
        config[field] = next((value for value in said if value), None)
    config["fan_in_fan_out"] = any(a.config.get("fan_in_fan_out") for a in adapters)
    return config


def _features(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(feature for a in adapters for feature in a.features))


def _updates(adapters: Sequence[Adapter]) -> Iterator[Update]:
    for adapter in adapters:
        yield from adapter.updates.values()


def _dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the type that holds the factors of all adapters."""
    found = next(_updates(adapters)).a.dtype
    for update in _updates(adapters):
        for factor in (update.a, update.b):
            found = torch.promote_types(found, factor.dtype)
    return found


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    rounded = adapter.to(dtype)
    for name, update in rounded.updates.items():
        if not bool(torch.isfinite(update.b).all()):
            raise PlanError(
                f"the combined update of '{name}' is too large for {str(dtype)[6:]}; use smaller "
                "weights."
            )
    return rounded
