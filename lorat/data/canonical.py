"""One raw row -> canonical examples, as its dataset's `Format` says.

What is common to every layout is here, once: earlier turns and system messages are put in front, text among messages
becomes a turn, dialogues are split where their answers begin, and `dialogues` turns text into messages or back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import labels
from .columns import cell
from .dialogues import HH_MARKER, split_messages, split_text, to_messages, to_text, without_last_user
from .layout import SIDES, Format
from .messages import is_dialogue, is_turn, kind, normal, objects, turn
from .published import unread_fields


def canonical_text(row: Mapping[str, Any], form: Format) -> dict[str, Any] | str:
    """The first example of a row, or the reason why it has none: `examples` for those who want one."""
    return next(iter(examples(row, form)), "no pair in it")


def examples(row: Mapping[str, Any], form: Format, account: set[str] | None = None) -> list[dict[str, Any] | str]:
    """One raw row as examples {"prompt", "chosen", "rejected"} or {"prompt", "completion", "label": bool}.

    Prompt and completions are all `str`, or all lists of messages where `form.chat`; "tools" and "chat_template_kwargs"
    stand beside them where the row has some. A reason (`str`) stands for what cannot be used: a cell that is no text or
    messages, a label that is no boolean, chosen equal to rejected. `account` collects message fields as `normal` does.
    """
    if form.shape:
        found = form.shape.read(row, form.settings)
        if isinstance(found, str):
            return [found]
        if account is not None:
            for column in form.shape.needs:
                account |= unread_fields(cell(row, column), column) if "answers" in form.shape.name else set()
        return [_finished(parts, form, {}, account) for parts in found]
    parts: dict[str, Any] = {}
    for role, column in form.roles.items():
        value = cell(row, column)
        if (expected := form.kinds.get(column)) and kind(value) != expected:
            return [f"{column} is {kind(value)}, not {expected}"]
        parts[role] = value
    return [_finished(parts, form, form.roles, account)]


def _finished(
    parts: dict[str, Any], form: Format, names: Mapping[str, str], account: set[str] | None
) -> dict[str, Any] | str:
    """Parts as they are written -> one canonical example, or why there is none."""
    raw: dict[str, Any] = {}
    for role in ("prompt", "messages", *SIDES):
        if role not in parts:
            continue
        value, name = parts[role], names.get(role, role)
        if kind(value) not in ("text", "messages"):
            return f"{name} is {kind(value)}, not text or messages"
        read = normal(value, name, account) if kind(value) == "messages" else value
        if isinstance(read, str) and not isinstance(value, str):
            return read
        raw[role] = read
    example: dict[str, Any] = {}
    if "label" in parts:
        if isinstance(label := labels.read(parts["label"]), str):
            return label
        example["label"] = label
    for role, shape in (("tools", list), ("chat_template_kwargs", dict)):
        if role in parts:
            value = objects(parts[role], names.get(role, role), shape)
            if isinstance(value, str):
                return value
            example |= {role: value} if value else {}
    lead = _lead(parts, names, account)
    if isinstance(lead, str):
        return lead
    as_turns = form.turns or bool(lead) or any(isinstance(v, list) for v in raw.values())
    if "chosen" in raw and raw["chosen"] == raw.get("rejected"):
        return "chosen equals rejected"
    body = _turns(raw, parts, lead, form) if as_turns else _texts(raw, parts, form)
    if isinstance(body, str):
        return body
    body = _turned(body, form)
    if isinstance(body, str):
        return body
    body = _endings(body, form)
    return body if isinstance(body, str) else body | example


def _lead(parts: Mapping[str, Any], names: Mapping[str, str], account: set[str] | None) -> list[dict[str, Any]] | str:
    """The system message and the earlier turns that stand in columns of their own."""
    lead = []
    system = parts.get("system")
    if system is not None and not isinstance(system, str):
        return f"{names.get('system', 'system')} is {kind(system)}, not text"
    if system and system.strip():
        lead.append(turn("system", system))
    name = names.get("history", "history")
    history = parts.get("history") or []
    if not isinstance(history, list):
        return f"{name} is {kind(history)}, not a list of turns"
    if history and all(map(is_turn, history)):
        turns = normal(history, name, account)
        return turns if isinstance(turns, str) else lead + turns
    for pair in history:  # alpaca: [[question, answer], …]
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            return f"{name} has an item that is not a question and its answer"
        lead += [turn("user", pair[0]), turn("assistant", pair[1])]
    return lead


def _texts(raw: dict[str, Any], parts: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """Parts that are all text."""
    if form.layout == "implicit":
        return split_text(raw["chosen"], raw["rejected"])
    return {"prompt": _with_input(raw.get("prompt", ""), parts), **{k: raw[k] for k in SIDES if k in raw}}


def _with_input(prompt: Any, parts: Mapping[str, Any]) -> Any:
    """An instruction and its input, a line each, as alpaca's readers join them."""
    extra = parts.get("input")
    return "\n".join(p for p in (prompt, extra) if p) if isinstance(extra, str) and extra.strip() else prompt


