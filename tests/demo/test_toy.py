"""The toy world: its reward and judge by hand, its tools against slow loops, its model in NF4."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorat.demo import toy

DOG = "tell me about the small dog :"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small gains nothing from a second thread, and waits ten times as long for one on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return toy.make_sft_model(tokenizer, seed=0, steps=120)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("the small sweet dog sleeps softly in the sunny garden .", 3.0),  # asked 1, grammar 1, kind 1
        ("the dog sleeps in the lovely barn . it sings .", 3.0),
        ("the small dog sleeps .", 2.0),
        ("it sleeps .", 1.0),  # grammar alone
        ("the cat sleeps .", 1.0),
        ("the dog sleeps . the cat sings .", 1.0),  # another animal beside the asked one
        ("the dog sleeps . the dog sings .", 1.5),  # 2 − ½: dog is said again
        ("the small small dog sleeps .", 0.5),  # asked 1, − ½ again, not grammatical
        ("the sweet sweet sweet sweet dog sleeps .", 1.0),  # asked 1, kind 1 once, − 1 at most for repetition
        ("the ugly dog sleeps .", 1.0),  # 2 − 1
        ("the ugly stupid dog sleeps .", 0.0),  # one manner a noun: not grammatical; rude counts once
        ("the sweet dog sleeps in the nasty barn .", 1.0),  # asked 1, kind 1, rude − 1; a barn is not nasty
        ("the dog sleeps", 0.0),  # asked 1, no end − 1, no grammar
        ("the dog sleeps . it sings . it waits .", 1.0),  # three sentences
        (" ".join(["the dog sleeps ."] * 6), -1.0),  # asked 1, − 1 again, − 1 long
        (" ".join(["ugly cat"] * 11), -3.0),  # the least
        ("", -1.0),  # no end
    ],
)
def test_gold_reward_by_hand(completion, reward):
    assert toy.gold_reward(DOG, completion) == reward


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("the small sweet dog sleeps softly in the sunny garden .", True),
        ("the dog sleeps .  it sings .", True),
        ("the sweet sweet dog sleeps .", False),
        ("the dog sleeps", False),
        ("", False),
    ],
)
def test_what_is_grammatical(completion, right):
    assert toy.grammatical(completion) is right


def test_demonstrations_leave_room_above():
    rows = toy.demonstrations(2000, seed=3)
    rewards = [toy.gold_reward(row["prompt"], row["completion"]) for row in rows]
    assert 1.0 < statistics.mean(rewards) < 1.6 and max(rewards) == toy.BEST_REWARD
    assert rows == toy.demonstrations(2000, seed=3) and rows != toy.demonstrations(2000, seed=4)
    assert len(set(toy.PROMPTS)) == 72 and {row["prompt"] for row in rows} == set(toy.PROMPTS)


def test_the_judge_is_bradley_terry():
    """Frequencies of 20,000 draws within five standard deviations of σ((r_a − r_b)/temperature)."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    for gap, temperature in ((0.0, 0.5), (1.0, 0.5), (-0.5, 0.5), (1.0, 2.0)):
        p = 1 / (1 + math.exp(-gap / temperature))
        wins = toy.prefers_first(torch.full((n,), 1.5 + gap), torch.full((n,), 1.5), temperature, generator)
        assert wins.float().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<end>", "<pad>", "<unk>")
    assert len(loaded) == len(tokenizer) and loaded.padding_side == "left"
    for row in toy.demonstrations(50):
        ids = loaded(row["completion"])["input_ids"]
        assert loaded.decode(ids) == row["completion"] and loaded.unk_token_id not in ids
        assert len(ids) == len(row["completion"].split())  # no BOS, no EOS
        # joined with or without a space, prompt and completion are the tokens of both
        for joint in (row["prompt"] + row["completion"], row["prompt"] + " " + row["completion"]):
            assert loaded(joint)["input_ids"] == loaded(row["prompt"])["input_ids"] + ids
    assert loaded("zebra")["input_ids"] == [loaded.unk_token_id]


def test_sequence_logps_equal_a_loop(model, tokenizer):
    rows = toy.demonstrations(7, seed=5)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    expected = []
    for prompt, completion in zip(prompts, completions):
        prefix = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        total = 0.0
        for i, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([prefix + answer[:i]])).logits[0, -1].double()
            total += torch.log_softmax(logits, -1)[token].item()
        expected.append(total)
    for batch_size in (256, 3):
        logps = toy.sequence_logps(model, tokenizer, prompts, completions, batch_size=batch_size)
        assert logps.tolist() == pytest.approx(expected, abs=2e-5)
    assert toy.sequence_logps(model, tokenizer, [], []).shape == (0,)


