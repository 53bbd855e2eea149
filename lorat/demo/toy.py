"""A small world with a known reward, so that `lorat demo` shows alignment working in a minute on any computer.

Why: on real data nobody knows the true reward. Here it is a function of the text (`gold_reward`): animals are asked
about, a tiny GPT-NeoX trained on sloppy demonstrations answers in short English sentences, and preferences are drawn
from the gold reward by Bradley-Terry, noise included. What alignment gains, and what it pays in KL, can be measured.

Left out on purpose: alignment itself (that is the trainer's), and anything that would need a download. Everything is a
function of its seed. Cost on two CPU cores: 7 s for the SFT model, 1 s for 1,000 pairs.

Prompts, completions and the vocabulary are lower-case words with spaces around punctuation, which is also how the
tokenizer decodes; a completion carries no EOS, whoever tokenises it adds `<end>`.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from ..packs.logprobs import logprobs_of

ANIMALS = ("bear", "cat", "dog", "fox", "owl", "rabbit")
SIZES = ("big", "old", "small", "young")
KIND = ("brave", "gentle", "happy", "sweet")
PLEASANT = ("lovely", "sunny")
RUDE = ("nasty", "stupid", "ugly")
VERBS = ("dances", "listens", "plays", "rests", "runs", "sings", "sleeps", "smiles", "waits", "walks")
ADVERBS = ("alone", "quietly", "slowly", "softly")
PREPOSITIONS = ("behind", "in", "near")
SCENERY = ("cold", "dark", "green", "quiet")
PLACES = ("barn", "field", "forest", "garden", "house", "meadow", "river", "village")
TEMPLATES = ("tell me about the {} {} :", "describe the {} {} :", "what does the {} {} do ?")
KIND_WORDS = {*KIND, *PLEASANT}
FUNCTION_WORDS = {"the", "it", ".", *PREPOSITIONS}  # may be said again

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
LONGEST = 20  # words of an answer, full stops included
BEST_REWARD, WORST_REWARD = 3.0, -3.0
PROMPTS = tuple(t.format(size, animal) for t, size, animal in itertools.product(TEMPLATES, SIZES, ANIMALS))

_ANIMAL, _SIZE, _MANNER, _VERB, _ADVERB, _PREPOSITION, _LOOK, _PLACE = (
    f"(?:{'|'.join(words)})"
    for words in (ANIMALS, SIZES, KIND + RUDE, VERBS, ADVERBS, PREPOSITIONS, SCENERY + PLEASANT, PLACES)
)
_SUBJECT = rf"(?:it|the (?:{_SIZE} )?(?:{_MANNER} )?{_ANIMAL})"
_SENTENCE = rf"{_SUBJECT} {_VERB}(?: {_ADVERB})?(?: {_PREPOSITION} the (?:{_LOOK} )?{_PLACE})? \."
_GRAMMAR = re.compile(rf"{_SENTENCE}(?: {_SENTENCE})?")


def grammatical(completion: str) -> bool:
    """Whether it is one or two sentences of the toy's grammar."""
    return _GRAMMAR.fullmatch(" ".join(completion.split())) is not None


def gold_reward(prompt: str, completion: str) -> float:
    """The true quality of an answer, from −3 to 3.

    One point each for naming the asked animal and no other, for one or two grammatical sentences, and for a kind or
    pleasant word; minus one for a rude word, minus half for each word said again (at most one), and minus one for more
    than 20 words or no full stop at the end.
    """
    words = completion.split()
    named = {word for word in words if word in ANIMALS}
    asked = {word for word in prompt.split() if word in ANIMALS}
    content = [word for word in words if word not in FUNCTION_WORDS]
    reward = 1.0 * (named == asked)
    reward += 1.0 * grammatical(completion)
    reward += 1.0 * bool(set(words) & KIND_WORDS)
    reward -= 1.0 * any(word in RUDE for word in words)
    reward -= 0.5 * min(2, len(content) - len(set(content)))
    reward -= 1.0 * (len(words) > LONGEST or words[-1:] != ["."])
    return reward


def _sentence(rng: random.Random, subject: str, size: str) -> list[str]:
    """One sentence of a sloppy writer: sometimes kind, sometimes rude, sometimes twice the same word."""
    words = [subject]
    if subject != "it":
        manner = rng.choices([None, rng.choice(KIND), rng.choice(RUDE)], [0.30, 0.20, 0.50])[0]
        words = ["the", *([size] if rng.random() < 0.5 else []), *([manner] if manner else []), subject]
    words.append(rng.choice(VERBS))
    if rng.random() < 0.4:
        words.append(rng.choice(ADVERBS))
    if rng.random() < 0.7:
        look = rng.choices([None, rng.choice(SCENERY), rng.choice(PLEASANT)], [0.4, 0.40, 0.20])[0]
        words += [rng.choice(PREPOSITIONS), "the", *([look] if look else []), rng.choice(PLACES)]
    if rng.random() < 0.15:
        at = rng.randrange(len(words))
        words.insert(at, words[at])
    return [*words, "."]


