import math
import re
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats

from gradrank.core.errors import OptionError, OutputError
from gradrank.record import RunRecord
from gradrank.report import figures
from gradrank.report.figures_budget import budget_bar, cost_bar
from gradrank.report.figures_energy import effective_rank_heat_map, energy_heat_map
from gradrank.report.figures_ranks import rank_heat_map, rank_histogram, rank_profile
from gradrank.report.figures_scores import reliability_gauge, score_against_rank, spearman
from gradrank.report.figures_spectra import (
    cumulative,
    eigenvalue_spectra,
    relative_energy,
    saturation,
    saturation_sentence,
    singular_values,
)
from gradrank.report.figures_training import loss_curves, loss_difference, smooth, thin
from gradrank.report.reading import distinct_measurements, read_runs
from gradrank.report.sections import gather
from gradrank.report.style import ink_on
from gradrank.report.view import Measured, Measurement
from report import report_cases as cases

SMALL = {"h.0.q": (4, 4), "h.0.v": (4, 2), "h.1.q": (4, 4), "h.1.v": (4, 2)}


def small(ranks=(3, 0, 1, 2), scores=(4.0, 1.0, 2.0, 3.0), budget=60, **changes):
    planned = cases.plan(
        "gard",
        SMALL,
        dict(zip(SMALL, ranks, strict=True)),
        dict(zip(SMALL, scores, strict=True)) if scores else None,
        options={"energy": 0.9},
        budget=budget,
    )
    return cases.record("gard", SMALL, planned, cases.measurement(SMALL), **changes)


def uniform(rank=2, **changes):
    planned = cases.plan("uniform", SMALL, dict.fromkeys(SMALL, rank), budget=60)
    return cases.record("uniform", SMALL, planned, None, **changes)


def prepared(*records):
    material = gather(read_runs(records))
    return material.runs, material.layout


def test_rank_heat_map_holds_every_rank_at_its_place():
    figure = rank_heat_map(*prepared(small()))
    assert figure.data == {
        "rows": ["q", "v"],
        "columns": ["0", "1"],
        "panels": {"gard": [[3.0, 1.0], [0.0, 2.0]]},
    }
    assert "rank 0" in figure.caption


def test_a_constant_allocation_is_said_and_not_drawn():
    figure = rank_heat_map(*prepared(uniform(), small()))
    assert list(figure.data["panels"]) == ["gard"]
    assert "Not drawn: uniform (rank 2 everywhere)." in figure.caption
    alone = rank_heat_map(*prepared(uniform()))
    assert list(alone.data["panels"]) == ["uniform"]


def test_a_missing_target_leaves_an_empty_cell():
    names = {"h.0.q": (4, 4), "h.0.v": (4, 2), "h.1.q": (4, 4)}
    record = cases.record("gard", names, cases.plan("gard", names, dict.fromkeys(names, 1)))
    assert rank_heat_map(*prepared(record)).data["panels"]["gard"][1] == [1.0, None]


def test_numbers_in_cells_only_where_they_fit():
    def numbers(layers):
        record = cases.demo_records(layers)[1]
        return rank_heat_map(*prepared(record)).svg.count("text-anchor:middle") - layers

    assert numbers(12) > 12 * 7 - 5
    assert numbers(100) < 40


def test_rank_profile_follows_each_type_over_layers():
    figure = rank_profile(*prepared(small(), uniform()))
    assert figure.data["q"]["gard"] == {"layers": [0, 1], "ranks": [3, 1]}
    assert figure.data["v"]["uniform"] == {"layers": [0, 1], "ranks": [2, 2]}
    assert "q the most (mean rank 2)" in figure.caption
    assert "v the least (1)" in figure.caption


def test_rank_histogram_counts_targets():
    figure = rank_histogram(prepared(small(ranks=(3, 3, 1, 3)), uniform())[0])
    assert figure.data == {"gard": {1: 1, 3: 3}, "uniform": {2: 4}}


