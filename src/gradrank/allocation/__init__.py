"""Floor 1: from scores or gains and a budget in parameters to whole ranks. No torch.

Every allocator keeps three promises: the parameters never exceed the budget, the slack is smaller
than the cheapest step that was still allowed, and the outcome depends on the targets' names but
not on their order.

- :func:`proportional`: GARD's rule, ranks in proportion to scores.
- :func:`allocate_gains`: ranks with the largest total gain; on top of :func:`solve`, the exact
  multiple-choice knapsack over :class:`Candidate`, or :func:`greedy`, the named fallback, whose
  distance to :func:`lp_bound` is less than one step.
- :func:`keep_directions`: which single directions survive, by their scores.
- :func:`uniform`, :func:`random_scores`, :func:`depth_scores`, :func:`permute_within_shape`,
  :func:`reverse_order`: controls.
- :func:`rank_bounds`, :func:`rank_costs`, :func:`check_budget`: what new allocators share.
"""

from gradrank.allocation.controls import (
    depth_scores,
    permute_within_shape,
    random_scores,
    reverse_order,
    uniform,
)
from gradrank.allocation.directions import keep_directions
from gradrank.allocation.gains import SOLVERS, allocate_gains
from gradrank.allocation.hull import greedy, lp_bound
from gradrank.allocation.knapsack import solve
from gradrank.allocation.problem import check_budget, rank_bounds, rank_costs, score_array
from gradrank.allocation.proportional import proportional
from gradrank.allocation.table import Candidate

__all__ = [
    "SOLVERS",
    "Candidate",
    "allocate_gains",
    "check_budget",
    "depth_scores",
    "greedy",
    "keep_directions",
    "lp_bound",
    "permute_within_shape",
    "proportional",
    "random_scores",
    "rank_bounds",
    "rank_costs",
    "reverse_order",
    "score_array",
    "solve",
    "uniform",
]
