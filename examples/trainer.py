"""transformers.Trainer: the first ranks from a plan, and ranks that move from there on.

python examples/trainer.py --model smollm2-135m --steps 20 --out out/trainer
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import get_peft_model
from sample import model_folder, sentences, token_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--interval", type=int, default=5)
    parser.add_argument("--out", default="out/trainer")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, mlflow, ...")
    parser.add_argument("--resume", action="store_true", help="from the last whole checkpoint")
    args = parser.parse_args(argv)

    set_seed(0)
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = token_rows(AutoTokenizer.from_pretrained(folder), sentences(args.data))
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=1,
        save_steps=args.interval,
        report_to=args.report_to,
    )

    # The plan comes before the Trainer, which gets the model ready when it is made.
    loader = Trainer(model, arguments, train_dataset=rows).get_train_dataloader()
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=8)
    model = get_peft_model(model, plan.lora_config(lora_alpha=16, task_type="CAUSAL_LM"))

    # Leave the callback out to keep the plan's ranks. The numbers of each decision go where the
    # Trainer's own logs go, as gradrank/moved, gradrank/parameters and so on.
    method = gr.DynamicGard(interval=args.interval, window=args.interval, energy=0.7)
    capacity = gr.CapacityCallback(method, args.budget)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[capacity])
    gr.prepare_trainer(trainer)
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"{len(capacity.decisions)} decisions; ranks {sorted(set(capacity.run.ranks.values()))}")
    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
