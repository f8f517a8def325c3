"""A base model in 4 bits (bitsandbytes): measured as it is, without any weight gradient.

python examples/four_bit.py --model smollm2-135m --steps 10 --out out/four-bit
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import prepare_model_for_kbit_training
from sample import model_folder, sentences, token_rows
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import gradrank as gr


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="out/four-bit")
    args = parser.parse_args(argv)

    set_seed(0)
    folder = model_folder(args.model)
    gpu = torch.cuda.is_available()
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=packing, device_map={"": 0 if gpu else "cpu"}
    )
    rows = token_rows(AutoTokenizer.from_pretrained(folder), sentences(args.data))
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )

    # Nothing here differs from a base in full precision.
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=default_data_collator)
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=4)
    model = gr.apply(plan, model, lora_alpha=16, task_type="CAUSAL_LM")
    print(plan)

    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
