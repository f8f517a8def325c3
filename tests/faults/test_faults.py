"""Faults survived: what a user finds after a kill, a full disk, a crash, and what works then."""

import json
from pathlib import Path
from typing import Any

import pytest

from launching import run

PLAN_FILES = {"plan.json", "measurement.safetensors", "record.json", "report.html", "config.yaml"}
KILLED = ("killed_plan", "killed_train", "killed_replacing", "killed_export")
SHORT_OF = ("full_disk", "small_files", "read_only", "no_memory")
OTHER = ("interrupted", "diverged", "clock", "two_at_once", "damaged")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what gives a scenario's findings; all of them run once, in a process of their own."""
    folder = tmp_path_factory.mktemp("faults")
    worker = Path(__file__).with_name("fault_worker.py")
    ended = run(worker, str(folder), *KILLED, *SHORT_OF, *OTHER, seconds=800)

    def get(name: str) -> Any:
        result = folder / f"{name}.json"
        assert result.exists(), ended.stderr[-3000:]
        return json.loads(result.read_text())

    return get


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def told(run: dict[str, Any], code: int, *words: str) -> None:
    assert run["code"] == code, run["said"]
    assert "Traceback" not in run["said"]
    assert "not foreseen" not in run["said"]
    for word in words:
        assert word in run["said"], run["said"]


def in_x(names: list[str]) -> set[str]:
    return {name.partition("/")[2] for name in names if name.startswith("x/")}


def test_a_killed_plan_is_whole_or_absent(found: Any) -> None:
    kinds = set()
    for case in found("killed_plan"):
        assert case["killed"]["code"] in {-9, 0}
        left = in_x(case["left"]["seen"])
        assert left in (set(), PLAN_FILES)
        kinds.add((case["old"], bool(left)))
        told(case["again"], 0)
        assert in_x(case["end"]["seen"]) == PLAN_FILES
    # An old plan stands until the new one is whole, up to the one moment between two renames.
    assert {(False, False), (True, True)} <= kinds
    assert sum(c["old"] and not in_x(c["left"]["seen"]) for c in found("killed_plan")) <= 1


def test_a_killed_training_goes_on_or_says_what_to_do(found: Any) -> None:
    resumed = 0
    for case in found("killed_train"):
        assert case["killed"]["code"] == -9
        assert "x/record.json" not in case["left"]["seen"]
        if case["fresh"] is None:
            told(case["again"], 0)
            resumed += "resuming at step" in case["again"]["said"]
        else:
            told(case["again"], 2, "--overwrite")
            told(case["fresh"], 0)
        assert (case["status"], case["steps"]) == ("finished", 4)
    assert resumed


def test_a_killed_replacement_gives_the_old_run_back(found: Any) -> None:
    for case in found("killed_replacing"):
        assert case["killed"]["code"] == -9
        told(case["again"], 0, "nothing to resume")
        assert case["same"]
        assert not case["end"]["hidden"]


def test_a_killed_export_is_whole_or_absent(found: Any) -> None:
    for case in found("killed_export"):
        assert case["killed"]["code"] == -9
        whole = in_x(case["end"]["seen"])
        assert {"adapter_config.json", "adapter_model.safetensors"} <= whole
        assert in_x(case["left"]["seen"]) in (set(), whole)
        told(case["again"], 0)


def test_a_full_disk_is_named_and_leaves_no_half(found: Any) -> None:
    for case in found("full_disk"):
        told(case["ended"], 1, "no space left")
        assert not case["left"]["hidden"]
        if case["verb"] != "train":
            assert not case["left"]["seen"]
        told(case["again"], 0)


def test_a_write_that_stops_in_its_middle_is_named(found: Any) -> None:
    words = {"plan": "too large", "train": "checkpoint of step 1", "export": "too large"}
    for case in found("small_files"):
        told(case["ended"], 1, words[case["verb"]])
        assert not case["left"]["hidden"]
        assert not any(name.endswith("complete.json") for name in case["left"]["seen"])


def test_a_read_only_place_is_named(found: Any) -> None:
    for case in found("read_only"):
        told(case["ended"], 1, "may not be written", "--out")
        assert not case["left"]["seen"]


def test_ctrl_c_once_and_twice(found: Any) -> None:
    plan, plan_twice, train, train_twice = found("interrupted")
    for case in (plan, plan_twice):
        told(case["ended"], 130, "was not written")
        assert not case["left"]["seen"]
    told(train["ended"], 130, "Go on with --resume", "press Ctrl-C again")
    told(train_twice["ended"], 130, "interrupted at step 1")
    for case in found("interrupted"):
        told(case["again"], 0)


def test_a_loss_that_is_no_number_keeps_the_checkpoints_before_it(found: Any) -> None:
    for case in found("diverged"):
        told(case["ended"], 1, "the loss is nan at step 3", "learning rate")
        assert case["whole"] == "checkpoint-2"
        assert case["as"] == "failed"
        told(case["again"], 0)


def test_lack_of_memory_says_what_to_lower(found: Any) -> None:
    static, dynamic, plan = found("no_memory")
    for case in (static, dynamic):
        told(case["ended"], 1, "out of memory", "batch_size", "max_length")
        assert case["whole"] == "checkpoint-2"
        told(case["again"], 0)
    told(plan["ended"], 1, "out of memory", "--batch-size", "--max-length", "--max-memory")
    assert not plan["left"]["seen"]


def test_a_clock_that_runs_backwards_changes_nothing(found: Any) -> None:
    case = found("clock")
    told(case["ended"], 0)
    spent = {key: value for key, value in case["record"]["cost"].items() if "seconds" in key}
    assert spent
    assert all(0 <= value < 1e4 for value in spent.values()), spent
    assert case["last"] == "checkpoint-4"


def test_two_runs_never_share_a_folder(found: Any) -> None:
    train, plan = found("two_at_once")
    told(train["first"], 0)
    for other in train["others"]:
        told(other, 2, "x'")
    assert any("another run writes to" in other["said"] for other in train["others"])
    # Nothing stands in a plan's folder before it is whole: who is whole first has it.
    told(plan["first"], 1, "by another process")
    assert in_x(plan["end"]["seen"]) == PLAN_FILES
    assert not plan["end"]["hidden"]


# Without its marker, or with one that disagrees, a checkpoint is passed over.
PASSED_OVER = dict.fromkeys(("bit flipped", "optimizer cut off"), "no whole checkpoint")


def test_checkpoints_that_lie_are_refused(found: Any) -> None:
    for case in found("damaged"):
        if case["name"] in PASSED_OVER:
            told(case["ended"], 0, PASSED_OVER[case["name"]])
        else:
            assert case["ended"]["code"] in {1, 2}, case
            told(case["ended"], case["ended"]["code"], "error: ")
