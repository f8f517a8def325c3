"""Who looks at the adapter's gradients while a run trains, and at what it costs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradrank.core.errors import MeasurementError
from gradrank.ops import quadrature
from gradrank.ops.sketch import seed_of
from gradrank.signals.distributed import is_distributed, sum_over_processes
from gradrank.signals.path import FACTORS, Branch, at_point, gradients
from gradrank.signals.replay import LossFunction, MicroBatch, Replay
from gradrank.signals.sensitivity import (
    Gradients,
    Observation,
    PathGradient,
    RandomScale,
    Sensitivity,
    in_use,
    weights_in_use,
)


class Scorer:
    """Watches one run's gradients; see the classes that derive from it.

    Attributes:
        index: Micro-batches drawn for so far, in this process.
    """

    def __init__(self, branches: Callable[[], Sequence[Branch]]) -> None:
        """Prepare.

        Args:
            branches: Gives the adapters as they are now; called anew after surgery.
        """
        self._branches = branches
        self.index = 0

    def before_step(self) -> None:
        """A step that is looked at begins."""

    def before_update(self) -> Observation | None:
        """The gradients are there, and the optimizer has not used them yet."""
        return None

    def after_update(self) -> Observation | None:
        """The optimizer has made its step, and the gradients are still there."""
        return None

    def pause(self) -> None:
        """Leave the factors alone until the next step that is looked at: they will be replaced."""

    def close(self) -> None:
        """Remove every hook; safe to call twice."""

    def _from_training(self) -> Observation:
        """An observation of the ``.grad`` fields."""
        branches = [branch for branch in self._branches() if branch.rank]
        found: Gradients = {}
        for branch in branches:
            found[branch.name] = {}
            for factor, tensor in branch.learned.items():
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                found[branch.name][factor] = in_use(branch, factor, grad)
        return Observation(found, weights_in_use(branches, FACTORS))


class TrainingScorer(Scorer):
    """Looks at what the optimizer is about to use."""

    def before_update(self) -> Observation:
        """Return the gradients of training, accumulated, averaged over processes, and clipped."""
        return self._from_training()


class RandomScaleScorer(Scorer):
    """Trains at a random point of the path and looks at that gradient."""

    def __init__(
        self,
        model: nn.Module,
        branches: Callable[[], Sequence[Branch]],
        signal: RandomScale,
        seed: int,
    ) -> None:
        """Install the hooks that scale the adapter in training.

        Args:
            model: The model inside all wrappings.
            branches: The adapters.
            signal: What is asked for.
            seed: Seed of the points.
        """
        super().__init__(branches)
        self._model, self._signal, self._seed = model, signal, seed
        self._scale = 1.0
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._draw),
            *(b.outer.register_forward_hook(self._apply) for b in branches()),
        ]

    def after_update(self) -> Observation:
        """Return the gradients that have just been used, with the weights after the step."""
        return self._from_training()

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def _draw(self, module: nn.Module, _args: Any) -> None:
        if module is not self._model:
            return
        self._scale = 1.0
        if module.training and torch.is_grad_enabled():
            index, self.index = _global(self.index), self.index + 1
            n = self._signal.segments
            self._scale = ((1 + seed_of("alpha", self._seed, index) % n) / n) ** 3

    def _apply(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        return output * self._scale if self._scale != 1 else None


class PathScorer(Scorer):
    """Repeats micro-batches of training at other points of the path."""

    def __init__(
        self,
        model: nn.Module,
        branches: Callable[[], Sequence[Branch]],
        signal: PathGradient,
        seed: int,
        loss_function: LossFunction | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: The model inside all wrappings.
            branches: The adapters.
            signal: What is asked for.
            seed: Seed of the points.
            loss_function: ``loss_function(model, batch)``, where the model returns no loss.
        """
        super().__init__(branches)
        self._signal, self._seed = signal, seed
        self._replay = Replay(model, signal.micro_batches, loss_function, signal.rows)
        # Training's own gradient is that of all rows.
        self._shares = loss_function is None and signal.rows == 1

    def before_step(self) -> None:
        """Begin to remember the coming step's micro-batches."""
        shared = {}
        if self._shares and any(1.0 in rule.points for rule in self._upcoming()):
            shared = {
                (branch.name, factor): branch.learned[factor]
                for branch in self._branches()
                for factor in self._signal.factors
            }
        self._replay.open(shared)

    def before_update(self) -> Observation | None:
        """Return the path integrals over the micro-batches of this step, averaged.

        Raises:
            MeasurementError: If training never called the model, or its loss is not known.
        """
        self._replay.close()
        if not self._replay.batches:
            raise MeasurementError(
                "the model that was given was not called in training mode in this step, so that "
                "there is no mini-batch to score by. Check that it is the one that is trained."
            )
        branches = [branch for branch in self._branches() if branch.rank]
        total, passes, change = None, 0, 0.0
        with self._replay.undisturbed():
            for offset, batch in enumerate(self._replay.batches):
                rule = self._signal.draw(self._seed, _global(self.index + offset))
                found, cost, moved = self._integral(batch, rule, branches)
                total = found if total is None else _plus(total, found)
                passes, change = passes + cost, change + moved
        count = len(self._replay.batches)
        self.index += count
        self._replay.forget()
        mean, loss = _average(total or {}, change, count)
        if not all(
            bool(torch.isfinite(t).all()) for factors in mean.values() for t in factors.values()
        ):
            return None
        return Observation(
            mean,
            weights_in_use(branches, self._signal.factors),
            passes,
            loss if self._signal.losses else None,
        )

    def pause(self) -> None:
        """Remove the hooks, which are on the factors, and forget the micro-batches."""
        self.close()

    def close(self) -> None:
        """Remove every hook and forget the micro-batches; safe to call twice."""
        self._replay.close()
        self._replay.forget()

    def _upcoming(self) -> Iterator[quadrature.Rule]:
        for offset in range(self._signal.micro_batches):
            yield self._signal.draw(self._seed, _global(self.index + offset))

    def _integral(
        self, batch: MicroBatch, rule: quadrature.Rule, branches: Sequence[Branch]
    ) -> tuple[Gradients, int, float]:
        """One micro-batch's integral, the passes it took, and ``L(ΔW) - L(0)``."""
        signal = self._signal
        total: Gradients = {}
        # With a loss function the model's own loss, which training may not have used, is another.
        own = batch.loss if self._shares else None
        losses: dict[float, float] = {} if own is None else {1.0: own}
        passes = 0
        for alpha, weight in zip(rule.points, rule.weights, strict=True):
            shared = alpha == 1 and self._shares
            found = batch.training_gradients(branches, signal.factors) if shared else None
            if found is None:
                with at_point(branches, alpha):
                    loss = self._replay.loss(batch)
                    found = gradients(loss, branches, signal.factors)
                losses[alpha], passes = float(loss.detach()), passes + 1
            total = _plus(total, _scaled(found, branches, weight))
        for alpha in (0.0, 1.0) if signal.losses else ():
            if alpha not in losses:
                with at_point(branches, alpha), torch.no_grad():
                    losses[alpha] = float(self._replay.loss(batch))
        return total, passes, losses[1.0] - losses[0.0] if signal.losses else 0.0


