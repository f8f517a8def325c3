"""YAML of unknown origin: small, plain, and each key once."""

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from gradrank.core.errors import DataError
from gradrank.core.files import read_text
from gradrank.core.text import refuse_unwritable

# Twenty times the largest of ours; what is more would take the reader seconds.
LARGEST = 1 << 16


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Anchors and aliases are refused: a few hundred bytes of them can stand for gigabytes.

    Args:
        path: The file.
        what: What it should be ("config", "recipe"), for the message.

    Returns:
        Plain data.

    Raises:
        DataError: If the file is missing, too large, not text or no YAML, names a key twice, or
            uses anchors.
    """
    text = read_text(path, what, LARGEST)
    try:
        data = yaml.load(text, Loader=_Plain)
        refuse_unwritable(data, text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} '{path}' is not valid YAML: {reason}.") from error
    return data


class _Plain(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(
                None, None, "aliases (*name) are not read; write the value again", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        data = super().construct_mapping(node, deep)
        if len(data) < len(node.value):  # 5000 and 5_000 are one number
            raise ConstructorError(
                None, None, "two keys are written differently and are the same", node.start_mark
            )
        return data
