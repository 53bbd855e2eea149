"""A row of each published shape, written by hand as its dataset card has it, and what it must become."""

import json

import pytest
from datasets import Dataset

from lorat.data.canonical import examples
from lorat.data.columns import RowSettings
from lorat.data.formats import canonical_text, detect
from lorat.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def said(who, text):
    return {"from": who, "value": text}


def read(row, method="dpo", **settings):
    dataset = Dataset.from_list([row])
    form = detect(dataset, method, RowSettings(**settings))
    return form, canonical_text(dataset[0], form)


ASK, YES, NO = "How do I boil an egg?", "Seven minutes.", "Ask somebody else."
CHAT = {"prompt": [user(ASK)], "chosen": [bot(YES)], "rejected": [bot(NO)]}
WITH_SYSTEM = CHAT | {"prompt": [system("Be brief."), user(ASK)]}
TEXT = {"prompt": ASK, "chosen": YES, "rejected": NO}
TOOL = {"type": "function", "function": {"name": "boil", "description": "Boil.", "parameters": {"type": "object"}}}

PAIRS = {
    "orca (axolotl chatml.intel)": (
        {"system": "Be brief.", "question": ASK, "chosen": YES, "rejected": NO},
        WITH_SYSTEM,
    ),
    "axolotl chatml.icr": ({"system": "Be brief.", "input": ASK, "chosen": YES, "rejected": NO}, WITH_SYSTEM),
    "orca without a system message": ({"system": "", "question": ASK, "chosen": YES, "rejected": NO}, TEXT),
    "axolotl chatml.argilla": (
        {"system": "Be brief.", "instruction": ASK, "chosen_response": YES, "rejected_response": NO},
        WITH_SYSTEM,
    ),
    "NeMo": ({"prompt": ASK, "chosen_response": YES, "rejected_response": NO}, TEXT),
    "LLaMA-Factory sharegpt": (
        {"conversations": [said("human", ASK)], "chosen": said("gpt", YES), "rejected": said("gpt", NO)},
        CHAT,
    ),
    "LLaMA-Factory sharegpt with a system column": (
        {"conversations": [said("human", ASK)], "chosen": said("gpt", YES), "rejected": said("gpt", NO)}
        | {"system": "Be brief."},
        WITH_SYSTEM,
    ),
    "LLaMA-Factory alpaca": (
        {"instruction": "Translate.", "input": "Good morning", "chosen": "Bonjour", "rejected": "Hi"},
        {"prompt": "Translate.\nGood morning", "chosen": "Bonjour", "rejected": "Hi"},
    ),
    "LLaMA-Factory alpaca with everything": (
        {"instruction": "And this?", "input": "Good night", "system": "Answer in French.", "chosen": "Bonne nuit"}
        | {"history": [["Good morning", "Bonjour"]], "rejected": "Night"},
        {
            "prompt": [
                system("Answer in French."),
                user("Good morning"),
                bot("Bonjour"),
                user("And this?\nGood night"),
            ],
            "chosen": [bot("Bonne nuit")],
            "rejected": [bot("Night")],
        },
    ),
    "case 2: system, prompt and input": (
        {"system": "Answer in French.", "prompt": "Translate.", "input": "Good morning"}
        | {"chosen": "Bonjour", "rejected": "Good morning"},
        {
            "prompt": [system("Answer in French."), user("Translate.\nGood morning")],
            "chosen": [bot("Bonjour")],
            "rejected": [bot("Good morning")],
        },
    ),
    "axolotl chat_template.default": ({"messages": [user(ASK)], "chosen": bot(YES), "rejected": bot(NO)}, CHAT),
    "case 1: a conversation and texts": (
        {"conversations": [said("human", ASK)], "chosen": YES, "rejected": NO},
        CHAT,
    ),
    "ms-swift rejected_response": ({"messages": [user(ASK), bot(YES)], "rejected_response": NO}, CHAT),
    "ms-swift rejected_messages": (
        {"messages": [system("Be brief."), user(ASK), bot(YES)], "rejected_messages": [system("Be brief."), user(ASK), bot(NO)]},
        WITH_SYSTEM,
    ),
    "ms-swift query, response": ({"query": ASK, "chosen": YES, "rejected_response": NO}, TEXT),
    "OpenAI": (
        {"input": {"messages": [user(ASK)], "parallel_tool_calls": True}, "preferred_output": [bot(YES)]}
        | {"non_preferred_output": [bot(NO)]},
        CHAT,
    ),
    "OpenAI with tools": (
        {"input": {"messages": [user(ASK)], "tools": [TOOL]}, "preferred_output": [bot(YES)]}
        | {"non_preferred_output": [bot(NO)]},
        CHAT | {"tools": [TOOL]},
    ),
    "content parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "How do I "}, {"type": "text", "text": "boil an egg?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": YES}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": NO}]}],
        },
        CHAT,
    ),
    "tools as JSON text": (CHAT | {"tools": json.dumps([TOOL])}, CHAT | {"tools": [TOOL]}),
    "chat_template_kwargs": (
        CHAT | {"chat_template_kwargs": {"enable_thinking": False}},
        CHAT | {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "PKU-SafeRLHF": (
        {"prompt": ASK, "response_0": NO, "response_1": YES, "better_response_id": 1, "safer_response_id": 0},
        TEXT,
    ),
    "SHP": (
        {"post_id": "x", "history": ASK, "human_ref_A": YES, "human_ref_B": NO, "labels": 1, "score_A": 9, "score_B": 2},
        TEXT,
    ),
    "SHP, B preferred": ({"history": ASK, "human_ref_A": NO, "human_ref_B": YES, "labels": 0}, TEXT),
    "HelpSteer2": ({"prompt": ASK, "response_1": YES, "response_2": NO, "preference_strength": -2}, TEXT),
    "HelpSteer2 of several turns": (
        {
            "prompt": f"Hello\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n{ASK}",
            "response_1": NO,
            "response_2": YES,
            "preference_strength": 1,
        },
        CHAT | {"prompt": [user("Hello"), bot("Yes?"), user(ASK)]},
    ),
    "HelpSteer3": (
        {"domain": "general", "context": [user(ASK)], "response1": NO, "response2": YES, "overall_preference": 3},
        CHAT,
    ),
    "Nectar": (
        {
            "prompt": f"\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [
                {"answer": "Hm.", "model": "b", "rank": 2.0},
                {"answer": YES, "model": "a", "rank": 1.0},
                {"answer": NO, "model": "c", "rank": 3.0},
            ],
            "turns": 1,
        },
        TEXT | {"prompt": f"\n\nHuman: {ASK}\n\nAssistant: "},
    ),
    "UltraFeedback, raw": (
        {"instruction": ASK, "completions": [{"response": NO, "overall_score": 2.0}, {"response": YES, "overall_score": 8.5}]},
        TEXT,
    ),
    "answers and scores side by side": ({"prompt": ASK, "responses": [NO, YES], "scores": [0.1, 0.9]}, TEXT),
    "answers and ranks side by side": ({"prompt": ASK, "responses": [NO, YES], "ranks": [2, 1]}, TEXT),
    "Arena": (
        {
            "model_a": "x", "model_b": "y", "winner": "model_b",
            "conversation_a": [user(ASK), bot(NO)], "conversation_b": [user(ASK), bot(YES)],
        },
        CHAT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, expected = PAIRS[name]
    form, example = read(row)
    assert example == expected
    assert set(form.reads) | set(form.unread) == set(row)
    assert read(row, "kto")[0].unpair


LABELLED = {"prompt": [user(ASK)], "completion": [bot(YES)], "label": True}
SINGLES = {
    "LLaMA-Factory kto_tag, sharegpt": (
        {"conversations": [said("human", ASK), said("gpt", YES)], "kto_tag": True},
        LABELLED,
    ),
    "LLaMA-Factory kto_tag, messages": ({"messages": [user(ASK), bot(YES)], "kto_tag": True}, LABELLED),
    "ms-swift label": ({"messages": [user(ASK), bot(YES)], "label": 1.0}, LABELLED),
    "LLaMA-Factory kto_tag, alpaca": (
        {"instruction": "Translate.", "input": "Good morning", "output": "Bonjour", "kto_tag": False},
        {"prompt": "Translate.\nGood morning", "completion": "Bonjour", "label": False},
    ),
    "TRL": ({"prompt": ASK, "completion": YES, "label": True}, {"prompt": ASK, "completion": YES, "label": True}),
}


@pytest.mark.parametrize("name", SINGLES)
def test_singles(name):
    row, expected = SINGLES[name]
    assert read(row, "kto")[1] == expected
    with pytest.raises(DataError, match="set method=kto"):
        read(row)


@pytest.mark.parametrize("human, model", [("human", "gpt"), ("Human", "bot"), ("user", "chatgpt"), ("USER", "model")])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_roles_have_many_names(human, model, keys):
    """Read as user and assistant, and the names that were translated are told."""

    def said(who, text):
        return dict(zip(keys, (who, text)))

    row = {"prompt": [said(human, ASK)], "chosen": [said(model, YES)], "rejected": [said(model, NO)]}
    form, example = read(row)
    assert example == CHAT
    account = set()
    examples(row, form, account)
    assert account == {f"{a}→{b}" for a, b in ((human, "user"), (model, "assistant")) if a != b}


def test_a_role_that_nobody_knows_is_named():
    row = CHAT | {"prompt": [{"role": "narrator", "content": "x"}]}
    assert "prompt has the role 'narrator', and lorat knows user, assistant" in read(row)[1]


def test_calls_of_tools_are_kept():
    """Arguments as JSON text become an object; LLaMA-Factory's function_call becomes a call."""
    call = {"type": "function", "function": {"name": "boil", "arguments": {"minutes": 7}}}
    written = {"type": "function", "function": {"name": "boil", "arguments": '{"minutes": 7}'}}
    answer = [{"role": "assistant", "content": None, "tool_calls": [written]}]
    example = canonical_text(CHAT | {"chosen": answer}, read(CHAT)[0])
    assert example["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    swift = {"conversations": [said("human", ASK)], "rejected": said("gpt", NO)}
    swift["chosen"] = said("function_call", '{"name": "boil", "arguments": {"minutes": 7}}')
    assert read(swift)[1]["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_safer_answers_by_a_setting():
    row = PAIRS["PKU-SafeRLHF"][0]
    assert read(row, columns={"choice": "safer_response_id"})[1] == TEXT | {"chosen": NO, "rejected": YES}


RANKED = {"prompt": ASK, "responses": ["b", "a", "d", "c"], "scores": [3.0, 4.0, 1.0, 3.0]}


def test_rankings_by_a_setting():
    """Best against worst, or every pair of unequal scores: 4 answers, of which 2 are tied, give 5 pairs."""
    form, example = read(RANKED)
    assert (example["chosen"], example["rejected"]) == ("a", "d")
    form, _ = read(RANKED, rankings="all_pairs")
    found = [(e["chosen"], e["rejected"]) for e in examples(RANKED, form)]
    assert sorted(found) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]


def test_a_list_of_answers_may_stand_in_any_column():
    row = {"question": ASK, "drafts": [NO, YES], "quality": [1, 2]}
    mapping = {"answers": "drafts", "scores": "quality"}
    assert read(row, columns=mapping)[1] == TEXT


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("Arena", {"winner": "tie"}, "a tie"),
        ("Arena", {"winner": "tie (bothbad)"}, "a tie"),
        ("Arena", {"winner": "both_bad"}, "a tie"),
        ("Arena", {"winner": "?"}, "winner is neither"),
        ("HelpSteer2", {"preference_strength": 0}, "a tie"),
        ("HelpSteer3", {"overall_preference": None}, "no number"),
        ("PKU-SafeRLHF", {"better_response_id": 2}, "better_response_id is neither 0 nor 1"),
        ("SHP", {"labels": None}, "labels is neither 0 nor 1"),
        ("OpenAI", {"input": None}, "input holds no messages"),
        ("answers and scores side by side", {"scores": [1, 1]}, "a tie"),
        ("answers and scores side by side", {"scores": [1]}, "not one number for each"),
        ("answers and scores side by side", {"responses": [YES, None]}, "fewer than two answers"),
        ("Nectar", {"answers": "x"}, "answers is text, not a list of answers"),
        ("content parts", {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is not text"),
        ("LLaMA-Factory alpaca with everything", {"history": [["a"]]}, "history has an item that is not a question"),
        ("tools as JSON text", {"tools": "{"}, "tools is text, not a list of tools"),
        ("ms-swift rejected_response", {"messages": [user(ASK)]}, "messages does not end with an answer"),
    ],
)  # fmt: skip
def test_rows_that_give_no_pair_say_why(name, change, reason):
    row, _ = PAIRS[name]
    form, _ = read(row)
    assert reason in canonical_text(row | change, form)
