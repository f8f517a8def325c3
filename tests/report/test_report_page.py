import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.core.errors import DataError, OptionError, OutputError
from gradrank.record import RunRecord
from gradrank.report import build, write
from gradrank.report.sections import config_text
from report import report_cases as cases
from report.strict_page import Page

EVIL = "<script>alert('x')</script>\"'&"


@pytest.fixture(scope="module")
def demo():
    return build(cases.demo_records(6))


def one(**changes):
    names = {"h.0.q": (4, 4)}
    planned = cases.plan("gard", names, {"h.0.q": 2}, {"h.0.q": 1.0}, options={"energy": 0.9})
    return cases.record("gard", names, planned, cases.measurement(names), **changes)


def test_the_same_records_give_the_same_bytes(demo):
    assert build(cases.demo_records(6)) == demo


def test_sections_stand_in_reading_order(demo):
    page = Page(demo)
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert ids == ["result", "capacity", "measured", "trust", "training", "cost", "replay"]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in ids]


def test_headings_descend_one_level_at_a_time(demo):
    headings = Page(demo).headings
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))


def test_every_figure_has_heading_caption_and_text_alternative(demo):
    page = Page(demo)
    drawn = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawn) == 14
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(drawn)
    assert demo.count("<title>") == len(drawn) + 1


def test_ids_are_unique_over_the_whole_page(demo):
    ids = [attrs["id"] for _, attrs in Page(demo).tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', demo)
    assert {a or b for a, b in targets} <= set(ids)


def test_nothing_outside_is_referred_to(demo):
    page = Page(demo)
    assert not [t for t, _ in page.tags if t in {"link", "img", "iframe", "image", "object"}]
    for _, attrs in page.tags:
        for key in ("src", "href", "xlink:href", "action", "poster"):
            assert attrs.get(key, "#").startswith("#")
    assert set(re.findall(r"https?://[^\s\"'<]+", demo)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in demo
    assert re.findall(r"url\((?!#)", demo) == []


def test_the_policy_forbids_everything_but_this_script(demo):
    page = Page(demo)
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert "default-src 'none'" in policy
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_headline_says_what_was_run(demo):
    text = Page(demo).text
    assert "Training: uniform, gard and waterfill on SmolLM2-135M" in text
    budget = 8 * sum(sum(shape) for shape in cases.shapes(6).values())
    assert f"{budget:,} adapter parameters" in text
    assert "of 134,515,008" in text
    assert "rotten-tomatoes-lm" in text


def test_the_verdict_is_relative_to_uniform_and_modest(demo):
    text = Page(demo).text
    assert "gard ended 0.0210 nats (0.49 %) below it." in text
    assert "waterfill ended 0.0060 nats (0.14 %) above it." in text
    assert "This proves nothing yet." in text
    assert "one seed per method and only 60 steps" in text
    assert "The planner recommends uniform. The scores of waterfill are not reliable." in text


def test_several_long_seeds_are_averaged_in_pairs():
    records = []
    for seed, shift in enumerate((-0.02, 0.01, -0.03)):
        for name, moved in (("uniform", 0.0), ("gard", shift)):
            names = {"h.0.q": (4, 4)}
            planned = cases.plan(name, names, {"h.0.q": 2})
            base = cases.record(name, names, planned, seed=seed)
            final = 4.0 + seed + moved
            cost = {"steps": 1000}
            records.append(replace(base, metrics={"eval_loss": final}, losses={}, cost=cost))
    text = Page(build(records)).text
    assert "gard ended −0.0133 nats" in text
    assert "(−0.0300 to +0.0100), below it in 2 of them" in text
    assert "This proves nothing yet" not in text
    assert "3 seeds per method" in text


def test_without_uniform_nothing_is_claimed():
    assert "nothing says whether placing capacity helped" in Page(build([one()])).text


def test_runs_of_different_size_are_called_out():
    names = {"h.0.q": (4, 4)}
    uniform = cases.record("uniform", names, cases.plan("uniform", names, {"h.0.q": 4}))
    assert "The runs do not have the same size." in Page(build([uniform, one()])).text


def test_a_plan_says_that_nothing_was_trained():
    record = one(kind="plan", losses={}, metrics={}, cost={}, environment={})
    page = Page(build([record]))
    assert "Nothing was trained here." in page.text
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert "training" not in ids
    assert "cost" not in ids
    assert "gradrank plan --config run.yaml" in page.text


def test_reliability_is_said_in_words(demo):
    text = Page(demo).text
    assert "Split-half agreement is 0.71 over 8 splits, threshold 0.5." in text
    assert "Among targets of equal shape it is −0.12." in text
    assert "Recommendation: use uniform ranks instead." in text
    assert "uniform. Measured nothing" in text


def test_a_measurement_without_a_check_says_so():
    assert "No split-half check was recorded for gard" in Page(build([one()])).text


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_an_unfinished_run_is_flagged_and_not_compared(status):
    names = {"h.0.q": (4, 4)}
    uniform = cases.record("uniform", names, cases.plan("uniform", names, {"h.0.q": 2}))
    page = Page(build([uniform, one(status=status)]))
    assert f"1 run not finished: gard ({status} at step 60)" in page.text
    assert any(a.get("class") == "badge" for _, a in page.tags)
    assert "gard ended" not in page.text
    assert f"gard ({status})" in page.text


def test_hostile_text_cannot_get_through_anywhere():
    names = {f"h.0.{EVIL}": (4, 4), EVIL: (4, 4), "h.0.\x00\u202e\ud800": (4, 4)}
    planned = cases.plan(EVIL, names, dict.fromkeys(names, 1), dict.fromkeys(names, 1.0))
    planned["provenance"] = {"model": EVIL, "base_parameters": 10}
    planned["reliability"] = {"split_half": 0.1, "recommendation": EVIL, "reason": EVIL}
    record = cases.record(EVIL, names, planned, cases.measurement(names))
    record = replace(
        record,
        config={EVIL: EVIL, "steps": 3},
        environment={EVIL: EVIL},
        metrics={**record.metrics, EVIL: 1.0},
        created=EVIL,
        status=EVIL,
    )
    html = build([record], title=EVIL)
    page = Page(html)
    assert len(page.scripts) == 1
    assert "alert('x')" not in page.scripts[0]
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert html.count("<script") == 1
    assert EVIL in page.text
    html.encode("utf-8")


def test_closing_tags_in_configuration_stay_text():
    text = "</pre></script><img src=x onerror=alert(1)>"
    page = Page(build([one(config={"note": text})]))
    assert not any(tag == "img" for tag, _ in page.tags)
    assert text in page.text


def test_the_configuration_replays():
    config = {
        "model": "m",
        "option": {"energy": 0.9},
        "seeds": [1, 2],
        "text": "a: b #c",
        "no": None,
    }
    assert yaml.safe_load(config_text(config)) == config
    assert list(yaml.safe_load(config_text(config))) == list(config)


def test_the_table_of_targets_lists_everything(demo):
    page = Page(demo)
    for name in cases.shapes(6):
        assert f">{name}</th>" in demo
    assert "1536 × 576" in page.text
    assert f"All {len(cases.shapes(6))} targets" in page.text


def test_a_record_with_nothing_is_still_a_page():
    text = Page(build([RunRecord("x", "train")])).text
    assert "No result." in text
    assert "hold no plan" in text
    assert "hold no loss curves" in text
    assert "hold no configuration" in text


def test_no_record_is_refused():
    with pytest.raises(DataError, match="no record to report on"):
        build([])


def test_a_hundred_layers_stay_readable_and_light():
    html = build(cases.demo_records(100))
    assert len(html) < 2_500_000
    (drawn,) = re.findall(r'<svg[^>]*aria-label="Rank of every target".*?</svg>', html, re.DOTALL)
    assert ">95</text>" in drawn
    assert ">37</text>" not in drawn


def test_names_without_layers_and_clashing_labels():
    names = {"lm_head": (4, 9), "a.fc": (4, 4), "b.fc": (4, 4)}
    planned = cases.plan("gard", names, {"lm_head": 1, "a.fc": 0, "b.fc": 2})
    record = cases.record("same", names, planned, cases.measurement(names))
    text = Page(build([record, record, replace(record, seeds={})])).text
    assert "targets without a layer number" in text
    # Results, cost and the titles of the configurations name three different runs.
    for label in ("same (seed 0)", "same (seed 0) #2", "same"):
        assert f" {label}: gradrank train --config" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {}, optional={k: JSON | st.integers(0, 9) for k in ("rank", "d_in", "d_out", "score")}
)
SPECTRUM = st.fixed_dictionaries(
    {},
    optional={
        "eigenvalues": JSON | st.lists(st.floats(), max_size=4),
        "singular_values": st.lists(st.floats(), max_size=4),
        "effective_rank": JSON | st.integers(0, 9),
        "energy": st.floats(),
    },
)
TARGETS = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["h.0.q", "h.1.q"]), ENTRY, max_size=3
)
SPECTRA = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["h.0.q", "h.1.q"]), SPECTRUM, max_size=3
)
CURVE = JSON | st.lists(st.tuples(st.integers(0, 9), st.floats()).map(list), max_size=4)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    plan=st.fixed_dictionaries(
        {"targets": TARGETS | JSON},
        optional=dict.fromkeys(("method", "budget", "reliability", "provenance"), JSON),
    ),
    measurement=JSON | st.fixed_dictionaries({"targets": SPECTRA}, optional={"batches": JSON}),
    losses=st.fixed_dictionaries({}, optional={"train": CURVE, "eval": CURVE}),
    rest=st.dictionaries(
        st.text(max_size=4) | st.sampled_from(["steps", "train_seconds"]), JSON, max_size=3
    ),
)
def test_no_content_of_a_record_breaks_the_page(plan, measurement, losses, rest):
    record = RunRecord(
        "r", "train", plan=plan, measurement=measurement, losses=losses, metrics=rest, cost=rest,
        config=rest, environment=rest, trainable_parameters=rest,
    )  # fmt: skip
    Page(build([record, replace(record, status="failed")]))


