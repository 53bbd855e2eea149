"""What a person wrote: a flat YAML file and a command line, read as text with its place, and as the type that is wanted.

Both deliver text, so that `1e-5`, `no` and `0123` mean the same in both and the traps of YAML 1.1 (`1e-5` a string, `no` a
boolean, `0123` octal) cannot snap. What the keys mean is for `arguments.py`; no setting is known here.
"""

from __future__ import annotations

import difflib
import enum
import functools
import math
import re
import types
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

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


TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NAMES = re.compile(r"[\w.\-]+(\s*,\s*[\w.\-]+)+")  # q_proj,v_proj; anything else with a comma may be a regex


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. None is for the caller to judge and passes through.

    `value`: text, a list of texts, a dict, True for a bare `--flag`. Raises `ValueError` if it does not fit.
    """
    kinds = _kinds(hint)
    if value is None or (type(None) in kinds and str not in kinds and str(value).lower() == "none"):
        return None
    if value is True:
        if bool in kinds:
            return True
        raise ValueError("no value given")
    braces = isinstance(value, str) and value.startswith("{")
    for kind in kinds:
        if braces and kind is str and any((get_origin(k) or k) is dict for k in kinds):
            continue  # a mapping that does not parse is no path
        try:
            return _as(value, kind, or_text=str in kinds)
        except (ValueError, TypeError, OverflowError, yaml.YAMLError):
            continue
    raise ValueError(f"not {describe(hint)}")


@functools.cache
def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, the pickiest first; text only where no enumeration says which texts there are."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_choices(k) and isinstance(k, type) for k in kinds):
        kinds = tuple(k for k in kinds if k is not str)
    order = (bool, None, int, float, dict, list, str, type(None))
    rank: dict[Any, int] = {kind: place for place, kind in enumerate(order)}
    return tuple(sorted(kinds, key=lambda k: rank.get(get_origin(k) or k, 1)))


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(e.value for e in kind) if isinstance(kind, type) and issubclass(kind, enum.Enum) else ()


def _as(value: Any, kind: Any, or_text: bool = False) -> Any:
    base = get_origin(kind) or kind
    if base is list:
        if isinstance(value, str):
            if or_text and not value.startswith("[") and not _NAMES.fullmatch(value):
                raise ValueError  # one name is text where text will do
            value = yaml.load(value, Loader) if value.startswith("[") else _split(value)
        inner = (get_args(kind) or (str,))[0]
        if dict in (mappings := get_args(inner)):  # a list of names and mappings
            value = [yaml.load(v, Loader) if isinstance(v, str) and v.startswith("{") else v for v in value]
        if not isinstance(value, list) or any(isinstance(v, list | dict) and type(v) not in mappings for v in value):
            raise ValueError
        if mappings:
            return [v if isinstance(v, dict) else str(v) for v in value]
        return [_as(str(v), inner) for v in value]
    if base is dict:
        if isinstance(value, str) and value.startswith("{"):
            value = yaml.load(value, Loader)
        elif isinstance(value, str) and names_of(kind):
            value = mapping(value)
        if not isinstance(value, dict):
            raise ValueError
        return {str(k): _name(v) for k, v in value.items()} if names_of(kind) else value
    if not isinstance(value, str):
        raise ValueError
    word = value.strip().lower()
    if allowed := _choices(kind):
        for choice in allowed:
            if value == str(choice) or (word in FALSE and choice in ("no", False)):
                return choice
        raise ValueError
    if base is bool:
        if word in (*TRUE, *FALSE, "1", "0"):
            return word in (*TRUE, "1")
        raise ValueError
    if base in (int, float):
        number = float(value)
        if not math.isfinite(number) or (base is int and number % 1):
            raise ValueError
        return number if base is float else int(value) if value.strip().lstrip("+-").isdigit() else int(number)
    if base is str:
        return value
    raise ValueError


def _split(text: str) -> list[str]:
    return re.split(r"\s*,\s*", text) if _NAMES.fullmatch(text) else [text]


def names_of(kind: Any) -> bool:
    """Whether a type is a mapping of names to names, which `name=name,name=name` can write."""
    return get_origin(kind) is dict and get_args(kind)[1] != Any


def mapping(text: str) -> dict[str, str | None]:
    """`prompt=question,system=` as {"prompt": "question", "system": None}. Raises `ValueError` for anything else."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or any(not equals or not key.strip() for key, equals, _ in pairs):
        raise ValueError("not written as part=column,part=column")
    if len({key.strip() for key, *_ in pairs}) < len(pairs):
        raise ValueError("a part is given twice")
    return {key.strip(): name.strip() or None for key, _, name in pairs}


def _name(value: Any) -> str | None:
    if isinstance(value, bool | list | dict):
        raise ValueError
    return None if value is None or value == "" else str(value)


def describe(hint: Any) -> str:
    """A type in words: "a number", "one of: dpo, ipo, kto", "a whole number or null"."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    names |= {dict: "a mapping", list: "a list"}
    words = []
    for kind in _kinds(hint):
        allowed = _choices(kind)
        word = names[get_origin(kind) or kind] if not allowed else f"one of: {', '.join(map(str, allowed))}"
        words.append("a mapping of names, such as prompt=question,chosen=good" if names_of(kind) else word)
    return " or ".join(words)


def nearest(word: str, known: Any) -> str | None:
    """The most similar of `known`, or None."""
    return next(iter(difflib.get_close_matches(word.lower(), [str(k) for k in known], 1, 0.6)), None)


def choices(hint: Any) -> tuple[Any, ...]:
    """All values that an enumerated setting takes; empty for others."""
    return tuple(choice for kind in _kinds(hint) for choice in _choices(kind))


def shown(value: Any) -> str:
    """A value as a person would write it in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
