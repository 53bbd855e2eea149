"""A dataset's layout, as it was found: what every row of it is read by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .columns import AS_WRITTEN, RowSettings
from .published import Shape

SIDES = ("chosen", "rejected", "completion")


@dataclass(frozen=True)
class Format:
    """A detected layout. `name` is for people; `kinds` maps each raw column that is checked to what its cells hold.

    `layout` is "explicit" or "implicit" (pairs), "kto", or "shape" (read by a function of `published.py`); `roles` maps
    parts to columns; `chat` says that examples are messages, `turns` that rows are read as such (before `dialogues` turns
    them into text); `unpair` that method kto splits each pair into a desirable
    and an undesirable completion; `reads` and `unread` are all columns there are.
    """

    name: str
    layout: str
    kinds: dict[str, str]
    chat: bool = False
    turns: bool = False
    unpair: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    settings: RowSettings = AS_WRITTEN
    shape: Shape | None = None
    reads: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
