"""Pictures of benchmarks: folders, archives nobody trusts, and the hub."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks import archive as archives
from gradrank.lab.benchmarks.images import FORMS
from gradrank.lab.data import DataSpec, read_examples
from gradrank.lab.encode import load_task_data
from gradrank.lab.models import resolve_model
from gradrank.lab.pictures import open_picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADRANK_DATA", raising=False)
    return tmp_path / "cache"


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 6), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def members(prefix: str = "") -> dict[str, bytes]:
    """Two classes, three training pictures and one test picture each; the shade is the number."""
    return {
        f"{prefix}{split}/{label}/{number:04d}.png": png(100 * place + 10 * number + base)
        for split, base, count in (("train", 0, 3), ("test", 5, 1))
        for place, label in enumerate(("cat", "dog"))
        for number in range(count)
    }


def pack(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w:xz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as out:  # pyright: ignore[reportCallIssue,reportArgumentType]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        for info in extra:
            out.addfile(info, io.BytesIO(b"\0" * info.size))
    return path


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def check(examples) -> None:
    assert (examples.head, examples.metric) == ("image", "accuracy")
    assert examples.label_names == ("cat", "dog")
    assert examples.train.labels == [0, 0, 0, 1, 1, 1]
    shades = [open_picture(picture).getpixel((0, 0))[0] for picture in examples.train.inputs]
    assert shades == [0, 10, 20, 100, 110, 120]
    held = [open_picture(picture).getpixel((0, 0))[0] for picture in examples.eval.inputs]
    assert (held, examples.eval.labels) == ([5, 105], [0, 1])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_folder(tmp_path, form):
    for name, data in members().items():
        path = tmp_path / form.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    check(read_examples(DataSpec(form.name, data_dir=str(tmp_path))))


def test_folder_with_one_split_is_refused(tmp_path):
    (tmp_path / "dtd" / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="lacks 'test'"):
        read_examples(DataSpec("dtd", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("ending", "mode", "prefix"),
    [
        (".tar.xz", "w:xz", ""),
        (".tar.gz", "w:gz", "./"),
        (".tgz", "w:gz", "x/y/"),
        (".tar", "w", ""),
    ],
)
def test_archive(tmp_path, cache, ending, mode, prefix):
    extra = (entry(f"{prefix}train", tarfile.DIRTYPE),)
    files = {**members(prefix), "README.md": b"hello", f"{prefix}train/cat/.hidden.png": b"x"}
    pack(tmp_path / "cifar10" / f"data{ending}", files, *extra, mode=mode)
    said: list[str] = []
    check(read_examples(DataSpec("cifar10", data_dir=str(tmp_path)), said.append))
    assert said == [f"unpacking 'data{ending}'"]
    check(read_examples(DataSpec("cifar10", data_dir=str(tmp_path)), said.append))
    assert len(said) == 1
    kept = sorted(path.name for path in (cache / "pictures").glob("*/*"))
    assert kept == ["index.json", "manifest.json", "pictures.bin"]


def test_damaged_cache_is_built_again(tmp_path, cache):
    pack(tmp_path / "cifar10" / "a.tar.xz", members())
    read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))
    (path,) = cache.glob("pictures/*/pictures.bin")
    path.write_bytes(b"nonsense")
    said: list[str] = []
    check(read_examples(DataSpec("cifar10", data_dir=str(tmp_path)), said.append))
    assert "is damaged" in said[0]


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (entry("../outside.png", tarfile.REGTYPE), "leads out of it"),
        (entry("train/../../../outside.png", tarfile.REGTYPE), "leads out of it"),
        (entry("/train/cat/0009.png", tarfile.REGTYPE), "leads out of it"),
        (entry("train/cat/0009.png", tarfile.SYMTYPE, "/etc/passwd"), "no ordinary file"),
        (entry("train/cat/0009.png", tarfile.LNKTYPE, "train/cat/0000.png"), "no ordinary file"),
        (entry("train/cat/0009.png", tarfile.FIFOTYPE), "no ordinary file"),
        (entry("train/cat/0000.png", tarfile.REGTYPE), "twice"),
        (entry("train/cat/0009.png", tarfile.REGTYPE), "is no picture"),
    ],
)
def test_hostile_archive_is_refused_and_leaves_nothing(tmp_path, cache, info, told):
    pack(tmp_path / "data" / "cifar10" / "a.tar.xz", members(), info)
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    with pytest.raises(DataError, match=told):
        read_examples(DataSpec("cifar10", data_dir=str(tmp_path / "data")))
    after = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    assert after - before == {cache} - before
    assert [path for path in cache.rglob("*") if path.suffix not in {"", ".lock"}] == []


def test_archive_is_bounded(tmp_path, monkeypatch):
    pack(tmp_path / "cifar10" / "a.tar.xz", members())
    size = sum(map(len, members().values()))
    for name, least, told in (
        ("MOST_BYTES", size - 1, "holds more than"),
        ("MOST_MEMBERS", len(members()) - 1, "holds more than"),
        ("LARGEST_PICTURE", max(map(len, members().values())) - 1, "a picture may have"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(archives, name, least)
            with pytest.raises(DataError, match=told):
                read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))
    check(read_examples(DataSpec("cifar10", data_dir=str(tmp_path))))


def test_archive_that_is_none(tmp_path):
    folder = tmp_path / "cifar10"
    whole = pack(folder / "a.tar.xz", members()).read_bytes()
    for content in (b"no archive", whole[: len(whole) // 2], b""):
        (folder / "a.tar.xz").write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be unpacked|holds no pictures"):
            read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))
    only = {name: data for name, data in members().items() if name.startswith("train")}
    pack(folder / "a.tar.xz", only)
    with pytest.raises(DataError, match="holds no pictures 'test/"):
        read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))
    pack(folder / "b.tar.gz", members(), mode="w:gz")
    with pytest.raises(DataError, match="holds 2 archives"):
        read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))


def test_packed_pictures_become_pixels(tmp_path):
    pack(tmp_path / "cifar10" / "a.tar.xz", members())
    examples = read_examples(DataSpec("cifar10", data_dir=str(tmp_path)))
    data = load_task_data(examples, resolve_model("tiny-vit", "image", 2, device="cpu"))
    batch = data.collate([data.train[index] for index in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("form", "named"), [(FORMS[0], True), (FORMS[-1], False)])
def test_hub_pictures_are_opened_when_asked_for(monkeypatch, form, named):
    def rows(shades, labels):
        pictures = [Image.fromarray(np.full((6, 6, 3), shade, np.uint8)) for shade in shades]
        kind = datasets.ClassLabel(names=["cat", "dog"]) if named else datasets.Value("int64")
        features = datasets.Features({form.image: datasets.Image(), form.label: kind})
        columns = {form.image: pictures, form.label: labels}
        return datasets.Dataset.from_dict(columns, features=features)

    asked = []

    def load(path, configuration):
        asked.append((path, configuration))
        splits = {"train": rows([0, 10, 20, 100], [0, 0, 1, 1]), "test": rows([5, 105], [0, 1])}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = read_examples(DataSpec(form.name, train_examples=3))
    assert asked == [(form.hub, None)]
    assert examples.label_names == (("cat", "dog") if named else ("0", "1"))
    assert examples.eval.labels == [0, 1]
    assert [open_picture(picture).getpixel((0, 0)) for picture in examples.eval.inputs] == [
        (5, 5, 5),
        (105, 105, 105),
    ]
    assert len(examples.train.inputs) == 3


def test_hub_copy_with_other_columns(monkeypatch):
    split = datasets.Dataset.from_dict({"x": [1]})
    both = datasets.DatasetDict({"train": split, "test": split})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_a: both)
    with pytest.raises(DataError, match=r"no column 'image'. Known: x"):
        read_examples(DataSpec("dtd"))


def test_nowhere_to_be_found(tmp_path):
    with pytest.raises(
        DataError, match=r"'cars/train/<class>/<picture>'.*'tanganke/stanford_cars'"
    ):
        read_examples(DataSpec("cars", data_dir=str(tmp_path)))
