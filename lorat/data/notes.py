"""What is not wrong but rarely meant, said in one line with the setting that changes it.

Looked for among the canonical examples of a dataset as they are made; a note is about most of the rows, or counts them.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from .dialogues import HH_MARKER, without_last_user
from .layout import SIDES, Format


class Notes:
    """Counts over examples (`see`), and the lines they come to (`lines`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: Format) -> None:
        self.form = form
        self.instruct = bool(tokenizer.chat_template)
        self.special = [t for t in tokenizer.all_special_tokens if t]
        self.seen = self.hh = self.marked = self.repeats = self.glued = 0
        self.user_last: list[int] = []

    def see(self, example: dict[str, Any], row: int) -> None:
        """Looks at one example."""
        self.seen += 1
        sides = [example[side] for side in SIDES if side in example]
        if any(without_last_user(side)[1] for side in sides) and self.user_last[-1:] != [row]:
            self.user_last.append(row)
        prompt = example["prompt"]
        if not isinstance(prompt, str):
            return
        self.hh += HH_MARKER in prompt
        self.marked += any(token in prompt for token in self.special)
        self.repeats += bool(prompt.strip()) and all(side.lstrip().startswith(prompt.strip()) for side in sides)
        self.glued += bool(prompt) and not prompt[-1].isspace() and all(side[:1].isalnum() for side in sides)

    def lines(self) -> list[str]:
        """What there is to say, a line each."""
        out, most, form = [], self.seen / 2, self.form
        names = {side: form.roles.get(side, side) for side in ("chosen", "rejected")}
        if self.repeats > most and form.layout == "explicit":
            mapping = ", ".join(f"{role}: {column}" for role, column in names.items())
            out.append(
                f"the answers of {self.repeats} of {self.seen} rows begin with the prompt, which the model then reads twice; "
                f"set columns: {{prompt: null, {mapping}}} to take the prompt from what the answers have in common."
            )
        elif self.glued > most:
            out.append(
                f"the answers of {self.glued} of {self.seen} rows follow their prompt without a space or a line between; "
                "set dialogues: text to write both as Human:/Assistant: turns"
                + (", or dialogues: chat to write them through the chat template." if self.instruct else ".")
            )
        if self.instruct and not form.chat and self.seen and self.marked <= most:
            what = "Human:/Assistant: dialogues" if self.hh > most else "plain texts"
            out.append(
                f"the tokenizer has a chat template, and these {what} are trained as they are written, without it; set "
                "dialogues: chat to write them as its messages."
            )
        if self.user_last:
            n = len(self.user_last)
            out.append(
                f"{n} row{'s' * (n > 1)} end with the user's words, which are trained as part of the answer; set "
                "user_endings: cut to leave them out, or drop to leave out the rows."
            )
        return out
