"""Where settings are written: a flat YAML file and the command line, read as text with their places.

Types are for `coercion.py`, what the keys mean for `arguments.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """One setting as it was written. `value`: text, a list of texts, a dict, None, or True for a bare `--flag`."""

    value: Any
    where: str


class Loader(yaml.SafeLoader):
    """`yaml.safe_load` that reads `1e-5` as a number, leaves dates as text and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            line = key.start_mark.line + 1
            if name in lines:
                text = f"{key.value!r} is given twice, in lines {lines[name]} and {line}; keep one of them"
                raise ConstructorError(None, None, text, key.start_mark)
            lines[name] = line
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith("timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str) -> dict[str, Given]:
    """The settings in a flat YAML file, values as text. Raises `ConfigError` with file and line."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        near = f" (in {file.parent}: {', '.join(difflib.get_close_matches(file.name, there, 5, 0))})" if there else ""
        raise ConfigError(f"there is no file {path}{near}; give --config the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as YAML text: {error}.") from None
    found: dict[str, Given] = {}
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: the file holds {kind}; write lines of `key: value`.")
        loader.construct_document(node)  # refuses duplicate keys and tags that would run code
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            found[str(key.value).replace("-", "_")] = Given(_plain(loader, value), where)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: this is not valid YAML: {what}. Write flat lines of `key: value`.") from None
    return found


def _plain(loader: Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(n, yaml.ScalarNode) for n in node.value):
        return [n.value for n in node.value]
    return loader.construct_object(node, deep=True)


def read_argv(argv: list[str], flags: Collection[str]) -> tuple[str | None, dict[str, Given], list[str]]:
    """The file named by --config, the settings on the command line (the last one wins), and what makes no sense.

    `flags`: the keys that are true or false, which `--no_key` turns off.
    """
    config: str | None = None
    found: dict[str, Given] = {}
    problems: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not re.match(r"--[A-Za-z]", token):
            advice = f"write --config {token}" if token.endswith((".yaml", ".yml")) else "write --key value"
            problems.append(f"{COMMAND_LINE}: {token!r} belongs to no key; {advice}.")
            continue
        name, equals, text = token[2:].partition("=")
        key, values = name.replace("-", "_"), [text] if equals else []
        while not equals and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            values.append(rest.pop(0))
        if key == "config":
            values, rest = values[:1], values[1:] + rest
            if not values or config is not None:
                problems.append(f"{COMMAND_LINE}: --config takes one file, once.")
            config = config or (values[0] if values else None)
            continue
        if not values and key.startswith("no_") and key[3:] in flags:
            key, values = key[3:], ["false"]
        value = True if not values else values[0] if len(values) == 1 else values
        found[key] = Given(None if value in ("null", "~") else value, COMMAND_LINE)
    return config, found, problems