def test_equal_allocations_are_drawn_once():
    runs, layout = prepared(small(seed=0), small(seed=1))
    assert list(rank_heat_map(runs, layout).data["panels"]) == ["gard (2 runs)"]


def test_budget_bar_adds_up_with_its_slack():
    figure = budget_bar(*prepared(small(budget=60)))
    entry = figure.data["gard"]
    assert entry["segments"] == {"q": 4 * 8, "v": 2 * 6}
    assert sum(entry["segments"].values()) + entry["slack"] == entry["budget"] == 60
    assert "27\xa0%" in figure.caption


def test_parameters_are_recomputed_and_not_trusted():
    record = small(budget=10)
    record.plan["parameters"] = 1
    record.plan["targets"]["h.0.q"]["parameters"] = 1
    figure = budget_bar(*prepared(record))
    assert figure.data["gard"]["slack"] == 10 - 44
    assert "spends more than its budget" in figure.caption


def test_module_types_beyond_the_palette_share_one_entry():
    names = {f"h.0.m{i}": (2, 2) for i in range(30)}
    record = cases.record("gard", names, cases.plan("gard", names, dict.fromkeys(names, 1)))
    segments = budget_bar(*prepared(record)).data["gard"]["segments"]
    assert len(segments) == 12
    assert segments["other types"] == (30 - 11) * 4


def test_cost_bar_leaves_out_what_is_unknown():
    record = small(cost={"train_seconds": 3.0, "measure_seconds": 0.0, "steps": 3})
    assert cost_bar(prepared(record)[0]).data == {"gard": {"train": 3.0}}


def test_cumulative_energy_by_hand():
    assert cumulative([6.0, 3.0, 1.0]) == pytest.approx([0.6, 0.9, 1.0])
    assert cumulative([0.0, 0.0]) == []
    assert relative_energy([1.0, 10.0]) == pytest.approx([0.0, -2.0])
    assert relative_energy([]) == []


def test_spectra_hold_every_target_the_median_and_alpha():
    runs, layout = prepared(small())
    figure = eigenvalue_spectra(runs[0].measurement, layout)
    assert figure.data["alpha"] == 0.9
    curves = figure.data["targets"]["q"]
    assert set(curves) == {"h.0.q", "h.1.q"}
    raw = runs[0].record.measurement["targets"]["h.0.q"]["eigenvalues"]
    assert curves["h.0.q"] == pytest.approx(list(np.cumsum(raw) / sum(raw)))
    expected = np.median(list(curves.values()), axis=0)
    assert figure.data["median"]["q"] == pytest.approx(list(expected))


def test_singular_values_are_a_figure_of_their_own():
    runs, layout = prepared(small())
    assert singular_values(runs[0].measurement, layout).name == "singular-values"
    bare = replace(runs[0].record, measurement=cases.measurement(SMALL, singular=False))
    assert singular_values(prepared(bare)[0][0].measurement, layout) is None


def test_many_curves_become_a_band_and_stay_light():
    record = cases.demo_records(100)[1]
    runs, layout = prepared(record)
    figure = eigenvalue_spectra(runs[0].measurement, layout)
    assert len(figure.data["targets"]["q_proj"]) == 100
    assert len(figure.svg) < 120_000


def measured(ranks, batches=10, alpha=0.9):
    targets = {f"h.{i}.q": Measured(effective_rank=r) for i, r in enumerate(ranks)}
    return Measurement(targets, {"batches": batches}, alpha=alpha)


def test_saturation_by_hand():
    found = saturation(measured([9, 9, 3]))
    assert found["ceiling"] == 9
    assert found["mean"] == pytest.approx(7.0)
    assert found["at_ceiling"] == 2
    assert found["share"] == pytest.approx(7 / 9)
    assert "close to saturation" not in saturation_sentence(measured([9, 9, 3]))
    assert "close to saturation" in saturation_sentence(measured([9, 9, 8]))


def test_the_ceiling_is_what_a_flat_spectrum_reaches():
    for batches in range(1, 40):
        for alpha in (0.5, 0.56, 0.8, 0.9, 0.95, 1.0):
            share = np.arange(1, batches + 1) / batches
            flat = int(np.argmax(share >= alpha - 1e-12)) + 1
            assert saturation(measured([1], batches, alpha))["ceiling"] == flat


