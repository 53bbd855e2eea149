"""Rows of a forward pass, and how a batch is divided under a token budget."""

from __future__ import annotations

import random

import pytest
import torch

from lorat.methods.kto import KTO
from lorat.packs.logprobs import per_completion
from lorat.packs.packing import Batch, collate, pad_rows, split_rows
from lorat.train.meters import Averages


def test_rows_are_padded_on_the_right_and_completion_tokens_predicted():
    pack = pad_rows([([5, 6, 7], [[8, 9]]), ([5], [[6]])], pad_id=0)
    assert pack.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert pack.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    # the hidden state at 7 predicts 8, that at 8 predicts 9; in the second row that at 5 predicts 6
    assert pack.predict.tolist() == [2, 3, 5]
    assert pack.targets.tolist() == [8, 9, 6]
    assert pack.lengths == [2, 1]
    assert per_completion(torch.tensor([1.0, 2.0, 4.0]), pack.lengths).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("seed", range(20))
def test_a_division_keeps_every_example_and_the_budget(seed):
    rng = random.Random(seed)
    rows = [[rng.randint(2, 40) for _ in range(2)] for _ in range(rng.randint(1, 30))]
    budget = rng.choice([1, 40, 100, 1000])
    groups = split_rows(rows, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(rows)))
    for group in groups:
        padded = max(max(rows[i]) for i in group) * sum(len(rows[i]) for i in group)
        assert padded <= budget or len(group) == 1
    assert len(split_rows(rows, 10**9)) == 1


def test_a_budget_for_two_pairs_makes_groups_of_two():
    assert split_rows([[10, 10]] * 5, 40) == [[0, 1], [2, 3], [4]]
    assert split_rows([], 40) == []


def test_a_batch_tells_its_size_first():
    batch = collate([{"row": 4}, {"row": 9}])
    assert next(iter(batch)) == "row"
    assert batch["row"].tolist() == [4, 9]
    assert batch["batch"].weights == [1.0, 1.0] and len(Batch([{}])) == 1


def test_mismatched_completions_are_those_of_the_next_example_drawn():
    """4 examples on one rank, as 2 + 2 on one rank, and as 1 + 1 batches on two ranks: the same partners."""
    a, b, c, d = (([i], [[10 + i]]) for i in range(4))
    expected = [([0], [[11]]), ([1], [[12]]), ([2], [[13]]), ([3], [[10]])]
    assert KTO(0.1).partners([[[a, b, c, d]]], 0) == expected
    assert KTO(0.1).partners([[[a, b], [c, d]]], 0) == expected
    two = [[[a], [c]], [[b], [d]]]  # rank 0 drew a and c, rank 1 b and d
    assert KTO(0.1).partners(two, 0) == [expected[0], expected[2]]
    assert KTO(0.1).partners(two, 1) == [expected[1], expected[3]]
    assert KTO(0.1).partners([[[a]]], 0) == []


def test_averages_weigh_examples_and_not_batches():
    averages = Averages()
    averages.add("x", torch.tensor([1.0, 2.0, 3.0]))
    averages.add("x", torch.tensor([10.0]))
    averages.add("y", torch.tensor([5.0, float("nan")]), torch.tensor([1.0, 0.0]))
    averages.add("none", torch.tensor([7.0]), torch.tensor([0.0]))
    assert averages.means() == {"x": 4.0, "y": 5.0}
    doubled = averages.reduced(lambda both: 2 * both)  # as two ranks with the same examples
    assert doubled["x"] == (32.0, 8.0)
    again = Averages()
    again.load_state_dict(averages.state_dict(), torch.device("cpu"))
    assert again.means() == averages.means()
    averages.reset()
    assert averages.means() == {}


def test_a_margin_is_the_difference_of_means_where_there_are_no_pairs():
    averages = Averages()
    averages.add("rewards/chosen", torch.tensor([3.0, 5.0]))
    averages.add("rewards/rejected", torch.tensor([1.0]))
    assert averages.means()["rewards/margins"] == 3.0
