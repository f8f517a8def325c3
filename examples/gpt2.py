"""GPT-2, whose Conv1D layers hold their weights transposed: ranks from an exact knapsack, merged.

python examples/gpt2.py --model openai-community/gpt2 --steps 20 --out out/gpt2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import get_peft_model
from sample import model_folder, sentences, token_rows
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="openai-community/gpt2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="0.2%")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="out/gpt2")
    args = parser.parse_args(argv)

    set_seed(0)
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = token_rows(tokenizer, sentences(args.data))
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=default_data_collator)

    plan = gr.plan(model, loader, method="waterfill", budget=args.budget, num_batches=8)
    print(plan, sorted({planned.target.kind for planned in plan.targets}))
    config = plan.lora_config(lora_alpha=16, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)  # config.fan_in_fan_out is set where it must be

    arguments = TrainingArguments(
        f"{args.out}/run",
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=rows).train()
    # The whole model in one folder, its logits compared with the trained ones before it is kept.
    print(gr.export(model, f"{args.out}/merged", target="merged", tokenizer=tokenizer))


if __name__ == "__main__":
    main()
