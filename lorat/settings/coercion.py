"""What a person wrote, as the type that a setting wants; and that type in words.

YAML and the command line both deliver text, so that `1e-5`, `no` and `0123` mean the same in both and
the traps of YAML 1.1 (`1e-5` a string, `no` a boolean, `0123` octal) cannot snap. No setting is known here.
"""

from __future__ import annotations

import difflib
import enum
import functools
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from .sources import Loader

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
        if not isinstance(value, list) or any(isinstance(v, list | dict) for v in value):
            raise ValueError
        inner = (get_args(kind) or (str,))[0]
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
