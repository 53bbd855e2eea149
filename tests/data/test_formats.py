"""Layouts: expected values are written by hand or come from TRL's own extraction."""

import re

import pytest
from datasets import Dataset
from trl import maybe_extract_prompt

from lorat.data.formats import canonical_text, common_prefix, detect
from lorat.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def first(rows, method="dpo"):
    dataset = Dataset.from_list(rows)
    form = detect(dataset, method)
    return form, canonical_text(dataset[0], form)


TEXT = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": [user("hi")], "chosen": [bot("yes")], "rejected": [bot("no")]}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
INFO = {"id": "1", "post": "My cat left.", "title": "Cat", "subreddit": "pets", "site": None, "article": None}
SUMMARIES = [{"text": " it left \n", "policy": "x", "note": None}, {"text": "cat", "policy": "y", "note": None}]
TLDR = "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat left.\n\nTL;DR:"


@pytest.mark.parametrize(
    "row, name, expected",
    [
        (TEXT, "prompt, chosen, rejected (text)", TEXT),
        (TEXT | {"prompt_id": 3, "score": 1.0}, "prompt, chosen, rejected (text)", TEXT),
        (
            {"chosen": HH + " Yes.\n\nHuman: d", "rejected": HH + " You know."},
            "Anthropic-HH dialogues (prompt = common prefix)",
            {"prompt": HH, "chosen": " Yes.\n\nHuman: d", "rejected": " You know."},
        ),
        (CHAT, "prompt, chosen, rejected (messages)", CHAT),
        (CHAT | {"prompt": "hi"}, "prompt, chosen, rejected (messages)", CHAT),
        (CHAT | {"chosen": "yes", "rejected": "no"}, "prompt, chosen, rejected (messages)", CHAT),
        (
            {"chosen": [user("hi"), bot("yes")], "rejected": [user("hi"), bot("no")]},
            "dialogues as messages (prompt = common prefix)",
            CHAT,
        ),
        (  # UltraFeedback: the prompt string repeats the first user turn, and the dialogues win
            {
                "prompt": "something else",
                "prompt_id": "f0",
                "chosen": [user("hi"), bot("yes")],
                "rejected": [user("hi"), bot("no")],
                "messages": [user("hi"), bot("yes")],
                "score_chosen": 8.0,
                "score_rejected": 7.5,
            },
            "dialogues as messages (prompt = common prefix)",
            CHAT,
        ),
        (  # the prompt as messages beside dialogues that hold it, and one that they lack
            {"prompt": [user("hi")], "chosen": [user("hi"), bot("yes")], "rejected": [user("hi"), bot("no")]},
            "dialogues as messages (prompt = common prefix)",
            CHAT,
        ),
        (
            {
                "prompt": [{"role": "system", "content": "be"}],
                "chosen": [user("hi"), bot("yes")],
                "rejected": [user("hi"), bot("no")],
            },
            "dialogues as messages (prompt = common prefix)",
            CHAT | {"prompt": [{"role": "system", "content": "be"}, user("hi")]},
        ),
        (
            {"info": INFO, "summaries": SUMMARIES, "choice": 1, "worker": "w"},
            "TL;DR comparisons (info, summaries, choice)",
            {"prompt": TLDR, "chosen": " cat", "rejected": " it left"},
        ),
        (
            {"info": INFO, "summaries": {"text": ["it left", "cat"]}, "choice": 0},
            "TL;DR comparisons (info, summaries, choice)",
            {"prompt": TLDR, "chosen": " it left", "rejected": " cat"},
        ),
    ],
)
def test_pair_layouts(row, name, expected):
    form, example = first([row])
    assert (form.name, example, form.unpair) == (name, expected, False)
    assert first([row], "kto")[0].unpair


@pytest.mark.parametrize("label, expected", [(True, True), (0, False), (1.0, True)])
@pytest.mark.parametrize("prompt, completion, chat", [("Q:", " a", False), ([user("q")], [bot("a")], True)])
def test_kto_layouts(prompt, completion, chat, label, expected):
    form, example = first([{"prompt": prompt, "completion": completion, "label": label}], "kto")
    assert example == {"prompt": prompt, "completion": completion, "label": expected}
    assert example["label"] is expected
    assert (form.chat, form.unpair) == (chat, False)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("The sky is blue", "The sky is green", "The sky is"),  # the space belongs to the completion
        ("Say: the cat", "Say: the car", "Say: the"),  # not within a word
        ("Say: the car", "Say: the carpet", "Say: the"),
        ("Stop here. Yes", "Stop here, no", "Stop here"),  # already at a boundary
        ("Q\nyes", "Q\nno", "Q\n"),
        ("你好吗", "你好啊", "你好"),  # a script without spaces
    ],
)
def test_common_prefix_of_texts_ends_at_a_word(chosen, rejected, prompt):
    form, example = first([{"chosen": chosen, "rejected": rejected}])
    assert form.name == "chosen and rejected texts (prompt = common prefix)"
    assert example == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c"), user("d"), bot("e")]},
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
        {"prompt": "a", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        TEXT,
        CHAT,
    ],
)
def test_agrees_with_trl(row):
    theirs = maybe_extract_prompt(row)
    assert first([row])[1] == {key: theirs[key] for key in ("prompt", "chosen", "rejected")}