def test_saturation_is_unknown_without_a_threshold():
    assert saturation(measured([1], alpha=None)) is None
    assert "unknown" in saturation_sentence(measured([1], alpha=None))


def test_effective_ranks_are_drawn_against_their_ceiling():
    runs, layout = prepared(small())
    figure = effective_rank_heat_map(runs[0].measurement, layout)
    told = runs[0].record.measurement["targets"]
    assert figure.data["panels"]["effective rank"][0][1] == told["h.1.q"]["effective_rank"]
    assert figure.data["saturation"]["ceiling"] == math.ceil(0.9 * 16)


def test_energy_is_logarithmic_and_silent_targets_stay_empty():
    targets = {"h.0.q": Measured(energy=100.0), "h.1.q": Measured(energy=0.0)}
    _, layout = prepared(small())
    figure = energy_heat_map(Measurement(targets), layout)
    assert figure.data["panels"]["energy"][0] == [2.0, None]
    assert "1 without any gradient" in figure.caption


def test_score_against_rank_names_spearman():
    figure = score_against_rank(*prepared(small()))
    assert figure.data["gard"]["points"]["q"] == [[4.0, 3], [2.0, 1]]
    expected = scipy.stats.spearmanr([4, 1, 2, 3], [3, 0, 1, 2]).statistic
    assert figure.data["gard"]["spearman"] == pytest.approx(expected)
    assert "1.00 for gard" in figure.caption


@pytest.mark.parametrize("seed", range(5))
def test_spearman_equals_scipy_with_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 40).tolist(), rng.integers(0, 4, 40).tolist()
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


def test_spearman_is_undefined_for_constants_and_two_points():
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_reliability_gauge_holds_the_numbers():
    runs, _ = prepared(*cases.demo_records(2))
    figure = reliability_gauge(runs)
    assert figure.data["gard"] == {"split_half": 0.71, "within_shape": 0.58, "threshold": 0.5}
    assert "uniform" not in figure.data


def test_loss_curves_hold_what_was_recorded():
    record = small(losses={"train": [[1, 3.0], [2, 2.0]], "eval": [[2, 2.5]]})
    curves = loss_curves(prepared(record)[0]).data["gard"]
    assert curves == {"train": [[1, 3.0], [2, 2.0]], "smoothed": [], "eval": [[2, 2.5]]}


def test_smoothing_and_thinning_keep_the_mean():
    points = [(float(i), float(i % 3)) for i in range(1200)]
    thinned = thin(points)
    assert len(thinned) == 400
    assert np.mean([y for _, y in thinned]) == pytest.approx(1.0)
    assert smooth([[i, 5.0] for i in range(50)]) == [[i, 5.0] for i in range(50)]
    assert smooth([[0, 0.0], [1, 3.0], [2, 0.0]])[1] == [1, 1.0]


def test_difference_to_uniform_pairs_seeds_and_steps():
    runs, _ = prepared(
        uniform(seed=0, losses={"eval": [[0, 5.0], [10, 4.0], [20, 3.0]]}),
        uniform(seed=1, losses={"eval": [[0, 6.0], [10, 5.0]]}),
        small(seed=1, losses={"eval": [[0, 6.0], [10, 4.5], [20, 4.0]]}),
    )
    assert loss_difference(runs).data == {"gard": [[0, 0.0], [10, -0.5]]}


def test_unfinished_runs_are_not_compared():
    runs, _ = prepared(uniform(), small(status="interrupted"))
    assert loss_difference(runs) is None
    assert "gard (interrupted)" in loss_curves(runs).data


def test_two_methods_share_the_figures_of_one_measurement():
    runs = read_runs(cases.demo_records(2))
    assert [m.runs for m in distinct_measurements(runs)] == [("gard", "waterfill")]


