"""RoBERTa on a GLUE task, from the task's own TSV files; accuracy on the development set.

python examples/glue.py --model FacebookAI/roberta-base --data glue/mrpc --out out/glue
"""

import argparse
import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sample import model_folder
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import gradrank as gr

# Columns of the texts and of the label.
COLUMNS = {
    "sst2": (["sentence"], "label"),
    "rte": (["sentence1", "sentence2"], "label"),
    "mrpc": (["#1 String", "#2 String"], "Quality"),
}


def read(file: Path, task: str) -> tuple[list[list[str]], list[str]]:
    texts, label = COLUMNS[task]
    with gzip.open(file, "rt", encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [[row[name] for name in texts] for row in rows], [row[label] for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--data", type=Path, required=True, help="sst2, rte or mrpc, with *.tsv.gz")
    parser.add_argument("--budget", default="uniform:4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", default="out/glue")
    args = parser.parse_args(argv)

    set_seed(0)
    train, dev = (read(args.data / f"{part}.tsv.gz", args.data.name) for part in ("train", "dev"))
    names = sorted(set(train[1]))
    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))

    def encode(texts: list[list[str]], labels: list[str]) -> list[dict[str, Any]]:
        rows = [dict(tokenizer(*text, truncation=True, max_length=128)) for text in texts]
        numbers = [names.index(label) for label in labels]
        return [row | {"labels": label} for row, label in zip(rows, numbers, strict=True)]

    rows, collate = encode(*train), DataCollatorWithPadding(tokenizer)
    loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
    plan = gr.plan(model, loader, method="gard", budget=args.budget, num_batches=16)
    print(plan)

    # The task type makes PEFT train and save the new head too.
    model = gr.apply(plan, model, lora_alpha=16, task_type="SEQ_CLS")
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=args.lr,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=encode(*dev),
        data_collator=collate,
        compute_metrics=lambda found: {
            "accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))
        },
    )
    trainer.train()
    print(trainer.evaluate())
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
