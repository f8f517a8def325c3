"""Budgets: how many trainable adapter parameters may be spent. Ranks are never a budget."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from gradrank.core.errors import BudgetError
from gradrank.core.targets import Target, cost_of_rank_one

_FORMS = "a number of parameters (200000), 'uniform:8', or a percentage of the base model ('0.5%')"


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget of trainable adapter parameters, before it is resolved against a model.

    Use the constructors :meth:`parameters`, :meth:`uniform`, :meth:`fraction` or :meth:`parse`.

    Attributes:
        kind: ``parameters``, ``uniform`` or ``fraction``.
        value: Parameters, rank, or fraction of the base model's parameters (0.005 is 0.5 %).

    Examples:
        >>> Budget.parse("uniform:8")
        Budget(kind='uniform', value=8)
        >>> Budget.uniform(2).resolve([Target("a", 3, 5)], base_parameters=100)
        16
    """

    kind: str
    value: float

    @classmethod
    def parameters(cls, count: int) -> "Budget":
        """Return a budget of ``count`` parameters.

        Args:
            count: Trainable parameters, at least 1.

        Returns:
            The budget.

        Raises:
            BudgetError: If ``count`` is not a positive whole number.
        """
        if not _is_whole(count) or count < 1:
            raise BudgetError(
                f"a budget of {count!r} parameters is not a positive whole number. Give a number "
                "of parameters, or the rank of the uniform LoRA that costs as much ('uniform:8')."
            )
        return cls("parameters", int(count))

    @classmethod
    def uniform(cls, rank: int) -> "Budget":
        """Return what uniform LoRA of this rank costs on the targets.

        Args:
            rank: Rank on every target, at least 1.

        Returns:
            The budget.

        Raises:
            BudgetError: If ``rank`` is not a positive whole number.
        """
        if not _is_whole(rank) or rank < 1:
            raise BudgetError(
                f"budget 'uniform:{rank}' needs a whole rank of at least 1, such as 'uniform:8'."
            )
        return cls("uniform", int(rank))

    @classmethod
    def fraction(cls, x: float) -> "Budget":
        """Return a budget of a fraction of the base model's parameters.

        Args:
            x: Fraction in (0, 1]; 0.005 is 0.5 %.

        Returns:
            The budget.

        Raises:
            BudgetError: If ``x`` is outside (0, 1].
        """
        if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x <= 1:
            raise BudgetError(
                f"a budget of {x!r} times the base model's parameters is outside (0, 1]. Half a "
                "per cent is '0.5%', and 0.005 in Budget.fraction."
            )
        return cls("fraction", float(x))

    @classmethod
    def parse(cls, text: "str | int | Budget") -> "Budget":
        """Read a budget as users write it.

        Args:
            text: ``200000``, ``"200_000"``, ``"uniform:8"``, ``"0.5%"``, or a Budget.

        Returns:
            The budget.

        Raises:
            BudgetError: If the text has none of these forms.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            return cls.parameters(text)
        word = str(text).strip().replace("_", "").replace(",", "").lower()
        if match := re.fullmatch(r"uniform:(\d{1,6})", word):
            return cls.uniform(int(match[1]))
        if match := re.fullmatch(r"(\d{1,3}(?:\.\d+)?|\.\d+)%", word):
            return cls.fraction(float(match[1]) / 100)
        if re.fullmatch(r"\d{1,15}", word):
            return cls.parameters(int(word))
        raise BudgetError(f"budget {text!r} is not understood. Write {_FORMS}.")

    def resolve(self, targets: Sequence[Target], base_parameters: int) -> int:
        """Return the budget in parameters for these targets.

        Args:
            targets: The targets that may receive capacity.
            base_parameters: Parameters of the base model (used by fractions only).

        Returns:
            Parameters that may be spent; rounded down for fractions.

        Raises:
            BudgetError: If a fraction is asked of a model whose size is unknown.
        """
        if self.kind == "uniform":
            return int(self.value) * cost_of_rank_one(targets)
        if self.kind == "fraction":
            if base_parameters <= 0:
                raise BudgetError(
                    "a percentage budget needs the size of the base model, which is not known "
                    "here. Give the budget in parameters or as 'uniform:R'."
                )
            return int(self.value * base_parameters)
        return int(self.value)

    def __str__(self) -> str:
        if self.kind == "uniform":
            return f"uniform:{int(self.value)}"
        if self.kind == "fraction":
            return f"{self.value * 100:g}%"
        return str(int(self.value))


def _is_whole(value: object) -> bool:
    whole = isinstance(value, float) and value.is_integer()
    return whole or (isinstance(value, Integral) and not isinstance(value, bool))