def test_distinct_measurements_have_distinct_figures():
    first, second = small(), small()
    second = replace(second, name="other", measurement=cases.measurement(SMALL, seed=5))
    names = [figure.name for figure in figures([first, second, replace(first, name="again")])]
    assert "eigenvalue-spectra" in names
    assert "eigenvalue-spectra-2" in names
    assert "eigenvalue-spectra-3" not in names
    assert len(set(names)) == len(names)


def test_merged_measurements_keep_what_either_knows():
    bare = replace(small(), measurement=cases.measurement(SMALL, singular=False))
    runs = read_runs([bare, replace(small(), name="full")])
    (merged,) = distinct_measurements(runs)
    assert merged.alpha == 0.9
    assert all(m.singular_values for m in merged.targets.values())


def test_an_unnamed_threshold_is_taken_only_if_it_explains_the_ranks():
    plain = replace(small(), plan=None)
    assert read_runs([plain])[0].measurement.alpha == 0.9
    plain.measurement["targets"]["h.1.v"]["effective_rank"] += 1
    assert read_runs([plain])[0].measurement.alpha is None


def test_nothing_to_draw_is_no_figure():
    runs, layout = prepared(RunRecord("empty", "train"))
    assert rank_heat_map(runs, layout) is None
    assert rank_profile(runs, layout) is None
    assert rank_histogram(runs) is None
    assert budget_bar(runs, layout) is None
    assert cost_bar(runs) is None
    assert score_against_rank(runs, layout) is None
    assert reliability_gauge(runs) is None
    assert loss_curves(runs) is None
    assert figures([RunRecord("empty", "plan")]) == []


def test_svg_is_whole_accessible_and_without_outside_references():
    for figure in figures([small(), uniform()]):
        root = ElementTree.fromstring(figure.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == figure.title
        assert root[0].tag.endswith("title")
        assert "<?xml" not in figure.svg
        assert "<metadata" not in figure.svg
        links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', figure.svg)
        assert all((href or url).startswith(f"#{figure.name}-") for href, url in links)
        ids = [e.get("id") for e in root.iter() if e.get("id")]
        assert all(name.startswith(f"{figure.name}-") for name in ids)
        assert len(set(ids)) == len(ids)


def test_dollar_signs_scripts_and_missing_glyphs_are_plain_text():
    names = {"h.0.$\\frac{1}$": (4, 4), "h.0.<script>x</script>": (4, 4), "h.0.漢字😀": (4, 4)}
    record = cases.record("_under", names, cases.plan("gard", names, dict.fromkeys(names, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = "".join(figure.svg for figure in figures([record]))
    assert "$\\frac{1}$" in svg
    assert "漢字😀" in svg
    assert "_under" in svg
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_the_users_matplotlib_settings_neither_matter_nor_change():
    expected = rank_heat_map(*prepared(small())).svg
    with mpl.rc_context({"font.size": 30.0, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert rank_heat_map(*prepared(small())).svg == expected
        assert dict(mpl.rcParams) == before


def test_ink_can_be_read_on_every_colour():
    for name in ("viridis", "cividis"):
        for x in np.linspace(0, 1, 50):
            rgba = mpl.colormaps[name](x)
            ink = 1.0 if ink_on(rgba) == "#ffffff" else 0.0
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba]
            light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            contrast = (max(ink, light) + 0.05) / (min(ink, light) + 0.05)
            assert contrast >= 4.5


@pytest.mark.parametrize(
    ("ending", "magic"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_a_figure_saves_itself(tmp_path, ending, magic):
    figure = rank_heat_map(*prepared(small()))
    path = tmp_path / f"figure.{ending}"
    figure.save(path)
    content = path.read_bytes()
    assert content.startswith(magic)
    with pytest.raises(OutputError, match="exists already"):
        figure.save(path)
    figure.save(path, overwrite=True)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unknown_format_is_refused_by_name(tmp_path):
    figure = rank_heat_map(*prepared(small()))
    with pytest.raises(OptionError, match=r"'pgn' is unknown.*Did you mean 'png'"):
        figure.save(tmp_path / "figure.pgn")
    assert not list(tmp_path.iterdir())
