"""EVA: ranks and first directions from the variance of each target's inputs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor

from gradrank.core.budget import Budget
from gradrank.core.errors import BudgetError, MeasurementError
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target, cost_of_rank_one
from gradrank.lab.baselines.arm import Batch, Built, Setting
from gradrank.lab.baselines.eva_inputs import InputRows, explained
from gradrank.lab.baselines.shared_peft import attach, lora_layers, used_ranks
from gradrank.methods.method import option, require

# Passes that PEFT gets to stop in once its stopping rule has been lowered, at least.
_GRACE = 64


@dataclass(frozen=True, slots=True)
class Eva:
    """LoRA whose A are principal directions of the inputs, as many per target as explain most.

    PEFT finds the directions (incremental PCA, until they stand still, or for ``passes`` rounds,
    whose last directions are taken as they are, with a note) and hands out a budget of
    *ranks* by explained variance, at most ``rho`` times the uniform rank per target. What is done
    here to keep a budget of *parameters*: PEFT gets the uniform rank of the budget, or the next
    ones if what comes out is below the budget; then the directions are taken in the order of the
    variance that they explain until no further one fits, from PEFT's one result. Every target
    gets the setting's scale (which is what PEFT's ``adjust_scaling_factors`` does too). B begins at
    0, so that the function at the start is the base model's.

    **Source**: Paischer et al., EVA, arXiv 2410.07170, section 3 and algorithm 1;
    ``get_eva_state_dict`` of PEFT.
    """

    rho: float = option(2.0, "most ranks of a target, as a multiple of the uniform rank; 1..16")
    tau: float = option(0.99, "cosine similarity between steps at which a direction stands still")
    batches: int = option(16, "calibration batches, gone through until all directions stand still")
    passes: int = option(
        50,
        "rounds over the calibration batches, after which directions are taken as they are",
    )

    name: ClassVar[str] = "eva"
    summary: ClassVar[str] = "ranks and start by the variance of the inputs (EVA)"
    source: ClassVar[str] = "Paischer et al., EVA, NeurIPS 2025 (arXiv 2410.07170); PEFT's code"
    matched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(1 <= self.rho <= 16, self.name, "rho", self.rho, "in 1..16")
        require(0 < self.tau < 1, self.name, "tau", self.tau, "inside (0, 1)")
        require(self.batches >= 1, self.name, "batches", self.batches, "1 or more")
        require(self.passes >= 1, self.name, "passes", self.passes, "1 or more")

    def build(self, setting: Setting) -> Built:
        """Return LoRA with the ranks and the directions of EVA.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model.

        Raises:
            BudgetError: If the budget is below uniform rank 1.
        """
        whole = cost_of_rank_one(setting.targets)
        if setting.budget < whole:
            raise BudgetError(
                f"{setting.budget:,} parameters are not enough for 'eva': it redistributes uniform "
                f"ranks, and rank 1 on {len(setting.targets)} targets takes {whole:,}. Raise the "
                "budget, choose fewer targets, or leave 'eva' out."
            )
        search = _Search(self, setting)
        rank, found = search.run(setting.budget // whole)
        shares = explained(setting.model, found, search.inputs, search.groups)
        ranks = within_budget(setting.targets, shares, setting.budget)
        plan = _plan(setting, ranks)
        model = attach(setting, plan)
        with torch.no_grad():
            for name, layer in lora_layers(model).items():
                layer.lora_A["default"].weight.copy_(found[name][: ranks[name]])
        before = sum(len(found[t.name]) * t.cost for t in setting.targets)
        note = (
            f"PEFT redistributed rank {rank} into {before:,} parameters; the directions that "
            f"explain least were left out to come to {plan.parameters:,}. The scale is "
            f"{setting.scaling:g} on every target."
        )
        notes = (note, *search.inputs.notes, *search.unsettled(rank))
        return Built(model, ranks=used_ranks(plan), notes=notes)


class _Search:
    """PEFT's directions at growing ranks, until they spend the budget."""

    def __init__(self, arm: Eva, setting: Setting) -> None:
        self.arm, self.setting = arm, setting
        self.batches = list(setting.batches(arm.batches))
        self.inputs = InputRows(setting.model, setting.targets, self.batches)
        self.groups: list[Batch] = []
        self._stopped: set[int] = set()

    def unsettled(self, rank: int) -> tuple[str, ...]:
        """Return a note if the directions of a rank had not come to rest."""
        if rank not in self._stopped:
            return ()
        arm = self.arm
        return (
            f"Not all directions stood still (cosine similarity {arm.tau:g} between steps) after "
            f"{arm.passes} rounds over {len(self.groups)} batches; the last ones are taken.",
        )

    def run(self, reference: int) -> tuple[int, dict[str, Tensor]]:
        """Return the rank that PEFT was given, and its directions, ``[rank, d_in]`` by target."""
        budget, targets = self.setting.budget, self.setting.targets
        most = max(round(self.arm.rho * reference), reference)
        rank = reference
        while True:
            found = self._directions(rank, max(most, rank))
            cost = sum(len(found[target.name]) * target.cost for target in targets)
            open_ = [t.cost for t in targets if len(found[t.name]) < min(t.max_rank, most)]
            if not open_ or cost + min(open_) > budget:
                return rank, found
            rank = max(rank + 1, min(rank * budget // max(cost, 1), most))

    def _directions(self, rank: int, most: int) -> dict[str, Tensor]:
        """Let PEFT find and hand out the directions of ``rank`` per target, at most ``most`` each.

        Args:
            rank: Rank per target that PEFT redistributes.
            most: Most ranks of a target.

        Returns:
            The directions, ``[rank, d_in]`` by target.

        Raises:
            BudgetError: If inputs have too few features for that.
        """
        # PEFT's PCA works with twice the directions that it is asked for.
        narrow = min(self.setting.targets, key=lambda target: target.d_in)
        limit = narrow.d_in // 2
        if rank > limit:
            raise BudgetError(
                f"'eva' needs {2 * rank} input features for rank {rank}, and '{narrow.name}' has "
                f"{narrow.d_in}. Lower the budget, or leave 'eva' out."
            )
        most = min(most, limit)
        self.groups = self.inputs.grouped(2 * most)
        passes = _Passes(self.inputs, self.arm.passes * len(self.groups), self.arm.tau)
        config = LoraConfig(
            r=rank,
            target_modules="^(?:"
            + "|".join(re.escape(t.name) for t in self.setting.targets)
            + ")$",
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=most / rank, tau=passes.tau),  # pyright: ignore
        )
        found = get_eva_state_dict(
            self.setting.model,
            self.groups,
            config,
            forward_fn=passes,
            prepare_model_inputs_fn=self.inputs.mask_of,
            prepare_layer_inputs_fn=self.inputs.rows_of,
            show_progress_bar=False,
        )
        if passes.stopped:
            self._stopped.add(rank)
        return {t.name: found[t.name][: t.max_rank] for t in self.setting.targets}


class _Passes:
    """PEFT's forward function, which puts an end to a PCA that does not come to rest.

    How still is still enough only says when PEFT stops. It compares with the very tensor that it
    is given, so that lowering it from here stops it at the directions that it has.

    Attributes:
        tau: The cosine similarity that PEFT compares with, a scalar.
        stopped: Whether it had to be lowered.
    """

    def __init__(self, inputs: InputRows, most: int, tau: float) -> None:
        self.inputs, self.left, self.most = inputs, most, most
        self.tau = torch.tensor(tau)
        self.stopped = False

    def __call__(self, model: Any, batch: Batch) -> Any:
        """Run the model without its loss.

        Args:
            model: The model.
            batch: A batch.

        Returns:
            The model's output.

        Raises:
            MeasurementError: If nothing stops it, since the directions are no numbers.
        """
        if self.left < 0:
            self.stopped = True
            self.tau.fill_(-2.0)  # below every cosine, but for NaN
        if self.left < -max(self.most, _GRACE):
            raise MeasurementError(
                f"the directions that 'eva' found in {self.most - self.left} forward passes are "
                "not finite. Check the model and its data for infinite or constant inputs."
            )
        self.left -= 1
        return self.inputs.forward(model, batch)


def within_budget(
    targets: Sequence[Target], shares: Mapping[str, Sequence[float]], budget: int
) -> dict[str, int]:
    """Return how many directions each target keeps: those that explain most, while they fit.

    Args:
        targets: The targets.
        shares: Explained variance of each direction, falling, by target.
        budget: Parameters.

    Returns:
        Rank per target. What is left of the budget is less than one rank on any target that has
        further directions.
    """
    order = sorted(
        (
            (-share, index, place)
            for place, target in enumerate(targets)
            for index, share in enumerate(shares[target.name])
        )
    )
    ranks = dict.fromkeys((target.name for target in targets), 0)
    left = budget
    for _, index, place in order:
        target = targets[place]
        # Directions are kept from the first on; one that did not fit ends its target.
        if index == ranks[target.name] and target.cost <= left:
            ranks[target.name] += 1
            left -= target.cost
    return ranks


def _plan(setting: Setting, ranks: Mapping[str, int]) -> Plan:
    planned = tuple(PlannedTarget(target, ranks[target.name]) for target in setting.targets)
    return Plan("eva", {}, Budget.parameters(setting.budget), setting.budget, planned)
