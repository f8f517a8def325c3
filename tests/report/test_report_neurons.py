"""What the report says of neurons: bands, hits, gradients, shares, partitions in plans."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradrank.core.partition import NeuronPartition
from gradrank.record import RunRecord
from gradrank.report import build
from gradrank.report.figures_bands import partition_bands, partitions_compared
from gradrank.report.figures_gradient import gradient_maps
from gradrank.report.figures_hits import by_chance, hit_histogram, middle
from gradrank.report.figures_overlap import overlap_by_type, overlap_matrix
from gradrank.report.figures_ranks import rank_histogram
from gradrank.report.figures_shares import dominant_shares
from gradrank.report.neurons import binned, mask, shares
from gradrank.report.pairs import all_pairs, labelled
from gradrank.report.reading import read_runs
from gradrank.report.sections import gather
from gradrank.report.sections_neurons import neurons_section
from gradrank.report.tables_neurons import capacity, partition_table
from report import neuron_runs, report_cases
from report.test_report_page import EVIL, Page

TINY = {"h.0.q": (4, 4), "h.0.v": (4, 2), "h.1.q": (4, 4), "h.1.v": (4, 2)}
SPLITS = {
    "h.0.q": [True, False, False, True],
    "h.0.v": [False, True],
    "h.1.q": [True, True, True, False],
    "h.1.v": [True, True],
}


def tiny(rule="majority", splits=None, **changes):
    """Return a two-stage record of four targets: 8 of 12 neurons dominant, 2 looks."""
    targets = {}
    for name, flags in (splits or SPLITS).items():
        split = NeuronPartition.of(flags, 3, 1)
        hits = [split.d_out - split.dominant_rows, 0, split.dominant_rows]
        targets[name] = {**split.to_dict(), "looks": 2, "hits": hits}
    told = {"step": 20, "looks": 2, "interval": 10, "rule": rule, "targets": targets}
    maps = {"h.1.q": {"rows": 4, "columns": 4, "before": [[1e-4, 1e-2]], "after": [[0.0, 1.0]] * 2}}
    planned = report_cases.plan("pilora", TINY, dict.fromkeys(TINY, 3), budget=80)
    record = report_cases.record("pilora", TINY, planned, None)
    record.trainable_parameters = {"peak": 84, "final": 67}
    return replace(record, neurons={**told, "maps": maps}, **changes)


def prepared(*records):
    material = gather(read_runs(records))
    return material.runs, material.layout


@pytest.fixture(scope="module")
def several():
    told = [("sst2", 0), ("sst2", 1), ("mnli", 0)]
    return [neuron_runs.pilora(layers=2, task=t, seed=s, maps=1) for t, s in told]


@pytest.fixture(scope="module")
def page(several):
    return build(several)


def test_masks_and_shares_follow_the_rows():
    flags = [True, False, False, True, True, False, True, True, True, False]
    split = NeuronPartition.of(flags, 4, 1)
    assert mask(split).tolist() == [int(flag) for flag in flags]
    assert shares(split, 5).tolist() == [0.5, 0.5, 0.5, 1.0, 0.5]
    assert shares(split, 99).tolist() == mask(split).tolist()
    assert shares(split, 3).tolist() == pytest.approx([1 / 3, 2 / 3, 3 / 4])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(1, 40))
def test_bins_lose_no_neuron(flags, cells):
    values = binned(np.array(flags, dtype=float), cells)
    edges = np.arange(len(values) + 1) * len(flags) // len(values)
    assert float((values * np.diff(edges)).sum()) == pytest.approx(sum(flags))
    assert max(np.diff(edges)) - min(np.diff(edges)) <= 1


def test_a_partition_prices_a_target_and_its_rank_is_the_stock_one():
    (run,), _ = prepared(tiny())
    assert run.ranks == {"h.0.q": 4, "h.0.v": 4, "h.1.q": 4, "h.1.v": 3}
    # r (n + |M|) + r' (n + m - |M|), and of h.1.v, all of whose rows are dominant, r (n + m)
    assert run.parameters == (18 + 6) + (15 + 5) + (21 + 5) + 18
    assert run.slack == 80 - run.parameters
    assert run.falls
    assert run.history is None


def test_a_split_that_contradicts_the_shape_is_left_out():
    (run,), _ = prepared(tiny(splits={**SPLITS, "h.0.q": [True, False, True]}))
    assert "h.0.q" not in run.splits
    assert run.ranks["h.0.q"] == 3


def test_bands_show_every_row_of_small_targets():
    (run,), layout = prepared(tiny())
    figure = partition_bands(run, layout)
    assert figure.data == {
        "q": {
            "0": {"share": [1, 0, 0, 1], "neurons": 4},
            "1": {"share": [1, 1, 1, 0], "neurons": 4},
        },
        "v": {"0": {"share": [0, 1], "neurons": 2}, "1": {"share": [1, 1], "neurons": 2}},
    }
    assert "% of 12 neurons are dominant and get rank 3, the others 1." in figure.headline
    assert figure.headline.startswith("pilora: 67")


def test_runs_are_compared_in_the_last_layer_they_share():
    other = {**SPLITS, "h.1.q": [False, True, True, True]}
    runs, layout = prepared(tiny(), tiny(splits=other, name="other"))
    labels = [run.label for run in runs]
    figure = partitions_compared(runs, labels, layout)
    assert list(figure.data) == ["q", "v"]
    assert figure.data["q"]["pilora"]["share"] == [1, 1, 1, 0]
    assert figure.data["q"]["other"]["share"] == [0, 1, 1, 1]
    assert "layer 1" in figure.caption
    only = {name: SPLITS[name] for name in ("h.0.q", "h.0.v")}
    runs, layout = prepared(tiny(), tiny(splits=only, name="other"))
    assert "layer 0" in partitions_compared(runs, labels, layout).caption
    assert partitions_compared(runs[:1], labels[:1], layout) is None


def test_hits_are_summed_by_type_and_the_line_stands_right_of_half():
    (run,), layout = prepared(tiny())
    figure = hit_histogram(run, layout)
    q = figure.data["q"]
    assert q["frequency"] == [0, 0.5, 1]
    assert q["share"] == pytest.approx([3 / 8, 0, 5 / 8])
    assert q["majority"] == 0.75
    assert q["middle"] == 0
    assert "pilora: 0\N{NO-BREAK SPACE}% of the neurons are undecided" in figure.headline
    assert "majority: dominant to the right" in figure.svg
    (run,), layout = prepared(tiny(rule="mean"))
    figure = hit_histogram(run, layout)
    assert "dominant to the right" not in figure.svg
    assert "rule 'mean'" in figure.caption


def test_the_chance_line_is_binomial():
    hits = [10, 20, 30, 40]
    mean = (20 + 60 + 120) / 300
    exact = [100 * math.comb(3, k) * mean**k * (1 - mean) ** (3 - k) for k in range(4)]
    assert by_chance(hits) == pytest.approx(exact)
    assert by_chance([5, 0, 0]).tolist() == [5, 0, 0]
    assert middle([1, 2, 4, 8, 16]) == 4 + 0 * 2
    assert middle([1] * 11) == 5


def test_many_looks_are_binned_without_losing_neurons():
    record = tiny()
    entry = record.neurons["targets"]["h.0.q"]
    entry["looks"], entry["hits"] = 1000, [0] * 999 + [1, 3]
    (run,), layout = prepared(record)
    q = hit_histogram(run, layout).data["q"]
    assert len(q["share"]) == 41
    assert sum(q["share"]) == pytest.approx(1)
    assert sum(q["chance"]) == pytest.approx(1)


def test_gradient_maps_share_a_scale_and_show_rows_against_their_mean():
    (run,), _ = prepared(tiny())
    figure = gradient_maps(run, "h.1.q")
    assert figure.data["first look"]["cells"] == [[1e-4, 1e-2]]
    assert figure.data["first look"]["rows"] == [1.0]
    assert figure.data["last look"]["rows"] == [1.0, 1.0]
    assert figure.data["last look"]["top_tenth"] == 0.5
    assert figure.data["scale"] == [-4, 0]
    assert gradient_maps(run, "h.0.q") is None


def test_concentration_is_seen_after_and_not_before(several):
    (run,), _ = prepared(several[0])
    for name in run.neurons.maps:
        data = gradient_maps(run, name).data
        assert len(data["last look"]["cells"]) == 64
        assert data["last look"]["top_tenth"] > data["first look"]["top_tenth"] > 0.1


def test_shares_are_of_neurons_and_the_paper_is_quoted_for_its_own_method_only():
    runs, layout = prepared(tiny())
    figure = dominant_shares(labelled(runs), layout)
    assert figure.data["pilora"]["q"] == {"shares": [0.5, 0.75], "mean": 5 / 8}
    assert "half (paper: just below)" in figure.svg
    runs, layout = prepared(neuron_runs.hybrid(3))
    assert "paper" not in dominant_shares(labelled(runs), layout).svg


def test_overlap_figures_agree_with_the_pairs(several):
    runs, layout = prepared(*several)
    by_label = labelled(runs)
    pairs = all_pairs(by_label, layout)
    matrix = overlap_matrix(list(by_label), pairs)
    assert matrix.data["jaccard"][0][1] == pairs[0].whole.jaccard == matrix.data["jaccard"][1][0]
    assert matrix.data["chance"][1][2] == pairs[2].whole.chance
    assert matrix.data["jaccard"][0][0] is None
    by_type = overlap_by_type(pairs)
    assert by_type.data["all types"]["jaccard"] == [pair.whole.jaccard for pair in pairs]
    assert by_type.data["q_proj"]["chance"] == [pair.types["q_proj"].chance for pair in pairs]
    assert overlap_matrix(list(by_label)[:2], pairs[:1]) is None
    assert overlap_by_type([]) is None


def test_the_section_stands_after_capacity_with_everything_in_it(page):
    read = Page(page)
    ids = [attrs["id"] for tag, attrs in read.tags if tag == "section"]
    assert ids[:3] == ["result", "capacity", "neurons"]
    assert "history" not in ids
    for text in (
        "Which neurons got the capacity",
        "10 looks at the gradients, one every 2 steps.",
        "After step 20 the output neurons of each target were split by the rule 'majority'.",
        "Do runs agree?",
        "Overlap of dominant neurons, one row per pair of runs.",
        "Rows and ranks of 14 split targets",
        "sst2 · seed 1",
    ):
        assert text in read.text
    everything = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(set(everything)) == len(everything)


def test_names_of_figures_are_distinct_and_bytes_repeat(several, page):
    names = re.findall(r'<h3 id="fig-([^"]+)"', page)
    assert len(set(names)) == len(names)
    assert {"partition-bands", "partition-bands-3", "partitions-compared", "hit-frequency"} <= {
        *names
    }
    assert build(several) == page


def test_a_larger_first_stage_is_told_where_sizes_are_compared():
    uniform = report_cases.plan("uniform", TINY, dict.fromkeys(TINY, 3), budget=90)
    base = report_cases.record("uniform", TINY, uniform, None)
    record = tiny()
    record.trainable_parameters = {"peak": 168, "final": 88}
    text = Page(build([base, record])).text
    assert "pilora used up to 168 parameters" in text
    assert "until rows were split after step 20" in text


def test_plans_with_partitions_have_bands_and_a_table():
    record = neuron_runs.hybrid(3)
    assert RunRecord.from_dict(record.to_dict()) == record
    runs, layout = prepared(record)
    table = partition_table(labelled(runs), layout)
    assert len(table.rows) == len(runs[0].splits) > 3
    name = next(iter(runs[0].splits))
    cells = next(row for row in table.rows if row[0].text == name)
    split = runs[0].splits[name]
    rest = split.d_out - split.dominant_rows
    assert cells[5].text == f"{split.dominant_rows:,} × 16 + {rest:,} × 2"
    assert cells[6].text == f"{split.parameters(report_cases.shapes(3)[name][0]):,}"
    text = Page(build([record])).text
    assert "hold a neuron partition; in the others all rows have one rank" in text
    assert runs[0].parameters == record.plan["parameters"]
    figure = rank_histogram(runs)
    assert "Crossed bars count targets with a neuron partition" in figure.caption
    assert figure.data["hybrid"][18] == len(runs[0].splits)


def test_a_partition_is_written_with_the_ranks_in_use():
    assert capacity(NeuronPartition.of([True, False, False], 16, 2)) == "1 × 16 + 2 × 2"
    assert capacity(NeuronPartition.of([True, False, False], 16, 0)) == "1 × 16"
    assert capacity(NeuronPartition.of([True, True], 16, 2)) == "2 × 16"
    assert capacity(NeuronPartition.of([False], 16, 0)) == "no adapter"


def test_without_partitions_there_is_no_section():
    runs, layout = prepared(*report_cases.demo_records(2))
    assert neurons_section(runs, layout).blocks == []
    assert "neuron" not in rank_histogram(runs).caption
    empty = replace(tiny(), neurons={"targets": {}, "maps": {}})
    assert 'id="neurons"' not in build([empty])


def test_only_maps_are_shown_where_nothing_was_split():
    record = tiny()
    record.neurons = {**record.neurons, "targets": {}}
    read = Page(build([record]))
    assert "Gradient of h.1.q" in read.text
    assert "Dominant neurons by layer" not in read.text


def test_an_unfinished_run_says_so_in_every_label():
    runs, layout = prepared(tiny(status="interrupted"))
    figure = partition_bands(*labelled(runs).values(), layout)
    assert figure.headline.startswith("pilora (interrupted):")


@pytest.mark.parametrize("rows", [1, 2, 65])
def test_targets_of_few_neurons_are_drawn(rows):
    targets = {"h.0.q": (1, rows), "head": (1, 1)}
    record = neuron_runs.pilora(targets=targets, looks=1, maps=2)
    runs, layout = prepared(record)
    drawn = partition_bands(runs[0], layout)
    # From 65 on cells are whole pixels wide.
    assert len(drawn.data["q"]["0"]["share"]) == (52 if rows == 65 else rows)
    assert drawn.data["head"]["–"]["neurons"] == 1
    assert neurons_section(runs, layout).blocks


HOSTILE = (
    {"targets": [1], "maps": 3, "step": "x", "rule": ["a"]},
    {"targets": {"h.0.q": None, "h.0.v": {"d_out": 2, "dominant": "zz"}}},
    {"targets": {"h.0.q": {"d_out": 4, "rank": 3, "supplementary_rank": 1, "dominant": "-3"}}},
    {"maps": {"h.0.q": {"rows": 4, "columns": 4, "before": [[math.nan]], "after": [[1], [1, 2]]}}},
    {"maps": {"h.0.q": {"rows": 4, "columns": 4, "before": [[0.0]], "after": [[1e300]]}}},
    {"maps": {"nowhere": {"rows": 4, "columns": 4, "before": [[0.0]], "after": None}}},
)


@pytest.mark.parametrize("told", HOSTILE)
def test_what_is_wrong_in_a_record_is_left_out(told):
    runs, layout = prepared(replace(tiny(), neurons=told))
    assert runs[0].splits == {}
    for block in neurons_section(runs, layout).blocks:
        for figure in getattr(block, "figures", ()):
            assert re.search(r"\b(nan|inf)\b", figure.svg + figure.caption) is None


def test_hostile_names_are_escaped():
    targets = {f"h.0.{EVIL}": (4, 8), "h.1.$x_{": (4, 8), "h.0.\x00": (4, 8)}
    records = [
        neuron_runs.pilora(name=EVIL, targets=targets, task=EVIL, seed=s, rule=EVIL, maps=3)
        for s in range(3)
    ]
    html = build(records)
    Page(html)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


@settings(deadline=None, derandomize=True, max_examples=8)
@given(
    st.dictionaries(
        st.sampled_from(list(TINY)),
        st.fixed_dictionaries(
            {},
            optional={
                "d_out": st.one_of(st.integers(-1, 6), st.none(), st.floats()),
                "rank": st.integers(-1, 3),
                "supplementary_rank": st.integers(-1, 3),
                "dominant": st.one_of(st.text("0123f-x", max_size=3), st.none()),
                "hits": st.lists(st.integers(-1, 4), max_size=4),
                "looks": st.integers(-1, 4),
            },
        ),
    )
)
def test_any_targets_can_be_reported(targets):
    runs, layout = prepared(replace(tiny(), neurons={"targets": targets}))
    neurons_section(runs, layout)


def test_the_shapes_of_a_large_model_stay_a_light_page():
    records = [neuron_runs.big(seed=s, looks=2) for s in (0, 1)]
    assert len(build(records).encode()) < 3_000_000
    runs, layout = prepared(*records)
    found = partition_bands(runs[0], layout, among=2).data["gate_proj"]
    assert len(found) == 32
    assert all(24 <= len(entry["share"]) <= 256 for entry in found.values())
    assert found["0"]["neurons"] == 14336
