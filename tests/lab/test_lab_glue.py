"""GLUE and WikiText in the layouts of their public files, and of the hub."""

import gzip
from pathlib import Path

import datasets
import pytest

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks import wikitext
from gradrank.lab.benchmarks.glue import FORMS
from gradrank.lab.benchmarks.wikitext import articles
from gradrank.lab.data import DataSpec, read_examples

BOM = "\ufeff"
# Header and two lines, with quotes that are ordinary characters, as the official files have them.
FILES = {
    "cola": (
        "",
        'gj04\t1\t\t"Quoted" sentence number {n}.\nks08\t0\t*\tThem "is wrong {n}.\n',
        ('"Quoted" sentence number 0.', "acceptable"),
    ),
    "sst2": (
        "sentence\tlabel\n",
        'a " stray quote {n} \t1\ndull {n} \t0\n',
        ('a " stray quote 0', "positive"),
    ),
    "mrpc": (
        f"{BOM}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '1\t7\t8\tHe said " yes {n}\tYes {n} , he " said .\n0\t1\t2\tOne {n}\tTwo {n}\n',
        (('He said " yes 0', 'Yes 0 , he " said .'), "equivalent"),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "1\t2\t3\tWho {n}?\tWhom {n}?\t1\n2\t3\t4\tWhy {n}?\tWhen {n}?\t0\n",
        (("Who 0?", "Whom 0?"), "duplicate"),
    ),
    "mnli": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n",
        "0\t1\tAll {n}\tSome {n}\tneutral\tentailment\n1\t1\tNo {n}\tAll {n}\tx\tcontradiction\n",
        (("All 0", "Some 0"), "entailment"),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n",
        "0\tWho {n}?\tShe {n}.\tentailment\n1\tWhy {n}?\tNever {n}.\tnot_entailment\n",
        (("Who 0?", "She 0."), "entailment"),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tA {n}\tB {n}\tnot_entailment\n1\tC {n}\tD {n}\tentailment\n",
        (("A 0", "B 0"), "not_entailment"),
    ),
}
FOLDERS = {form.name: form.folder for form in FORMS}
DEV = {"mnli": "dev_matched", "mnli-mm": "dev_mismatched"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8", newline="")


def table(name: str, first: int, count: int) -> str:
    header, lines, _ = FILES[name.removesuffix("-mm")]
    return header + "".join(lines.format(n=n) for n in range(first, first + count))


def glue(folder: Path, name: str, ending: str = ".tsv.gz", official: bool = False) -> str:
    base = name.removesuffix("-mm")
    place = folder / "glue" / (FOLDERS[name] if official else base)
    write(place / f"train{ending}", table(name, 0, 6))
    write(place / f"{DEV.get(name, 'dev')}{ending}", table(name, 90, 2))
    return str(folder)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize(("ending", "official"), [(".tsv.gz", False), (".tsv", True)])
def test_official_columns(tmp_path, name, ending, official):
    examples = read_examples(DataSpec(name, data_dir=glue(tmp_path, name, ending, official)))
    form = next(form for form in FORMS if form.name == name)
    assert (len(examples.train.inputs), len(examples.eval.inputs)) == (12, 4)
    text, label = FILES[name.removesuffix("-mm")][2]
    assert examples.train.inputs[0] == text
    assert examples.label_names == form.classes
    assert examples.label_names[(examples.train.labels or [])[0]] == label
    assert "90" in str(examples.eval.inputs[0])
    assert examples.metric == form.metric
    assert "note" not in examples.describe


def test_positive_class_of_f1_has_index_one():
    classes = {form.name: form.classes for form in FORMS if form.metric == "accuracy_f1"}
    assert {name: names[1] for name, names in classes.items()} == {
        "mrpc": "equivalent",
        "qqp": "duplicate",
    }
    metrics = {form.name: form.metric for form in FORMS}
    assert {name for name in metrics if metrics[name] == "mcc"} == {"cola"}


def test_environment_names_a_folder_too(tmp_path, monkeypatch):
    glue(tmp_path / "other", "rte")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GRADRANK_DATA", str(tmp_path / "other"))
    assert len(read_examples(DataSpec("rte")).train.inputs) == 12
    spec = DataSpec("rte", data_dir=str(tmp_path / "empty"))
    assert len(read_examples(spec).train.inputs) == 12
    monkeypatch.setenv("GRADRANK_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"GRADRANK_DATA '.*gone' is no folder"):
        read_examples(DataSpec("rte"))


def test_missing_data_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADRANK_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"no local folder \(data_dir and GRADRANK_DATA.*'nyu-mll/glue:cola' could"
    ):
        read_examples(DataSpec("cola"))
    monkeypatch.setenv("GRADRANK_DATA", str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError) as caught:
        read_examples(DataSpec("cola", data_dir=str(tmp_path / "a")))
    told = str(caught.value)
    for part in (f"'{tmp_path / 'a'}' and '{tmp_path}'", "glue/cola/train.tsv[.gz]", "--data-dir"):
        assert part in told


def test_development_file_alone_is_no_task(tmp_path):
    write(tmp_path / "glue" / "qnli_dev_only.tsv.gz", table("qnli", 0, 3))
    with pytest.raises(DataError, match=r"only '.*qnli_dev_only.tsv.gz' is there, so the training"):
        read_examples(DataSpec("qnli", data_dir=str(tmp_path)))
    write(tmp_path / "glue" / "qnli" / "train.tsv", table("qnli", 5, 3))
    assert len(read_examples(DataSpec("qnli", data_dir=str(tmp_path))).eval.inputs) == 6


def test_few_broken_lines_are_left_out_and_told(tmp_path):
    folder = glue(tmp_path, "qqp", ".tsv")
    path = tmp_path / "glue" / "qqp" / "train.tsv"
    write(path, table("qqp", 0, 100) + "1\t2\t3\tcut off\n\n")
    examples = read_examples(DataSpec("qqp", data_dir=folder))
    assert len(examples.train.inputs) == 200
    assert "1 broken line(s) of 'train.tsv'" in examples.describe["note"]
    write(path, table("qqp", 0, 10) + "1\t2\t3\tcut off\n")
    with pytest.raises(DataError, match=r"1 of 21 lines lack a text or a known label.*line 22"):
        read_examples(DataSpec("qqp", data_dir=folder))
    write(path, table("qqp", 0, 10).replace("is_duplicate", "label"))
    with pytest.raises(DataError, match=r"has no column 'is_duplicate'.*official file"):
        read_examples(DataSpec("qqp", data_dir=folder))
    write(path, "")
    with pytest.raises(DataError, match="has no column"):
        read_examples(DataSpec("qqp", data_dir=folder))
    path.with_name("train.tsv.gz").write_bytes(gzip.compress(b"id\tqid1")[:-4])
    path.unlink()
    with pytest.raises(DataError, match="could not be read"):
        read_examples(DataSpec("qqp", data_dir=folder))


def on_hub(monkeypatch, **splits):
    asked = []

    def load(path, configuration=None):
        asked.append((path, configuration))
        return datasets.DatasetDict(splits)

    monkeypatch.delenv("GRADRANK_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def hub_split(columns: dict, names: list[str] | None = None) -> datasets.Dataset:
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("label", datasets.ClassLabel(names=names)) if names else made


def test_hub_by_name(monkeypatch):
    rows = {"premise": ["a", "b"], "hypothesis": ["c ", "d"], "label": [2, 0], "idx": [0, 1]}
    names = ["entailment", "neutral", "contradiction"]
    held = {**rows, "premise": ["held", "out"]}
    asked = on_hub(
        monkeypatch,
        train=hub_split(rows, names),
        validation_matched=hub_split(rows, names),
        validation_mismatched=hub_split(held, names),
    )
    examples = read_examples(DataSpec("mnli-mm"))
    assert asked == [("nyu-mll/glue", "mnli")]
    assert examples.train.inputs == [("a", "c"), ("b", "d")]
    assert examples.train.labels == [2, 0]
    assert examples.eval.inputs[0] == ("held", "c")


def test_hub_copy_without_class_names(monkeypatch):
    rows = {"sentence": ["a", "b"], "label": [1, 0]}
    on_hub(monkeypatch, train=hub_split(rows), validation=hub_split(rows))
    assert read_examples(DataSpec("cola")).train.labels == [1, 0]
    on_hub(monkeypatch, train=hub_split({"text": ["a"], "label": [1]}), validation=hub_split(rows))
    with pytest.raises(DataError, match="no rows with the columns sentence, label"):
        read_examples(DataSpec("cola"))
    on_hub(monkeypatch, train=hub_split(rows))
    with pytest.raises(DataError, match=r"no split 'validation'. Known: train"):
        read_examples(DataSpec("cola"))


WIKI = (
    " \n = First Title = \n \n One <unk> . \n \n = = Section = = \n \n = not alone = \n Two . \n \n"
)


def test_articles_begin_at_titles():
    lines = [*WIKI.split("\n"), " = Second = ", "", "Three"]
    first, second = articles(lines)
    assert first.startswith("= First Title =\n\nOne <unk> .\n")
    assert "= = Section = =" in first
    assert "= not alone =\nTwo ." in first
    assert second == "= Second =\n\nThree\n"
    assert articles(["", " "]) == []


def test_wikitext_without_its_training_split(tmp_path):
    one = "".join(f" = A {i} = \n \n text {i} \n \n" for i in range(5))
    write(tmp_path / "wikitext2" / "valid.txt.gz", one)
    write(tmp_path / "wikitext2" / "test.txt.gz", one.replace("= A", "= Test A"))
    spec = {"data_dir": str(tmp_path), "validation": 2}
    examples = read_examples(DataSpec("wikitext2", **spec))
    assert (examples.head, examples.metric) == ("lm", "perplexity")
    assert len(examples.train.inputs) == 3
    assert len(examples.eval.inputs) == 5
    assert all(text.startswith("= Test A") for text in examples.eval.inputs)
    assert "Trained on the validation split" in examples.describe["note"]
    held = read_examples(DataSpec("wikitext2", split="validation", **spec))
    assert len({*held.train.inputs, *held.eval.inputs}) == 5
    write(tmp_path / "wikitext2" / "train.txt", one.replace("= A", "= Train A"))
    full = read_examples(DataSpec("wikitext2", **spec))
    assert full.train.inputs[0].startswith("= Train A")
    assert "note" not in full.describe


@pytest.fixture
def online(monkeypatch):
    """Take the tests' offline mode away, and what an earlier try found."""
    wikitext.train_from_hub.cache_clear()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wikitext.train_from_hub.cache_clear()


def halves(folder):
    """Write the validation and the test split, as some folders have them; return the folder."""
    for split in ("valid", "test"):
        text = "".join(f" = {split} {i} = \n \n text {i} \n \n" for i in range(3))
        write(folder / "wikitext2" / f"{split}.txt", text)
    return str(folder)


@pytest.mark.usefixtures("online")
def test_the_hub_has_the_training_split_that_a_folder_lacks(monkeypatch, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["", " = Hub A = \n", "", " one \n"]})
    asked = on_hub(monkeypatch, train=rows, test=rows)
    examples = read_examples(DataSpec("wikitext2", data_dir=halves(tmp_path)))
    assert examples.train.inputs == ["= Hub A =\n\none\n"]
    assert examples.eval.inputs[0].startswith("= test 0 =")
    assert "from the public hub" in examples.describe["note"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]


@pytest.mark.usefixtures("online")
def test_without_the_hub_the_validation_split_is_trained_on_and_one_try_is_enough(
    monkeypatch, tmp_path
):
    asked = []

    def gone(*named):
        asked.append(named)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    for _ in range(2):
        examples = read_examples(DataSpec("wikitext2", data_dir=halves(tmp_path)))
        assert examples.train.inputs[0].startswith("= valid 0 =")
        assert "Trained on the validation split" in examples.describe["note"]
    assert len(asked) == 1


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_the_hub_is_not_asked_for_the_training_split(monkeypatch, tmp_path, name):
    rows = datasets.Dataset.from_dict({"text": ["", " = Hub A = \n", "", " one \n"]})
    asked = on_hub(monkeypatch, train=rows, test=rows)
    monkeypatch.setenv(name, "1")
    examples = read_examples(DataSpec("wikitext2", data_dir=halves(tmp_path)))
    assert examples.train.inputs[0].startswith("= valid 0 =")
    assert asked == []


def test_wikitext_from_the_hub(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " one \n", " two \n"]})
    asked = on_hub(monkeypatch, train=rows, test=rows)
    assert read_examples(DataSpec("wikitext2")).eval.inputs == ["= A =\n\none\ntwo\n"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]