def test_samples_follow_the_model(model, tokenizer):
    """Left padding and the cache change nothing: first words are drawn with the model's own probabilities."""
    n = 4000
    prompts = [DOG, "describe the big cat :"] * n  # 7 and 5 tokens
    texts = toy.sample(model, tokenizer, prompts, max_new_tokens=2, seed=1, batch_size=2 * n)
    for k in (0, 1):
        counts = {text: texts[k::2].count(text) / n for text in set(texts[k::2])}
        for text in sorted(counts, key=counts.get)[-3:]:
            ids = tokenizer(prompts[k])["input_ids"] + tokenizer(text)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            p = math.exp(sum(logps[-3 + i, ids[-2 + i]].item() for i in (0, 1)))
            assert counts[text] == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))


def test_samples_end_and_are_reproducible(model, tokenizer):
    prompts = list(toy.PROMPTS)
    texts = toy.sample(model, tokenizer, prompts, seed=2)
    assert texts == toy.sample(model, tokenizer, prompts, seed=2) != toy.sample(model, tokenizer, prompts, seed=3)
    assert sum(text.endswith(".") for text in texts) > 0.9 * len(texts)
    assert not any("<" in text for text in texts)
    assert all(len(text.split()) <= 4 for text in toy.sample(model, tokenizer, prompts, max_new_tokens=4))
    assert toy.sample(model, tokenizer, []) == []


def test_sampling_keeps_the_mode_of_the_model(tokenizer, model):
    model.train()
    toy.sample(model, tokenizer, [DOG])
    toy.sequence_logps(model, tokenizer, [DOG], ["the dog sleeps ."])
    assert model.training
    model.eval()
    toy.sample(model, tokenizer, [DOG])
    assert not model.training


def test_sft_speaks_and_could_be_better(model, tokenizer):
    prompts = list(toy.PROMPTS) * 4
    rewards = list(map(toy.gold_reward, prompts, toy.sample(model, tokenizer, prompts, seed=4)))
    assert 0.5 < statistics.mean(rewards) < 1.7


def test_sft_is_a_function_of_its_seed(tokenizer):
    models = []
    for seed in (1, 1, 2):
        torch.rand(1)
        state = torch.get_rng_state()
        models.append(toy.make_sft_model(tokenizer, seed=seed, steps=2))
        assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    first, again, other = ([p.detach() for p in m.parameters()] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_preference_pairs(model, tokenizer):
    pairs = toy.preference_pairs(model, tokenizer, 300, seed=1)
    assert len(pairs) == 300 and pairs == toy.preference_pairs(model, tokenizer, 300, seed=1)
    assert all(pair["prompt"] in toy.PROMPTS for pair in pairs)
    short = toy.preference_pairs(model, tokenizer, 40, seed=1, max_new_tokens=2)  # where equal samples are common
    assert all(pair["chosen"] and pair["rejected"] and pair["chosen"] != pair["rejected"] for pair in pairs + short)
    gaps = [
        toy.gold_reward(pair["prompt"], pair["chosen"]) - toy.gold_reward(pair["prompt"], pair["rejected"])
        for pair in pairs
    ]
    right, wrong = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    assert right > 4 * wrong > 0  # noisy, but a signal
    cold = toy.preference_pairs(model, tokenizer, 100, seed=1, temperature=1e-6)
    assert all(
        toy.gold_reward(pair["prompt"], pair["chosen"]) >= toy.gold_reward(pair["prompt"], pair["rejected"])
        for pair in cold
    )


def test_nf4_still_speaks(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation)
    assert sum(type(module).__name__ == "Linear4bit" for module in small.modules()) == 2 * 4
    rows = toy.demonstrations(100, seed=6)
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    full, four_bit = (toy.sequence_logps(m, tokenizer, prompts, completions) for m in (model, small))
    assert not torch.equal(full, four_bit)  # it is quantised
    assert four_bit.mean().item() == pytest.approx(full.mean().item(), abs=0.5)  # of about −16 nats
    everyone = list(toy.PROMPTS) * 3
    rewards = [
        statistics.mean(map(toy.gold_reward, everyone, toy.sample(m, tokenizer, everyone, seed=7)))
        for m in (model, small)
    ]
    assert rewards[1] == pytest.approx(rewards[0], abs=0.3)
