"""The study of regimes on tiny models: its passes, what they say together, and its command."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.regimes import results as regimes_results
from benchmarks.regimes.measure import CASES, QUICK, Case, take
from benchmarks.regimes.readings import (
    BUDGETS,
    NORM,
    STABLE,
    WATERFILL,
    from_text,
    gard,
    planned,
    resolved,
)
from benchmarks.regimes.results import collect, summarise
from benchmarks.regimes.tables import pick, tables
from benchmarks.regimes.views import View, within_shapes
from scipy import stats

from gradrank.core.errors import DataError
from gradrank.core.files import read_json, write_json
from gradrank.core.targets import Target
from gradrank.evidence.stability import rank_agreement, share_in_common
from gradrank.lab.compare.bench import Bench
from gradrank.methods.registry import create

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("regimes")


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder)


@pytest.fixture(scope="module")
def found(folder: Path, bench: Bench) -> dict[str, Any]:
    return collect(QUICK, folder / "regimes.json", bench, folder)


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    return summarise(found)


def targets_of(found: dict[str, Any], model: str) -> list[Target]:
    return [Target(*entry) for entry in found["targets"][model]]


def rows_of(found: dict[str, Any], case: Case, seed: int, **wanted: Any) -> Sequence[Any]:
    return pick(found["passes"][f"{case.name} seed {seed}"]["rows"], **wanted)


def test_rows_lead_to_the_plans_of_the_methods(
    found: dict[str, Any], bench: Bench, folder: Path
) -> None:
    case = QUICK[0]
    measurement = take(case, 0, bench, folder).measurement
    targets = targets_of(found, case.model)
    options = {gard(0.5): ("gard", {"energy": 0.5}), NORM: (NORM, {}), WATERFILL: (WATERFILL, {})}
    for reading, (method, chosen) in options.items():
        (row,) = rows_of(found, case, 0, batches=case.batches, group=1, reading=reading)
        for budget in BUDGETS:
            built = create(method, chosen)
            assessment = built.assess(targets, measurement)
            wanted = built.ranks(targets, assessment, resolved(budget, targets))
            ours = planned(row, targets, budget)
            # Scores are kept with four digits, which may decide a rank that is nearly a tie.
            assert all(abs(ours[name] - wanted[name]) <= (reading == NORM) for name in wanted)
            assert set(ours) == set(wanted)


def test_scores_of_a_view_are_effective_ranks_of_its_gram_matrix(
    found: dict[str, Any], bench: Bench, folder: Path
) -> None:
    case = QUICK[2]
    statistic = take(case, 1, bench, folder).measurement.need_spectrum()
    wanted = statistic.subset(range(4)).effective_ranks(0.9)
    (row,) = rows_of(found, case, 1, batches=4, group=1, reading=gard(0.9))
    assert from_text(row["scores"]) == [wanted[t.name] for t in targets_of(found, case.model)]
    assert row["saturation"] == pytest.approx(sum(wanted.values()) / len(wanted) / 4, abs=1e-4)


def test_between_seeds_is_the_evidence_of_stability(
    found: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    case = QUICK[0]
    targets = targets_of(found, case.model)
    raw = [rows_of(found, case, s, batches=8, group=1, reading=gard(0.9))[0] for s in (0, 1)]
    (told,) = pick(rows, model=case.model, point="start", batches=8, whole=True, reading=gard(0.9))
    for budget in BUDGETS:
        first, second = (planned(row, targets, budget) for row in raw)
        assert told["plans"][budget] == rank_agreement(first, second)
        spent = [{t.name: plan[t.name] * t.cost for t in targets} for plan in (first, second)]
        share = share_in_common(*spent)
        assert share is not None
        assert told["changed"][budget] == pytest.approx(1 - share)
        assert sum(spent[0].values()) <= resolved(budget, targets)
    scores = [from_text(row["scores"]) for row in raw]
    assert told["seeds_within"] == within_shapes(targets, *scores)


def test_readings_are_compared_with_the_norm_of_the_same_calibration(
    found: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    case = QUICK[2]
    wanted = []
    for seed in case.seeds:
        sides = [
            from_text(rows_of(found, case, seed, batches=8, reading=name)[0]["scores"])
            for name in (STABLE, NORM)
        ]
        wanted.append(stats.spearmanr(*sides).statistic)  # pyright: ignore
    told = {row["reading"]: row["with_norm"] for row in pick(rows, model=case.model, whole=True)}
    assert told[NORM] == pytest.approx(1)
    (row,) = pick(rows, model=case.model, point="start", whole=True, reading=STABLE)
    assert row["with_norm"] == pytest.approx(sum(wanted) / len(wanted))


def test_equal_scores_move_nothing_and_agree(found: dict[str, Any]) -> None:
    flat = {**found, "passes": {}}
    for key, told in found["passes"].items():
        many = len(found["targets"][found["cases"][told["case"]]["model"]])
        its = [
            {**row, "scores": " ".join(["4"] * many)}
            for row in told["rows"]
            if row["reading"] == gard(0.9)
        ]
        flat["passes"][key] = {**told, "rows": its}
    for row in summarise(flat):
        assert row["cv"] == 0
        assert row["explained"] is None
        assert row["seeds_within"] is None
        assert set(row["moved"]) == set(BUDGETS if row["whole"] else BUDGETS[1:])
        for budget in row["moved"]:
            assert row["moved"][budget] == row["changed"][budget] == row["differs"][budget] == 0
            assert row["plans"][budget] == 1


def test_points_and_tasks_are_compared_with_another_seed(
    found: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    (told,) = pick(rows, model="tiny-bert", point="head 3", whole=True, reading=STABLE)
    targets = targets_of(found, "tiny-bert")
    start, warm = (
        {
            s: from_text(rows_of(found, case, s, batches=8, reading=STABLE)[0]["scores"])
            for s in (0, 1)
        }
        for case in QUICK[:2]
    )
    pairs = [within_shapes(targets, warm[a], start[b]) or 0 for a, b in ((0, 1), (1, 0))]
    assert told["start_within"] == pytest.approx(sum(pairs) / 2)
    assert told["tasks_within"] is None
    assert all(row["start_within"] is None for row in pick(rows, point="start"))
    # The same passes under the name of another task agree with themselves as seeds do.
    twin = {**found, "cases": dict(found["cases"]), "passes": dict(found["passes"])}
    for case in QUICK[:1]:
        twin["cases"]["twin"] = {**found["cases"][case.name], "task": "twin"}
        for seed in case.seeds:
            own = found["passes"][f"{case.name} seed {seed}"]
            twin["passes"][f"twin seed {seed}"] = {**own, "case": "twin"}
    (again,) = pick(summarise(twin), task="twin", whole=True, reading=STABLE)
    assert again["tasks_within"] == pytest.approx(again["seeds_within"])
    assert again["rest_tasks"] == pytest.approx(again["rest_seeds"])
    assert again["changed_task"] == pytest.approx(again["changed"])


def test_a_provisional_adapter_moves_the_point(
    found: dict[str, Any], folder: Path, bench: Bench
) -> None:
    start, moved = QUICK[2], QUICK[3]
    losses = [found["passes"][f"{case.name} seed 0"]["loss"] for case in (start, moved)]
    assert losses[1] < losses[0]
    one, other = (take(case, 0, bench, folder).measurement for case in (start, moved))
    assert one.targets == other.targets
    name = one.targets[0].name
    assert not torch.allclose(one.gram(name), other.gram(name))


def test_what_is_there_is_not_measured_again(
    found: dict[str, Any], folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = dict(found, passes=dict(found["passes"]))
    lost = kept["passes"].pop(f"{QUICK[1].name} seed 1")
    out = folder / "again.json"
    write_json(out, kept)
    taken: list[tuple[Case, int]] = []

    def spy(case: Case, seed: int, *rest: Any) -> Any:
        taken.append((case, seed))
        return take(case, seed, *rest)

    monkeypatch.setattr(regimes_results, "take", spy)
    again = collect(QUICK, out, bench, folder)
    assert taken == [(QUICK[1], 1)]
    assert again["passes"][f"{QUICK[1].name} seed 1"] == lost
    assert again["missing"] == {}
    taken.clear()
    first = folder / "none.json"
    late = collect(QUICK, first, bench, folder / "empty", minutes=-1)
    assert not taken
    assert set(late["missing"].values()) == {"not run yet"}
    assert read_json(first, "study") == late
    cached = collect(QUICK, first, bench, folder, minutes=-1)
    assert cached["passes"] == found["passes"]
    assert cached["missing"] == {}


def test_a_damaged_measurement_is_taken_again(folder: Path, bench: Bench) -> None:
    case = replace(QUICK[2], batches=4)
    before = take(case, 0, bench, folder)
    (path,) = folder.glob(f"*{case.name.replace(' ', '_')}*seed_0*")
    path.write_bytes(b"no tensors")
    after = take(case, 0, bench, folder)
    name = before.measurement.targets[0].name
    assert torch.equal(before.measurement.gram(name), after.measurement.gram(name))
    assert after.loss == before.loss


def test_absent_data_are_named_without_folders(
    folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(case: Case, *rest: Any) -> Any:
        raise DataError(f"looked in {folder}")

    monkeypatch.setattr(regimes_results, "take", none)
    said: list[str] = []
    out = folder / "absent.json"
    found = collect(QUICK[:1], out, bench, folder, say=said.append)
    assert found["missing"] == {
        f"{QUICK[0].name} seed {s}": "model or data not found" for s in (0, 1)
    }
    assert len(said) == 1
    assert str(folder) not in out.read_text()
    assert "model or data not found" in tables(found, [])["missing"]


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(View(case.batches) and len(case.seeds) >= 3 for case in CASES)


def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "study_regimes", ROOT / "benchmarks" / "study_regimes.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_results_figures_and_tables(
    found: dict[str, Any], rows: list[dict[str, Any]], folder: Path
) -> None:
    module, page, drawn = study(), folder / "page.md", folder / "figures"
    names = tables(found, rows)
    page.write_text("\n".join(f"<!-- {n} -->\n<!-- /{n} -->" for n in names), encoding="utf-8")
    module.main(
        [
            "--redraw",
            "--out",
            str(folder / "regimes.json"),
            "--page",
            str(page),
            "--figures",
            str(drawn),
        ]
    )
    text = page.read_text(encoding="utf-8")
    assert all(table in text for table in names.values())
    assert {path.stem for path in drawn.iterdir()} == {
        "regimes-energy", "regimes-batches", "regimes-tasks"
    }  # fmt: skip
    module.main(["--quick", "--out", str(folder / "quick.json"), "--cache", str(folder)])
    assert read_json(folder / "quick-quick.json", "study")["passes"] == found["passes"]


def test_the_page_holds_the_tables_of_the_results() -> None:
    results, page = ROOT / "results/studies/regimes.json", ROOT / "docs/studies/regimes.md"
    found = read_json(results, "study")
    text = page.read_text(encoding="utf-8")
    for name in ("cases", "missing"):
        assert tables(found, [])[name] in text
