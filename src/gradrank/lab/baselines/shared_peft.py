"""What the baselines on PEFT share: attaching a plan with one scale, and starts other than B = 0.

What has to be known of PEFT's starts (0.21) to read a comparison:

- PiSSA, OLoRA and LoRA-GA begin with ``B A ≠ 0`` and take ``scale · B A`` off the base weight, so
  that the function at the start is that of the base model, at any scale. The base weight that
  stays is *another* one: an adapter of theirs fits no original model, ``disable_adapter()`` does
  not give the base model back, and a run can be resumed only where the start is found again to the
  last bit.
- With dropout inside the adapter the function at the start is unchanged in evaluation only.
- In half precision the changed weight is rounded, and the start is unchanged up to that.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from gradrank.adapters.apply import apply_plan
from gradrank.core.errors import OptionError
from gradrank.core.plan import Plan
from gradrank.core.targets import Target
from gradrank.lab.baselines.arm import Setting

PREFIX = "base_model.model."


def attach(setting: Setting, plan: Plan, **options: Any) -> PeftModel:
    """Wrap the setting's model with the LoRA layers of a plan, all of the setting's scale.

    Args:
        setting: Model, scale and what every PEFT configuration gets.
        plan: The plan.
        **options: Further fields of ``LoraConfig``; with ``policy`` the scale is the caller's
            (``lora_alpha`` goes with it).

    Returns:
        The PEFT model: the adapter and the task head are trainable, nothing else.
    """
    if "policy" not in options:
        options["scaling"] = setting.scaling
    return apply_plan(plan, setting.model, **{**setting.peft_options, **options})


def adapted(plan: Plan) -> tuple[Target, ...]:
    """Return the targets of a plan that have a rank.

    Args:
        plan: The plan.
    """
    return tuple(planned.target for planned in plan.targets if planned.rank)


def used_ranks(plan: Plan) -> dict[str, int]:
    """Return the ranks of a plan without its zeros.

    Args:
        plan: The plan.
    """
    return {name: rank for name, rank in plan.ranks.items() if rank}


def refuse(method: str, plan: Plan, kinds: dict[str, str]) -> None:
    """Refuse kinds of layers that an arm cannot take.

    Args:
        method: Name of the arm.
        plan: The plan; targets of rank 0 are no obstacle.
        kinds: Why not, by kind of layer.

    Raises:
        OptionError: If the plan gives a rank to such a layer.
    """
    hit = [target for target in adapted(plan) if target.kind in kinds]
    if hit:
        raise OptionError(
            f"'{method}' cannot take '{hit[0].name}' and {len(hit) - 1} other(s) of kind "
            f"'{hit[0].kind}': {kinds[hit[0].kind]}. Leave '{method}' out for this model, or "
            "choose other targets."
        )


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's LoRA layers by their names in the base model.

    Args:
        model: The PEFT model.

    Returns:
        The layers, in model order.
    """
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@torch.no_grad()
def start_from(layer: Any, A: Tensor, B: Tensor, adapter: str = "default") -> None:
    """Give a layer its first factors, and take their product off the base weight.

    Args:
        layer: PEFT's layer.
        A: Shape ``[r, d_in]``.
        B: Shape ``[d_out, r]``.
        adapter: Name of the adapter.
    """
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    lora_A.copy_(A)
    lora_B.copy_(B)
    # From the factors as they are stored, so that rounding them leaves the function alone.
    product = layer.scaling[adapter] * (lora_B.float() @ lora_A.float())
    weight = layer.get_base_layer().weight
    weight.sub_((product.T if layer.fan_in_fan_out else product).to(weight.device))