def _turns(raw: dict[str, Any], parts: Mapping[str, Any], lead: list, form: Format) -> dict[str, Any] | str:
    """Parts of which some are messages: what is text becomes a turn, and what goes before is put in front."""
    if form.layout == "implicit" and isinstance(raw["chosen"], str):  # texts beside a system message
        body = _with_turns(split_text(raw["chosen"], raw["rejected"]))
        return body if isinstance(body, str) else {**body, "prompt": lead + body["prompt"]}
    prompt = raw.get("prompt", [])
    if isinstance(prompt, str) and is_dialogue(raw.get("chosen")):
        prompt = []  # a text beside whole dialogues repeats what they hold
    elif isinstance(prompt, str):
        prompt = [turn("user", text)] if (text := _with_input(prompt, parts)) else []
    elif parts.get("input"):
        prompt = [*prompt, turn("user", parts["input"])]
    if "messages" in raw:
        prompt = ([turn("user", raw["messages"])] if isinstance(raw["messages"], str) else raw["messages"]) + prompt
    sides = {k: [turn("assistant", v)] if isinstance(v, str) else v for k, v in raw.items() if k in SIDES}
    if "chosen" not in sides and "completion" not in sides:  # the conversation ends in the answer
        n = len(prompt)
        while n and prompt[n - 1]["role"] == "assistant":
            n -= 1
        prompt, answer = prompt[:n], prompt[n:]
        if not answer:
            return f"{form.roles.get('messages', 'messages')} does not end with an answer"
        sides = {"completion": answer} if "rejected" not in sides else {"chosen": answer, **sides}
        if sides.get("rejected") and is_dialogue(sides["rejected"]):
            sides["chosen"] = [*prompt, *answer]
            prompt = []
    if "chosen" in sides and sides["chosen"] == sides["rejected"]:
        return "chosen equals rejected"
    if "chosen" in sides and (form.layout == "implicit" or is_dialogue(sides["chosen"])):
        body = split_messages(sides["chosen"], sides["rejected"], prompt)
    else:
        body = {"prompt": prompt, **sides}
    start = body["prompt"][:1]
    if lead and start and start[0]["role"] == "system" and lead[0]["role"] == "system":
        if start[0]["content"].strip() != lead[0]["content"].strip():
            return "two system messages, one in a column of its own"
        lead = lead[1:]
        return {**body, "prompt": start + lead + body["prompt"][1:]}
    return {**body, "prompt": lead + body["prompt"]} if lead else body


def _with_turns(body: dict[str, Any]) -> dict[str, Any] | str:
    """An example of texts as messages."""
    out: dict[str, Any] = {}
    for key, text in body.items():
        turns = to_messages(text, "user" if key == "prompt" else "assistant")
        if isinstance(turns, str):
            return turns
        out[key] = turns
    return out


def _turned(body: dict[str, Any], form: Format) -> dict[str, Any] | str:
    """Text as messages or messages as text, where `dialogues` asks for it."""
    if form.settings.dialogues == "chat" and isinstance(body["prompt"], str):
        return _with_turns(body)
    if form.settings.dialogues == "text":
        turns = _with_turns(body) if isinstance(body["prompt"], str) and HH_MARKER not in body["prompt"] else body
        if isinstance(turns, str) or isinstance(turns["prompt"], str):
            return turns
        texts = {key: to_text(part, key != "prompt") if part else "" for key, part in turns.items()}
        return "calls of tools, which cannot be written as text" if None in texts.values() else texts
    return body


def _endings(body: dict[str, Any], form: Format) -> dict[str, Any] | str:
    """Completions without the user's last words, where `user_endings` asks for it."""
    if form.settings.user_endings == "keep":
        return body
    cut = {key: without_last_user(body[key]) for key in SIDES if key in body}
    if form.settings.user_endings == "drop":
        return "an answer that ends with the user's words" if any(was for _, was in cut.values()) else body
    return body | {key: part for key, (part, _) in cut.items()}
