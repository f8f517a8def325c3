"""The sections of the page, in reading order: outcome first, the numbers behind it after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gradrank.report.blocks import Block, Facts, Gallery, Paragraph, Quote, Section
from gradrank.report.figures_budget import budget_bar, cost_bar
from gradrank.report.figures_energy import effective_rank_heat_map, energy_heat_map
from gradrank.report.figures_ranks import rank_heat_map, rank_histogram, rank_profile
from gradrank.report.figures_scores import reliability_gauge, score_against_rank
from gradrank.report.figures_spectra import eigenvalue_spectra, saturation_sentence, singular_values
from gradrank.report.figures_training import loss_curves, loss_difference
from gradrank.report.figures_types import type_means
from gradrank.report.layout import Layout, arrange
from gradrank.report.reading import distinct_measurements
from gradrank.report.sections_neurons import neurons_section
from gradrank.report.sections_time import history_section
from gradrank.report.svg import Figure
from gradrank.report.tables import cost_table, results_table, target_table
from gradrank.report.text import as_count, clean, count, listed, memory, percent, plural, seconds
from gradrank.report.verdict import reliability_sentences, verdict
from gradrank.report.view import Measurement, Run, final


@dataclass(frozen=True)
class Material:
    """Everything that the sections draw from."""

    runs: Sequence[Run]
    measurements: Sequence[Measurement]
    layout: Layout


def gather(runs: Sequence[Run]) -> Material:
    """Find the distinct measurements and the layout that all figures share.

    Args:
        runs: The runs.

    Returns:
        The material.
    """
    measurements = distinct_measurements(runs)
    names: dict[str, None] = {}
    for run in runs:
        names.update(dict.fromkeys(run.planned))
        if run.history is not None:
            names.update(dict.fromkeys([*run.history.targets, *run.history.measured]))
        names.update(dict.fromkeys(run.neurons.maps if run.neurons else ()))
    for measured in measurements:
        names.update(dict.fromkeys(measured.targets))
    return Material(runs, measurements, arrange(names))


def all_sections(material: Material) -> list[Section]:
    """Return the sections that have something to show, in order.

    Args:
        material: What to draw from.

    Returns:
        The sections.
    """
    moved = [make(material.runs, material.layout) for make in (neurons_section, history_section)]
    first = [_result(material), _capacity(material), *moved]
    makers = (_measured, _trust, _training, _cost, _replay)
    return [section for section in (*first, *(make(material) for make in makers)) if section.blocks]


def _figures(*drawn: Figure | None) -> list[Block]:
    shown = [figure for figure in drawn if figure is not None]
    return [Gallery(shown)] if shown else []


def _result(material: Material) -> Section:
    runs = material.runs
    blocks: list[Block] = [Facts("", headline(runs)), *verdict(runs), results_table(runs)]
    return Section("result", "The result", blocks)


def _capacity(material: Material) -> Section:
    runs, layout = material.runs, material.layout
    title = "Where the capacity went" + (" (final ranks)" if final(runs) else "")
    blocks: list[Block] = []
    if not any(run.planned for run in runs):
        text = "These records hold no plan, so where capacity went is unknown."
        return Section("capacity", title, [Paragraph(text)])
    blocks += _figures(
        budget_bar(runs, layout),
        type_means(runs, layout),
        rank_histogram(runs),
        rank_heat_map(runs, layout),
        rank_profile(runs, layout),
    )
    return Section("capacity", title, blocks)


def _measured(material: Material) -> Section:
    title = "What was measured"
    blocks: list[Block] = []
    layout, several = material.layout, len(material.measurements) > 1
    if not material.measurements:
        text = "These records hold no measurement, so there are no spectra to show."
        if any(run.history and run.history.measured for run in material.runs):
            text = "Nothing was measured before training, only during it: see how capacity moved."
        blocks.append(Paragraph(text))
    for i, measured in enumerate(material.measurements):
        suffix = f"-{i + 1}" if i else ""
        lead = f"For {listed(measured.runs)}." if several or len(material.runs) > 1 else ""
        blocks.append(Paragraph(_measuring(measured), lead=lead))
        figures = (
            eigenvalue_spectra(measured, layout, suffix),
            effective_rank_heat_map(measured, layout, suffix),
            energy_heat_map(measured, layout, suffix),
            singular_values(measured, layout, suffix),
        )
        blocks += _figures(*figures)
        if figures[0] is not None and figures[1] is None:
            blocks.append(Paragraph(f"Effective ranks. {saturation_sentence(measured)}"))
    blocks += _figures(score_against_rank(material.runs, layout))
    return Section("measured", title, blocks)


def _measuring(measured: Measurement) -> str:
    facts = measured.facts
    parts = []
    if measured.batches:
        parts.append(plural(measured.batches, "mini-batch").replace("batchs", "batches"))
    parts += [f"{count(facts[key])} {key}" for key in ("examples", "tokens") if key in facts]
    text = f"Gradients of {listed(parts)}" if parts else "Gradients"
    text += f" on {plural(len(measured.targets), 'target')}"
    if measured.estimator:
        size = f" of dimension {count(facts['sketch_dim'])}" if "sketch_dim" in facts else ""
        text += f", estimator '{measured.estimator}'{size}"
    cost = [seconds(facts["seconds"])] if "seconds" in facts else []
    cost += [memory(facts["peak_memory_bytes"])] if "peak_memory_bytes" in facts else []
    return f"{text}; this took {listed(cost)}." if cost else f"{text}."


def _trust(material: Material) -> Section:
    runs = material.runs
    notes = [
        Paragraph(reliability_sentences(run), lead=f"{run.label}.")
        for run in runs
        if run.reliability is not None
    ]
    silent = [run for run in runs if run.reliability is None and run.measurement is not None]
    if silent:
        names = listed(run.label for run in silent)
        text = f"No split-half check was recorded for {names}, so trust in its scores is unknown."
        notes.append(Paragraph(text))
    quiet = [run for run in runs if run.planned and run.measurement is None]
    if notes and quiet:
        names = listed(run.label for run in quiet)
        text = "Measured nothing, so there is nothing to check."
        notes.append(Paragraph(text, lead=f"{names}."))
    gauge = reliability_gauge(runs)
    blocks = [Gallery([gauge], notes)] if gauge else notes
    return Section("trust", "Can the scores be trusted", blocks)


def _training(material: Material) -> Section:
    runs = material.runs
    blocks = _figures(loss_curves(runs), loss_difference(runs))
    if not blocks and any(run.kind == "train" for run in runs):
        blocks = [Paragraph("These records hold no loss curves.")]
    return Section("training", "Training", blocks)


def _cost(material: Material) -> Section:
    table, bar = cost_table(material.runs), cost_bar(material.runs)
    notes = [note for run in material.runs if (note := _overhead(run)) is not None]
    blocks: list[Block] = [Gallery([bar], notes)] if bar else list(notes)
    return Section("cost", "What it cost", [*blocks, table] if table else blocks)


def _overhead(run: Run) -> Paragraph | None:
    spent, whole = run.cost.get("measure_seconds"), run.total_seconds
    if not spent or not whole or "train_seconds" not in run.cost:
        return None
    text = f"Measuring took {seconds(spent)}, {percent(spent / whole)} of the whole run."
    peak, highest = (run.cost.get(f"{p}peak_memory_bytes") for p in ("measure_", ""))
    if peak is not None and highest is not None:
        text += f" Memory peaked at {memory(peak)} while measuring, {memory(highest)} in all."
    return Paragraph(text, lead=f"{run.label}.")


def _replay(material: Material) -> Section:
    blocks: list[Block] = []
    for run in material.runs:
        if run.record.config:
            verb = run.kind if run.kind in {"plan", "train"} else "train"
            title = f"{run.label}: gradrank {verb} --config run.yaml"
            folded = len(material.runs) > 1
            blocks.append(Quote(title, config_text(run.record.config), folded))
    if blocks:
        text = "Save one of these as run.yaml and pass it to the command to repeat that run."
        blocks.insert(0, Paragraph(text))
    else:
        blocks.append(Paragraph("These records hold no configuration to replay."))
    for environment, labels in _environments(material.runs):
        which = f" of {listed(labels)}" if len(labels) < len(material.runs) else ""
        blocks.append(Facts(f"Environment{which}", environment, folded=True))
    table = target_table(material.runs, material.measurements, material.layout)
    return Section("replay", "Replay and details", [*blocks, table] if table else blocks)


def _environments(runs: Sequence[Run]) -> list[tuple[list[tuple[str, str]], list[str]]]:
    found: list[tuple[list[tuple[str, str]], list[str]]] = []
    for run in runs:
        pairs = [(clean(k, 60), _short(v)) for k, v in run.record.environment.items()]
        same = next((labels for known, labels in found if known == pairs), None)
        if same is not None:
            same.append(run.label)
        elif pairs:
            found.append((pairs, [run.label]))
    return found


def config_text(config: Mapping[str, Any]) -> str:
    """Write a configuration as YAML, in the order of the record.

    Args:
        config: The configuration, untrusted.

    Returns:
        YAML text without characters that cannot be shown.
    """
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=88)
    return "\n".join(clean(line, 20_000) for line in text.splitlines())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def headline(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Say what was run: model, data, budget, methods, seeds.

    Args:
        runs: The runs.

    Returns:
        Names and values; only those that are known.
    """
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    pairs = [
        ("Model", _common(runs, "model_spec", "model_name", "model")),
        ("Data", _common(runs, "data", "task", "dataset")),
        ("Budget", _budget(runs)),
        ("Methods", listed(dict.fromkeys(run.method for run in runs))),
        ("Seeds" if len(seeds) > 1 else "Seed", listed(str(seed) for seed in seeds)),
        ("Started", min((_moment(t) for run in runs if (t := run.record.created)), default="")),
    ]
    return [(name, value) for name, value in pairs if value]


