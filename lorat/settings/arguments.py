"""`lorat train --config run.yaml [--key value …]` -> a checked `TrustRegionConfig`.

Keys are flat, and every one can be given in the file and on the command line, which wins. TRL's names
are accepted (`trl.py`). Everything that is wrong is said at once: where it was given, what was given,
what is expected. Nothing is loaded or written.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

from ..errors import ConfigError
from .aliases import ADVICE, ALIASES, TRL_TYPES, setting_of, translate
from .coercion import FALSE, TRUE, choices, coerce, describe, nearest, shown
from .config import TrustRegionConfig
from .sources import Given, read_argv, read_yaml
from .validation import SYNC

REQUIRED = {
    "model_name_or_path": "a hub id or a local folder",
    "dataset_name": "a hub id, a folder or a data file",
    "output_dir": "a folder for checkpoints and the finished adapter",
}
_NOT_SETTABLE = {"parallelism_config"}  # takes an object that no file can hold


def parse_config(argv: list[str], say: Callable[[str], None] | None = None) -> TrustRegionConfig:
    """The configuration of a run from the arguments of `lorat train`.

    `say` gets a note for each setting that was translated or left out (default: standard error, first rank).
    Raises `ConfigError` that lists every problem there is.
    """
    path, line, problems = read_argv(argv, {key for key, hint in types().items() if hint in (bool, bool | None)})
    file = read_yaml(path) if path is not None else {}
    notes = _override(file, line)
    given = file | line
    values: dict[str, Any] = {}
    guesses: set[str | None] = set()
    for key, entry in given.items():
        if key not in types():
            problem, guess = _unknown(key)
            problems.append(f"{entry.where}: {problem}")
            guesses.add(guess)
            continue
        try:
            value = coerce(entry.value, types()[key])
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
        if not values.get(key) and key not in guesses and not (key in given and given[key].value)
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


def translate_trl(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under TRL's names -> lorat's, with a note for each translation; lorat's own names pass through.

    `values` holds Python values (`yaml.safe_load`, or `DPOConfig.to_dict()` without its defaults). Raises
    `ConfigError` for a loss that lorat does not have, contradictions, and settings without effect in TRL.
    """
    out, notes, problems = translate(values)
    if problems:
        raise ConfigError(_message([text for _, text in problems]))
    return out, notes


def help_text(width: int | None = None) -> str:
    """What `lorat train --help` prints, `width` columns wide (default: the terminal, at most 120)."""
    from .help import render

    return render(width)


@functools.cache
def types() -> dict[str, Any]:
    """Every accepted key, TRL's names too, and its type."""
    hints = get_type_hints(TrustRegionConfig)
    own = {f.name: hints[f.name] for f in fields(TrustRegionConfig) if f.init and f.name not in _NOT_SETTABLE}
    own["resume_from_checkpoint"] = str | bool | None  # true: the newest checkpoint
    return own | {old: own[new] for old, new in ALIASES.items()} | TRL_TYPES


def _override(file: dict[str, Given], line: dict[str, Given]) -> list[str]:
    """Remove from `file` what the command line overrides, under whichever name; notes on what goes along."""
    notes = []
    overridden = {setting_of(key) for key in line}
    sync = next((str(given.value).lower() for key, given in line.items() if setting_of(key) == "sync"), "")
    sync = "frozen" if sync in FALSE else "soft" if sync in TRUE else sync  # sync_ref_model
    useless: set[str] = set() if sync in ("", "soft", "adaptive") else {"sync_alpha"}
    useless |= {"sync_every"} if sync not in ("", *SYNC[1:]) else set()  # frozen, or a name that says both
    useless |= {"sync_limit", "sync_distance"} if sync not in ("", "adaptive") else set()
    useless |= {"sync_space"} if sync in ("frozen", "hard") else set()
    for key, given in list(file.items()):
        if setting_of(key) in overridden:
            del file[key]
        elif setting_of(key) in useless:
            del file[key]
            notes.append(f"{key}: {shown(given.value)} ({given.where}) → left out, it has no meaning for sync: {sync}")
    return notes


def _takes_null(key: str) -> bool:
    return describe(types()[key]).endswith("null") and key != "report_to"  # its "null" is the text none


def _unknown(key: str) -> tuple[str, str | None]:
    """Why `key` is refused, and the key that was probably meant."""
    if key in ADVICE:
        return f"{key} is not a setting of lorat: {ADVICE[key]}.", None
    if key in _NOT_SETTABLE:
        return f"{key} cannot be written in a file; remove it.", None
    guess = nearest(key, types())
    advice = f"did you mean {guess}?" if guess else "`lorat train --help` lists the settings."
    return f"{key} is not a setting of lorat; {advice}", guess


def _wrong_type(key: str, value: Any, error: str) -> str:
    expected = describe(types()[key])
    if error == "no value given":
        return f"--{key} has no value; give it {expected}."
    allowed = choices(types()[key])
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