def demonstrations(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows `{"prompt", "completion"}` to learn to speak from, sloppy on purpose: often rude, sometimes of another
    animal or with a word said twice, and less kind than they could be."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt = rng.choice(PROMPTS)
        size, asked = (next(word for word in prompt.split() if word in group) for group in (SIZES, ANIMALS))
        animal = rng.choice(ANIMALS) if rng.random() < 0.25 else asked
        words = _sentence(rng, animal, size)
        if rng.random() < 0.35:
            words += _sentence(rng, rng.choice(["it", "it", animal]), size)
        rows.append({"prompt": prompt, "completion": " ".join(words)})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the toy's whole vocabulary; EOS `<end>`, padding `<pad>` on the left, `<unk>`."""
    groups = (ANIMALS, SIZES, KIND, PLEASANT, RUDE, VERBS, ADVERBS, PREPOSITIONS, SCENERY, PLACES, FUNCTION_WORDS)
    words = sorted({*itertools.chain(*groups), *" ".join(PROMPTS).split()})
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", model_max_length=128, **specials)


def make_sft_model(
    tokenizer: Any, seed: int = 0, steps: int = 300, batch_size: int = 32, learning_rate: float = 3e-3, layers: int = 2
) -> GPTNeoXForCausalLM:
    """A GPT-NeoX (hidden 128, 2 heads; every linear layer a multiple of 64, so NF4 takes it) trained on demonstrations.

    AdamW with a linear decay, loss on completion tokens only. Returns it in eval mode, float32, on the CPU.
    """
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    rows = demonstrations(steps * batch_size, seed)
    model.train()
    for step in range(steps):
        batch = rows[step * batch_size : (step + 1) * batch_size]
        prompts, completions = zip(*((row["prompt"], row["completion"]) for row in batch))
        logps = Completions(tokenizer, prompts, completions).logps(model)
        (-logps.sum() / (logps != 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 32, seed: int = 0, batch_size: int = 256
) -> list[str]:
    """One completion a prompt from the model's own distribution: temperature 1, nothing cut off; text without EOS.

    Any causal Hugging Face model, adapters included. Reproducible for a seed and a batch size on one machine.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[start : start + batch_size], padding=True, return_tensors="pt", padding_side="left")
        tokens, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
        cache, new = None, list[Tensor]()
        while len(new) < max_new_tokens and not ended.all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            tokens = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            tokens[ended] = tokenizer.pad_token_id
            ended |= tokens[:, 0] == tokenizer.eos_token_id
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            new.append(tokens)
        texts += tokenizer.batch_decode(torch.cat(new, dim=1), skip_special_tokens=True)
    model.train(was_training)
    return texts


def prefers_first(rewards_a: Tensor, rewards_b: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Bradley-Terry labels: true with `P(a ≻ b) = σ((r_a − r_b)/temperature)`; rewards `(n,)`, returns `(n,)` bool."""
    return torch.rand(rewards_a.shape, generator=generator) < torch.sigmoid((rewards_a - rewards_b) / temperature)


def preference_pairs(
    model: Any, tokenizer: Any, n: int, seed: int = 0, temperature: float = 0.5, max_new_tokens: int = 32
) -> list[dict[str, str]]:
    """`n` pairs `{"prompt", "chosen", "rejected"}`: two different samples of one prompt (neither empty), labelled by
    Bradley-Terry. `temperature` is the judge's noise in units of reward: at 0.5 a gap of 1 is mislabelled in 12 %."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pairs: list[dict[str, str]] = []
    while len(pairs) < n:
        prompts = [rng.choice(PROMPTS) for _ in range(n - len(pairs))]
        texts = sample(model, tokenizer, prompts + prompts, max_new_tokens, seed=rng.getrandbits(32))
        rows = [
            (p, a, b) for p, a, b in zip(prompts, texts[: len(prompts)], texts[len(prompts) :]) if a != b and a and b
        ]
        rewards_a, rewards_b = (torch.tensor([gold_reward(row[0], row[k]) for row in rows]) for k in (1, 2))
        first = prefers_first(rewards_a, rewards_b, temperature, generator).tolist()
        pairs += [
            {"prompt": p, "chosen": a if win else b, "rejected": b if win else a} for (p, a, b), win in zip(rows, first)
        ]
    return pairs


class Completions:
    """n prompts with completions, tokenised and padded on the right once, for plain transformers.

    `ids: (n, T)` int64, `mask: (n, T)` int64, 0 on padding; `counted: (n, T-1)` bool, the targets that belong to a
    completion or are its EOS. On the CPU.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> None:
        before = tokenizer(list(prompts))["input_ids"]
        after = tokenizer(list(completions))["input_ids"]
        rows = [[*p, *c, tokenizer.eos_token_id] for p, c in zip(before, after, strict=True)]
        longest = max(map(len, rows))
        self.ids = torch.tensor([r + [tokenizer.pad_token_id] * (longest - len(r)) for r in rows])
        at, ends = torch.arange(longest), torch.tensor([[len(r)] for r in rows])
        self.mask = (at < ends).long()
        self.counted = (at[1:] >= torch.tensor([[len(p)] for p in before])) & (at[1:] < ends)

    def logps(self, model: Any, rows: Tensor | slice = slice(None)) -> Tensor:
        """Log-probs `(rows, T-1)` float32 in nats, with gradient, on the model's device; 0 outside the completions."""
        device = next(model.parameters()).device
        ids, mask, counted = (x[rows].to(device) for x in (self.ids, self.mask, self.counted))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return logprobs_of(logits, ids[:, 1:]).masked_fill(~counted, 0.0)


@torch.no_grad()
def sequence_logps(
    model: Any, tokenizer: Any, prompts: list[str], completions: list[str], batch_size: int = 256
) -> Tensor:
    """Log-prob of each completion and its `<end>` in nats, `(n,)` float32 on the CPU, by plain transformers.

    The mean of policy minus SFT over samples **of the policy** estimates KL(policy‖SFT); a sample that was cut off at
    `max_new_tokens` counts as if it had ended there.
    """
    was_training = model.training
    model.eval()
    starts = range(0, len(prompts), batch_size)
    parts = [
        Completions(tokenizer, prompts[i : i + batch_size], completions[i : i + batch_size]).logps(model).sum(1).cpu()
        for i in starts
    ]
    model.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0)
