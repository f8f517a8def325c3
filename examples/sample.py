"""What the examples run on if you name nothing: replace it by your own model and data."""

import json
from pathlib import Path
from typing import Any

from gradrank.lab.assets import fetch_asset
from gradrank.lab.locate import locate


def model_folder(name: str) -> str:
    """Return a folder or hub name as it is, and fetch a small model such as smollm2-135m."""
    folder, _, _ = locate(name, print)
    return str(folder)


def sentences(file: Path | None) -> list[str]:
    """Read the "text" of JSON lines; of movie reviews, if no file is given."""
    path = file or fetch_asset("movie-reviews", print) / "sentences.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def token_rows(tokenizer: Any, texts: list[str], length: int = 48) -> list[dict[str, list[int]]]:
    """Encode texts to rows of one length, with labels that leave the padding out."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    for text in texts:
        row = tokenizer(text, truncation=True, max_length=length, padding="max_length")
        pairs = zip(row["input_ids"], row["attention_mask"], strict=True)
        rows.append(dict(row) | {"labels": [token if seen else -100 for token, seen in pairs]})
    return rows