def test_write_is_atomic_and_refuses_to_overwrite(tmp_path):
    path = tmp_path / "out" / "report.html"
    record = one(measurement=None)
    written = write([record], path, figures_dir=tmp_path / "figures", formats=("svg", "png"))
    assert written[0] == path
    assert path.read_text(encoding="utf-8") == build([record])
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    drawn = {"budget", "rank-histogram", "rank-heat-map", "score-rank", "loss", "cost"}
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("svg", "png")}
    assert {file.name for file in written[1:]} == names
    with pytest.raises(OutputError, match="exists already"):
        write([record], path)
    assert write([record], path, overwrite=True) == [path]
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_nothing_is_written_when_one_figure_would_be_overwritten(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.svg").write_text("mine")
    with pytest.raises(OutputError, match=r"loss\.svg"):
        write([one()], tmp_path / "report.html", figures_dir=tmp_path / "figures")
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "figures" / "loss.svg").read_text() == "mine"


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OptionError, match="'jpg' is unknown"):
        write([one()], tmp_path / "r.html", figures_dir=tmp_path, formats=("jpg",))
    assert not list(tmp_path.iterdir())


def test_a_record_survives_its_file(tmp_path):
    one().save(tmp_path / "record.json")
    assert build([RunRecord.load(tmp_path / "record.json")]) == build([one()])
