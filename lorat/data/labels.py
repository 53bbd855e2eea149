"""KTO's labels: which word means desirable, whether both classes are there, and what would balance them.

The words of a whole column are read together, since alone some are ambiguous: 0 is undesirable beside 1, and unknown
beside -1. Blank labels and unknown words drop their row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..errors import DataError

PAIRS = (
    ("true", "false"), ("1", "0"), ("1", "-1"), ("good", "bad"), ("chosen", "rejected"), ("yes", "no"),
    ("desirable", "undesirable"), ("positive", "negative"), ("accepted", "rejected"), ("up", "down"),
    ("thumbs_up", "thumbs_down"), ("like", "dislike"),
)  # fmt: skip
GOOD, BAD = {good for good, _ in PAIRS}, {bad for _, bad in PAIRS}
UNKNOWN = "label is neither true/false nor 1/0"
BLANK = "label is blank"


def word(cell: Any) -> str | None:
    """A label as a lower-case word, numbers without a fraction of 0; None where it is blank."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    text = str(cell).strip().lower()
    if text in ("", "nan", "none", "null"):
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def read(cell: Any) -> bool | str:
    """True, False, or why a label says neither (`str`)."""
    said = word(cell)
    return BLANK if said is None else said in GOOD if said in GOOD | BAD else UNKNOWN


def check(cells: Iterable[Any], column: str, type_: str) -> None:
    """Raise `DataError` where a column of labels says nothing, or says it ambiguously."""
    said = {word(cell) for cell in cells}
    known = (said - {None}) & (GOOD | BAD)
    if not known:
        shown = f"all {'blank' if said <= {None} else ', '.join(sorted(map(str, said - {None}))[:5])}"
        raise DataError(
            f"the column '{column}' holds {type_} ({shown}) and no row is true/false or 1/0, so nothing says "
            "which completions are desirable; write true for desirable and false for undesirable."
        )
    if {"0", "-1"} <= known:
        raise DataError(
            f"the column '{column}' holds 0 and -1, so it is not plain which of them is undesirable and which is no "
            "judgement; write true for desirable, false for undesirable, and leave out the other rows."
        )


def missing_class(desirable: int, undesirable: int, name: str) -> DataError | None:
    """What to raise where one of KTO's two classes has no completion."""
    if desirable and undesirable:
        return None
    there, lacks = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
    return DataError(
        f"{name}: all {desirable + undesirable} completions are {there} and none is {lacks}, so KTO would only be "
        f"pushed one way; give rows with the label {'false' if desirable else 'true'} too (is the right column read?)."
    )


def balance(desirable: int, undesirable: int, weights: tuple[float, float]) -> str | None:
    """One line where the classes are far apart, with the weights that bring them together.

    KTO's rule (arXiv 2402.01306, section 4.2): `λ_D n_D : λ_U n_U` between 1 and 4/3, the smaller class weighted up.
    Said from twice that on either side; None where nothing is to be said.
    """
    ratio = weights[0] * desirable / (weights[1] * undesirable) if weights[1] and undesirable else math.inf
    if 1 / 2 <= ratio <= 8 / 3:
        return None
    if desirable > undesirable:
        key, low, high = "undesirable_weight", 0.75 * desirable / undesirable, desirable / undesirable
    else:
        key, low, high = "desirable_weight", undesirable / desirable, undesirable / desirable * 4 / 3
    other = "desirable_weight" if key == "undesirable_weight" else "undesirable_weight"
    return (
        f"{desirable} desirable to {undesirable} undesirable completions, weighted {weights[0]:g} to {weights[1]:g}: "
        f"{ratio:.2g} to 1, and KTO wants 1 to 1.33; set {key}: {(low + high) / 2:.3g} ({low:.3g} to {high:.3g}) with "
        f"{other}: 1."
    )
