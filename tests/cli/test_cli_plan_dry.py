"""``gradrank plan --dry-run``: sizes without weights or data, and what it refuses."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, T5Config

from cli.conftest import Run
from gradrank.cli.plan_dry import size
from gradrank.lab.measured import measured_signals
from gradrank.methods.registry import create
from gradrank.signals.measure import MeanGradient, Spectrum

DRY = ("plan", "--dry-run", "--batch-size", 2, "--max-length", 16, "--model")


def test_everything_is_told(run: Run) -> None:
    result = run(*DRY, "tiny-llama", "--tflops", 2)
    assert result.exit_code == 0, result.stderr
    for word in (
        "35,232 in the base model, 14 targets",
        "down_proj",
        "8,192 adapter parameters",
        "uniform LoRA of rank 8",
        "activations",
        "moments",
        "with checkpointing",
        "on disk",
        "FLOPs forward",
        "Not counted: the allocator's fragmentation",
        "peak ",
    ):
        assert word in result.stdout
    assert list(Path.cwd().iterdir()) == []


def test_json_of_a_folder_with_a_configuration_only(run: Run) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    config.save_pretrained("model")
    result = run(*DRY, "model", "--json", "--quantised", "4", "--tflops", "0.5")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["quantised"] == 4
    assert found["dtype"] == "bfloat16"
    part = found["measuring"]
    names = ("weights", "activations", "statistics", "workspace")
    assert part["device"] == sum(part[name] for name in names)
    work = part["forward"] + part["backward"] + part["projections"]
    assert found["seconds"]["measuring"] == pytest.approx(work / 0.5e12)
    assert found["tflops_from"] == "flag"
    assert found["signals"] == ["spectrum (sketch)", "mean-gradient (40 directions)"]


def test_a_cap_on_memory_is_kept_and_told(run: Run) -> None:
    free = json.loads(run(*DRY, "tiny-llama", "--json").stdout)
    assert free["measuring"]["passes"] == 1
    less = free["measuring_checkpointed"]
    assert less["activations"] < free["measuring"]["activations"]
    result = run(*DRY, "tiny-llama", "--max-memory", "600KiB")
    assert result.exit_code == 0, result.stderr
    assert "beyond the model, --max-memory 600.0 KiB" in result.stdout
    assert "checkpointed, " in result.stdout
    forced = json.loads(run(*DRY, "tiny-llama", "--checkpoint", "--json").stdout)
    assert forced["measuring"] == less
    assert forced["measuring_checkpointed"] is None


def test_a_method_that_measures_nothing(run: Run) -> None:
    result = run(*DRY, "tiny-gpt2", "--method", "uniform", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["measuring"] is None
    assert found["seconds"]["measuring"] is None
    assert found["tflops_from"] == "matrix products here"


def test_a_budget_between_ranks_and_a_classifier(run: Run) -> None:
    result = run("plan", "--dry-run", "--model", "tiny-bert", "--batch-size", 1, "--budget", 1100)
    assert result.exit_code == 0, result.stderr
    assert "uniform LoRA of rank 1" in result.stdout
    assert "a head of 66 parameters beside it" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "tiny-lama"), "Did you mean 'tiny-llama'"),
        (("--model", "absent/model"), "are not known here"),
        (("--model", "t5"), "Choose another model"),
        (("--model", "tiny-vit", "--head", "lm"), "has no 'lm' head"),
        (("--model", "tiny-llama", "--from", "m.safetensors"), "do not go together"),
        (("--model", "tiny-llama", "--task", "tiny-lm", "--out", "x"), "leave out --out, --task"),
        (("--model", "tiny-llama", "--max-length", "500"), "positions for 128 tokens"),
        (("--model", "tiny-llama", "--method", "grad"), "Did you mean 'gard'"),
        (("--model", "tiny-llama", "--device", "tpu"), "unknown device 'tpu'"),
        (("--model", "tiny-llama", "--device", "cpu", "--dtype", "float16"), "not usable"),
        (("--model", "tiny-llama", "--targets", "q_prj"), "q_proj"),
        (("--model", "tiny-llama", "--budget", "3"), "3"),
        (("--model", "tiny-llama", "--max-memory", "much"), "not understood"),
        (("--model", "tiny-llama", "--max-memory", "9KiB"), "Measure smaller micro-batches"),
        ((), "give a model with --model"),
    ],
)
def test_bad_input_is_refused_in_words(run: Run, args: tuple[str, ...], words: str) -> None:
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained("t5")
    result = run("plan", "--dry-run", *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("flag", [("--quantised", "4"), ("--tflops", "1")])
def test_flags_of_a_dry_run_need_one(run: Run, flag: tuple[str, str]) -> None:
    result = run("plan", "--model", "tiny-llama", "--task", "tiny-lm", "--out", "x", *flag)
    assert result.exit_code == 2
    assert "Add --dry-run" in result.stderr


def test_signals_are_those_that_plan_measures() -> None:
    kinds = [type(signal) for signal in measured_signals(create("gard"))]
    assert kinds == [Spectrum, MeanGradient]
    assert measured_signals(create("uniform")) == ()
    dense = create("gard", {"estimator": "dense"})
    assert [signal.estimator for signal in measured_signals(dense)] == ["dense"]


def test_sizes_are_written_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]
