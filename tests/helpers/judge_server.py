"""Judges for tests: a scripted HTTP server that speaks the chat protocol, and a real model that always says the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Reply = tuple[int, dict[str, str], Any]


def completion(text: str | None, tokens_in: int = 10, tokens_out: int = 3, finish: str = "stop") -> Reply:
    """A chat completion that says `text`."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    return 200, {}, {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def failure(status: int, message: str = "no") -> Reply:
    """An error that may be tried again after a millisecond, if at all."""
    return status, {"retry-after-ms": "1"}, {"error": {"message": message, "type": "error"}}


@contextmanager
def serving(answer: Callable[[int, dict[str, Any], Any], Reply], port: int = 0):
    """A server on `port`, or a free one; `answer(number from 0, request's JSON, headers)`. Yields `(base_url, requests so far)`."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append(body)
            status, headers, value = answer(number, body, self.headers)
            content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            try:
                self.send_response(status)
                for name, text in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client was killed
                pass

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def save_judge(folder: Path, says: tuple[str, ...] = ("Verdict:", "A")) -> str:
    """A real Llama that says `says` to everything: with attention and MLP at zero a token decides the next one.

    Rows of the embedding are unit vectors, and the head maps each word to its successor, so greedy decoding walks
    assistant -> says[0] -> says[1] -> … -> end.
    """
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", *says]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=4096,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), 16))
        head = model.lm_head.weight.zero_()
        chain = [words.index("<assistant>"), *range(5, len(words)), 1]
        for now, following in pairwise(chain):
            head[following, now] = 10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
