"""Boundaries, BOS, EOS and truncation: ids and texts are written by hand, or come from the tokenizer alone."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import apply_chat_template

from lorat.data.tokenization import Tokens, adds_bos, as_row, check_tokenizer, encode, strip_eos, truncate, unfit
from lorat.errors import ModelError
from tests.helpers.worlds import SHARED

DATA = SHARED / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(bos=False, template=None, **special):
    """Byte-level BPE whose only merge is a+b, so that a prompt "a" and a completion "b" become one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 257, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["ab"] * 10, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def one(example, tokenizer):
    (tokens,) = encode([example], tokenizer)
    if isinstance(tokens, str):
        return tokens
    return words(tokenizer, tokens.prompt), [words(tokenizer, c) for c in tokens.completions]


def test_a_token_that_merges_over_the_boundary_belongs_to_the_completions():
    assert one(pair("x a", "b", "c"), make()) == (["x", "Ġ"], [["ab", "</s>"], ["a", "c", "</s>"]])
    assert one({"prompt": "x a", "completion": "c", "label": True}, make()) == (["x", "Ġ", "a"], [["c", "</s>"]])
    assert one({"prompt": "x a", "completion": "b", "label": True}, make()) == (["x", "Ġ"], [["ab", "</s>"]])


def test_a_prompt_without_a_token_of_its_own_is_refused_unless_there_is_bos():
    assert "no token of its own" in one(pair("a", "b", "c"), make())
    assert one(pair("a", "b", "c"), make(bos=True)) == (["<s>"], [["ab", "</s>"], ["a", "c", "</s>"]])


@pytest.mark.parametrize(
    "bos, prompt, expected",
    [(True, "q", ["<s>", "q"]), (True, "<s>q", ["<s>", "q"]), (False, "q", ["q"]), (False, "<s>q", ["<s>", "q"])],
)
def test_bos_exactly_when_the_tokenizer_adds_it_and_never_twice(bos, prompt, expected):
    tokenizer = make(bos=bos)
    assert adds_bos(tokenizer) is bos
    assert one(pair(prompt, "c", "d"), tokenizer) == (expected, [["c", "</s>"], ["d", "</s>"]])


@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n", "</s> \n\n", "</s></s>", "</s>\n</s>"])
def test_eos_exactly_once(ending):
    assert one(pair("q", "c" + ending, "d"), make()) == (["q"], [["c", "</s>"], ["d", "</s>"]])


def test_white_space_without_eos_is_kept():
    assert strip_eos("a \n", "</s>") == "a \n"
    assert strip_eos("a </s> ", "</s>") == "a "


@pytest.mark.parametrize(
    "example, reason",
    [
        (pair("", "c", "d"), "empty prompt"),
        (pair(" \n", "c", "d"), "empty prompt"),
        (pair("q", "c", "  "), "empty completion"),
        (pair("q", "</s>\n", "d"), "empty completion"),
        (pair([], [{"role": "assistant", "content": "c"}], []), "empty prompt"),
        (pair([{"role": "user", "content": "q"}], [{"role": "assistant", "content": " "}], []), "empty completion"),
    ],
)
def test_empty_parts_give_a_reason(example, reason):
    assert one(example, make(template=CHATML)) == reason


def test_a_completion_that_normalises_to_nothing_is_empty():
    tokenizer = make()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    assert one(pair("q", "~", "c"), tokenizer) == "empty completion"


CHAT = pair(
    [{"role": "user", "content": "q"}],
    [{"role": "assistant", "content": "yes"}],
    [{"role": "assistant", "content": "no"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "s"}],
)


@pytest.mark.parametrize("bos", [False, True])
def test_conversations_follow_the_chat_template(bos):
    """BOS only where the template writes it; the newline after the last EOS is cut, those between turns stay."""
    tokenizer = make(bos=bos, template=CHATML)
    (tokens,) = encode([CHAT], tokenizer)
    texts = [tokenizer.decode(ids) for ids in (tokens.prompt, *tokens.completions)]
    assert texts[0] == "<|im_start|>user\nq</s>\n<|im_start|>assistant\n"
    assert texts[1:] == ["yes</s>", "no</s>\n<|im_start|>user\nr</s>\n<|im_start|>assistant\ns</s>"]
    theirs = apply_chat_template(CHAT, tokenizer)
    assert texts == [theirs["prompt"], theirs["chosen"].rstrip("\n"), theirs["rejected"].rstrip("\n")]


