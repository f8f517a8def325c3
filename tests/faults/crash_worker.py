"""One of two gloo processes that train with moving capacity; the second one dies at step 3.

Usage: crash_worker.py FOLDER MOMENT; RANK and the rest come from the environment.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradrank as gr
from dist.moving_worker import BUDGET, METHOD, Sentences, build


class Die(TrainerCallback):
    def __init__(self, moment: str) -> None:
        self.moment = moment

    def die(self, moment: str, step: int) -> None:
        if moment == self.moment and step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die("step", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die("save", state.global_step)


def main(folder: Path, moment: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        save_steps=1,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_timeout=60,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    capacity = gr.CapacityCallback(METHOD, BUDGET)
    # Before the callback that seals: the other process then waits for one that is gone.
    callbacks = [Die(moment), capacity]
    trainer = Trainer(build(), arguments, train_dataset=Sentences(), callbacks=callbacks)
    gr.prepare_trainer(trainer).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
