"""Single rows as training sees them: the served prompt, each completion, where the boundary lies, and what was cut.

A row is tokenised twice, once as the settings say and once without limits, so that what was cut can be shown. Nothing is
printed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .columns import AS_WRITTEN, RowSettings
from .formats import detect
from .prepare import tokenise
from .templates import Template
from .tokenised import PAIR, SINGLE

Span = tuple[str, bool]  # text, and whether it is a special token


@dataclass(frozen=True)
class Side:
    """One completion: `ids` that are trained on, and `cut` ids that were left off its end. `label`: KTO's."""

    name: str
    ids: list[int]
    cut: list[int]
    label: bool | None = None


@dataclass(frozen=True)
class Look:
    """One example of a row. `cut`: ids left out of the prompt, `kept_front` of its ids stand before them (a BOS)."""

    row: int
    dropped: str | None
    prompt: list[int]
    cut: list[int]
    kept_front: int
    sides: list[Side]


def look(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    row: int,
    *,
    method: str,
    rows: RowSettings = AS_WRITTEN,
    **limits: Any,
) -> list[Look]:
    """The examples that raw row `row` gives (a ranking gives several; a pair under KTO two). Raises `DataError`."""
    if "prompt_ids" in dataset.column_names:
        return [_tokenised(dataset[row], row)]
    form = detect(dataset, method, rows)
    columns = SINGLE if form.unpair or form.layout == "kto" else PAIR
    cells = dataset.select([row]).select_columns(list(form.reads))[:]
    how: dict[str, Any] = {"form": form, "columns": tuple(columns)}
    how["template"] = Template(tokenizer, rows.chat_template_kwargs)
    found: list[Look] = []
    for side in ["chosen", "rejected"] if form.unpair else [None]:
        kept = tokenise(cells, [row], side=side, **how, **limits)
        whole = tokenise(cells, [row], side=side, **how, **{**limits, "max_length": None, "max_prompt_length": None})
        for one, all_ in zip(_rows(kept), _rows(whole)):
            reason = one["dropped"]
            found.append(_look(row, reason, all_ if reason and not all_["dropped"] else one, all_))
    return found


def _rows(columns: Mapping[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _look(row: int, dropped: str | None, one: dict[str, Any], whole: dict[str, Any]) -> Look:
    prompt, uncut = one["prompt_ids"] or [], whole["prompt_ids"] or []
    missing = len(uncut) - len(prompt)
    front = int(
        missing > 0 and prompt[:1] == uncut[:1] and prompt[1:] == uncut[missing + 1 :] and prompt != uncut[missing:]
    )
    sides = []
    for column in ("chosen_ids", "rejected_ids", "completion_ids"):
        if one.get(column):
            ids = one[column]
            sides.append(Side(column.removesuffix("_ids"), ids, whole[column][len(ids) :], one.get("label")))
    return Look(row, dropped, prompt, uncut[front : front + missing], front, sides)


def _tokenised(cells: Mapping[str, Any], row: int) -> Look:
    names = [c for c in ("chosen_ids", "rejected_ids", "completion_ids") if cells.get(c)]
    sides = [Side(c.removesuffix("_ids"), list(cells[c]), [], cells.get("label")) for c in names]
    return Look(row, None, list(cells["prompt_ids"]), [], 0, sides)


def spans(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Ids as text, special tokens apart; control characters are spelt out, so that nothing can move a cursor."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Span] = []
    run: list[int] = []

    def close() -> None:
        if run:
            found.append((printable(str(tokenizer.decode(run, clean_up_tokenization_spaces=False))), False))
            run.clear()

    for token in ids:
        if token in special:
            close()
            found.append((printable(str(tokenizer.convert_ids_to_tokens(token))), True))
        else:
            run.append(token)
    close()
    return found


def pieces(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each id's own text, quoted."""
    return [repr(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]


def printable(text: str) -> str:
    """Text whose control characters, line feeds and tabs aside, are written as `\\x1b`."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
