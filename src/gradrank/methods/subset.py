"""Uniform LoRA on targets that people choose by hand, as published recipes do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.allocation import random_scores as draws
from gradrank.allocation import rank_costs, uniform
from gradrank.core.errors import BudgetError, OptionError, nearest
from gradrank.core.targets import Target
from gradrank.methods.method import Assessment, option, require
from gradrank.signals.measure import Signal
from gradrank.signals.measurement import Measurement

CHOICES = ("qv", "attention", "mlp", "last", "first", "random", "names")
_QUERY_VALUE = frozenset(
    ["q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "q", "v"]
)
_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "densereludense", "moe", "expert")
# Names of feed-forward layers that stand in a block by themselves (BERT, OPT).
_FEED_FORWARD_PARTS = frozenset({"intermediate", "output", "fc1", "fc2"})


@dataclass(frozen=True, slots=True)
class Subset:
    """The same rank on some of the targets and nothing on the others.

    What is chosen follows from names alone. Nothing stands in for a choice that finds no target:
    it is refused, with the types of modules that there are.

    Source:
        Hu et al., LoRA, ICLR 2022, section 7.1 (which matrices to adapt).
    """

    name: ClassVar[str] = "subset"
    summary: ClassVar[str] = "the same rank on targets chosen by hand (control)"
    source: ClassVar[str] = "Hu et al., LoRA, ICLR 2022, section 7.1 (which matrices to adapt)"

    choose: str = option("attention", f"what carries an adapter: {', '.join(CHOICES)}")
    pattern: str | None = option(
        None, "for choose=names: ends of module names, with commas between (q_proj,mlp.fc1)"
    )
    share: float = option(
        0.5, "for first and last the share of blocks, for random of targets; above 0, at most 1"
    )
    seed: int = option(0, "seed of choose=random")

    def __post_init__(self) -> None:
        require(
            self.choose in CHOICES, self.name, "choose", self.choose, f"one of {', '.join(CHOICES)}"
        )
        require(0 < self.share <= 1, self.name, "share", self.share, "above 0 and at most 1")
        if self.choose == "names":
            named = bool(self.pattern) and all(_ends(self.pattern or ""))
            require(named, self.name, "pattern", self.pattern, "names with commas between")
        else:
            rule = f"left out with choose={self.choose}"
            require(self.pattern is None, self.name, "pattern", self.pattern, rule)

    def signals(self) -> tuple[Signal, ...]:
        """Return no signal: names are known without data."""
        return ()

    def assess(self, targets: Sequence[Target], measurement: Measurement | None) -> Assessment:
        """Return what is chosen.

        Args:
            targets: The targets.
            measurement: Not looked at.

        Returns:
            A score of 1 for each chosen target, 0 for the others.
        """
        chosen = {target.name for target in self._chosen(targets)}
        return Assessment({target.name: float(target.name in chosen) for target in targets})

    def ranks(
        self, targets: Sequence[Target], assessment: Assessment, budget: int
    ) -> dict[str, int]:
        """Return uniform ranks on the chosen targets.

        A budget below rank 1 on each of them buys rank 1 on as many as it can pay: from the last
        block on, with ``first`` from the first block on, with ``random`` in random order.

        Args:
            targets: The targets.
            assessment: Scores; above 0 where chosen.
            budget: Parameters that may be spent.

        Returns:
            Rank per target.

        Raises:
            BudgetError: If the budget is below one rank on the cheapest chosen target.
        """
        chosen = [target for target in targets if assessment.scores[target.name] > 0]
        cheapest = int(rank_costs(chosen).min())
        if budget < cheapest:
            raise BudgetError(
                f"budget {budget:,} is below the floor of {cheapest:,} parameters, one rank on the "
                f"cheapest of {len(chosen)} chosen targets (choose={self.choose}). Raise the "
                f"budget to at least {cheapest:,}, or choose smaller targets."
            )
        whole = sum(target.cost for target in chosen)
        found = uniform(chosen, budget) if budget >= whole else self._ones(chosen, budget)
        return {target.name: found.get(target.name, 0) for target in targets}

    def _ones(self, chosen: Sequence[Target], budget: int) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for target in self._ordered(chosen):
            if target.cost <= budget:
                ranks[target.name] = 1
                budget -= target.cost
        return ranks

    def _ordered(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets, those first that a small budget buys first."""
        if self.choose == "random":
            # Of its own: at one seed, `random` and this are two controls and not one.
            draw = draws(targets, self.seed, salt=self.name)
            return sorted(targets, key=lambda target: (-draw[target.name], target.name))
        blocks = _blocks(targets)

        def place(target: Target) -> tuple[int, str, str]:
            # Stacks (encoder, decoder) are counted each from its own end; targets outside blocks
            # come after all that are in one.
            if target.depth is None:
                return len(targets), target.stack, target.name
            order = blocks[target.stack]
            order = order if self.choose == "first" else order[::-1]
            return order.index(target.depth), target.stack, target.name

        return sorted(targets, key=place)

    def _chosen(self, targets: Sequence[Target]) -> list[Target]:
        if self.choose == "names":
            return _by_names(targets, self.pattern or "")
        if self.choose == "random":
            return self._ordered(targets)[: math.ceil(self.share * len(targets))]
        rule, what = {
            "qv": (_is_query_or_value, "a query or value projection by itself"),
            "attention": (_is_attention, "part of an attention"),
            "mlp": (_is_feed_forward, "part of a feed-forward network"),
            "last": (self._at_an_end(targets), "in a numbered block"),
            "first": (self._at_an_end(targets), "in a numbered block"),
        }[self.choose]
        chosen = [target for target in targets if rule(target)]
        if not chosen:
            raise OptionError(
                f"option 'choose' of method 'subset' is '{self.choose}', and none of "
                f"{len(targets)} targets is {what}. Types of modules here: {_types(targets)}. "
                "Choose among them with choose=names and pattern=TYPE,TYPE."
            )
        return chosen

    def _at_an_end(self, targets: Sequence[Target]) -> Callable[[Target], bool]:
        kept: dict[str, set[int]] = {}
        for stack, order in _blocks(targets).items():
            count = math.ceil(self.share * len(order))
            kept[stack] = set(order[:count] if self.choose == "first" else order[-count:])
        return lambda target: target.depth is not None and target.depth in kept[target.stack]


