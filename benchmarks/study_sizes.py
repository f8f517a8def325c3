"""Study of `gradrank plan --dry-run`: predicted against measured peak memory, on the CPU.

Usage: python -m benchmarks.study_sizes [--out FOLDER] [--part memory|large]

Every number is measured in a process of its own: what the process has resident before the model is
built is taken off its highest point while measuring, or while two training steps run. Weights are
random. Writes results/studies/sizes.json. About five minutes on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.frame import EXACT
from transformers import LlamaConfig

from gradrank.core.files import write_json
from gradrank.lab.arms import head_options
from gradrank.lab.compare.dry_models import config_of
from gradrank.lab.memory import PeakMemory
from gradrank.lab.models import HEADS
from gradrank.lab.sized import Inquiry
from gradrank.lab.sizing import recompute, size_up
from gradrank.session import allocate, apply, measure
from gradrank.signals.facts import find_targets
from gradrank.signals.measure import MeanGradient, Spectrum

SIGNALS = (Spectrum(), MeanGradient())
PHASES = ("measuring", "measuring_checkpointed", "training", "checkpointed")
BATCHES, BUDGET = 4, "uniform:8"
PLAIN = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
WAYS = {"exact": EXACT, "as it is": {}}
# Width, layers, batch size, length.
LLAMAS = ((256, 4, 4, 256), (512, 4, 4, 256), (512, 4, 2, 512))
BERT = ("minilm-l6", "classification", 16, 128)
LARGE = "meta-llama/Meta-Llama-3-8B"


def main() -> None:
    """Run the study, or one measurement of it."""
    parser = argparse.ArgumentParser(description="Study of predicted sizes")
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    parser.add_argument("--part", choices=["memory", "large"], help="default: both")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(**json.loads(args.case))))
        return
    if args.part != "memory":
        for bits in (None, 4):
            update(args.out, "large", large_row(bits, 4), bits is None)
    if args.part == "large":
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = [(BERT[0], *BERT), *(llama(Path(folder), *shape) for shape in LLAMAS)]
        for case in cases:
            for row in compared(*case):
                update(args.out, "rows", row, row["model"] == BERT[0] and row["phase"] == PHASES[0])


def update(out: Path, key: str, row: dict[str, Any], first: bool) -> None:
    """Add a row to the results, so that a study that is broken off keeps what it has."""
    path = out / "sizes.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = [] if first else known.get(key, [])
    about = (
        "Peak memory in bytes, predicted from shapes and measured (highest resident size less that "
        "before the model was built), float32 on a CPU, random weights; large: predicted only"
    )
    setting = {"batches": BATCHES, "budget": BUDGET, "threads": torch.get_num_threads()}
    kept = {"rows": known.get("rows", []), "large": known.get("large", [])}
    data = {"about": about, **setting, "torch": torch.__version__, **kept, key: [*before, row]}
    write_json(path, data, overwrite=True)


def llama(folder: Path, width: int, layers: int, batch_size: int, length: int) -> Any:
    """Write the configuration of a small Llama, and return its case."""
    path = folder / f"llama-{width}x{layers}"
    LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    ).save_pretrained(path)
    return path.name, str(path), "lm", batch_size, length


def compared(name: str, spec: str, head: str, batch_size: int, length: int) -> list[Any]:
    """Return predicted and measured sizes of all phases."""
    asked = Inquiry(
        spec,
        head,
        budget=BUDGET,
        signals=SIGNALS,
        batches=BATCHES,
        batch_size=batch_size,
        length=length,
    )
    found = size_up(asked)
    rows = []
    for phase in PHASES:
        part: Any = getattr(found, phase)
        host = part.host if phase.startswith("measuring") else 0
        case = {"phase": phase, "spec": spec, "head": head, "size": batch_size, "length": length}
        command = [sys.executable, "-m", "benchmarks.study_sizes", "--case", json.dumps(case)]
        ways = WAYS if phase == "training" else {"exact": WAYS["exact"]}
        real = {way: run(command, PLAIN | extra) for way, extra in ways.items()}
        row = {
            "model": name,
            "parameters": found.parameters.base,
            "phase": phase,
            "batch_size": batch_size,
            "length": length,
            "predicted": part.device + host,
            "measured": real["exact"],
            "ratio": round((part.device + host) / real["exact"], 3),
            "measured_as_is": real.get("as it is"),
            "predicted_activations": part.activations,
        }
        rows.append(row)
        print(
            f"{name:14} {batch_size:3} x {length:4} {phase:22} predicted "
            f"{row['predicted'] / 2**20:7.1f} MiB  measured {row['measured'] / 2**20:7.1f} MiB  "
            f"ratio {row['ratio']:.2f}",
            flush=True,
        )
    return rows


def run(command: list[str], environment: dict[str, str]) -> int:
    """Return the peak that a process of its own measures, bytes."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def measured(phase: str, spec: str, head: str, size: int, length: int) -> dict[str, int]:
    """Return the bytes that a phase adds to this process, the model included."""
    # What libraries allocate when they are first used is none of the model's.
    work("measuring", "tiny-llama", "lm", 1, 8)
    work("measuring_checkpointed", "tiny-llama", "lm", 1, 8)
    work("checkpointed", "tiny-llama", "lm", 1, 8)
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as memory:
        work(phase, spec, head, size, length)
    return {"peak": memory.peak - before.peak}


def work(phase: str, spec: str, head: str, size: int, length: int) -> None:
    """Build a model with random weights and measure it, or train it for two steps."""
    config = config_of(spec)[0]
    config.num_labels = 2
    torch.manual_seed(0)
    model: Any = HEADS[head][0].from_config(config)
    model.config.use_cache = False
    ids = torch.randint(4, config.vocab_size, (size, length))
    labels = ids.clone() if head == "lm" else ids[:, 0] % 2
    batch = {"input_ids": ids, "labels": labels}
    if phase.startswith("measuring"):
        model.eval()
        again = phase == "measuring_checkpointed"
        measure(model, [batch] * BATCHES, SIGNALS, num_batches=BATCHES, checkpoint=again)
        return
    plan = allocate(find_targets(model), "uniform", BUDGET)
    model = apply(plan, model, **head_options(model, head))
    model.train()
    if phase == "checkpointed":
        recompute(model.base_model.model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, fused=True)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def large_row(bits: int | None, batch_size: int) -> dict[str, Any]:
    """Return what a model of 8 billion parameters would take on a GPU."""
    asked = Inquiry(
        LARGE,
        "lm",
        budget=BUDGET,
        signals=SIGNALS,
        batches=32,
        batch_size=batch_size,
        length=2048,
        dtype="bfloat16",
        bits=bits,
        gpu=True,
    )
    found = size_up(asked)
    assert found.measuring is not None
    assert found.checkpointed is not None
    parts = {phase: asdict(getattr(found, phase)) for phase in PHASES}
    told = "  ".join(f"{phase} {part['device'] / 2**30:.1f} GiB" for phase, part in parts.items())
    print(f"{LARGE} {bits or 16}-bit, {batch_size} x 2048: {told}", flush=True)
    return {"model": LARGE, "bits": bits, "batch_size": batch_size, "length": 2048, **parts}


if __name__ == "__main__":
    main()
