"""Prompts to answer, from whatever file holds them, as token ids.

Lines of text, or rows (JSONL, JSON, CSV, Parquet, a hub id) with `prompt`, `messages`, `instruction` (AlpacaEval),
`uid` and `prompt` or `question_id` and `turns` (Arena-Hard), or preference pairs, whose prompts are taken. Text that is
a user's turn goes through the chat template where the tokenizer has one; a `prompt` is taken to the letter, as it is in
training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError, LoratError, ModelError
from .canonical import canonical_text
from .formats import detect
from .messages import kind
from .reading import load_preference_data
from .tokenization import adds_bos

KINDS = """prompts are read from:
  a .txt file                 one prompt a line
  prompt                      text, taken as it is, or a list of {"role", "content"} messages
  messages                    a conversation; an answer at its end is left off
  instruction                 a user's turn (AlpacaEval)
  uid, prompt                 a user's turn (Arena-Hard 2.0)
  question_id, turns          a user's turn (Arena-Hard 0.1)
  chosen, rejected, …         the prompts of preference pairs"""
CHAT = ("auto", "always", "never")


@dataclass(frozen=True)
class Prompt:
    """`content`: text, or messages that end before an answer; `turn`: whether text is what a user said in a chat."""

    content: str | list[dict[str, str]]
    turn: bool = False
    id: str | None = None
    dataset: str = ""

    @property
    def instruction(self) -> str:
        """What was asked, as text: the last user's turn of messages."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content


def read_prompts(name: str, split: str = "train", config: str | None = None) -> list[Prompt]:
    """The prompts in a file, a folder or a hub dataset, in order. Raises `DataError` for what holds none."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save the file as UTF-8.") from error
        found = [Prompt(line, dataset=path.stem) for line in lines if line.strip()]
    else:
        data = load_preference_data(name, split, config)
        columns = set(data.column_names)
        if (
            not columns & {"prompt", "messages", "instruction", "turns", "chosen"}
            and not {"info", "summaries"} <= columns
        ):
            raise DataError(f"{name} has the columns {sorted(columns)}, none of which holds prompts.\n{KINDS}")
        pairs = detect(data, "dpo") if {"info", "summaries"} <= columns or "chosen" in columns else None
        found = []
        for number, row in enumerate(data):
            if pairs:
                example = canonical_text(row, pairs)
                prompt = example if isinstance(example, str) else Prompt(example["prompt"], dataset=path.stem)
            else:
                prompt = _from_row(row, path.stem)
            if isinstance(prompt, str):
                raise DataError(f"{name}, row {number}: {prompt}; correct or delete it.\n{KINDS}")
            found.append(prompt)
    if not found:
        raise DataError(f"{name} holds no prompts.\n{KINDS}")
    return found


def _from_row(row: dict[str, Any], stem: str) -> Prompt | str:
    """A row's prompt, or why it has none (`str`)."""
    name = row.get("uid") if row.get("uid") is not None else row.get("question_id")
    common = {"id": None if name is None else str(name), "dataset": str(row.get("dataset") or stem)}
    if (turns := row.get("turns")) is not None:
        if len(turns) != 1:
            return f"it has {len(turns)} turns, and one is answered"
        return _checked(turns[0]["content"] if isinstance(turns[0], dict) else turns[0], True, common)
    column = next((c for c in ("messages", "instruction", "prompt") if row.get(c) is not None), None)
    if column is None:
        return "its prompt is null"
    return _checked(row[column], column == "instruction" or row.get("uid") is not None, common)


def _checked(content: Any, turn: bool, common: dict[str, Any]) -> Prompt | str:
    if kind(content) == "messages":
        if not all(isinstance(m["role"], str) and isinstance(m.get("content"), str) for m in content):
            return "it has a message whose content is not text"
        messages = [{"role": m["role"], "content": m["content"]} for m in content]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return Prompt(messages, False, **common) if messages else "its messages are an answer alone"
    if not isinstance(content, str):
        return f"its prompt is {kind(content)}, not text or messages"
    return Prompt(content, turn, **common) if content.strip() else "its prompt is empty"


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat: str = "auto", template: str | None = None
) -> list[list[int]]:
    """Token ids of each prompt, with a BOS where the tokenizer puts one.

    `chat`: "auto" writes messages and users' turns through the chat template (turns as they are without one), "always"
    all of them, "never" none. `template`: text around a prompt that is text, with `{prompt}` in it. Raises `LoratError`.
    """
    if template is not None and ("{prompt}" not in template or chat == "always"):
        why = "it goes around plain text, which --chat always turns into messages" if chat == "always" else "where?"
        raise DataError(f"the template {template!r} must hold {{prompt}} and cannot go with --chat always ({why}).")
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    return list(_encoded(prompts, tokenizer, chat, template, bos))


def _encoded(
    prompts: Sequence[Prompt], tokenizer: Any, chat: str, template: str | None, bos: list[int]
) -> Iterator[list[int]]:
    for number, p in enumerate(prompts):
        text = isinstance(p.content, str)
        through = chat == "always" or (chat == "auto" and (not text or (p.turn and template is None)))
        if through and text and chat == "auto" and not tokenizer.chat_template:
            through = False
        if through:
            written = _through_template(p, number, tokenizer)
            yield list(tokenizer(written, add_special_tokens=False).input_ids)
            continue
        if not text:
            raise DataError(f"prompt {number} is a list of messages, which --chat never cannot write; leave it out.")
        content = str(p.content)
        ids = list(
            tokenizer(
                template.replace("{prompt}", content) if template else content, add_special_tokens=False
            ).input_ids
        )
        ids = ids if ids[:1] == bos else bos + ids
        if not ids:
            raise DataError(f"prompt {number} ({content[:40]!r}) has no tokens; correct or delete it.")
        yield ids


def _through_template(p: Prompt, number: int, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "the prompts are messages, but the tokenizer has no chat template, so nothing says how they become text; use "
            "the tokenizer of an instruction-tuned model, or give plain prompts."
        )
    try:
        return str(tokenizer.apply_chat_template(p.messages, tokenize=False, add_generation_prompt=True))
    except LoratError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(
            f"prompt {number}: the chat template refuses the messages ({error}); correct or delete it."
        ) from error
