"""Asking a judge: any OpenAI-compatible chat endpoint, several questions at a time, every answer kept.

The client is OpenAI's own (`pip install "lorat[judge]"`); it retries what can pass (429, 5xx, lost connections) with
backoff and as the server's Retry-After says. The key comes from OPENAI_API_KEY and goes nowhere but into the request:
not into the cache, the results or a message. Answers are appended to the cache as they come, so a run that was killed
asks only what is missing when it is started again; what was under way at that moment is asked, and paid for, twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, LoratError, first_line
from ..files import Lines

REFUSALS = (400, 413, 422)  # of this request alone: too long, filtered, a field that the server does not know


class JudgeError(LoratError, RuntimeError):
    """A judge that could not be asked, or does not answer as a chat endpoint does."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `request`: fields of the request beside model and messages; a null leaves one out."""

    model: str
    base_url: str
    request: dict[str, Any]
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0

    @property
    def shown(self) -> str:
        """The address without a user or password."""
        parts = urlsplit(self.base_url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def body(self, text: str) -> dict[str, Any]:
        """The request's JSON for one question."""
        more = {k: v for k, v in self.request.items() if v is not None}
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **more}

    def key(self, body: dict[str, Any]) -> str:
        """SHA-256 of all that decides an answer: the address and the request."""
        return hashlib.sha256(json.dumps([self.shown, body], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """A judge's answer: its text, the tokens the server counted (None if it did not), and whether it was cut off."""

    text: str
    tokens_in: int | None
    tokens_out: int | None
    cut: bool


@dataclass
class Asked:
    """`replies` by key; `new`: the keys that this run asked; `refused`: why a request has no reply.

    The server turned it down as such, or its answer is no chat completion. Neither is kept: another run asks again.
    """

    replies: dict[str, Reply]
    new: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


class Cache:
    """Replies in a JSON Lines file, one appended and flushed at a time. It holds no prompt, no answer and no key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        try:
            self._lines = Lines(path)
        except OSError as error:
            raise ConfigError(
                f"the cache {str(path)!r} cannot be used: {error}. Set --cache to another file."
            ) from error
        self.skipped = self._lines.skipped
        for row in self._lines.rows:
            try:
                self.replies[row["key"]] = Reply(**{k: v for k, v in row.items() if k != "key"})
            except (TypeError, KeyError):
                self.skipped += 1

    def add(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        try:
            self._lines.append({"key": key, **asdict(reply)})
        except OSError as error:
            raise JudgeError(f"the cache {str(self.path)!r} cannot be written: {error}. Free space there.") from error

    def close(self) -> None:
        self._lines.close()


def ask(
    endpoint: Endpoint, texts: Iterable[str], cache: Cache, progress: Callable[[int, int], None] | None = None
) -> tuple[list[str], Asked]:
    """Ask every text that the cache does not answer, each once; returns the texts' keys in order, and what was answered.

    Stops, with all answers so far in the cache, at the first error that retries did not cure (`JudgeError`). A request
    that the server turns down as such (400, 413, 422: too long, filtered), or answers with what is no chat completion
    (no choices, say), is recorded and the others go on, unless the first five all end so.
    """
    bodies = [endpoint.body(text) for text in texts]
    keys = [endpoint.key(body) for body in bodies]
    missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in cache.replies}
    asked = Asked(cache.replies)
    if missing:
        asyncio.run(_ask_all(endpoint, missing, cache, asked, progress or (lambda done, total: None)))
    return keys, asked


async def _ask_all(endpoint: Endpoint, missing: dict[str, Any], cache: Cache, asked: Asked, progress) -> None:
    try:
        import openai
    except ImportError as error:
        raise ConfigError('lorat judge needs OpenAI\'s client: pip install "lorat[judge]".') from error
    key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none
    waiting = iter(missing.items())
    failure: list[str] = []

    def plain(error: BaseException) -> str:
        return first_line(error).replace(key, "***") if key != "none" else first_line(error)

    def refuse(name: str, why: str, advice: str) -> None:
        asked.refused[name] = why
        if len(asked.refused) >= 5 and not asked.new:
            failure.append(f"not one of the first five requests was answered: {why}. {advice}")

    async def one(client: Any, name: str, body: dict[str, Any]) -> None:
        tried = f"{endpoint.retries} retries included"
        try:
            reply = _reply(await client.post("/chat/completions", body=body, cast_to=object))
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            failure.append(f"{plain(error)}. Set the environment variable OPENAI_API_KEY to a key that it takes")
        except openai.NotFoundError as error:
            failure.append(f"{plain(error)}. Look at --model and --base-url (which mostly ends in /v1)")
        except openai.APIStatusError as error:
            if error.status_code in REFUSALS:
                refuse(name, plain(error), "See --request")
            else:
                failure.append(f"{plain(error)}, {tried}. Lower --concurrency, or wait")
        except openai.APIError as error:
            failure.append(f"{plain(error)}, {tried}. Is it up, and is --base-url right?")
        except ValueError as error:  # also where it calls something JSON that is none
            refuse(name, f"no chat completion: {plain(error)}", "Look at --base-url (which mostly ends in /v1)")
        else:
            cache.add(name, reply)
            asked.new.add(name)

    async def work(client: Any) -> None:
        for name, body in waiting:  # shared: each worker takes the next one
            if failure:
                return
            try:
                await one(client, name, body)
            except JudgeError as error:  # the cache cannot be written
                failure.append(plain(error))
            progress(len(asked.new) + len(asked.refused), len(missing))

    settings: dict[str, Any] = dict(api_key=key, max_retries=endpoint.retries, timeout=endpoint.timeout)
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, **settings) as client:
        await asyncio.gather(*(work(client) for _ in range(min(endpoint.concurrency, len(missing)))))
    if failure:
        raise JudgeError(
            f"the judge {endpoint.model!r} at {endpoint.shown}: {failure[0]}. {len(asked.new)} of {len(missing)} questions "
            f"were answered and are in {str(cache.path)!r}; the same command asks only the others."
        )


def _reply(raw: Any) -> Reply:
    """What counts of a chat completion's JSON. Raises `ValueError` if it is none, or has no choices."""
    try:
        choice, usage = raw["choices"][0], raw.get("usage") or {}
        text = choice["message"].get("content") or ""
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        if not isinstance(text, str):
            raise TypeError
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(repr(str(raw)[:100])) from error
    tokens_in, tokens_out = (c if isinstance(c, int) else None for c in counts)
    return Reply(text, tokens_in, tokens_out, choice.get("finish_reason") == "length")
