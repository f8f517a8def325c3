"""Arithmetic of the path study against closed forms and enumeration; the measuring rig, tiny."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.igu_quadrature import findings as path_findings
from benchmarks.igu_quadrature import noise as path_noise
from benchmarks.igu_quadrature import ranking as path_ranking
from benchmarks.igu_quadrature import results as path_results
from benchmarks.igu_quadrature import study as path_study
from benchmarks.igu_quadrature.collect import QUICK, Kept, Measured, StudySize
from benchmarks.igu_quadrature.figures import study_figures
from benchmarks.igu_quadrature.measure import PathSettings, Rig
from benchmarks.igu_quadrature.scores import FORMS, Pool, estimators, split_half
from benchmarks.igu_quadrature.tables import refresh, tables
from benchmarks.pages import markdown

from gradrank.core.errors import DataError, OptionError
from gradrank.methods.importance import ElementImportance
from gradrank.ops import quadrature
from gradrank.signals.path import at_point
from gradrank.signals.sensitivity import Observation

NODES = path_study.chebyshev_points(9)
SETTINGS, SIZE = QUICK


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    return Measured(SETTINGS, SIZE, folder)


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    return path_results.study(SETTINGS, SIZE, folder)


# Quadrature and interpolation.


def test_interpolation_gives_back_polynomials_of_the_degree_of_its_nodes() -> None:
    points = torch.linspace(0, 1, 23, dtype=torch.float64)
    x = torch.tensor(NODES, dtype=torch.float64)
    rows = path_study.interpolation(NODES, points.tolist())
    for degree in range(len(NODES)):
        assert torch.allclose(rows @ x**degree, points**degree, atol=1e-13)
    missed = rows @ x ** len(NODES) - points ** len(NODES)
    assert missed.abs().max() > 1e-6


def test_interpolation_at_a_node_is_its_value() -> None:
    rows = path_study.interpolation(NODES, NODES)
    assert torch.equal(rows, torch.eye(len(NODES), dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1_and_no_further(count: int) -> None:
    rule = path_study.gauss_legendre(count)

    def integral(degree: int) -> float:
        return sum(w * p**degree for p, w in zip(rule.points, rule.weights, strict=True))

    for degree in range(2 * count):
        assert integral(degree) == pytest.approx(1 / (degree + 1), abs=1e-13)
    assert abs(integral(2 * count) - 1 / (2 * count + 1)) > 1e-8


def test_the_weights_of_the_nodes_integrate_their_polynomials() -> None:
    x = torch.tensor(NODES, dtype=torch.float64)
    for degree in range(len(NODES)):
        assert float(path_study.exact_weights(NODES) @ x**degree) == pytest.approx(
            1 / (degree + 1), abs=1e-13
        )


def quartic(many: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients at the nodes of L(w) = sum a w^4 on the path α w, weights, exact integrals."""
    a = torch.rand(many, generator=generator(), dtype=torch.float64) + 0.5
    w = torch.randn(many, generator=generator(1), dtype=torch.float64)
    alpha = torch.tensor(NODES, dtype=torch.float64)
    return 4 * a * w**3 * alpha[:, None] ** 3, w, a * w**3


def test_on_a_quartic_loss_the_slope_over_segments_is_minus_two() -> None:
    values, w, exact = quartic()
    counts = [1, 2, 4, 8, 16, 32]
    rules = [path_study.weights_of(quadrature.trapezoid(n), NODES) for n in counts]
    groups = torch.arange(12) % 4
    squares, sizes = path_study.squared_errors(values, rules, exact, w, groups)
    # The trapezoid rule integrates α^3 to 1/4 + 1/(4 N^2).
    errors = (squares.sum(1) / sizes.sum()).sqrt()
    assert torch.allclose(errors, torch.tensor([1 / n**2 for n in counts]).double())
    slope = path_study.fit_slope(counts, squares, sizes)
    assert slope.slope == pytest.approx(-2, abs=1e-9)
    assert slope.low == pytest.approx(-2, abs=1e-9)
    assert slope.high == pytest.approx(-2, abs=1e-9)


