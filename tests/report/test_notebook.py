"""What notebooks show: whole, escaped, bounded, without scripts, and the same for the same."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradrank.core.budget import Budget
from gradrank.core.plan import Plan
from gradrank.core.planned import PlannedTarget
from gradrank.core.targets import Target
from gradrank.record import RunRecord
from gradrank.report.notebook import MAX_ROWS
from gradrank.signals.measurement import Measurement
from gradrank.signals.spectrum import SpectrumStatistic
from report.comparison_cases import realistic
from report.report_cases import SHAPES, demo_records, shapes
from report.strict_page import Page

HOSTILE = 'model.layers.0.<img src=x onerror=alert(1)>"q'
MEGABYTE = 1_000_000


def plan_of(layers: int, names: Callable[[int, str], str] | None = None, **facts: Any) -> Plan:
    name = names or (lambda layer, module: f"model.layers.{layer}.{module}")
    targets = [
        PlannedTarget(Target(name(layer, module), *shape), (layer + i) % 5)
        for layer in range(layers)
        for i, (module, shape) in enumerate(SHAPES.items())
    ]
    spent = sum(planned.parameters for planned in targets)
    budget = Budget.parameters(spent + 100)
    return Plan("gard", {"energy": 0.9}, budget, spent + 100, tuple(targets), **facts)


def measured(layers: int, batches: int = 4) -> Measurement:
    """A measurement of real layer names, with spectra of random gradients."""
    targets = tuple(Target(name, *shape) for name, shape in shapes(layers).items())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(targets), batches, 8, generator=generator, dtype=torch.float64)
    grams = rows @ rows.mT
    spectrum = SpectrumStatistic({t.name: grams[i] for i, t in enumerate(targets)})
    info = {"examples": 32, "tokens": 512, "estimator": "sketch", "model_name": "a <b> & model"}
    return Measurement(targets, spectrum, None, info)


def page(thing: Any) -> Page:
    """Read what a notebook is given, strictly."""
    return Page(thing._repr_html_())


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (plan_of(2), ("Plan: gard", "parameters on", "q_proj", "share", "mean rank")),
        (measured(2), ("Measurement", "4 mini-batches", "512 tokens", "effective ranks")),
        (demo_records(layers=2)[0], ("Run: ", "adapter parameters (final)", "eval_loss")),
        (realistic(), ("Comparison: ", "evidence", "uniform", "tested difference")),
    ],
    ids=["plan", "measurement", "record", "comparison"],
)
def test_a_table_and_a_figure_are_shown(thing: Any, words: tuple[str, ...]) -> None:
    found = page(thing)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("table") == 1
    assert tags.count("svg") == 1
    assert not set(tags) & {"script", "style", "link", "img", "iframe", "object"}
    assert not re.search(r"""https?://(?!www\.w3\.org/)|\bon\w+=["']""", thing._repr_html_())
    for word in words:
        assert word in found.text, word
    assert thing._repr_html_() == thing._repr_html_()


@pytest.mark.parametrize(
    "thing",
    [plan_of(150), measured(150), plan_of(1050, lambda i, m: f"odd{i}.{m}")],
    ids=["plan", "measurement", "a type each"],
)
def test_a_thousand_targets_stay_small(thing: Any) -> None:
    text = thing._repr_html_()
    assert len(thing.targets) >= 1000
    assert len(text) < MEGABYTE
    assert len(repr(thing)) < 200
    found = page(thing)
    assert [tag for tag, _ in found.tags].count("tr") <= MAX_ROWS + 1


def test_names_are_escaped_everywhere() -> None:
    target = PlannedTarget(Target(HOSTILE, 8, 8), 2)
    told = {"recommendation": "uniform", "reason": "<script>alert(1)</script>"}
    plan = Plan("<b>gard", {}, Budget.parameters(64), 64, (target,), told)
    found = page(plan)
    assert not {"script", "b"} & {tag for tag, _ in found.tags}
    assert all(tag != "img" for tag, _ in found.tags)
    assert "<script>alert(1)</script>" in found.text
    assert "a <b> & model" in page(measured(1)).text


def test_two_figures_in_one_notebook_share_no_id() -> None:
    first, second = (page(plan_of(layers)) for layers in (2, 3))
    ids = [{a["id"] for _, a in one.tags if "id" in a} for one in (first, second)]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_ids_that_are_used_are_defined() -> None:
    for thing in (plan_of(2), realistic(), demo_records(layers=2)[0]):
        text = thing._repr_html_()
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        assert used <= set(re.findall(r'id="([^"]+)"', text))


def test_every_object_says_in_one_line_what_it_is() -> None:
    assert repr(plan_of(1)) == str(plan_of(1))
    assert str(plan_of(1)).startswith("Plan(gard: ")
    assert repr(measured(1)) == "Measurement(spectrum of 7 targets in 4 batches)"
    assert repr(Measurement(())) == "Measurement(nothing of 0 targets in 0 batches)"
    record = RunRecord("gard", "train", metrics={"eval_loss": 4.25, "odd": None})  # type: ignore[dict-item]
    assert repr(record) == "RunRecord(gard: train, finished, eval_loss 4.25)"
    assert repr(realistic()).startswith("Comparison(")


def test_what_has_nothing_to_draw_still_shows() -> None:
    for thing in (Measurement(()), RunRecord("gard", "train", status="failed")):
        tags = [tag for tag, _ in page(thing).tags]
        assert "svg" not in tags
        assert "strong" in tags


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    code = (
        "import sys, gradrank as gr; gr.Plan; gr.RunRecord; import gradrank.evidence.findings; "
        "print('matplotlib' in sys.modules, 'gradrank.report' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
