"""AdaLoRA as PEFT ships it, driven once per optimizer step and with the scale of the other arms."""

from dataclasses import dataclass
from typing import ClassVar

from gradrank.core.errors import BudgetError, OptionError
from gradrank.core.targets import cost_of_rank_one
from gradrank.lab.adalora import TargetRank, adalora_config, choose_target_rank
from gradrank.lab.adalora_model import attach_adalora
from gradrank.lab.adalora_run import AdaLoraCallback
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.methods.method import option, require

_REGULARISED = (
    "Its training losses contain the orthogonal regulariser and are not comparable with other "
    "arms'; evaluation losses do not."
)


@dataclass(frozen=True, slots=True)
class PeftAdaLora:
    """PEFT's AdaLoRA: triplets ``B diag(λ) A``, pruned from an initial to a mean final rank.

    The budget is for what is left at the end; on the way there is ``start`` times as much, as the
    method has it. See :mod:`gradrank.lab.adalora` for scale and counting. PEFT prunes ranks and
    not parameters: where targets cost differently, the outcome can lie on both sides of the
    budget, unless ``strict``. Its training losses contain the orthogonal regulariser; evaluation
    looks at logits and does not see it.

    **Source**: Zhang et al., AdaLoRA, arXiv 2303.10512, sections 3 and 4 (initial rank 1.5 times
    the final one); code of PEFT.
    """

    start: float = option(1.5, "initial rank, as a multiple of the mean final rank; 1.1..8")
    warmup: float = option(0.1, "first part of the steps, with all ranks; share of the steps")
    final: float = option(0.5, "last part of the steps, with fixed ranks; share of the steps")
    interval: int = option(10, "optimizer steps between two allocations")
    orthogonality: float = option(0.5, "weight of the orthogonal regulariser")
    strict: bool = option(False, "keep the budget wherever the ranks go, with a lower mean rank")

    name: ClassVar[str] = "peft-adalora"
    summary: ClassVar[str] = "PEFT's AdaLoRA, its budget met at the end of training"
    source: ClassVar[str] = "Zhang et al., AdaLoRA, ICLR 2023 (arXiv 2303.10512); PEFT's code"
    matched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(1.1 <= self.start <= 8, self.name, "start", self.start, "in 1.1..8")
        require(0 <= self.warmup < 1, self.name, "warmup", self.warmup, "in [0, 1)")
        rest = 1 - self.warmup
        require(0 <= self.final < rest, self.name, "final", self.final, f"in [0, {rest:g})")
        require(self.interval >= 1, self.name, "interval", self.interval, "1 or more")
        weight = self.orthogonality
        require(weight >= 0, self.name, "orthogonality", weight, "0 or more")

    def build(self, setting: Setting) -> Built:
        """Return AdaLoRA at its initial rank, and the callback that prunes it.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model and its callback.

        Raises:
            OptionError: If a target is quantized, or the run has too few steps to prune in.
        """
        kinds = {target.kind for target in setting.targets}
        if not kinds <= {"linear", "conv1d"}:
            raise OptionError(
                f"'{self.name}' cannot take targets of kind {', '.join(sorted(kinds))}. Leave it "
                "out for this model."
            )
        chosen, initial = self._ranks(setting)
        warmup, final = int(self.warmup * setting.steps), int(self.final * setting.steps)
        config = adalora_config(
            setting.targets,
            initial_rank=initial,
            target_rank=chosen.rank,
            total_steps=setting.steps,
            warmup=warmup,
            final=final,
            interval=min(self.interval, max(1, setting.steps - final - warmup - 1)),
            orthogonality=self.orthogonality,
            scaling=setting.scaling,
            **setting.peft_options,
        )
        model = attach_adalora(setting.model, config)
        ranks = {target.name: initial for target in setting.targets}
        notes = (_note(setting, chosen, initial),)
        if self.orthogonality:
            notes += (_REGULARISED,)
        return Built(model, AdaLoraCallback(), ranks, notes=notes)

    def _ranks(self, setting: Setting) -> tuple[TargetRank, int]:
        """Return the largest mean final rank within the budget, and the initial rank to it."""
        targets, budget = setting.targets, setting.budget
        whole = cost_of_rank_one(targets)
        for rank in range(budget // whole, 0, -1):
            initial = max(rank + 1, round(self.start * rank))
            try:
                chosen = choose_target_rank(targets, initial, budget, strict=self.strict)
            except BudgetError:
                continue
            if chosen.rank >= rank:
                return chosen, initial
        raise BudgetError(
            f"{budget:,} parameters are not enough for '{self.name}': a mean rank of 1 on "
            f"{len(targets)} targets takes {whole:,}"
            + (", and more to be kept wherever the ranks go" if self.strict else "")
            + ". Raise the budget, choose fewer targets, or leave it out."
        )


def _note(setting: Setting, chosen: TargetRank, initial: int) -> str:
    held = initial * sum(target.cost + 1 for target in setting.targets)
    spread = (
        "wherever the ranks go"
        if chosen.worst == chosen.uniform
        else f"if the ranks stay even, and {chosen.worst:,} if the costliest targets keep all"
    )
    return (
        f"It begins with rank {initial} on every target, {held:,} trained numbers in all, and ends "
        f"with a mean rank of {chosen.rank}: {chosen.uniform:,} parameters {spread}; the budget is "
        f"{setting.budget:,}."
    )
