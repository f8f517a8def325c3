"""Plans with neuron partitions on the command line: planned, shown, edited, trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.cli_cases import SHORT, TINY, invoke
from gradrank.cli.tables import split_words
from gradrank.core.partition import NeuronPartition
from gradrank.core.plan import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hybrid") / "plan"
    made = ("--method", "hybrid", "--budget", "uniform:2", "--batches", 4)
    result = invoke("plan", *TINY, *made, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["plan"] == Plan.load(out / "plan.json").to_dict()
    return out


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    found = Plan.load(folder / "plan.json")
    assert found.partitions, "this model must have something to show"
    return found


def test_show_tells_every_partition_and_what_it_costs(folder: Path, plan: Plan) -> None:
    shown = invoke("show", folder).stdout
    lines = shown.splitlines()
    assert f"partitions: {len(plan.partitions)} targets split their output rows" in shown
    for planned in plan.targets:
        if planned.partition is not None:
            line = next(text for text in lines if text.strip().startswith(planned.target.name))
            assert split_words(planned.partition) in line
            assert f"{planned.parameters:,}" in line
    by_type = [line.split() for line in lines if line.rstrip().endswith("%")]
    totals = [int(words[-2].replace(",", "")) for words in by_type if words[-2][0].isdigit()]
    assert plan.parameters in {sum(totals[i:]) for i in range(len(totals))}


def test_show_writes_a_partition_as_two_ranks(folder: Path, plan: Plan) -> None:
    shown = invoke("show", folder).stdout
    for split in plan.partitions.values():
        assert f"{split.rank}|{split.supplementary_rank}" in shown


def test_show_json_holds_the_partitions(folder: Path, plan: Plan) -> None:
    shown = json.loads(invoke("show", folder, "--json").stdout)
    assert shown["partitions"] == {n: s.to_dict() for n, s in plan.partitions.items()}
    assert shown["parameters"] == plan.parameters
    assert shown["ranks"] == plan.ranks


def test_plans_without_partitions_look_as_before(planned: Path) -> None:
    shown = invoke("show", planned).stdout
    assert "partition" not in shown
    assert "split" not in [word for line in shown.splitlines()[:40] for word in line.split()]


def test_words_add_up() -> None:
    split = NeuronPartition(576, 16, 2, (1 << 192) - 1)
    assert split_words(split) == "16 x 192 rows + 2 x 384"
    assert split_words(NeuronPartition(6, 3, 0, 0b11)) == "3 x 2 rows + none on 4"


def test_allocating_again_from_the_measurement(folder: Path) -> None:
    source = folder / "measurement.safetensors"
    found = {}
    for method in ("hybrid", "waterfill"):
        result = invoke(
            "plan", "--from", source, "--method", method, "--budget", "uniform:2", "--json"
        )
        assert result.exit_code == 0, result.stderr
        found[method] = json.loads(result.stdout)["plan"]
    assert found["hybrid"]["targets"] == Plan.load(folder / "plan.json").to_dict()["targets"]
    assert not any("partition" in target for target in found["waterfill"]["targets"].values())


def test_a_measurement_without_rows_is_refused_in_one_line(planned: Path) -> None:
    source = planned / "measurement.safetensors"
    result = invoke("plan", "--from", source, "--method", "hybrid", "--budget", 1500)
    assert result.exit_code == 2
    assert "kept no row factors" in result.stderr
    assert "Traceback" not in result.stderr
    ranks = ("--option", "shares=none")
    result = invoke("plan", "--from", source, "--method", "hybrid", "--budget", 1500, *ranks)
    assert result.exit_code == 0, result.stderr


def _edit(split: dict[str, Any], target: dict[str, Any], what: str) -> None:
    if what == "rank":
        target["rank"] += 1
    elif what == "rows":
        split["d_out"] += 1
    elif what == "dominant":
        split["dominant"] = "zz"
    elif what == "lacking":
        del split["supplementary_rank"]
    else:
        split["dominant"] = "f" * (split["d_out"] // 4)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("rank", "but its partition needs"),
        ("rows", "output rows, and its partition splits"),
        ("dominant", "no hexadecimal number"),
        ("lacking", "lacks 'supplementary_rank'"),
        ("whole", "two groups; otherwise give a rank alone"),
    ],
)
def test_wrong_edits_by_hand_are_refused(
    folder: Path, plan: Plan, tmp_path: Path, what: str, words: str
) -> None:
    data = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    target = data["targets"][next(iter(plan.partitions))]
    _edit(target["partition"], target, what)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    result = invoke("show", path)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_right_edit_by_hand_is_taken(folder: Path, plan: Plan, tmp_path: Path) -> None:
    data = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    name, split = next((n, s) for n, s in plan.partitions.items() if s.rank > 1)
    data["targets"][name]["partition"]["rank"] -= 1
    data["targets"][name]["rank"] -= 1
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert shown["partitions"][name]["rank"] == split.rank - 1
    assert shown["parameters"] < plan.parameters


def test_training_a_plan_with_partitions(folder: Path, plan: Plan, tmp_path: Path) -> None:
    given = ("--plan", folder / "plan.json", "--config", folder / "config.yaml")
    out = tmp_path / "run"
    result = invoke("train", *given, *SHORT, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["trainable_parameters"]["final"] == plan.parameters
    adapter = json.loads(invoke("show", out / "adapter", "--json").stdout)
    assert adapter["ranks"] == {name: rank for name, rank in plan.ranks.items() if rank}
