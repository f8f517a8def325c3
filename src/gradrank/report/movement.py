"""What a history adds up to, in numbers and in words: how much moved, from where to where."""

from collections.abc import Mapping
from dataclasses import dataclass

from gradrank.report.history import Event, History
from gradrank.report.layout import Layout
from gradrank.report.text import count, listed, percent, plural
from gradrank.report.view import Run

# A flow between two module types is "mostly" there when it holds at least this share.
MOST = 0.5
# Below this share of the start, the parameters in use count as unchanged.
STEADY = 0.01
_BACK_AND_FORTH = 1.2


@dataclass(frozen=True)
class Movement:
    """A history, added up.

    Attributes:
        decisions: Decisions taken; changes of ranks where the record tells no decisions.
        moving: Steps at which ranks changed.
        given: Parameters that targets gained between start and end, or None if unknown.
        taken: Parameters that targets lost between start and end, or None if unknown.
        gross: Parameters given, summed over all decisions, or None if unknown.
        by_type: Net parameters by module type, losses negative.
        changed: Targets that ended with another rank than they started with.
        dropped: Targets that lost their whole rank.
        whole: What shares refer to: the final budget, else the parameters at the start.
        budgeted: Whether ``whole`` is the budget.
        before: Parameters in use at the start, or None.
        after: Parameters in use at the end, or None.
    """

    decisions: int
    moving: tuple[int, ...]
    given: int | None
    taken: int | None
    gross: int | None
    by_type: Mapping[str, int]
    changed: int
    dropped: int
    whole: int | None
    budgeted: bool
    before: int | None
    after: int | None

    def share(self, parameters: int) -> str:
        """Return parameters as a share of the budget.

        Args:
            parameters: How many.

        Returns:
            Words such as ``12 % of the budget``.
        """
        if not self.whole:
            return f"{count(parameters)} parameters"
        return f"{percent(parameters / self.whole)} of {self.of_what}"

    @property
    def of_what(self) -> str:
        """What shares refer to, in words."""
        return "the budget" if self.budgeted else "the parameters in use at the start"


def movement(history: History, layout: Layout) -> Movement:
    """Add a history up.

    Args:
        history: The history.
        layout: Gives the module types.

    Returns:
        The sums. Shares between start and end count a parameter once, however often it moved;
        ``gross`` counts every move.
    """
    events = history.events
    net = history.change(history.start, history.final)
    priced = all(name in history.costs for name in net)
    by_type: dict[str, int] = {}
    for name, ranks in net.items() if priced else ():
        row = layout.row_of(name)
        by_type[row] = by_type.get(row, 0) + ranks * history.costs[name]
    worth = [ranks * history.costs[name] for name, ranks in net.items()] if priced else []
    moves = [event.moved for event in events]
    told = next((e.budget for e in reversed(events) if e.budget), history.budget)
    # On the way down the last allowance is not the budget: a run may have been stopped before.
    budget = history.asked if history.falls else told
    before, after = history.cost_of(history.start), history.cost_of(history.final)
    return Movement(
        decisions=len(history.decisions) or len(events),
        moving=tuple(event.step for event in events if event.changed),
        given=sum(w for w in worth if w > 0) if priced else None,
        taken=-sum(w for w in worth if w < 0) if priced else None,
        gross=None if None in moves else sum(m for m in moves if m is not None),
        by_type=by_type,
        changed=len(net),
        dropped=sum(1 for name in net if not history.final.get(name, 0)),
        whole=budget or before,
        budgeted=bool(budget),
        before=before,
        after=after,
    )


def headline(run: Run, layout: Layout) -> str:
    """Say in a sentence or two what moved, when, and from where to where.

    Args:
        run: A run with a history.
        layout: Gives the module types.

    Returns:
        The sentences; empty without a history.
    """
    history = run.history
    if history is None:
        return ""
    moved = movement(history, layout)
    if not moved.moving:
        return _nothing(history, moved)
    first, last = moved.moving[0], moved.moving[-1]
    when = f"At step {count(first)},"
    if first < last:
        when = f"Between steps {count(first)} and {count(last)},"
    rest = f" {_decisions(moved)}"
    if last < run.end:
        rest += f" After step {count(last)} ranks stayed until the end, step {count(run.end)}."
    return f"{when} {_what(history, moved)}{rest}"


