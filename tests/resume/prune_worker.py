"""Train methods that prune or split in forked children that are killed (SIGKILL), and resume them.

See kill_worker.py, whose ways to die are used here. Usage: prune_worker.py FOLDER [METHOD ...].
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

import gradrank as gr
from cases import tiny_llama
from gradrank.adapters import sidecar
from gradrank.core import files, marker
from resume.kill_worker import Sentences, arm, forked

STEPS = 9
DUE = [3, 5, 6]
SHORT: dict[str, Any] = {"interval": 2, "warmup": 1, "final": 3}
METHODS: dict[str, Any] = {
    "igu": gr.Igu(score_every=1, segments=4, aggregate=2, **SHORT),
    "as-code": gr.Igu(estimator="as-code", segments=4, **SHORT),
    "igu-direction": gr.IguDirection(score_every=1, segments=2, tolerance=1e6, **SHORT),
    "adalora": gr.AdaLora(**SHORT),
}
# Looks in steps 2 and 4; the split after step 5.
STAGES: dict[str, Any] = {"rank": 2, "interval": 2, "initial_steps": 5}
NEURONS: dict[str, Any] = {
    "pilora": gr.PiLora(supplementary_rank=1, **STAGES),
    "pilora-warm": gr.PiLora(supplementary_rank=1, start="warm", **STAGES),
}
# Steps: before the first pruning, at one (4 is in mid-aggregate of igu), after the last.
POINTS = {
    "igu": (("step", 2), ("sidecar-half", 3), ("step", 4), ("step", 8)),
    "as-code": (("step", 4), ("sidecar-half", 6)),
    "igu-direction": (("step", 4),),
    "adalora": (("step", 5),),
}
NEURON_POINTS = {
    "pilora": (("step", 3), ("sidecar-half", 5), ("step", 6)),
    "pilora-warm": (("step", 6),),
}


def make(out: Path, name: str) -> tuple[Any, gr.CapacityCallback]:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear")
    capacity = gr.CapacityCallback((METHODS | NEURONS)[name], "uniform:2")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        save_steps=1,
        save_total_limit=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = get_peft_model(tiny_llama(), config)
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[capacity])
    return gr.prepare_trainer(trainer), capacity


def train(out: Path, name: str, point: str | None, step: int, result: Path | None) -> None:
    trainer, capacity = make(out, name)
    if point is not None:
        arm(trainer, point, step)
    whole = marker.last_complete(out, sidecar.FILE) is not None
    trainer.train(resume_from_checkpoint=True if whole else None)
    if result is None:
        return
    weights = {k: v for k, v in trainer.model.state_dict().items() if ".lora_" in k}
    # What the run remembers and drew: smoothed scores, half aggregates, lambda, places on the path.
    facts, remembered = sidecar.read(out / f"{marker.PREFIX}{STEPS}" / sidecar.FILE)
    state = {f"state/{key}": tensor for key, tensor in remembered.items()}
    save_file(weights | state, result.with_suffix(".safetensors"))
    story = {
        "ranks_over_time": capacity.ranks_over_time,
        "decisions": [{**d, "seconds": 0} for d in capacity.decisions],
        "start_parameters": capacity.start_parameters,
        "step": facts["step"],
        "budget": facts["budget"],
        "neurons": capacity.neurons,
    }
    files.write_json(result.with_suffix(".json"), story)


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ends: dict[str, list[int]] = {}
    for name in names or POINTS:
        points = (POINTS | NEURON_POINTS)[name]
        whole = f"{name}-whole"
        end = forked(lambda n=name, w=whole: train(folder / w, n, None, 0, folder / w))
        ends[whole] = [end]
        for point, step in points:
            part = f"{name}-{point}-{step}"
            out = folder / part
            killed = forked(lambda o=out, n=name, p=point, s=step: train(o, n, p, s, None))
            resumed = forked(lambda o=out, n=name: train(o, n, None, 0, o))
            ends[part] = [killed, resumed]
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
