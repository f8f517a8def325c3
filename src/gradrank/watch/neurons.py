"""The first of two stages: which output neurons the adapter's own gradients move."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradrank.adapters.edits import Edit, Partition
from gradrank.adapters.optimizers import hookable_optimizer
from gradrank.adapters.view import LoraSite, lora_sites
from gradrank.core.partition import NeuronPartition
from gradrank.core.targets import Target
from gradrank.methods.course import Decision, NeuronCourse
from gradrank.ops.neurons import gradient_map, neuron_importance
from gradrank.signals.distributed import of_first_process
from gradrank.signals.parts import under
from gradrank.signals.unclipped import UnclippedGradients

MAPS, CELLS = 8, (64, 48)
"""Targets that a heat map is kept of, and its rows and columns at most."""


class NeuronWatch:
    """Takes row sums of ``|B G^A + G^B A|`` of complete, unclipped gradients.

    The gradients are copied as backward leaves them, and looked at when the optimizer's step
    begins, where the weights are still those they belong to. A step that a gradient scaler skips
    is skipped here too.

    Source:
        PiLoRA, Algorithm 1, lines 7 to 12.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        course: NeuronCourse,
        targets: tuple[Target, ...],
        adapter: str,
    ) -> None:
        self._model, self._course, self._adapter = model, course, adapter
        inner = hookable_optimizer(optimizer)
        self._targets = targets
        self._shown = pictured(targets)
        self._maps: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}}
        self._gradients = UnclippedGradients()
        self._sites: dict[str, LoraSite] = {}
        self._handle: Any = inner.register_step_pre_hook(self._before_update)
        self.left_out = 0

    def before_step(self, step: int) -> None:
        """Begin to copy gradients if the step is looked at."""
        if not self._course.schedule.observes(step):
            self._gradients.close()
        elif not self._gradients.is_open:
            self._sites = lora_sites(self._model, self._adapter)
            factors = [site.raw(f) for site in self._sites.values() for f in ("A", "B")]
            self._gradients.open(factors)

    @torch.no_grad()
    def _before_update(self, *_: Any) -> None:
        if not self._gradients.is_open:
            return
        copies = iter(self._gradients.take())
        importance: dict[str, Tensor] = {}
        maps: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            # At a fixed shape the first components are in use, and the others are masked.
            rank = site.rank
            weights = site.raw("A")[:rank], site.raw("B")[:, :rank]
            grads = next(copies)[:rank], next(copies)[:, :rank]
            importance[name] = neuron_importance(*weights, *grads)
            if name in self._shown:
                maps[name] = gradient_map(*weights, *grads, *CELLS).cpu()
        # All targets at once: waiting for the device once per look, not once per target.
        flat = torch.cat(list(importance.values())).cpu()
        if not bool(torch.isfinite(flat).all()):
            self.left_out += 1
            return
        parts = flat.split([row.numel() for row in importance.values()])
        self._course.look(dict(zip(importance, parts, strict=True)))
        self._maps["before"] = self._maps["before"] or maps
        self._maps["after"] = maps

    def after_step(self, step: int) -> None:
        """Everything happens when the optimizer's step begins; a skipped one is given up."""
        self.pause()

    def pause(self) -> None:
        """Take the hooks off the factors, which will be replaced."""
        self._gradients.close()

    def decide(self, ranks: Mapping[str, int], allowed: int) -> tuple[Decision, dict[str, Edit]]:
        """Return how the rows are split, and the edits that do it."""
        decision = self._course.split(allowed)
        splits = _agreed(decision.partitions or {})
        counts = {name: split.lora_rank for name, split in splits.items()}
        edits: dict[str, Edit] = {
            name: Partition(split, self._course.start) for name, split in splits.items()
        }
        return Decision(counts, decision.details, decision.facts, partitions=splits), edits

    def decided(self, decision: Decision) -> None:
        """Nothing: the second stage is not looked at."""

    def evidence(self, decision: Decision) -> dict[str, Any]:
        """Return what the decision rests on, as :class:`gradrank.RunRecord` keeps it.

        Args:
            decision: The decision.

        Returns:
            Plain data: partitions, histograms of hits, and heat maps of some targets.
        """
        hits, looks = self._course.hits, self._course.looks
        shapes = {target.name: target for target in self._targets}
        schedule: Any = self._course.schedule
        return {
            "step": schedule.initial_steps,
            "looks": max(looks.values(), default=0),
            "interval": schedule.interval,
            "targets": {
                name: split.to_dict()
                | {
                    "looks": looks[name],
                    "hits": torch.bincount(hits[name], minlength=looks[name] + 1).tolist(),
                }
                for name, split in (decision.partitions or {}).items()
            },
            "maps": {
                name: {
                    "rows": shapes[name].d_out,
                    "columns": shapes[name].d_in,
                    "before": _rounded(self._maps["before"][name]),
                    "after": _rounded(self._maps["after"][name]),
                }
                for name in self._shown
                if name in self._maps["after"]
            },
        }

    def close(self) -> None:
        """Remove all hooks; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._gradients.close()

    def state(self) -> dict[str, Tensor]:
        """Return the heat maps, and how many looks were left out."""
        # After one look both maps are one tensor, which no safetensors file may hold twice.
        maps = {
            f"maps/{at}/{name}": cells.clone()
            for at, found in self._maps.items()
            for name, cells in found.items()
        }
        return {"neurons/left_out": torch.tensor([self.left_out]), **maps}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` returned."""
        self.left_out = int(state["neurons/left_out"])
        self._maps = {at: dict(under(state, f"maps/{at}/")) for at in ("before", "after")}


def pictured(targets: tuple[Target, ...]) -> tuple[str, ...]:
    """Return the targets that heat maps are kept of: those of the last block, at most eight.

    Args:
        targets: All targets.

    Returns:
        Names, in model order.

    Source:
        PiLoRA, Figure 2 (the last layer).
    """
    deepest = max((t.depth for t in targets if t.depth is not None), default=None)
    return tuple(t.name for t in targets if t.depth == deepest)[-MAPS:]


def _agreed(mine: Mapping[str, NeuronPartition]) -> dict[str, NeuronPartition]:
    """The first process's dominant rows in all processes, in words of 32 rows."""
    words = {name: range(0, split.d_out, 32) for name, split in mine.items()}
    sent = [mine[name].bits >> start & 0xFFFFFFFF for name in mine for start in words[name]]
    agreed = iter(of_first_process(sent))
    return {
        name: dataclasses.replace(split, bits=sum(next(agreed) << start for start in words[name]))
        for name, split in mine.items()
    }


def _rounded(cells: Tensor) -> list[list[float]]:
    """Four significant digits: a picture needs no more, and records stay small."""
    return [[float(f"{value:.4g}") for value in row] for row in cells.tolist()]
