"""DyLoRA: one adapter that is trained at a random rank in every step, so that every rank works."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradrank.adapters.forms import attach_mask, detach, set_active
from gradrank.adapters.site import LoraSite
from gradrank.adapters.view import lora_sites
from gradrank.lab.baselines.arm import Built, Setting
from gradrank.lab.baselines.driver import StepDriver
from gradrank.lab.baselines.shared_peft import attach
from gradrank.methods.method import option
from gradrank.ops.sketch import seed_of


@dataclass(frozen=True, slots=True)
class DyLora:
    """Uniform LoRA of which each step uses the first b components only, b drawn anew.

    Evaluated at the full rank, and with the scale that all arms share; a step at rank b has that
    scale times r / b, as the paper's α / b.
    """

    name: ClassVar[str] = "dylora"
    summary: ClassVar[str] = "uniform LoRA trained at a random rank in every step"
    source: ClassVar[str] = "Valipour et al., DyLoRA, EACL 2023, Algorithm 1; code: gradrank"
    matched: ClassVar[bool] = True

    frozen: bool = option(
        True, "whether a step trains only component b (the paper's frozen variant), or all up to b"
    )

    def build(self, setting: Setting) -> Built:
        """Return the model to train.

        Args:
            setting: Model, budget and what else there is.

        Returns:
            The model, the callback that draws ranks, and what makes the adapter plain afterwards.
        """
        plan = setting.uniform(setting.budget)
        model = attach(setting, plan)
        driver = RankDraws(lora_sites(model, "default"), setting.seed, self.frozen)
        return Built(model, driver, plan.ranks, driver.finish)


class RankDraws(StepDriver):
    """Draws a rank before each step, and gives the adapter its full rank again after it.

    What is drawn depends on the seed and the step alone, so that a resumed run goes on with the
    same ranks. Components that a step leaves out have a gradient of exactly 0; their moments in
    the optimizer go on, as they do in the authors' code.
    """

    def __init__(self, sites: Mapping[str, LoraSite], seed: int, frozen: bool) -> None:
        """Give the layers masks, all open.

        Args:
            sites: Plain LoRA layers.
            seed: Seed of the draws.
            frozen: Whether only the last of the drawn components is trained.
        """
        self.sites, self.seed, self.frozen = dict(sites), seed, frozen
        self.full = {name: site.rank for name, site in sites.items()}
        self.scales = {name: site.scaling for name, site in sites.items()}
        self._hooks: list[RemovableHandle] = []
        for name, site in self.sites.items():
            attach_mask(site.layer, site.adapter, self.full[name])
        if frozen:
            self._hooks = [
                site.raw(factor).register_hook(_OnlyLast(site, axis))
                for site in self.sites.values()
                for factor, axis in (("A", 0), ("B", 1))
            ]

    def drawn(self, step: int) -> dict[str, int]:
        """Return the ranks of a step: one draw u for all targets, ``b = floor(u r) + 1``.

        Args:
            step: The step, from 0.

        Returns:
            ``b`` in ``1..r`` by target, uniform over these; the same where r is the same.

        Source:
            DyLoRA, arXiv 2210.07558, section 4 (b uniform in ``1..r``).
        """
        generator = torch.Generator().manual_seed(seed_of(self.seed, "dylora", step))
        draw = float(torch.rand((), generator=generator, dtype=torch.float64))
        return {name: rank_of(draw, rank) for name, rank in self.full.items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the adapter to the ranks of the step that begins."""
        self.cut(self.drawn(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the whole adapter: evaluations and checkpoints are those of the full rank."""
        self.cut(self.full)

    def cut(self, ranks: Mapping[str, int]) -> None:
        """Let the first components count, scaled by r / b.

        Args:
            ranks: b by target.
        """
        for name, site in self.sites.items():
            set_active(site.layer, site.adapter, ranks[name])
            scale = self.scales[name] * (self.full[name] / ranks[name])
            site.layer.scaling[site.adapter] = scale

    def close(self) -> None:
        """Open the whole adapter and remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if any(site.masked for site in self.sites.values()):
            self.cut(self.full)

    def finish(self, _model: Any) -> None:
        """Make the adapter a plain one of full rank.

        Args:
            _model: The trained model, whose layers are known.
        """
        self.close()
        for site in self.sites.values():
            detach(site.layer, site.adapter)


@dataclass(frozen=True, slots=True)
class _OnlyLast:
    """Keeps the gradient of the last active component alone."""

    site: LoraSite
    axis: int

    def __call__(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        last = self.site.rank - 1
        kept.select(self.axis, last).copy_(gradient.select(self.axis, last))
        return kept


def rank_of(draw: float, rank: int) -> int:
    """Return a rank from a uniform draw.

    Args:
        draw: In ``[0, 1)``.
        rank: Largest rank r, at least 1.

    Returns:
        ``1..r``, each with probability 1 / r.

    Examples:
        >>> [rank_of(draw, 4) for draw in (0.0, 0.24, 0.25, 0.99)]
        [1, 1, 2, 4]
    """
    return min(math.floor(draw * rank) + 1, rank)
