"""Gradients of the adapter's own elements; directions in SVD form go and come by them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.edits import Drop, Edit, Grow, Select
from gradrank.adapters.optimizers import hookable_optimizer
from gradrank.adapters.view import lora_sites
from gradrank.methods.course import Decision, DirectionCourse
from gradrank.ops.many import many
from gradrank.ops.orthogonality import penalty_gradient
from gradrank.signals.distributed import of_first_process
from gradrank.signals.layers import unwrapped
from gradrank.signals.path import RANK_AXIS, Branch
from gradrank.signals.replay import LossFunction
from gradrank.signals.scoring import scorer_for
from gradrank.signals.sensitivity import Observation, in_use


class DirectionWatch:
    """Looks at the gradients of the adapter's own elements; directions go, and may come.

    It acts inside the optimizer's step, where the gradients are complete and the weights are still
    those they belong to; a step that a gradient scaler skips is skipped here too.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        course: DirectionCourse,
        adapter: str,
        seed: int,
        loss_function: LossFunction | None = None,
    ) -> None:
        self._model, self._course, self._adapter = model, course, adapter
        self._found: list[Branch] | None = None
        inner = hookable_optimizer(optimizer)
        self._scorer = scorer_for(
            course.sensitivity, unwrapped(model), self._branches, seed, loss_function
        )
        self._handles = [
            inner.register_step_pre_hook(self._before_update),
            inner.register_step_post_hook(self._after_update),
        ]
        self._looking = False
        self.left_out = 0

    def _branches(self) -> list[Branch]:
        """The adapters as they are now; found anew only after surgery."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> list[Branch]:
        return [
            Branch(
                site.name,
                site.linear("A"),
                site.linear("B"),
                {factor: site.raw(factor) for factor in site.factors},
                site.rank,
            )
            for site in lora_sites(self._model, self._adapter).values()
        ]

    def before_step(self, step: int) -> None:
        """Get ready if the step is looked at."""
        self._looking = self._course.schedule.observes(step)
        if self._looking:
            self._scorer.before_step()

    def _before_update(self, *_: Any) -> None:
        if self._looking:
            before = self._scorer.index
            observation = self._scorer.before_update()
            self._take(observation)
            # Points were drawn and nothing came of it: the gradients there were not finite.
            self.left_out += observation is None and self._scorer.index != before
        if self._course.orthogonality:
            self._pull_apart()

    def _after_update(self, *_: Any) -> None:
        if self._looking:
            self._take(self._scorer.after_update())
        # A loop that forgets controller.step() is stopped by the controller, not by a second look.
        self._looking = False

    def _take(self, observation: Observation | None) -> None:
        if observation is not None:
            self._course.take(observation)

    @torch.no_grad()
    def _pull_apart(self) -> None:
        """Add the gradient of the orthogonality penalty to those of P and Q."""
        weight, whole = self._course.orthogonality, self._course.whole_penalty
        alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for branch in self._branches():
            for factor in ("A", "B") if branch.rank else ():
                tensor = branch.learned[factor]
                if tensor.grad is not None:
                    used = in_use(branch, factor, tensor)
                    grad = tensor.grad.narrow(RANK_AXIS[factor], 0, branch.rank)
                    pair = (used, grad) if factor == "A" else (used.mT, grad.mT)
                    alike.setdefault((pair[0].shape, grad.dtype, grad.device), []).append(pair)
        # Equal shapes together: a few large products, and not two small ones per factor.
        for pairs in alike.values():
            pull = penalty_gradient(torch.stack([used for used, _ in pairs]), whole).mul_(weight)
            grads = [grad for _, grad in pairs]
            many._foreach_add_(grads, list(pull.to(grads[0].dtype).unbind()))

    def after_step(self, step: int) -> None:
        """Everything happens inside the optimizer's step; one that was skipped is given up."""
        self.pause()

    def pause(self) -> None:
        """Take the hooks off the factors, which no edit would leave behind."""
        self._looking = False
        self._scorer.pause()

    def decide(self, ranks: Mapping[str, int], allowed: int) -> tuple[Decision, dict[str, Edit]]:
        """Return which directions stay, and edits that take the others away or add new ones."""
        branches = {branch.name: branch for branch in self._branches()}
        lam = {
            name: in_use(branch, "lam", branch.learned["lam"])
            for name, branch in branches.items()
            if branch.rank
        }
        decision = self._course.choose(allowed, lam)
        keep = decision.keep or {}
        flags = [int(i in keep[name]) for name, rank in ranks.items() for i in range(rank)]
        agreed = iter(of_first_process(flags))
        chosen = {
            name: tuple(i for i in range(rank) if next(agreed)) for name, rank in ranks.items()
        }
        sites = lora_sites(self._model, self._adapter)
        edits: dict[str, Edit] = {
            name: Select(kept) if kept or sites[name].masked else Drop()
            for name, kept in chosen.items()
            if name in sites and len(kept) < ranks[name]
        }
        wanted = of_first_process([decision.ranks[name] for name in ranks])
        counts = dict(zip(ranks, wanted, strict=True))
        edits |= {n: Grow(count) for n, count in counts.items() if count > ranks[n]}
        return Decision(counts, decision.details, decision.facts, chosen), edits

    def decided(self, decision: Decision) -> None:
        """Forget what was known of the directions that are gone."""
        self._course.follow(decision.keep or {})
        self._found = None

    def evidence(self, decision: Decision) -> None:
        """Nothing beside the decision."""

    def close(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()
        self._scorer.close()

    def state(self) -> dict[str, Tensor]:
        """Return how many points of the path were drawn, and how many looks were left out."""
        return {"scorer/counts": torch.tensor([self._scorer.index, self.left_out])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        self._scorer.index, self.left_out = (int(n) for n in state["scorer/counts"].tolist())
        self._found = None
