"""A really trained adapter in SVD form, and its gradients along the path.

What an estimator of a path integral would have computed is a weighted sum of gradients on the
path; :class:`Rig` measures the gradient of a mini-batch at given points. Whole gradients are taken
of the targets of every few blocks of layers, and those of λ of all targets.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from benchmarks.igu_quadrature.layout import Layout
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gradrank.adapters.forms import attach_svd
from gradrank.adapters.view import lora_sites, lora_targets
from gradrank.core.errors import OptionError
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import Batch, TaskData, load_task_data
from gradrank.lab.models import resolve_model
from gradrank.ops.orthogonality import penalty_gradient
from gradrank.ops.sketch import seed_of
from gradrank.signals.path import FACTORS, Branch, at_point, gradients

_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class PathSettings:
    """What is trained and on what, before anything is measured.

    Attributes:
        model: Name of the model.
        task: Name of the task, language modelling.
        rank: Rank of every target.
        scaling: Scale of the update.
        steps: Optimizer steps (AdamW).
        lr: Learning rate.
        orthogonality: Weight of the penalty that keeps P and Q orthonormal.
        batch: Sequences of a mini-batch, in training and in measuring.
        length: Tokens of a sequence.
        every: Whole gradients are kept of one block of layers in so many.
        seed: Seed.
    """

    model: str = "smollm2-135m"
    task: str = "movie-review-lm"
    rank: int = 8
    scaling: float = 2.0
    steps: int = 40
    lr: float = 1e-2
    orthogonality: float = 0.1
    batch: int = 4
    length: int = 32
    every: int = 3
    seed: int = 0


class Rig:
    """A model with an adapter in SVD form, its data, and what is measured on them.

    Attributes:
        settings: What is trained.
        model: The PEFT model.
        data: The data.
        branches: The adapters, in model order.
        layout: Which gradients are kept.
    """

    def __init__(self, settings: PathSettings, dtype: str = "float32") -> None:
        """Load the model and attach an adapter whose update is zero.

        Args:
            settings: What is trained.
            dtype: ``float32``, or ``float64`` for measuring rounding.

        Raises:
            OptionError: If no block of layers would be stored.
        """
        self.settings = settings
        loaded = resolve_model(settings.model, "lm", device="cpu", dtype="float32")
        examples = read_examples(DataSpec(settings.task))
        self.data: TaskData = load_task_data(examples, loaded, settings.length)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(settings.scaling * settings.rank),
            target_modules="all-linear",
        )
        # PEFT fills A at random; attach_svd decides what becomes of a zero update.
        self.model: Any = get_peft_model(loaded.model, config)
        for name, site in lora_sites(self.model, _ADAPTER).items():
            attach_svd(site.layer, _ADAPTER, "svd", seed_of(settings.seed, name))
        if dtype == "float64":
            self.model.double()
            _compute_norms_in_full(self.model)
        self.branches = [
            Branch(name, site.linear("A"), site.linear("B"), site.learned(), site.rank)
            for name, site in lora_sites(self.model, _ADAPTER).items()
        ]
        targets = lora_targets(self.model, _ADAPTER)
        stored = tuple(t for t in targets if (t.depth or 0) % settings.every == settings.every // 2)
        if not stored:
            raise OptionError(f"every={settings.every} keeps no block of layers; choose less.")
        ranks = {branch.name: branch.rank for branch in self.branches}
        self.layout = Layout(stored, ranks, tuple(branch.name for branch in self.branches))

    def train(self, steps: int, start: int = 0) -> list[float]:
        """Train with AdamW and the penalty, as the pruning methods do before they prune.

        Args:
            steps: Steps to take.
            start: Steps taken before; mini-batches of those are not seen again.

        Returns:
            The loss of every step.
        """
        settings = self.settings
        learned = [tensor for branch in self.branches for tensor in branch.learned.values()]
        optimizer = torch.optim.AdamW(learned, lr=settings.lr, weight_decay=0.0)
        losses = []
        seen = self.data.batches(start + steps, settings.batch, seed_of(settings.seed, "train"))
        for index, batch in enumerate(seen):
            if index < start:
                continue
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            for branch in self.branches:
                for factor, turn in (("A", False), ("B", True)):
                    tensor: Any = branch.learned[factor]
                    pull = penalty_gradient(tensor.T if turn else tensor) * settings.orthogonality
                    tensor.grad.add_(pull.T if turn else pull)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        return losses

    def weights(self) -> dict[str, Tensor]:
        """Return copies of the adapter's factors by ``FACTOR/TARGET``."""
        return {
            f"{factor}/{branch.name}": tensor.detach().clone()
            for branch in self.branches
            for factor, tensor in branch.learned.items()
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`weights` returned.

        Args:
            weights: The factors.
        """
        for branch in self.branches:
            for factor, tensor in branch.learned.items():
                tensor.copy_(weights[f"{factor}/{branch.name}"])

    def flat_weights(self) -> tuple[Tensor, Tensor]:
        """Return the stored targets' factors ``[size]``, and λ of all targets ``[directions]``."""
        found = {branch.name: branch.learned for branch in self.branches}
        lam = torch.cat([branch.learned["lam"].detach() for branch in self.branches])
        return self.layout.join(found), lam

    def pool(self, count: int) -> list[Batch]:
        """Return mini-batches of the training split, drawn apart from training's order.

        Args:
            count: How many.
        """
        drawn = self.data.batches(count, self.settings.batch, seed_of(self.settings.seed, "pool"))
        return list(drawn)

    def held_out(self, count: int) -> list[Batch]:
        """Return mini-batches of the evaluation split.

        Args:
            count: How many, or as many as there are.
        """
        held: Any = self.data.eval
        size = self.settings.batch
        many = max(1, min(count, len(held) // size))
        return [self.data.collate([held[size * i + j] for j in range(size)]) for i in range(many)]

    def gradients_at(self, batch: Batch, points: Sequence[float]) -> dict[str, Tensor]:
        """Measure one mini-batch at points of the path.

        Args:
            batch: The mini-batch.
            points: α, each in [0, 1].

        Returns:
            ``grads`` ``[points, size]``, ``lam`` ``[points, directions]``, ``losses`` ``[points]``.
        """
        grads, lam, losses = [], [], []
        for alpha in points:
            with at_point(self.branches, alpha):
                loss = _loss(self.model, batch)
                found = gradients(loss, self.branches, FACTORS)
            grads.append(self.layout.join(found))
            lam.append(torch.cat([found[name]["lam"] for name in self.layout.names]))
            losses.append(loss.detach())
        return {
            "grads": torch.stack(grads),
            "lam": torch.stack(lam),
            "losses": torch.stack(losses),
        }

    @torch.no_grad()
    def losses_without(
        self, removed: Mapping[str, Sequence[int]], batches: Sequence[Batch]
    ) -> Tensor:
        """Return the loss of each mini-batch with some directions taken out (λ = 0).

        Args:
            removed: Directions by target.
            batches: The mini-batches.

        Returns:
            ``[batches]``, float64.
        """
        lam: dict[str, Any] = {branch.name: branch.learned["lam"] for branch in self.branches}
        held = {name: lam[name].detach().clone() for name in removed}
        try:
            for name, found in removed.items():
                lam[name][list(found)] = 0.0
            return torch.tensor([float(_loss(self.model, b)) for b in batches], dtype=torch.float64)
        finally:
            for name, value in held.items():
                lam[name].copy_(value)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss per predicted token, in the precision of the logits, which its own has not."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )


def _compute_norms_in_full(model: nn.Module) -> None:
    """Let RMS norms compute in the precision of their input: transformers' own use float32."""

    def forward(module: Any, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return module.weight * (x * torch.rsqrt(variance + module.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            with contextlib.suppress(AttributeError):
                module.forward = MethodType(forward, module)
