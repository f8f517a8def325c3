"""Which packages are here, whether they are inside the tested range, and what is known of them."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from gradrank.cli.doctor_findings import NO, NOTE, OK, Finding

SECTION = "packages"
PROBLEMS = "known problems of what is installed"
# The newest versions that the test suite has run with (a test compares them with the pins).
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "matplotlib": "3.11.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "trl": "1.16.0",
    "bitsandbytes": "0.50.2",
}
# What the others are for, and what adds them.
OPTIONAL = {
    "accelerate": ("'gradrank train' and the demo", "'gradrank[train]'"),
    "datasets": ("public data sets by name", "'gradrank[train]'"),
    "trl": ("SFTTrainer; gradrank itself does not use it", "trl"),
    "bitsandbytes": ("4-bit and 8-bit bases and optimizers", "bitsandbytes"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A defect of other software that users of gradrank meet.

    Attributes:
        needs: Version ranges by package; all have to be there and inside.
        text: What happens.
        remedy: What to do.
    """

    needs: Mapping[str, str]
    text: str
    remedy: str


PROBLEMS_KNOWN = (
    Problem(
        {"peft": ">=0.21,<0.22", "transformers": ">=5.23"},
        "PEFT reads a property that transformers has renamed, and a FutureWarning about "
        "'is_gradient_checkpointing' appears",
        "nothing; it does no harm",
    ),
    Problem(
        {"peft": ">=0.21,<0.22"},
        "PEFT's AdaLoRA does nothing unless update_and_allocate is called after every step, which "
        "the Trainer does not do",
        "use --method adalora, or the baseline 'peft-adalora' of compare, which does",
    ),
    Problem(
        {"peft": ">=0.21,<0.22"},
        "PEFT's OLoRA changes the function of square Conv1D layers (GPT-2) silently",
        "use another initialisation there; gradrank refuses this one",
    ),
    Problem(
        {"peft": ">=0.21,<0.22"},
        "PEFT's EVA loops for ever where its components do not settle",
        "use the baseline 'eva' of compare, which takes a bounded number of rounds",
    ),
    Problem(
        {"vllm": ">=0"},
        "vLLM ignores rank_pattern and alpha_pattern: a stock adapter with several ranks gets a "
        "wrong scale silently",
        "gradrank export ADAPTER --target vllm",
    ),
    Problem(
        {"sglang": ">=0"},
        "SGLang stops at a stock adapter with several ranks",
        "gradrank export ADAPTER --target sglang",
    ),
)


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed.

    Args:
        names: Names of distributions.
    """
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def ranges() -> dict[str, tuple[str, bool]]:
    """Return what gradrank's own metadata asks for.

    Returns:
        By package the accepted versions, and whether it is required (not an extra).
    """
    from packaging.requirements import Requirement

    asked: dict[str, tuple[str, bool]] = {}
    try:
        lines = metadata.requires("gradrank") or []
    except metadata.PackageNotFoundError:
        lines = []  # run from its source without being installed
    for line in lines:
        one = Requirement(line)
        asked.setdefault(one.name, (str(one.specifier), "extra" not in str(one.marker or "")))
    return asked


def package_findings() -> list[Finding]:
    """Look at Python and at every package that gradrank builds on."""
    asked = ranges()
    names = list(dict.fromkeys([*TESTED, *(n for n, (_, needed) in asked.items() if needed)]))
    have = installed(names)
    found = [Finding(SECTION, "python", OK, platform.python_version())]
    for name in names:
        wanted, needed = asked.get(name, ("", name not in OPTIONAL))
        found.append(judge(name, have.get(name), wanted, needed))
    return found


def judge(name: str, version: str | None, wanted: str, needed: bool) -> Finding:
    """Judge one package.

    Args:
        name: Its name.
        version: The installed version, if any.
        wanted: The versions that gradrank accepts.
        needed: Whether gradrank needs it for its main job.

    Returns:
        The finding.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    use, install = OPTIONAL.get(name, ("", f"'{name}{wanted}'"))
    if version is None:
        if needed:
            return Finding(SECTION, name, NO, "not installed", f"pip install {install}", True)
        return Finding(SECTION, name, NOTE, f"not installed; for {use}", f"pip install {install}")
    tested = TESTED.get(name)
    told = f"{version} (accepted: {wanted or 'any'}" + (f", tested: {tested})" if tested else ")")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        fix = f"pip install '{name}{wanted}'"
        return Finding(SECTION, name, NO, told + ": outside the accepted range", fix, needed)
    if tested and Version(version).release[:2] > Version(tested).release[:2]:
        return Finding(SECTION, name, NOTE, told + ": newer than what was tested")
    return Finding(SECTION, name, OK, told)


def problem_findings(versions: Mapping[str, str] | None = None) -> list[Finding]:
    """Name the known problems of what is installed.

    Args:
        versions: Versions by package; None: those installed here.

    Returns:
        The findings.
    """
    from packaging.specifiers import SpecifierSet

    names = list(dict.fromkeys(name for one in PROBLEMS_KNOWN for name in one.needs))
    have = installed(names) if versions is None else versions
    return [
        Finding(PROBLEMS, " + ".join(one.needs), NOTE, one.text, one.remedy)
        for one in PROBLEMS_KNOWN
        if all(
            name in have and SpecifierSet(allowed).contains(have[name], prereleases=True)
            for name, allowed in one.needs.items()
        )
    ]