def _blocks(targets: Sequence[Target]) -> dict[str, list[int]]:
    """Return the indices of the blocks of each stack that have targets, from the first on."""
    found: dict[str, set[int]] = {}
    for target in targets:
        if target.depth is not None:
            found.setdefault(target.stack, set()).add(target.depth)
    return {stack: sorted(blocks) for stack, blocks in found.items()}


def _is_query_or_value(target: Target) -> bool:
    return target.module_type in _QUERY_VALUE


def _is_attention(target: Target) -> bool:
    return any(part in target.name.lower() for part in ("attn", "attention"))


def _is_feed_forward(target: Target) -> bool:
    if target.depth is None or _is_attention(target):
        return False
    parts = target.name.lower().split(".")
    within = any(word in part for part in parts for word in _FEED_FORWARD)
    return within or not _FEED_FORWARD_PARTS.isdisjoint(parts)


def _by_names(targets: Sequence[Target], pattern: str) -> list[Target]:
    chosen: set[str] = set()
    for end in _ends(pattern):
        hits = {t.name for t in targets if t.name == end or t.name.endswith(f".{end}")}
        if not hits:
            raise OptionError(
                f"option 'pattern' of method 'subset' names '{end}', and none of {len(targets)} "
                f"targets is called so or ends so. {nearest(end, {t.module_type for t in targets})}"
            )
        chosen |= hits
    return [target for target in targets if target.name in chosen]


def _ends(pattern: str) -> list[str]:
    return [end.strip() for end in pattern.split(",")]


def _types(targets: Sequence[Target]) -> str:
    return ", ".join(sorted({target.module_type for target in targets}))