def test_a_slope_leaves_out_what_is_rounding_and_needs_two_counts() -> None:
    counts = [1, 2, 4, 8]
    errors = torch.tensor([1.0, 0.25, 0.0625, 0.06], dtype=torch.float64)
    squares, sizes = errors[:, None].square(), torch.ones(1, dtype=torch.float64)
    assert path_study.fit_slope(counts, squares, sizes).slope > -1.9
    kept = path_study.fit_slope(counts, squares, sizes, floor=0.0122)
    assert kept.used == (1, 2, 4)
    assert kept.slope == pytest.approx(-2)
    with pytest.raises(OptionError, match="a slope needs two"):
        path_study.fit_slope(counts, squares, sizes, floor=0.1)


# Noise.


def pool(batches: int = 5, many: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Random smooth gradients: a cubic in α per mini-batch and element."""
    alpha = torch.tensor(NODES, dtype=torch.float64)
    powers = torch.stack([alpha**k for k in range(4)])
    factors = torch.randn(batches, many, 4, generator=generator(2), dtype=torch.float64)
    values = torch.einsum("bnd,dk->bkn", factors, powers)
    return values, torch.randn(many, generator=generator(3), dtype=torch.float64)


def test_components_add_up_to_the_enumerated_squared_error_of_one_look() -> None:
    values, w = pool()
    exact = path_study.exact_weights(NODES)
    truth = (exact @ values.mean(0)) * w
    for draws in path_noise.all_draws(NODES, 6).values():
        parts = path_study.components(values, draws.rows, draws.chances, exact, w)
        expected = 0.0
        for batch, (row, chance) in itertools.product(
            values, zip(draws.rows, draws.chances, strict=True)
        ):
            missed = (row @ batch) * w - truth
            expected += float(chance * missed.square().sum()) / len(values)
        assert parts.error(1) ** 2 == pytest.approx(expected / float(truth.square().sum()))
        assert min(parts.bias, parts.data, parts.alpha, parts.both) >= 0


def test_without_differences_between_mini_batches_there_is_no_variance_of_data() -> None:
    values, w = pool()
    draws = path_noise.all_draws(NODES, 6)["unbiased drawn N=6"]
    same = values[:1].expand(4, -1, -1)
    parts = path_study.components(
        same, draws.rows, draws.chances, path_study.exact_weights(NODES), w
    )
    assert parts.data == pytest.approx(0, abs=1e-20)
    assert parts.both == pytest.approx(0, abs=1e-20)
    assert parts.alpha > 0.01
    # The trapezoid rule with six segments is what the draws stand for.
    assert 0 < parts.bias < 0.01


def test_the_simulated_error_follows_the_predicted_one() -> None:
    values, w = pool()
    exact = path_study.exact_weights(NODES)
    for name in ("grid N=1", "stochastic N=6", "unbiased drawn N=6"):
        draws = path_noise.all_draws(NODES, 6)[name]
        parts = path_study.components(values, draws.rows, draws.chances, exact, w)
        draw = path_noise.drawer(draws, NODES, len(values), stratified=False)
        for looks in (1, 8, 64):
            seen = path_study.simulate(values, exact, w, draw, looks, 4000, 1)
            assert seen == pytest.approx(parts.error(looks), rel=0.05), (name, looks)


def test_the_slope_over_mini_batches_is_minus_a_half_where_there_is_no_bias() -> None:
    values, w = pool()
    found = path_noise.over_looks(values, w, NODES, (1, 4, 16, 64), 20, repeats=60)
    unbiased = found["estimators"]["unbiased drawn N=20"]
    low, high = unbiased["interval"]
    assert low < -0.5 < high
    assert high - low < 0.1
    biased = found["estimators"]["instantaneous"]
    assert biased["slope"] > high + 0.1
    assert biased["errors"][-1] > 2 * unbiased["errors"][-1]


def test_stratified_points_leave_only_the_variance_of_the_data() -> None:
    values, w = pool()
    exact = path_study.exact_weights(NODES)
    same = values[:1].expand(4, -1, -1)
    draws = path_noise.all_draws(NODES, 6)["unbiased drawn N=8"]
    errors = {
        stratified: path_study.simulate(
            same, exact, w, path_noise.drawer(draws, NODES, 4, stratified), 8, 300, 2
        )
        for stratified in (False, True)
    }
    assert errors[True] < 0.5 * errors[False]


def test_the_printed_weights_expect_half_the_ends_and_half_the_interior() -> None:
    """The missing factor N - 1: half of the weight lies on the ends, for every N."""
    for n in (4, 10, 20):
        draws = path_noise.all_draws(NODES, n)[f"stochastic N={n}"]
        ends = path_study.weights_of(quadrature.trapezoid(1), NODES)
        inner = quadrature.Rule(
            tuple(k / n for k in range(1, n)), tuple(1 / (n - 1) for _ in range(1, n))
        )
        expected = 0.5 * ends + 0.5 * path_study.weights_of(inner, NODES)
        assert torch.allclose(draws.rows.mean(0), expected, atol=1e-13)


def test_the_unbiased_draws_expect_the_trapezoid_rule() -> None:
    for name, draws in path_noise.all_draws(NODES, 5).items():
        if name.startswith("unbiased"):
            n = int(name.rpartition("=")[2])
            expected = path_study.weights_of(quadrature.trapezoid(n), NODES)
            assert torch.allclose(draws.chances @ draws.rows, expected, atol=1e-13)


def test_the_error_of_the_best_multiple_is_a_sine() -> None:
    x = torch.tensor([1.0, 0.0])
    assert path_study.scaled_error(7 * x, x) == pytest.approx(0, abs=1e-12)
    assert path_study.scaled_error(torch.tensor([1.0, 1.0]), x) == pytest.approx(math.sqrt(0.5))


# The rig.


def test_the_rig_measures_the_derivative_of_the_loss_along_the_path() -> None:
    rig = Rig(SETTINGS, "float64")
    rig.train(3)
    batch, step = rig.pool(1)[0], 1e-5
    _, lam = rig.flat_weights()
    for alpha in (0.0, 0.37, 1.0):
        found = rig.gradients_at(batch, [alpha])
        near = rig.gradients_at(batch, [alpha - step, alpha + step])["losses"]
        slope = float(near[1] - near[0]) / (2 * step)
        assert float(found["lam"][0] @ lam) == pytest.approx(slope, rel=1e-6, abs=1e-10)


def test_the_published_code_sees_the_gradient_times_the_scale() -> None:
    rig = Rig(SETTINGS, "float64")
    rig.train(3)
    batch, scale = rig.pool(1)[0], 0.4**3
    handles = [
        branch.outer.register_forward_hook(lambda _m, _a, output: output * scale)
        for branch in rig.branches
    ]
    code = rig.gradients_at(batch, [1.0])["grads"][0]
    for handle in handles:
        handle.remove()
    nodes = path_study.chebyshev_points(17)
    values = rig.gradients_at(batch, nodes)["grads"]
    row = scale * path_study.weights_of(quadrature.Rule((scale,), (1.0,)), nodes)
    assert torch.allclose(row @ values, code, rtol=1e-6, atol=1e-12)
    compared = {e.name: e for e in estimators(nodes)}
    drawn = [compared["as-code N=20"].rule(0, index) for index in range(60)]
    scales = {round(float(each.sum()), 9) for each in drawn}
    assert scales <= {round((k / 20) ** 3, 9) for k in range(1, 21)}
    assert len(scales) > 10


def test_taking_directions_out_is_undone(measured: Measured) -> None:
    rig = measured.rig
    held = rig.held_out(2)
    before = {name: value.clone() for name, value in rig.weights().items()}
    whole = rig.losses_without({}, held)
    name = rig.layout.targets[0].name
    assert not torch.equal(rig.losses_without({name: [0, 1]}, held), whole)
    assert all(torch.equal(before[key], value) for key, value in rig.weights().items())
    everything = {n: list(range(SETTINGS.rank)) for n in rig.layout.names}
    with at_point(rig.branches, 0.0):
        base = rig.losses_without({}, held)
    assert torch.allclose(rig.losses_without(everything, held), base)


def test_a_layout_splits_what_it_joined(measured: Measured) -> None:
    layout = measured.rig.layout
    flat = torch.arange(layout.size)
    assert torch.equal(layout.join(layout.split(flat)), flat)
    factors = layout.factor_of()
    for name, factor, place, shape in layout.parts():
        assert factors[place].unique().tolist() == [("A", "B", "lam").index(factor)], name
        assert place.stop - place.start == math.prod(shape)


def test_no_stored_block_is_refused() -> None:
    with pytest.raises(OptionError, match="choose less"):
        Rig(replace(SETTINGS, every=40))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept, calls = Kept(tmp_path, SETTINGS), []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"x": torch.ones(2)}

    assert torch.equal(kept.get("a", make)["x"], kept.get("a", make)["x"])
    assert len(calls) == 1
    other = Kept(tmp_path, replace(SETTINGS, lr=2e-2))
    assert other.folder != kept.folder


# Scores.


def test_scores_are_those_of_the_methods_own_importance(measured: Measured) -> None:
    """A grid looked at through interpolation scores as gradients at the grid's points do."""
    held, _, _ = path_ranking.pool_of(measured)
    grid = next(e for e in estimators(measured.nodes) if e.name == "grid N=4")
    importance = ElementImportance(0.85, 0.85, "ratio", 1e-12, lam_by_size=True)
    weights = held.layout.split(held.weights)
    rule = quadrature.trapezoid(4)
    for index in (2, 0, 3):
        batch = measured.rig.pool(index + 1)[index]
        values = measured.rig.gradients_at(batch, rule.points)["grads"]
        flat = torch.tensor(rule.weights) @ values
        importance.take(Observation(held.layout.split(flat), weights))
    lam = {name: found["lam"] for name, found in weights.items()}
    targets = held.layout.targets
    direct = importance.scores(targets, lam)
    found = held.scores(grid, [2, 0, 3], 0)["ratio"]
    assert torch.allclose(found, torch.cat([direct[target.name] for target in targets]), rtol=2e-3)


def test_halves_of_equal_mini_batches_agree_entirely(measured: Measured) -> None:
    held, _, _ = path_ranking.pool_of(measured)
    same = Pool(held.layout, held.grads[:1].expand(4, -1, -1), held.weights)
    fixed = [e for e in estimators(measured.nodes) if e.name in {"grid N=4", "instantaneous"}]
    found = split_half(same, fixed, 2, None, {})
    for table in found.values():
        for form in ("mean", "product", "attribution"):
            assert table[form]["halves"] == pytest.approx([1.0, 1.0])


def test_a_single_look_leaves_the_ratio_without_information(measured: Measured) -> None:
    """Mean and deviation of one look are the same multiple of it, whatever it saw."""
    held, _, _ = path_ranking.pool_of(measured)
    last = next(e for e in estimators(measured.nodes) if e.name == "instantaneous")
    ratio = held.scores(last, [0], 0)["ratio without |λ|"]
    assert torch.allclose(ratio, torch.full_like(ratio, 2 / 0.85), rtol=1e-2)


# The whole.


def test_the_whole_study_is_plain_data_for_tables_and_figures(found: dict, tmp_path: Path) -> None:
    assert found["convergence"]["slopes"]["λ"]["from 4"]["slope"] == pytest.approx(-2, abs=0.1)
    assert max(found["convergence"]["rounding"].values()) < 1e-4
    assert set(found["rankings"]["equal_cost"]["grid N=4"]) == set(FORMS)
    made = tables(found)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n" + "".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in made) + "after\n"
    )
    refresh(page, found)
    once = page.read_text()
    assert all(table in once for table in made.values())
    refresh(page, found)
    assert page.read_text() == once
    figures = study_figures(found)
    assert len({figure.name for figure in figures}) == 7
    assert all(figure.svg.startswith("<svg") for figure in figures)


