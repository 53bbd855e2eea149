"""Messages as people write them, turned into what chat templates take: `role`, `content`, and calls of tools.

Roles have many names (`human`, `gpt`, `from`/`value` …), content may be a list of text parts, calls may be JSON text.
What a message holds beyond `FIELDS` is not read, and is counted so that the report can name it. Images are left out:
a message that holds one is refused, with its row.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

SPEAKERS = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant",
    "ai": "assistant", "observation": "tool",
}  # fmt: skip
ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython")
FIELDS = ("role", "content", "from", "value", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
KEPT = ("tool_call_id", "name", "reasoning_content", "thinking")


def turn(role: str, content: str) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


def is_turn(cell: Any) -> bool:
    """Whether a cell is one message, of whatever dialect."""
    return isinstance(cell, Mapping) and (cell.get("role") is not None or cell.get("from") is not None)


def kind(cell: Any) -> str:
    """What a cell holds, in words: "text" and "messages" (one or a list) are usable, everything else is not."""
    if isinstance(cell, str):
        return "text"
    if isinstance(cell, list):
        return "messages" if all(map(is_turn, cell)) else "a list of something else"
    if is_turn(cell):
        return "messages"
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(cell), f"a {type(cell).__name__}")


def speaker(message: Mapping[str, Any]) -> str:
    """A message's role as templates know it, or as it is written where nobody knows it."""
    written = str(message["role"] if message.get("role") is not None else message.get("from"))
    role = written.strip().lower()
    return "assistant" if role == "function_call" else SPEAKERS.get(role, role if role in ROLES else written)


def is_dialogue(value: Any) -> bool:
    """Whether messages open with somebody else's turn, so that they hold the prompt too."""
    if kind(value) != "messages" or not value or isinstance(value, Mapping):
        return False
    return speaker(value[0]) != "assistant"


def normal(cell: Any, column: str, account: set[str] | None = None) -> list[dict[str, Any]] | str:
    """A cell of kind "messages" as a list of plain messages, or why it cannot be used (`str`).

    `account` collects what was found and is worth telling: "column[].field" for what is not read, "role→role" for
    what was translated.
    """
    out = []
    for message in [cell] if isinstance(cell, Mapping) else cell:
        role = speaker(message)
        if role not in ROLES:
            return f"{column} has the role {role!r}, and lorat knows {', '.join((*ROLES, *SPEAKERS))}"
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if isinstance(content, list):
            content = _joined(content)
            if content is None:
                return f"{column} has a message with a part that is not text"
        calls = message.get("tool_calls")
        if str(message.get("from")).strip().lower() == "function_call":
            calls, content = [_parsed(content)], ""
        if calls:
            calls = [_call(c) for c in (_parsed(calls) if isinstance(calls, str) else calls)]
            if None in calls:
                return f"{column} has a tool call that is not an object with a name and arguments"
            content = content or ""
        if not isinstance(content, str):
            return f"{column} has a message whose content is not text"
        plain: dict[str, Any] = {"role": role, "content": content}
        if calls:
            plain["tool_calls"] = calls
        for field in KEPT:
            if message.get(field) is not None:
                plain[field] = message[field]
        out.append(plain)
        if account is not None:
            written = message["role"] if message.get("role") is not None else message["from"]
            if written != role:
                account.add(f"{written}→{role}")
            account |= {f"{column}[].{k}" for k, v in message.items() if k not in FIELDS and v not in (None, [], "")}
    return out


def _joined(parts: list[Any]) -> str | None:
    """The text of content parts `[{"type": "text", "text": …}]`; None where a part is something else."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return None
    return "".join(texts)


def _call(call: Any) -> dict[str, Any] | None:
    """One call of a tool as templates take it: arguments an object, not JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    arguments = without_nulls(_parsed(function.get("arguments")) or {})
    if not isinstance(arguments, dict):
        return None
    plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return plain | ({"id": call["id"]} if call.get("id") is not None else {})


def _parsed(cell: Any) -> Any:
    """JSON text as what it holds; anything else, broken JSON too, as it is."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def without_nulls(value: Any) -> Any:
    """Without the nulls with which a table fills fields that other rows have."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def objects(cell: Any, column: str, shape: type) -> Any:
    """`tools` (a list) or `chat_template_kwargs` (a dict), from itself or from JSON text; a reason (`str`) if neither."""
    value = _parsed(cell)
    if value is None or value == "":
        return shape()
    return without_nulls(value) if isinstance(value, shape) else f"{column} is {kind(cell)}, not {_NAMES[shape]}"


_NAMES: dict[type, str] = {list: "a list of tools", dict: "an object"}


def written_as_text(cell: Any) -> str | None:
    """ "json" or "python" where a text is a list of messages that somebody wrote as text, as pandas does in CSV."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[{", '{"', "{'")) or len(cell) > 100_000:
        return None
    for name, read in (("json", json.loads), ("python", ast.literal_eval)):
        try:
            value = read(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if value and kind(value) == "messages":
            return name
    head = cell.lstrip()[:200]  # numpy leaves out the commas between the messages, and nothing reads that back
    return "broken" if head.startswith("[{'role'") or head.startswith("[{'from'") else None