def test_bos_of_the_template_is_not_doubled_and_missing_eos_is_added():
    tokenizer = make(bos=True, template="{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    prompt, completions = one(CHAT, tokenizer)
    assert "".join(prompt) == "<s>[q]"
    assert ["".join(c) for c in completions] == ["[yes]</s>", "[no][r][s]</s>"]


def test_template_that_opens_an_answer_which_it_then_does_not_write():
    """An opening that is served (`<think>`) stays in the prompt: a row whose answers do not begin so is refused."""
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    tokenizer = make(template=template)
    (reason,) = encode([CHAT], tokenizer)
    assert "opens the answer with '<think>'" in reason
    thought = {
        k: [m | {"content": f"<think>so</think>{m['content']}"} for m in v] for k, v in CHAT.items() if k != "prompt"
    }
    (tokens,) = encode([CHAT | thought], tokenizer)
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user\nq</s>\n<|im_start|>assistant\n<think>"
    assert tokenizer.decode(tokens.completions[0]) == "so</think>yes</s>"


def test_template_that_rewrites_the_prompt_within_a_token():
    """ "x ab" is served and "x ac" would be trained: no answer follows what is served, and the row is refused."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} ab{% endif %}"
    chat = {key: [{"role": "user", "content": text}] for key, text in pair("x", " ac", " ad").items()}
    assert "writes the prompt differently" in one(chat, make(template=template))
    answers = {key: [{"role": "assistant", "content": text}] for key, text in pair("x", " ac", " ad").items()}
    assert "opens the answer with ' ab'" in one(answers, make(template=template))


def test_conversations_without_a_template():
    with pytest.raises(ModelError, match=r"no chat template.*set tokenizer\.chat_template.*plain strings"):
        encode([CHAT], make())


def test_a_template_that_refuses_a_row_gives_a_reason_and_spares_the_others():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    bad = CHAT | {"prompt": [{"role": "system", "content": "x"}]}
    results = encode([bad, CHAT], make(template=template))
    assert "refuses" in results[0] and "no system" in results[0]
    assert isinstance(results[1], Tokens)


B = 0  # the BOS id below


@pytest.mark.parametrize(
    "prompt, completions, limits, expected",
    [
        ([5, 6, 7], [[1, 2], [3]], (None, None), ([5, 6, 7], [[1, 2], [3]], False, (False, False))),
        ([5, 6, 7], [[1, 2], [3]], (5, None), ([5, 6, 7], [[1, 2], [3]], False, (False, False))),
        # the prompt gives way first, from the left, only as far as needed
        ([5, 6, 7], [[1, 2], [3]], (4, None), ([6, 7], [[1, 2], [3]], True, (False, False))),
        ([B, 6, 7, 8], [[1, 2], [3]], (5, None), ([B, 7, 8], [[1, 2], [3]], True, (False, False))),
        # down to half of max_length; then completions lose their end
        ([5, 6, 7, 8], [[1, 2, 3, 4], [3]], (6, None), ([6, 7, 8], [[1, 2, 3], [3]], True, (True, False))),
        ([B, 6, 7, 8], [[1, 2, 3, 4], [3]], (4, None), ([B, 8], [[1, 2], [3]], True, (True, False))),
        ([8], [[1, 2, 3, 4], [3, 4, 5, 6]], (4, None), ([8], [[1, 2, 3], [3, 4, 5]], False, (True, True))),
        # max_prompt_length is a cap of its own, and the floor
        ([5, 6, 7], [[1, 2], [3]], (None, 2), ([6, 7], [[1, 2], [3]], True, (False, False))),
        ([B, 6, 7], [[1]], (None, 1), ([B], [[1]], True, (False,))),
        ([5, 6, 7, 8], [[1, 2, 3, 4]], (6, 4), ([5, 6, 7, 8], [[1, 2]], False, (True,))),
        ([5, 6, 7, 8], [[1, 2, 3, 4]], (6, 2), ([7, 8], [[1, 2, 3, 4]], True, (False,))),
        # never to nothing
        ([5, 6, 7], [[1, 2]], (2, 9), ([7], [[1]], True, (True,))),
        ([5, 6, 7], [[1, 2]], (1, None), ([7], [[1]], True, (True,))),
    ],
)
def test_truncation(prompt, completions, limits, expected):
    result = truncate(Tokens(prompt, completions), *limits, B)
    assert (result.prompt, result.completions, result.cut_prompt, result.cut) == expected


@pytest.mark.parametrize("length", range(2, 12))
def test_truncated_completions_lose_eos_and_whole_ones_keep_it(length):
    tokenizer = make(bos=True)
    (tokens,) = encode([pair("abcdef", "xyz", "qrstu")], tokenizer)
    result = truncate(tokens, length, None, tokenizer.bos_token_id)
    assert result.total <= length
    assert result.prompt[0] == tokenizer.bos_token_id
    for ids, cut in zip(result.completions, result.cut):
        assert (ids[-1] == tokenizer.eos_token_id) is not cut


def test_unfit():
    tokens = Tokens([1, 2], [[3], [3]])
    assert unfit(tokens, 2, None) == "longer than max_length=2"
    assert unfit(tokens, None, 1) == "prompt longer than max_prompt_length=1"
    assert unfit(tokens, 3, 2) == "chosen equals rejected after tokenisation"
    assert unfit(Tokens([1], [[2], [3]]), 2, 1) is None


def test_rows():
    assert as_row(7, Tokens([1], [[2], [3]])) == {"row": 7, "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    expected = {"row": 7, "prompt_ids": [1], "completion_ids": [2], "label": False}
    assert as_row(7, Tokens([1], [[2]]), False) == expected


@pytest.mark.parametrize("pad, expected", [(None, 1), ("<|im_start|>", 2), ("<s>", 0)])
def test_padding_falls_back_to_eos(pad, expected):
    assert check_tokenizer(make(pad_token=pad)) == expected


def test_tokenizer_without_eos():
    with pytest.raises(ModelError, match=r"no EOS token.*set tokenizer\.eos_token"):
        check_tokenizer(make(eos_token=None))


def test_long_texts_are_tokenised_without_a_warning(caplog):
    tokenizer = make(model_max_length=4)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(one(pair("q" * 9, "c", "d"), tokenizer)[0]) == 9
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_real_tokenizer_joint_ids():
    """Joined again, prompt and completion are what the tokenizer makes of the whole text, plus EOS."""
    if not (DATA / "pythia-tokenizer").is_dir():
        pytest.skip(f"no real tokenizer at {DATA / 'pythia-tokenizer'}")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "pythia-tokenizer")
    assert not adds_bos(tokenizer)
    prompt, chosen, rejected = "\n\nHuman: Is it 10 o'clock?\n\nAssistant:", " Yes — it is.", " I don't know"
    (tokens,) = encode([pair(prompt, chosen, rejected)], tokenizer)
    for completion, ids in zip((chosen, rejected), tokens.completions):
        assert tokens.prompt + ids == [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(tokens.prompt) == prompt