def _common(runs: Sequence[Run], *keys: str) -> str:
    return listed(dict.fromkeys(_named(v) for run in runs if (v := run.fact(*keys)) is not None))


def _named(value: Any) -> str:
    """Show a described thing by its name and source; the rest stands in the configuration."""
    if not isinstance(value, Mapping) or "name" not in value:
        return _short(value)
    source = f" ({_short(value['source'])})" if value.get("source") else ""
    return _short(value["name"]) + source


def _moment(text: Any) -> str:
    """Show an ISO 8601 time to the minute."""
    shown = clean(text, 40)
    is_iso = len(shown) >= 16 and shown[10] == "T"
    return f"{shown[:10]} {shown[11:16]} UTC" if is_iso and shown.endswith("+00:00") else shown


def _budget(runs: Sequence[Run]) -> str:
    texts: dict[str, None] = {}
    for run in runs:
        if run.budget is not None:
            base = as_count(run.provenance.get("base_parameters"))
            share = f" ({percent(run.budget / base)} of {count(base)})" if base else ""
            texts[f"{count(run.budget)} adapter parameters{share}"] = None
    return listed(texts)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k, 40)}: {_short(v)}" for k, v in list(value.items())[:8])
    if isinstance(value, list | tuple):
        return ", ".join(_short(item) for item in value[:8])
    return clean(value, 160)
