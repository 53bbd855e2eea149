"""Canonical text -> token ids: where the completion starts, where it ends, and what is cut.

Prompt and completion are tokenised jointly, as the model will meet them, and the boundary is resolved in token space:
a token that merges over it belongs to the completion. Every completion ends in exactly one EOS unless it was cut.
Nothing is padded here, and no tokenizer is modified. It costs one tokenizer call per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .dialogues import common_prefix
from .templates import Template

COMPLETIONS = ("chosen", "rejected", "completion")


@dataclass
class Tokens:
    """One example: `prompt` ids and one list of ids per completion; `cut_prompt`, `cut` say what was truncated.

    `note`: what the chat template left out that is worth telling.
    """

    prompt: list[int]
    completions: list[list[int]]
    cut_prompt: bool = False
    cut: tuple[bool, ...] = ()
    note: str | None = None

    @property
    def total(self) -> int:
        """Tokens of the prompt and its longest completion: what `max_length` bounds."""
        return len(self.prompt) + max(map(len, self.completions))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the pad token's, else EOS (padding is masked, so its value never matters).

    Raises `ModelError` when there is no EOS token: nothing could then say where a completion ends.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no EOS token, so a completion "
            "cannot be told where to end; set tokenizer.eos_token to the token that ends a text, "
            'e.g. tokenizer.eos_token = "<|endoftext|>".'
        )
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS in front of plain text."""
    bos, first = tokenizer.bos_token_id, [tokenizer("a", add_special_tokens=s).input_ids[:1] for s in (False, True)]
    return bos is not None and first[0] != [bos] and first[1] == [bos]


def strip_eos(text: str, eos: str) -> str:
    """The text without EOS at its end; white space that follows an EOS goes too, other white space stays."""
    while eos and (stripped := text.rstrip()).endswith(eos):
        text = stripped[: -len(eos)]
    return text


def render(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> tuple[str, list[str]] | str:
    """Prompt text, and per completion the text of prompt + completion without its final EOS; or a reason (`str`).

    Messages go through the tokenizer's chat template (`templates.py`). Raises `ModelError` without a chat template.
    """
    prompt, completions = example["prompt"], [example[key] for key in COMPLETIONS if key in example]
    if _blank(prompt, tokenizer):
        return "empty prompt"
    if any(_blank(completion, tokenizer) for completion in completions):
        return "empty completion"
    if isinstance(prompt, str):
        return prompt, [prompt + strip_eos(completion, tokenizer.eos_token) for completion in completions]
    rendered = (template or Template(tokenizer)).render(
        prompt, completions, example.get("tools"), example.get("chat_template_kwargs")
    )
    if isinstance(rendered, str):
        return rendered
    return rendered[0], [strip_eos(text, tokenizer.eos_token) for text in rendered[1]]


def _blank(part: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> bool:
    if not isinstance(part, str) and any(message.get("tool_calls") for message in part):
        return False
    texts = [part] if isinstance(part, str) else [message["content"] for message in part]
    return not any(strip_eos(text, tokenizer.eos_token).strip() for text in texts)


def encode(
    examples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> list[Tokens | str]:
    """Canonical examples as untruncated `Tokens`, in order; a reason (`str`) for one that cannot be used.

    BOS is added in front of plain text exactly when the tokenizer would add it and the text does not start with it.
    Conversations start as the chat template writes them, as they do when the model is served.
    """
    template = template or Template(tokenizer)
    rendered: list[Any] = []
    said: list[Any] = []
    for example in examples:
        template.note = None
        rendered.append(render(example, tokenizer, template))
        said.append(template.note)
    texts = [text for item in rendered if not isinstance(item, str) for text in (item[0], *item[1])]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids = iter(tokenizer(texts, verbose=False, **options).input_ids if texts else [])
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    results: list[Tokens | str] = []
    for example, item, note in zip(examples, rendered, said):
        if isinstance(item, str):
            results.append(item)
            continue
        plain = bos if isinstance(example["prompt"], str) else []
        prompt, *full = (_with(plain, list(next(ids))) for _ in range(1 + len(item[1])))
        n = common_prefix(prompt, *full)
        if not n:
            results.append("the prompt has no token of its own (all merge into the completion)")
        elif any(len(f) == n for f in full):
            results.append("empty completion")
        else:
            results.append(Tokens(prompt[:n], [[*f[n:], tokenizer.eos_token_id] for f in full], note=note))
    return results


def _with(bos: list[int], ids: list[int]) -> list[int]:
    return ids if ids[:1] == bos else bos + ids


def truncate(
    tokens: Tokens, max_length: int | None, max_prompt_length: int | None = None, bos: int | None = None
) -> Tokens:
    """The example cut to `max_length` tokens (prompt + longest completion) and `max_prompt_length` prompt tokens.

    A prompt keeps its end, and a leading `bos` stays in front; it gives way first, down to `max_prompt_length`
    (default: half of `max_length`) tokens. Then completions lose their ends, EOS included. One prompt serves all
    completions; prompt and completions keep at least one token each. `None` is no limit.
    """
    n = len(tokens.prompt)
    if max_prompt_length is not None:
        n = min(n, max(1, max_prompt_length))
    room = None
    if max_length is not None:
        floor = max(1, min(n, max_prompt_length or max_length // 2, max_length - 1))
        longest = max(map(len, tokens.completions))
        n = min(n, max(floor, max_length - longest))
        room = max(1, max_length - n)
    prompt = tokens.prompt
    if n < len(prompt):
        prompt = [bos, *prompt[len(prompt) - n + 1 :]] if bos is not None and prompt[0] == bos else prompt[-n:]
    cut = tuple(room is not None and len(c) > room for c in tokens.completions)
    return Tokens(prompt, [c[:room] for c in tokens.completions], n < len(tokens.prompt), cut)


def unfit(tokens: Tokens, max_length: int | None, max_prompt_length: int | None) -> str | None:
    """Why an example cannot be used: longer than either limit, or the same ids on both sides."""
    if max_prompt_length is not None and len(tokens.prompt) > max_prompt_length:
        return f"prompt longer than max_prompt_length={max_prompt_length}"
    if max_length is not None and tokens.total > max_length:
        return f"longer than max_length={max_length}"
    if len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]:
        return f"chosen equals rejected after {'truncation' if any(tokens.cut) else 'tokenisation'}"
    return None


def as_row(row: int, tokens: Tokens, label: bool | None = None) -> dict[str, Any]:
    """{"row", "prompt_ids", "chosen_ids", "rejected_ids"}, or with a label "completion_ids" and "label".

    `row` is the index in the raw dataset (of the raw pair, where pairs were split for KTO).
    """
    start = {"row": row, "prompt_ids": tokens.prompt}
    if label is not None:
        return start | {"completion_ids": tokens.completions[0], "label": label}
    chosen, rejected = tokens.completions
    return start | {"chosen_ids": chosen, "rejected_ids": rejected}
