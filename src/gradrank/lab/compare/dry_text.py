"""A rehearsal as lines for a terminal."""

from typing import Any

from gradrank.core.targets import cost_of_rank_one


def recipe_lines(found: Any) -> list[str]:
    """Return a rehearsal as a readable table.

    Args:
        found: A :class:`gradrank.lab.compare.dry.Rehearsal`.

    Returns:
        Lines.
    """
    recipe = found.recipe
    lines = [f"{recipe.name}: {recipe.about}", f"after {recipe.source}", "", *_models(found)]
    groups: dict[tuple[str, str], list[Any]] = {}
    for cell in found.cells:
        groups.setdefault((cell.task, cell.budget), []).append(cell)
    told = ""
    for (task, budget), cells in groups.items():
        if task != told:
            lines += ["", *_task(cells[0])]
            told = task
        lines += ["", *_table(budget, cells)]
    return [*lines, "", *_counts(found), "no problem was found; no weights or data were read"]


def _models(found: Any) -> list[str]:
    models = {(c.model.name, len(c.model.targets)): c.model for c in found.cells}
    return [
        f"model {model.name} ({model.kind}, shapes {model.source}): "
        f"{model.base_parameters:,} parameters, {len(model.targets)} targets, "
        f"{cost_of_rank_one(model.targets):,} parameters for rank 1 on each"
        for model in models.values()
    ]


def _task(cell: Any) -> list[str]:
    data, long = cell.data, cell.length
    words = [f"{data.head}, {data.metric}"]
    if data.classes:
        words.append(f"{data.classes} classes, a head of {cell.model.head_parameters:,} parameters")
    if long.examples is not None:
        words.append(f"about {long.examples:,} training examples")
    words.append("steps follow from the data" if long.steps is None else f"{long.steps:,} steps")
    if long.tokens is not None:
        words.append(f"at most {long.tokens:,} tokens")
    if data.note:
        words.append(data.note)
    named = "" if cell.task == data.name else f" ({data.name})"
    return [f"task {cell.task}{named} on {cell.model.name}: {'; '.join(words)}"]


def _table(budget: str, cells: list[Any]) -> list[str]:
    width = max(len("method"), *(len(cell.method) for cell in cells))
    lines = [
        f"budget {budget} = {cells[0].parameters:,} parameters",
        f"  {'method':{width}} {'final':>15} {'peak':>15} {'of budget':>9}  how",
    ]
    for cell in cells:
        size = cell.footprint
        final = ("" if size.exact else "<= ") + f"{size.final:,}"
        share = f"{size.final / cell.parameters:.1%}" if size.matched else "-"
        lines.append(f"  {cell.method:{width}} {final:>15} {size.peak:>15,} {share:>9}  {size.how}")
    return lines


def _counts(found: Any) -> list[str]:
    runs = found.runs
    recipe = found.recipe
    lines = [
        f"{sum(runs.values()):,} runs: {runs['tune']:,} to choose learning rates, "
        f"{runs['final']:,} reported ({len(recipe.seeds)} seeds), {runs['stability']:,} that only "
        "allocate"
    ]
    if found.steps is not None:
        tokens = "" if found.tokens is None else f", at most {found.tokens:,} tokens"
        lines.append(f"{found.steps:,} optimizer steps in all{tokens}")
    return lines