def _what(history: History, moved: Movement) -> str:
    if not history.ranks:
        return "ranks changed; the record does not tell which."
    if moved.given is None or moved.taken is None:
        who = f"{count(moved.changed)} of {plural(len(history.targets), 'target')}"
        return f"the rank of {who} changed; without shapes, parameters cannot be counted."
    if not moved.given and not moved.taken:
        back = (
            f" Counted decision by decision, {moved.share(moved.gross)} moved."
            if (moved.gross)
            else ""
        )
        return f"ranks moved, but every target ended with the rank it started with.{back}"
    if not moved.given or not moved.taken:
        return _one_way(moved)
    text = f"{moved.share(moved.given)} moved{_flow(moved)}."
    if moved.gross and moved.gross > _BACK_AND_FORTH * moved.given:
        text += (
            f" Counted decision by decision it was {moved.share(moved.gross)}: some went back and "
            "forth."
        )
    if moved.before and moved.after and abs(moved.after / moved.before - 1) > STEADY:
        text += f" Parameters in use went from {count(moved.before)} to {count(moved.after)}."
    return text


def _one_way(moved: Movement) -> str:
    """Describe a run that only grew or only shrank."""
    grew = bool(moved.given)
    size = moved.given or moved.taken or 0
    row = (max if grew else min)(moved.by_type, key=moved.by_type.__getitem__)
    most = ""
    if len(moved.by_type) > 1 and abs(moved.by_type[row]) >= MOST * size:
        most = f", mostly in {row}"
    verb, other = ("grew", "shrank") if grew else ("shrank", "grew")
    lost = f" {plural(moved.dropped, 'target')} lost the whole adapter." if moved.dropped else ""
    return (
        f"the adapter {verb} from {count(moved.before)} to {count(moved.after)} parameters{most}; "
        f"no target {other}.{lost}"
    )


def _flow(moved: Movement) -> str:
    """Say between which module types capacity moved, only as far as the numbers carry it."""
    given, taken = moved.given or 0, moved.taken or 0
    top = max(moved.by_type, key=moved.by_type.__getitem__)
    low = min(moved.by_type, key=moved.by_type.__getitem__)
    gain, loss = moved.by_type[top], -moved.by_type[low]
    if gain >= MOST * given and loss >= MOST * taken:
        return f", mostly from {low} to {top}"
    if sum(max(value, 0) for value in moved.by_type.values()) < MOST * given:
        return ", mostly between layers of the same module type"
    parts = []
    if gain > 0:
        parts.append(f"{top} gained the most ({moved.share(gain)})")
    if loss > 0:
        parts.append(f"{low} gave the most ({percent(loss / moved.whole)})" if moved.whole else low)
    return f"; {listed(parts)}" if parts else ""


def _decisions(moved: Movement) -> str:
    taken, changing = moved.decisions, len(moved.moving)
    if taken == 1:
        return "It was the only decision."
    if taken == changing:
        return f"All {count(taken)} decisions changed ranks."
    return f"{count(changing)} of {plural(taken, 'decision')} changed ranks."


def _nothing(history: History, moved: Movement) -> str:
    steps = [event.step for event in history.events]
    if not steps:
        return "No rank changed."
    when = f"at step {count(steps[0])}"
    if len(steps) > 1:
        when = f"between steps {count(steps[0])} and {count(steps[-1])}"
    return (
        f"No rank changed: {plural(moved.decisions, 'decision')} {when} kept every rank as it was."
    )


def contradictions(history: History) -> str:
    """Say where a record's own counts differ from what its ranks give.

    Args:
        history: The history.

    Returns:
        A sentence, or "" if nothing differs.
    """
    odd = [event for event in history.events if _differs(event)]
    if not odd:
        return ""
    one, steps = odd[0], listed(count(event.step) for event in odd[:3])
    more = f" and {plural(len(odd) - 3, 'more')[:-1]}" if len(odd) > 3 else ""
    facts = []
    for told, counted, what in (
        (one.parameters, one.recount.parameters, "parameters in use"),
        (one.moved, one.recount.moved, "parameters moved"),
        (one.changed, one.recount.changed, "changed ranks"),
    ):
        if counted is not None and told != counted:
            facts.append(f"{count(told)} {what}, the ranks give {count(counted)}")
    return (
        f"The record tells other counts than its ranks give (step {steps}{more}). At step "
        f"{count(one.step)} it tells {'; '.join(facts)}. Either the adapter has a form in which "
        "a rank costs more or less than d_in + d_out, or the record was edited. The figures show "
        "what is told."
    )


def _differs(event: Event) -> bool:
    pairs = (
        (event.parameters, event.recount.parameters),
        (event.moved, event.recount.moved),
        (event.changed, event.recount.changed),
    )
    return any(counted is not None and told != counted for told, counted in pairs)
