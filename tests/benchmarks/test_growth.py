"""The study of growth: exponents, errors against exact gradients, resuming, tables and figures."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.growth_figures import figures
from benchmarks.growth_tables import NOT_YET, along, axes_of, exponent, tables

from benchmarks import (
    growth_allocation,
    growth_error,
    growth_measuring,
    growth_memory,
    growth_points,
    growth_training,
    study_growth,
)
from gradrank.core.targets import Target

ROOT = Path(__file__).resolve().parents[2]


def test_the_exponent_of_a_power_law_is_found() -> None:
    sizes = [2, 4, 16, 64]
    found = exponent(sizes, [3 * size**1.5 for size in sizes])
    assert found is not None
    assert math.isclose(found, 1.5)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 0.0, 3.0], [1.0, -1.0, 3.0]])
def test_no_exponent_is_made_up(values: list[float]) -> None:
    assert exponent([1, 2, 4][: len(values)], values) is None


@pytest.fixture(scope="module")
def grams() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(6, 20, generator=generator).double() for name in "abc"}
    return {name: row @ row.T for name, row in rows.items()}


TARGETS = [Target("a", 16, 16), Target("b", 16, 32), Target("c", 32, 16)]


def test_equal_gram_matrices_agree_wholly(grams: dict[str, torch.Tensor]) -> None:
    row = growth_error.agreement(TARGETS, grams, grams)
    assert row["gram_error"] == row["gram_error_worst"] == 0
    assert row["0.9"]["equal"] == 1
    assert row["0.9"]["apart_most"] == 0
    assert row["0.9"]["plan_elsewhere"] == 0


def test_errors_are_relative_and_the_worst_target_is_named(grams: dict[str, torch.Tensor]) -> None:
    one_direction = torch.zeros(6, 6).double()
    one_direction[0, 0] = 1
    wrong = {"a": 1.5 * grams["a"], "b": grams["b"], "c": one_direction}
    row = growth_error.agreement(TARGETS, grams, wrong)
    assert row["worst_target"] == "c"
    off = float((one_direction - grams["c"]).norm() / grams["c"].norm())
    assert row["gram_error"] == pytest.approx((0.5 + off) / 3, abs=1e-5)
    assert row["0.9"]["equal"] == pytest.approx(2 / 3, abs=1e-5)
    assert row["0.9"]["plan_elsewhere"] > 0


def test_singular_values_are_compared_one_by_one() -> None:
    exact = {name: torch.linspace(2, 1, 16).double() for name in "abc"}
    found = {name: (values * 1.1)[:12] for name, values in exact.items()}
    row = growth_error.fidelity(TARGETS, exact, found)
    assert row["first"] == row["first_worst"] == pytest.approx(0.1)
    assert row["leading"] == row["second_half"] == pytest.approx(0.1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole study at its quick sizes, in one process."""
    out = tmp_path_factory.mktemp("growth") / "growth.json"
    with pytest.MonkeyPatch.context() as patch:
        # Starting a process takes longer than all the rest.
        patch.setattr(growth_memory, "row_of", _memory_row)
        study_growth.main(["--quick", "--out", str(out)])
    return out.with_name("growth-quick.json")


def _memory_row(point: growth_points.Point) -> dict[str, Any]:
    row: dict[str, Any] = vars(point).copy()
    for variant in growth_points.VARIANTS:
        row |= growth_memory.variant_row(variant, point)
    return row


def test_a_sketch_as_wide_as_the_model_is_exact_but_for_the_stored_fold(study: Path) -> None:
    parts = study_growth.known(study)["parts"]
    [row] = parts["error"].values()
    errors = {(e["sketch"], e["k"], e["seed"]): e["gram_error"] for e in row["spectra"]}
    assert errors["fold", 64, 0] < 0.2
    assert errors["fold", 4, 0] > 2 * errors["fold", 64, 0]


def test_every_part_has_its_tables_and_its_figure(study: Path) -> None:
    parts = study_growth.known(study)["parts"]
    assert set(parts) == set(study_growth.PARTS)
    made = tables(parts)
    assert NOT_YET not in made.values()
    page = (ROOT / "docs/studies/growth.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in made)
    drawn = {figure.name for figure in figures(parts)}
    assert len(drawn) == len(parts)
    assert set(re.findall(r"figures/([\w-]+)\.svg", "".join(made.values()))) == drawn


def test_nothing_is_done_twice_unless_asked(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("done twice")

    before = study.read_bytes()
    monkeypatch.setattr(growth_allocation, "grown", refuse)
    arguments = ["--quick", "--only", "allocation", "--out", str(study.with_name("growth.json"))]
    study_growth.main(arguments)
    assert study.read_bytes() == before
    with pytest.raises(AssertionError, match="done twice"):
        study_growth.main([*arguments, "--again"])


def test_without_results_the_page_says_so() -> None:
    assert set(tables({}).values()) == {NOT_YET}
    assert figures({}) == []


def test_only_one_size_grows_along_an_axis(study: Path) -> None:
    rows = study_growth.known(study)["parts"]["time"]
    axes = growth_measuring.QUICK
    assert [row["tokens"] for row in along(rows, "tokens", axes_of(rows))] == [32, 64]
    assert [row["width"] for row in along(rows, "width", axes_of(rows))] == [axes.base.width]


def test_a_slow_kind_is_not_tried_at_the_next_size() -> None:
    size = growth_allocation.AllocationSize((2, 4, 8), (4,), rank=4, count=2, patience=0)
    row = growth_allocation.grown(size, "proportional", "all equal")
    assert row["targets"][0]["seconds"] > 0
    assert [point["seconds"] for point in row["targets"][1:]] == [None, None]


def test_odd_costs_share_no_divisor() -> None:
    targets, gains = growth_allocation.problem("equal, odd costs", 16, 8)
    assert math.gcd(*(target.cost for target in targets)) == 1
    assert set(gains[targets[0].name]) == {1.0}


def test_decisions_are_counted(study: Path) -> None:
    rows = study_growth.known(study)["parts"]["training"]
    assert {row["method"] for row in rows.values()} == {"gard-dynamic", "igu"}
    assert all(row["decisions"] for row in rows.values())
    assert growth_training.FULL.steps % max(growth_training.FULL.intervals) == 0