def test_a_page_without_a_place_is_refused(found: dict, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(DataError, match="does not exist"):
        refresh(page, found)
    page.write_text("nothing")
    with pytest.raises(DataError, match="no place for table 'setting'"):
        refresh(page, found)


def test_cells_may_hold_bars() -> None:
    assert markdown(("a",), [("|λ|",)]).splitlines()[-1] == r"| \|λ\| |"


def test_without_a_later_checkpoint_nothing_is_said_of_it(folder: Path, measured: Measured) -> None:
    size = replace(SIZE, later_steps=0)
    assert list(Measured(SETTINGS, size, folder).later()) == []
    assert isinstance(size, StudySize)
    assert isinstance(SETTINGS, PathSettings)
    before = measured.rig.weights()
    assert len(list(measured.later())) == SIZE.later_pool
    assert all(torch.equal(before[key], value) for key, value in measured.rig.weights().items())


def test_parts_say_which_target_an_element_belongs_to(measured: Measured) -> None:
    flat, lam = measured.rig.flat_weights()
    layout = measured.rig.layout
    q, p, directions = path_findings.parts(layout, flat, lam)
    split = layout.split(flat)
    last = layout.targets[-1].name
    at = q.groups == len(layout.targets) - 1
    assert torch.equal(q.weights[at], split[last]["A"].reshape(-1))
    at = p.groups == 0
    assert torch.equal(p.weights[at], split[layout.targets[0].name]["B"].reshape(-1))
    assert torch.equal(directions.weights, lam)
