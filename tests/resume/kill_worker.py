"""Train in forked children that are killed (SIGKILL) at a given point, and resume them.

One process imports everything once; every run is a fork of it, so that a run costs a fraction of a
second and shares nothing with the others but the folder. Usage: kill_worker.py FOLDER.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradrank as gr
from cases import CASES, tiny_llama
from gradrank.adapters import sidecar
from gradrank.core import files, marker

STEPS = 6
# Every step for the two that matter most; the others at a step with a decision and at one without.
POINTS = {
    "step": range(1, STEPS + 1),
    "sidecar-half": range(1, STEPS + 1),
    "adapter": (3, 4),
    "optimizer": (3, 4),
    "sidecar": (3, 4),
    "marker": (3, 4),
    "sealed": (4, STEPS),
}
METHOD = {"interval": 2, "window": 4, "energy": 0.6, "sketch_dim": 8, "max_delta": 2}


class Sentences(Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = CASES["llama"].batch(torch.Generator().manual_seed(index))
        return {key: value[0] for key, value in batch.items()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


def make(out: Path) -> tuple[Trainer, gr.CapacityCallback]:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(tiny_llama(), config)
    capacity = gr.CapacityCallback(gr.DynamicGard(**METHOD), "uniform:3")
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
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[capacity])
    return gr.prepare_trainer(trainer), capacity


def arm(trainer: Trainer, point: str, step: int) -> None:
    """Make the process die at a point of a step."""

    def now() -> bool:
        return trainer.state.global_step == step

    def around(owner: Any, name: str, before: bool = False) -> None:
        work = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if before and now():
                die()
            result = work(*args, **kwargs)
            if now():
                die()
            return result

        setattr(owner, name, deadly)

    save = sidecar.save_file

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata=metadata)
        if now():
            os.truncate(path, path.stat().st_size // 2)
            die()

    arms: dict[str, Callable[[], None]] = {
        "step": lambda: trainer.add_callback(DieAfterStep(step)),
        "adapter": lambda: around(trainer, "save_model"),
        "optimizer": lambda: around(trainer, "_save_optimizer_and_scheduler"),
        "sidecar": lambda: around(sidecar, "write", before=True),
        "sidecar-half": lambda: setattr(sidecar, "save_file", half),
        "marker": lambda: around(marker, "write_json", before=True),
        "sealed": lambda: around(marker, "seal"),
    }
    arms[point]()


def train(out: Path, point: str | None, step: int, result: Path | None) -> None:
    trainer, capacity = make(out)
    if point is not None:
        arm(trainer, point, step)
    whole = marker.last_complete(out, sidecar.FILE) is not None
    trainer.train(resume_from_checkpoint=True if whole else None)
    if result is None:
        return
    weights = {k: v for k, v in trainer.model.state_dict().items() if ".lora_" in k}
    save_file(weights, result.with_suffix(".safetensors"))
    facts = {
        "ranks_over_time": capacity.ranks_over_time,
        "decisions": [{**d, "seconds": 0} for d in capacity.decisions],
    }
    files.write_json(result.with_suffix(".json"), facts)


def forked(work: Callable[[], None]) -> int:
    """Run in a child; return how it ended (negative: killed by that signal)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ends: dict[str, list[int]] = {}
    ends["whole"] = [forked(lambda: train(folder / "whole", None, 0, folder / "whole"))]
    for point, steps in POINTS.items():
        for step in steps:
            name = f"{point}-{step}"
            out = folder / name
            killed = forked(lambda out=out, p=point, s=step: train(out, p, s, None))
            resumed = forked(lambda out=out, name=name: train(out, None, 0, folder / name))
            ends[name] = [killed, resumed]
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