def test_dialogues_that_differ_in_a_user_turn_share_the_prompt_before_the_answer():
    chosen, rejected = [[user("a"), bot("b"), user(q), bot("d")] for q in "xy"]
    example = first([{"chosen": chosen, "rejected": rejected}])[1]
    assert example == {"prompt": [user("a")], "chosen": chosen[1:], "rejected": rejected[1:]}


@pytest.mark.parametrize(
    "good, bad, reason",
    [
        (TEXT, {"chosen": None}, "chosen is null, not text"),
        (TEXT, {"prompt": 5}, "prompt is a number, not text"),
        (TEXT, {"rejected": [bot("x")]}, "rejected is messages, not text"),
        (TEXT, {"rejected": " yes"}, "chosen equals rejected"),
        (CHAT, {"rejected": "x"}, "rejected is text, not messages"),
        (CHAT, {"chosen": [{"role": "assistant", "content": None}]}, "chosen has a message whose content is not text"),
        (CHAT, {"chosen": ["yes"]}, "chosen is a list of something else, not messages"),
        ({"info": INFO, "summaries": SUMMARIES, "choice": 1}, {"choice": 2}, "choice is neither 0 nor 1"),
        ({"info": INFO, "summaries": SUMMARIES, "choice": 1}, {"summaries": None}, "summaries are not two texts"),
        (
            {"info": INFO, "summaries": SUMMARIES, "choice": 1},
            {"summaries": [{"text": "cat"}, {"text": " cat"}]},
            "chosen equals rejected",
        ),
        (
            {"info": INFO, "summaries": SUMMARIES, "choice": 1},
            {"info": INFO | {"post": None}},
            "info lacks the subreddit, title or post",
        ),
    ],
)
def test_rows_that_cannot_be_used_give_a_reason(good, bad, reason):
    form, example = first([good])
    assert isinstance(example, dict)
    assert canonical_text(good | bad, form) == reason


def test_prompts_beside_dialogues_are_judged_row_by_row():
    """A null prompt beside a dialogue does no harm; a dialogue among bare answers is still split."""
    dialogue = {"prompt": "x", "chosen": [user("hi"), bot("yes")], "rejected": [user("hi"), bot("no")]}
    form, _ = first([dialogue])
    assert canonical_text(dialogue | {"prompt": None}, form) == CHAT
    form, _ = first([CHAT | {"prompt": "x"}])
    assert canonical_text(dialogue, form) == CHAT


def test_label_that_is_no_boolean_gives_a_reason():
    form, _ = first([{"prompt": "a", "completion": "b", "label": 1}], "kto")
    assert canonical_text({"prompt": "a", "completion": "b", "label": 2}, form) == "label is neither true/false nor 1/0"


@pytest.mark.parametrize(
    "row, method, words",
    [
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "dpo", ["'choosen' — did you mean 'chosen'", "rename"]),
        ({"Prompt": "a", "Chosen": "b", "Rejected": "c"}, "dpo", ["'Chosen' — did you mean 'chosen'", "'Rejected'"]),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, "dpo", ["'promt' — did you mean 'prompt'"]),
        ({"foo": "a", "bar": "b"}, "ipo", ["['foo', 'bar']", "prompt, chosen, rejected", "summaries", "Rename"]),
        ({"prompt": "a", "completion": "b", "labl": True}, "kto", ["'labl' — did you mean 'label'"]),
        ({"prompt": "a", "completion": "b", "label": True}, "dpo", ["KTO data", "method=dpo", "set method=kto"]),
        ({"prompt": "a", "completion": "b", "label": True}, "ipo", ["method=ipo"]),
        ({"prompt": "a", "completion": "b", "label": "fine"}, "kto", ["'label'", "string", "write true"]),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "dpo", ["'chosen'", "int64", "strings"]),
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "dpo", ["'prompt'", "null"]),
    ],
)
def test_datasets_that_fit_no_layout(row, method, words):
    with pytest.raises(DataError) as caught:
        first([row], method)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_column_is_judged_by_its_first_usable_cell():
    form, example = first([TEXT | {"chosen": None}, TEXT])
    assert (form.name, example) == ("prompt, chosen, rejected (text)", "chosen is null, not text")


def test_empty_dataset():
    with pytest.raises(DataError, match=re.escape("0 rows")):
        detect(Dataset.from_list([]), "dpo")


@pytest.mark.parametrize(
    "parts, n", [(("abc", "abd"), 2), (("ab", "abc", "a"), 1), (([1, 2], [1, 2]), 2), (("", "a"), 0)]
)
def test_common_prefix(parts, n):
    assert common_prefix(*parts) == n
