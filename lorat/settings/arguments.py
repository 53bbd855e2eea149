"""`lorat train --config run.yaml [--key value …]` -> a checked `TrustRegionConfig`.

Keys are flat, and every one can be given in the file and on the command line, which wins. TRL's names
are accepted (`aliases.py`). Everything that is wrong is said at once: where it was given, what was given,
what is expected. Nothing is loaded or written, and transformers is imported only where its types are asked for.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ..errors import ConfigError
from .aliases import ADVICE, ALIASES, TRL_TYPES, setting_of, translate
from .inherited import installed, simple_types
from .sources import FALSE, TRUE, Given, choices, coerce, describe, nearest, read_argv, read_yaml, shown
from .table import DEFAULTS, NAMED_SYNC, NOT_SETTABLE, OWN, SYNC, TRAINER, Setting

if TYPE_CHECKING:
    from .config import TrustRegionConfig

REQUIRED = {
    "model_name_or_path": "a hub id or a local folder",
    "dataset_name": "a hub id, a folder or a data file",
    "output_dir": "a folder for checkpoints and the finished adapter",
}


def parse_config(argv: list[str], say: Callable[[str], None] | None = None) -> TrustRegionConfig:
    """The configuration of a run from the arguments of `lorat train`.

    `say` gets a note for each setting that was translated or left out (default: standard error, first rank).
    Raises `ConfigError` that lists every problem there is.
    """
    path, line, problems = read_argv(argv, flags())
    file = read_yaml(path) if path is not None else {}
    notes = _override(file, line)
    given = file | line
    values: dict[str, Any] = {}
    guesses: set[str | None] = set()
    for key, entry in given.items():
        if key not in names():
            problem, guess = _unknown(key)
            problems.append(f"{entry.where}: {problem}")
            guesses.add(guess)
            continue
        try:
            value = coerce(entry.value, type_of(key))
        except ValueError as error:
            problems.append(f"{entry.where}: {_wrong_type(key, entry.value, str(error))}")
        else:
            # null: unset where that means something, else the default
            if value is not None or (_takes_null(key) and key not in (*ALIASES, *TRL_TYPES)):
                values[key] = value
    values, translated, untranslatable = translate(values)
    problems += [f"{given[key].where}: {text}" for key, text in untranslatable]
    missing = [
        f"{key} is not given; set it to {what}, in the file or with --{key}."
        for key, what in REQUIRED.items()
        if not values.get(key)
        and not (key == "dataset_name" and values.get("datasets"))
        and key not in guesses
        and not (key in given and given[key].value)
    ]
    missing += _evaluation(values, given) if not problems else []
    if problems:
        raise ConfigError(_message(problems + missing))
    config = _build(values, missing)
    if missing:
        raise ConfigError(_message(missing))
    for note in notes + translated:
        (say or _say)(note)
    return config


def help_text(width: int | None = None) -> str:
    """What `lorat train --help` prints, `width` columns wide (default: the terminal, at most 120)."""
    from .help import render

    return render(width)


@functools.cache
def names() -> frozenset[str]:
    """Every accepted key, TRL's names too."""
    return frozenset({*OWN, *installed(), *ALIASES, *TRL_TYPES}) - set(NOT_SETTABLE)


@functools.cache
def flags() -> frozenset[str]:
    """The keys that are true or false."""
    return frozenset(key for key in names() if _cheap_type(ALIASES.get(key, key)) in (bool, bool | None))


def type_of(key: str) -> Any:
    """The type of an accepted key; transformers is imported only for those of its enumerations and objects."""
    key = key if key in TRL_TYPES else ALIASES.get(key, key)
    if (cheap := _cheap_type(key)) is not None:
        return cheap
    from .config import TrustRegionConfig

    return get_type_hints(TrustRegionConfig)[key]


def _cheap_type(key: str) -> Any:
    """The type as far as it is known without transformers; None otherwise."""
    if key == "resume_from_checkpoint":
        return str | bool | None  # true: the newest checkpoint
    if key in TRL_TYPES:
        return TRL_TYPES[key]
    setting = OWN.get(key) or DEFAULTS.get(key)
    if setting is None and key in TRAINER and TRAINER[key].choices:
        setting = TRAINER[key]
    return _type(setting) if setting is not None else simple_types().get(key)


