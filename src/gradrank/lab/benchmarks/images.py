"""Image classification: a local folder, an archive of one, or the public hub."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gradrank.core.errors import DataError
from gradrank.lab.benchmarks.archive import packed_pictures
from gradrank.lab.benchmarks.find import data_folders, from_hub
from gradrank.lab.benchmarks.task import Columns, Loaded, Task, Where
from gradrank.lab.hub import read_picture_splits
from gradrank.lab.readers import read_image_folder

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


@dataclass(frozen=True, slots=True)
class Form:
    """One data set of pictures.

    Attributes:
        name: The task, and its folder.
        about: What is to be told apart.
        hub: Name on the public hub.
        source: Paper.
        image: Column of the picture on the hub.
        label: Column of the class there.
    """

    name: str
    about: str
    hub: str
    source: str
    image: str = "image"
    label: str = "label"


def load(form: Form, where: Where) -> Loaded:
    """Read pictures of both splits.

    Args:
        form: Which data set.
        where: Where to look.

    Returns:
        Training and test split.
    """
    for folder in data_folders(where):
        found = _local(folder / form.name, where)
        if found is not None:
            return found
    wanted = f"'{form.name}/train/<class>/<picture>' and '{form.name}/test/...', or a tar of them"
    return from_hub(form.name, form.hub, where, wanted, partial(_from_hub, form))


def _local(folder: Path, where: Where) -> Loaded | None:
    train, test = folder / "train", folder / "test"
    if train.is_dir() or test.is_dir():
        lacks = next((part for part in (train, test) if not part.is_dir()), None)
        if lacks is not None:
            raise DataError(f"folder '{folder}' lacks '{lacks.name}'; both splits are needed.")
        return Loaded(_folder(train), _folder(test))
    archives = sorted(_archives(folder))
    if len(archives) > 1:
        raise DataError(
            f"folder '{folder}' holds {len(archives)} archives ('{archives[0].name}', "
            f"'{archives[1].name}'); leave one, or unpack it to 'train' and 'test'."
        )
    if not archives:
        return None
    found = packed_pictures(archives[0], where.say)
    train_columns, test_columns = (found[split] for split in ("train", "test"))
    return Loaded(train_columns, test_columns)


def _archives(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name.lower().endswith(_ENDINGS)]


def _folder(folder: Path) -> Columns:
    rows = read_image_folder(folder)
    return [row["image"] for row in rows], [row["label"] for row in rows]


def _from_hub(form: Form) -> Loaded:
    train, test = read_picture_splits(form.hub, ("train", "test"), form.image, form.label)
    return Loaded(train, test)


FORMS = (
    Form(
        "cars",
        "196 models of cars",
        "tanganke/stanford_cars",
        "Krause et al., Stanford Cars (2013)",
    ),
    Form(
        "dtd",
        "47 textures",
        "tanganke/dtd",
        "Cimpoi et al., Describable Textures (2014)",
    ),
    Form(
        "eurosat",
        "10 kinds of land use from a satellite",
        "tanganke/eurosat",
        "Helber et al., EuroSAT (2019)",
    ),
    Form(
        "gtsrb",
        "43 traffic signs",
        "tanganke/gtsrb",
        "Stallkamp et al., German Traffic Sign Recognition Benchmark (2011)",
    ),
    Form(
        "resisc45",
        "45 scenes from the air",
        "tanganke/resisc45",
        "Cheng et al., NWPU-RESISC45 (2017)",
    ),
    Form(
        "sun397",
        "397 scenes",
        "tanganke/sun397",
        "Xiao et al., SUN Database (2010)",
    ),
    Form(
        "svhn",
        "10 digits of house numbers",
        "ufldl-stanford/svhn:cropped_digits",
        "Netzer et al., Street View House Numbers (2011)",
    ),
    Form(
        "cifar10",
        "10 kinds of things, 32 x 32 pixels",
        "uoft-cs/cifar10",
        "Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)",
        image="img",
    ),
)

IMAGE_TASKS = tuple(
    Task(
        name=form.name,
        head="image",
        metric="accuracy",
        description=f"Pictures of {form.about}.",
        source=form.source,
        licence="research use; see the data set",
        load=partial(load, form),
    )
    for form in FORMS
)
