"""The fields of the installed transformers' `TrainingArguments`, read off its source text.

Importing transformers takes seconds, and a typo or `--help` needs no more than names and simple types. Where the source
looks unlike today's, the names in `table.py` stand in, and types are asked of transformers itself.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from . import table

_FIELD = re.compile(r"^    (\w+): (.+?) = field\(", re.M)
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "None": None, "list[str]": list[str]}


@functools.cache
def installed() -> dict[str, str]:
    """Name -> annotation of every field, in words; without annotations ("") if they cannot be read."""
    found = importlib.util.find_spec("transformers")  # does not import it
    source = Path(str(found.origin)).with_name("training_args.py") if found else None
    fields = dict(_FIELD.findall(source.read_text(encoding="utf-8"))) if source and source.is_file() else {}
    if {"output_dir", "learning_rate", "seed"} <= fields.keys():
        return fields
    return dict.fromkeys(table.INHERITED, "")


@functools.cache
def simple_types() -> dict[str, Any]:
    """The types of the fields whose annotations are made of simple types; of the others transformers has to be asked."""
    found = {}
    for name, annotation in installed().items():
        words = annotation.split(" | ")
        if all(word in _TYPES for word in words):
            kinds = [_TYPES[word] for word in words if word != "None"]
            kind = functools.reduce(lambda a, b: a | b, kinds)
            found[name] = kind | None if "None" in words else kind
    return found


# transformers renamed gradient_checkpointing to activation_checkpointing; older versions lack the new name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in installed() else "gradient_checkpointing"
