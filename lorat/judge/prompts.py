"""What a judge is asked, and how its answer is read.

A prompt is a text file with `{prompt}`, `{a}` and `{b}`; the two that come with lorat follow the questions of the DPO
paper (arXiv 2305.18290, C.2), with a tie allowed. A verdict is read from the last line that names one, and from nothing
else: an answer that hedges counts as unreadable, never as a guess.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError
from .verdicts import Verdict

FOLDER = Path(__file__).parent / "judging"
SLOTS = ("{prompt}", "{a}", "{b}")

_NOUN = r"(?:(?:summary|response|answer|assistant|model|option)[\s_]*)?"
_LABEL = re.compile(
    r"(?:^|[^\w])(?:verdict|preferred|preference|winner|better|more helpful|choice|answer)\b[*_`\"'\s]*[:=][\s]*(.*)$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    rf"^[\W_]*{_NOUN}(?P<value>A|B|tie|tied|draw|equal)\b"
    r"(?![\W_]*(?:or|and|versus|vs)\b)(?!\s*[/|,]\s*\W*[AB]\b)"  # "A or B", "A/B"
    r"(?=[\W_]*$|\s*[.,;:!)\]*\"'`(–—-]|\s+(?:is|wins|because|since)\b)",  # not the article: "A more concise …"
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"\[\[(A|B|C|tie)\]\]", re.IGNORECASE)
_BARE = re.compile(rf"^[\W_]*{_NOUN}(A|B|tie)[\W_]*$", re.IGNORECASE)


def tasks() -> list[str]:
    """The tasks that lorat has a prompt for."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def load_prompt(task: str, file: str | None = None) -> str:
    """The text of a judge's prompt: a user's own `file`, or the one for a `task`. Raises `ConfigError`."""
    path = Path(file) if file else FOLDER / f"{task}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the judge's prompt {str(path)!r} cannot be read: {error}. Set --prompt to a text file."
        ) from error
    if missing := [slot for slot in SLOTS if slot not in text]:
        raise ConfigError(
            f"the judge's prompt {str(path)!r} has no {' and no '.join(missing)}, so the judge would not see all it judges. "
            "Put {prompt}, {a} and {b} where the conversation and the two answers belong."
        )
    return text


def fill(template: str, prompt: str, a: str, b: str) -> str:
    """The template with its slots filled, in one pass: slots inside the answers stay as they are."""
    values = dict(zip(SLOTS, (prompt, a, b), strict=True))
    return re.sub("|".join(map(re.escape, SLOTS)), lambda m: values[m[0]], template)


def parse_verdict(text: str) -> Verdict | None:
    """The verdict of a judge's answer, None if it cannot be read without guessing.

    Read: the last line like `Verdict: A` (or Preferred, Winner, Choice …; `[[A]]`, `[[C]]` for a tie, quotes and Markdown
    around), else a last line that is a bare `A`, `B` or `tie`. What a reasoning model thinks aloud is left out.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if bracketed := {m[1].upper() for m in _BRACKETS.finditer(lines[-1])}:
        return _named(bracketed.pop()) if len(bracketed) == 1 else None
    for line, following in zip(lines[::-1], ["", *lines[::-1]], strict=False):
        if labelled := _LABEL.search(line):
            found = _VALUE.match(labelled[1] if re.search(r"\w", labelled[1]) else following)
            return _named(found["value"]) if found else None
    bare = _BARE.match(lines[-1])
    return _named(bare[1]) if bare else None


def _named(word: str) -> Verdict:
    return "A" if word.upper() == "A" else "B" if word.upper() == "B" else "tie"
