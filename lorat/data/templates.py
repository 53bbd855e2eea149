"""A tokenizer's chat template: prompt and answers written as the model will be served, or refused with the reason.

A template is a program. It may leave out a system message, strip the reasoning before `</think>`, open an answer that it
then does not find, or write no calls of tools. So everything given to it is looked for in what it wrote, and the prompt
that is trained on is the one that is served: the template's own, with its opening of an answer. Costs a rendering for
the prompt and one for each answer; what can be known from the roles alone is asked once for each pattern of roles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ModelError

RESERVED = {
    "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "tools", "documents", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "conversation", "messages",
}  # fmt: skip
THINK_END = "</think>"
HISTORY = "reasoning of earlier answers is left out by the chat template, as it is when the model is served"
Rendered = tuple[str, list[str]]


class Refused(Exception):
    """Why messages cannot be written by a template."""


def no_template(what: str = "the data is conversational (lists of messages)") -> ModelError:
    """The error for messages without a chat template."""
    return ModelError(
        f"{what}, but the tokenizer has no chat template, so nothing says how messages become text; use the tokenizer of "
        "an instruction-tuned model, set tokenizer.chat_template, give plain strings as prompt, chosen and rejected, or "
        "set dialogues: text to write the messages as Human:/Assistant: text."
    )


class Template:
    """The chat template of a tokenizer. `render` is what it is for; `patterns` remembers what was asked of it.

    `kwargs`: what it is given for every row, beside what a row brings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self.patterns: dict[Any, str | None] = {}
        self.note: str | None = None  # what is to be said of the row rendered last

    def write(self, messages: list[dict], opened: bool, extra: dict[str, Any]) -> str:
        """Messages as text; `opened`: up to where the model's answer begins. Raises `Refused`."""
        if not self.tokenizer.chat_template:
            raise no_template()
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **extra)
            )
        except Exception as error:  # it may raise anything, e.g. that roles must alternate
            raise Refused(f"the chat template refuses the messages ({error})") from error

    def render(
        self, prompt: list[dict], answers: list[list[dict]], tools: list | None = None, kwargs: dict | None = None
    ) -> Rendered | str:
        """`(prompt, [prompt + answer, …])` as served, or the reason why a row cannot be written so."""
        extra: dict[str, Any] = self.kwargs | dict(kwargs or {})
        if bad := set(extra) & RESERVED:
            return f"chat_template_kwargs sets {', '.join(sorted(bad))}, which lorat sets itself"
        extra |= {"tools": tools} if tools else {}
        self.note = None
        try:
            served = self.write(prompt, True, extra)
            self._check_prompt(prompt, served, tools)
            return served, [served + self._answer(prompt, answer, served, extra) for answer in answers]
        except Refused as reason:
            return str(reason)

    def _check_prompt(self, prompt: list[dict], served: str, tools: list | None) -> None:
        """Each message of the prompt stands in it, and so do the tools."""
        for message in prompt:
            text = message["content"].strip()
            if text not in served:
                kept = text.rpartition(THINK_END)[2].strip()
                if message["role"] != "assistant" or THINK_END not in text or kept not in served:
                    raise Refused(f"the chat template does not write the {message['role']} message as it is given")
                self.note = HISTORY
            _check_calls(message, served)
        for tool in tools or []:
            name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
            if not name or str(name) not in served:
                raise Refused("the chat template does not write the tools")

    def _answer(self, prompt: list[dict], answer: list[dict], served: str, extra: dict[str, Any]) -> str:
        """What follows the served prompt when `answer` is given, final EOS included. Raises `Refused`."""
        whole = self.write(prompt + answer, False, extra)
        self._check_roles(prompt, answer, extra)
        if whole.startswith(served):
            body, seen = whole[len(served) :], whole[max(0, len(served) - len(answer[0]["content"].strip()) + 1) :]
        else:
            body = seen = self._served_answer(prompt, answer, served, whole, extra)
            if not whole.endswith(body):
                seen = whole
        for message in answer:
            text = message["content"].strip()
            if text not in seen:
                kept = text.rpartition(THINK_END)[2].strip()
                if THINK_END in text and kept in seen:
                    raise Refused(f"the chat template strips the reasoning before {THINK_END} from the answer")
                raise Refused(f"the chat template does not write the {message['role']} message as it is given")
            _check_calls(message, seen)
        return body

    def _served_answer(
        self, prompt: list[dict], answer: list[dict], served: str, whole: str, extra: dict[str, Any]
    ) -> str:
        """The answer after a prompt that the template writes differently once an answer follows.

        What stands between the prompt's last words and the answer must begin with the opening that is served, or lack
        nothing of it but what the answer itself begins with (`<think>`).
        """
        last, mark, end = prompt[-1], "lorat0question", "lorat0answer"
        if answer[0]["role"] != "assistant":
            raise Refused("the chat template writes the prompt differently once an answer follows")
        asked = [*prompt[:-1], {**last, "content": mark}]
        reply = {"role": "assistant", "content": end}
        _, found, opening = self.write(asked, True, extra).rpartition(mark)
        between = self.write([*asked, reply], False, extra).rpartition(mark)[2]
        head, found_end, _ = self.write([*prompt, reply], False, extra).partition(end)
        between, found_too, _ = between.partition(end)
        if not (found and found_end and found_too and whole.startswith(head) and served.endswith(opening)):
            first = answer[0]["content"]
            if THINK_END in first and first.strip() not in whole:
                raise Refused(f"the chat template strips the reasoning before {THINK_END} from the answer")
            raise Refused("the chat template writes the prompt differently once an answer follows")
        if between.startswith(opening):
            return between[len(opening) :] + whole[len(head) :]
        rest, lacks = whole[len(head) :].lstrip(), opening[len(between) :].strip()
        if opening.startswith(between) and lacks and rest.startswith(lacks):
            return rest[len(lacks) :].lstrip()
        if THINK_END in answer[0]["content"] and answer[0]["content"].strip() not in whole:
            raise Refused(f"the chat template strips the reasoning before {THINK_END} from the answer")
        opened = opening[len(between) :] if opening.startswith(between) else opening
        advice = " (chat_template_kwargs: {enable_thinking: false} may change that)" if self._has_thinking() else ""
        raise Refused(
            f"the chat template opens the answer with {opened[-40:]!r} when the model is served, and a given answer does "
            f"not begin so{advice}"
        )

    def _has_thinking(self) -> bool:
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def _check_roles(self, prompt: list[dict], answer: list[dict], extra: dict[str, Any]) -> None:
        """No message of this pattern of roles is left out, whatever it says: asked once, with marks for contents."""
        messages = prompt + answer
        if any(m.get("tool_calls") or m["role"] in ("tool", "function", "ipython") for m in messages):
            return
        key = (len(prompt), tuple(m["role"] for m in messages), json.dumps(extra, sort_keys=True, default=str))
        if key not in self.patterns:
            self.patterns[key] = self._left_out(messages, len(prompt), extra)
        if (left := self.patterns[key]) is not None:
            raise Refused(f"the chat template does not write the {left} message")

    def _left_out(self, messages: list[dict], n: int, extra: dict[str, Any]) -> str | None:
        """The role of the first message that is written neither in the prompt nor in the whole, or None."""
        marks = [{**m, "content": f"lorat0mark{i}end"} for i, m in enumerate(messages)]
        try:
            served, whole = self.write(marks[:n], True, extra), self.write(marks, False, extra)
        except Refused:
            return None  # it wants other words than marks, and the words themselves are looked for as well
        for i, m in enumerate(marks):
            if m["content"] not in (served if i < n else whole):
                return str(m["role"])
        return None


def _check_calls(message: dict[str, Any], text: str) -> None:
    """Every call of a tool stands in `text`: its name, and the values of its arguments."""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        for leaf in (function["name"], *_leaves(function["arguments"])):
            if (
                str(leaf) not in text
                and json.dumps(leaf) not in text
                and json.dumps(leaf, ensure_ascii=False) not in text
            ):
                raise Refused(f"the chat template does not write the call of {function['name']}")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, list) else [value]
