"""Study of the parameter counts in PiLoRA's tables.

Usage: python -m benchmarks.study_pilora_parameters [--out FOLDER] [--page FILE] [--redraw]

Builds the four models of the paper without weights, counts LoRA and PiLoRA parameters for every
choice of targets and denominator, and writes results/studies/pilora-parameters.json and the tables
in docs/studies/pilora-parameters.md. Seconds; no network. --redraw makes the tables from the
results alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, markdown
from benchmarks.pilora_parameters.findings import study

from gradrank.core.files import read_json, write_json

Found = dict[str, Any]


def main() -> None:
    """Run the study; write its results and the tables of its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/pilora-parameters.md"))
    parser.add_argument("--redraw", action="store_true", help="tables from the results alone")
    args = parser.parse_args()
    results = args.out / "pilora-parameters.json"
    if not args.redraw:
        write_json(results, study(), overwrite=True)
    fill(args.page, tables(read_json(results, "study")))


def tables(found: Found) -> dict[str, str]:
    """Return the tables of the page by name."""
    models = found["models"]
    return {
        "shapes": _shapes(models),
        "lora": _lora(models),
        "named": _named(models),
        "joint": _joint(found["joint"]),
        "roberta": _other_ranks(models["RoBERTa-large"]),
        "shares": _shares(models),
    }


def _shapes(models: Found) -> str:
    head = ("model", "linear layers of a block, d_in → d_out", "blocks", "parameters by basis")
    rows = []
    for name, model in models.items():
        layers = ", ".join(
            f"{_short(kind)} {size['d_in']} → {size['d_out']}"
            for kind, size in model["types"].items()
        )
        blocks = next(iter(model["types"].values()))["count"]
        bases = "; ".join(f"{basis} {size:,}" for basis, size in model["bases"].items())
        rows.append((name, layers, str(blocks), bases))
    return markdown(head, rows)


def _lora(models: Found) -> str:
    head = ("model", "r", "printed", "readings tried", "largest of them", "give the figure")
    rows = []
    for name, model in models.items():
        printed = model["printed"]
        rows.append(
            (
                name,
                str(printed["rank"]),
                f"{printed['lora']:.2f}",
                f"{model['readings']:,}",
                f"{model['largest']:.3f}",
                str(len(model["fitting"])) if model["fitting"] else "**none**",
            )
        )
    return markdown(head, rows)


def _named(models: Found) -> str:
    head = ("model", "basis", "adapter in the denominator", "LoRA", "printed", "as printed")
    rows = []
    for name, model in models.items():
        for row in model["named"]:
            printed = f"{model['printed']['lora']:.2f}"
            fits = "**yes**" if row["fits"] else "no"
            where = "yes" if row["inside"] else "no"
            rows.append((name, row["basis"], where, f"{row['lora']:.4f}", printed, fits))
    return markdown(head, rows)


def _joint(joint: Sequence[Found]) -> str:
    head = (
        "targets", "basis", "LoRA on both (0.83, 0.70)", "DoRA (0.71)", "half (0.66)",
        "share by 0.63", "share by 0.55",
    )  # fmt: skip
    rows = []
    for row in joint:
        where = row["basis"] + (", with the adapter" if row["inside"] else "")
        rows.append(
            (
                _listed(row["types"]),
                where,
                ", ".join(f"{value:.4f}" for value in row["lora"]),
                _judged(row["dora"], row["holds"]["dora"]),
                _judged(row["halves"], row["holds"]["halves"]),
                *(_span(share) for share in row["shares"]),
            )
        )
    return markdown(head, rows)


def _other_ranks(model: Found) -> str:
    head = (
        "r, r'", "readings that give 4.00", "share by 3.26, all six, encoder", "share by 3.26/4.00",
        "DoRA there",
    )  # fmt: skip
    rows = [
        (
            f"{row['rank']}, {row['supplementary_rank']}",
            str(len(row["fitting"])),
            _span(row["share"]) if row["share"] else "-",
            _span(row["by_ratio"]["outside"]),
            f"{row['dora']:.2f}" if row["dora"] else "-",
        )
        for row in model["other_ranks"]
    ]
    return markdown(head, rows)


def _shares(models: Found) -> str:
    head = (
        "model", "printed LoRA, PiLoRA", "share by PiLoRA's figure", "by the ratio of both",
        "by the saving in the text",
    )  # fmt: skip
    rows = []
    for name, model in models.items():
        printed = model["printed"]
        fitting = [row for row in model["named"] if row["fits"]]
        direct = "; ".join(_fitting_share(row) for row in fitting) or "no reading"
        # Where no reading gives LoRA's figure there is no denominator to take an adapter out of.
        ratio = model["by_ratio"]["inside" if fitting else "outside"]
        saving, half = printed["saving"]
        rows.append(
            (
                name,
                f"{printed['lora']:.2f}, {printed['pilora']:.2f}",
                direct,
                _span(ratio),
                f"{_span(model['by_ratio']['stated'])} ({saving:g} ± {half:g} %)",
            )
        )
    return markdown(head, rows)


def _fitting_share(row: Found) -> str:
    where = row["basis"] + (" with adapter" if row["inside"] else "")
    return f"{_span(row['share'])} ({where})"


def _judged(value: float, holds: bool) -> str:
    return f"{value:.4f} {'yes' if holds else 'no'}"


def _span(share: Sequence[float]) -> str:
    least, central, most = share
    return f"{central:.3f} [{least:.3f}, {most:.3f}]"


def _listed(types: Sequence[str]) -> str:
    return ", ".join(_short(kind) for kind in types)


def _short(kind: str) -> str:
    names = {"attention.output.dense": "attention.output", "intermediate.dense": "intermediate"}
    return names.get(kind) or kind.removesuffix(".dense").rpartition(".")[2]


if __name__ == "__main__":
    main()