def _type(setting: Setting) -> Any:
    kind: Any = Literal[setting.choices] if setting.choices else list[str] if setting.kind is list else setting.kind
    return kind | None if setting.null else kind


@functools.cache
def types() -> dict[str, Any]:
    """Every accepted key and its type."""
    return {key: type_of(key) for key in names()}


def _override(file: dict[str, Given], line: dict[str, Given]) -> list[str]:
    """Remove from `file` what the command line overrides, under whichever name; notes on what goes along."""
    notes = []
    overridden = {setting_of(key) for key in line}
    sync = next((str(given.value).lower() for key, given in line.items() if setting_of(key) == "sync"), "")
    sync = "frozen" if sync in FALSE else "soft" if sync in TRUE else sync  # sync_ref_model
    known = {name for names in SYNC.values() for name in names}
    useless = known - set(SYNC.get(sync, NAMED_SYNC)) if sync else set()
    for key, given in list(file.items()):
        if setting_of(key) in overridden:
            del file[key]
        elif setting_of(key) in useless:
            del file[key]
            notes.append(f"{key}: {shown(given.value)} ({given.where}) → left out, it has no meaning for sync: {sync}")
    return notes


def _takes_null(key: str) -> bool:
    return describe(type_of(key)).endswith("null") and key != "report_to"  # its "null" is the text none


def _unknown(key: str) -> tuple[str, str | None]:
    """Why `key` is refused, and the key that was probably meant."""
    if key in ADVICE:
        return f"{key} is not a setting of lorat: {ADVICE[key]}.", None
    if key in NOT_SETTABLE:
        return f"{key} cannot be written in a file; remove it.", None
    guess = nearest(key, sorted(names()))
    advice = f"did you mean {guess}?" if guess else "`lorat train --help` lists the settings."
    return f"{key} is not a setting of lorat; {advice}", guess


def _wrong_type(key: str, value: Any, error: str) -> str:
    expected = describe(type_of(key))
    if error == "no value given":
        return f"--{key} has no value; give it {expected}."
    allowed = choices(type_of(key))
    guess = nearest(str(value), allowed)
    if guess and len(allowed) > 8:
        expected = f"one of the {len(allowed)} that there are"
    told = "a mapping" if isinstance(value, dict) else "a nested list" if _nested(value) else shown(value) or "''"
    return f"{key}: {told} is not {expected}" + (f"; did you mean {guess}?" if guess else ".")


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, list | dict) for v in value)


def _evaluation(values: dict[str, Any], given: dict[str, Given]) -> list[str]:
    if values.get("eval_dataset_name") or values.get("eval_dataset_split"):
        return []
    asked = [k for k in ("eval_strategy", "eval_on_start") if values.get(k, "no") not in ("no", False, None)]
    advice = "set eval_dataset_split (test, say) or eval_dataset_name, or remove it"
    return [f"{given[k].where}: {k}: {shown(values[k])}, but no data to evaluate on is named; {advice}." for k in asked]


def _build(values: dict[str, Any], missing: list[str]) -> TrustRegionConfig:
    """`TrustRegionConfig(**values)`; its contradictions join what is `missing` in one `ConfigError`."""
    from .config import TrustRegionConfig

    try:
        return TrustRegionConfig(**values)
    except ConfigError as error:
        if not missing:
            raise
        bullets = [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
        raise ConfigError(_message(missing + bullets)) from None
    except (ValueError, TypeError, ImportError, OSError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        advice = " Set bf16: false, or remove it: it is on where the GPU has it." if "bf16" in text else ""
        raise ConfigError(_message([*missing, f"transformers refuses these settings: {text}{advice}"])) from error


def _message(problems: list[str]) -> str:
    head = "These settings cannot work:" if len(problems) > 1 else "This setting cannot work:"
    return "\n".join([head, *(f"  - {p}" for p in problems)])


def _say(note: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"lorat: {note}", file=sys.stderr)