def _scaled(found: Gradients, branches: Sequence[Branch], weight: float) -> Gradients:
    return {
        b.name: {f: in_use(b, f, grad) * weight for f, grad in found[b.name].items()}
        for b in branches
    }


def _plus(total: Gradients, more: Gradients) -> Gradients:
    if not total:
        return more
    for name, factors in more.items():
        for factor, grad in factors.items():
            total[name][factor].add_(grad)
    return total


def _global(index: int) -> int:
    """The place of a draw among those of all processes, so that together they are stratified."""
    if not is_distributed():
        return index
    return index * dist.get_world_size() + dist.get_rank()


def _average(total: Gradients, change: float, count: int) -> tuple[Gradients, float]:
    """The mean over micro-batches and processes."""
    flat = [grad for factors in total.values() for grad in factors.values()]
    processes = 1
    if is_distributed() and flat:
        processes = dist.get_world_size()
        moved = flat[0].new_tensor([change])
        sum_over_processes([*flat, moved])
        change = float(moved)
    for grad in flat:
        grad.div_(count * processes)
    return total, change / (count * processes)


def scorer_for(
    signal: Sensitivity,
    model: nn.Module,
    branches: Callable[[], Sequence[Branch]],
    seed: int,
    loss_function: LossFunction | None = None,
) -> Scorer:
    """Return who looks at what a method asks for.

    Args:
        signal: What is asked for.
        model: The model inside all wrappings for several processes.
        branches: Gives the adapters as they are now.
        seed: Seed of the points on the path.
        loss_function: ``loss_function(model, batch)``, where the model returns no loss.

    Returns:
        The scorer.
    """
    if isinstance(signal, PathGradient):
        return PathScorer(model, branches, signal, seed, loss_function)
    if isinstance(signal, RandomScale):
        return RandomScaleScorer(model, branches, signal, seed)
    return TrainingScorer(branches)
