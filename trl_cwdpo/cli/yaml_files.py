"""YAML as users write it, read strictly: safe types only, no key twice, and errors that name file and line."""

from pathlib import Path
from typing import Any


class YamlError(ValueError):
    """A YAML file that cannot be read, or says something twice; worded to follow the name of the file."""


def read_yaml(text: str | bytes) -> Any:  # noqa: ANN401 (any YAML value)
    """
    Read YAML.

    Args:
        text (`str` or `bytes`):
            The document; bytes are UTF-8.

    Returns:
        Plain values: no other objects are made, whatever tags the document has.

    Raises:
        YamlError: Naming the line and what is wrong.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    class Loader(yaml.SafeLoader):
        # Where the document is taken apart: merged keys (`<<`), which may be given again, are not there yet
        def compose_mapping_node(self, anchor: Any) -> Any:  # noqa: ANN401 (PyYAML's signature)
            node = super().compose_mapping_node(anchor)
            _refuse_repeated_keys(node)
            return node

    try:
        return yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, Loader)
    except UnicodeDecodeError as error:
        raise YamlError(f"is not UTF-8 ({error.reason} at byte {error.start}). Save it as such.") from error
    except yaml.YAMLError as error:
        raise YamlError(f"is no valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise YamlError("is nested too deeply.") from error


def _refuse_repeated_keys(mapping: Any) -> None:  # noqa: ANN401 (a node of PyYAML's)
    seen: dict[str, int] = {}
    for key, _ in mapping.value:
        line, name = key.start_mark.line + 1, key.value
        if not isinstance(name, str):
            continue
        if name in seen and name != "<<":
            raise YamlError(f"says `{name}` twice, in line {seen[name]} and in line {line}. Remove one.")
        seen[name] = line


def read_yaml_file(path: str | Path) -> Any:  # noqa: ANN401 (any YAML value)
    """
    Read a YAML file.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        See [`read_yaml`].

    Raises:
        YamlError: If it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise YamlError(f"cannot be read: {error.strerror or error}. Name a YAML file.") from error
    return read_yaml(content)
