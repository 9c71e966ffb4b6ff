"""Mixtures: Open-R1's own formula for weights up to 1, whole repeats above, and splits that share no row."""

from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import write_jsonl

from open_r1.configs import ScriptArguments
from open_r1.data import get_dataset
from open_r1.errors import UserError
from open_r1.mixture import columns_of, draw, in_proportion, split


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return [
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{name}{row}", "extra": row} for row in range(size)])
        for name, size in (("a", 101), ("b", 37), ("c", 250))
    ]


def as_open_r1(sources, seed, test_split_size=None):
    """The formula of Open-R1's `get_dataset`, on its own terms."""
    parts = []
    for name, weight in sources:
        rows = datasets.load_dataset("json", data_files=name, split="train").select_columns(["text"])
        parts.append(rows.shuffle(seed=seed).select(range(int(len(rows) * weight))))
    mixed = datasets.concatenate_datasets(parts).shuffle(seed=seed)
    if test_split_size is None:
        return datasets.DatasetDict(train=mixed)
    return mixed.train_test_split(test_size=test_split_size, seed=seed)


def mixture(files, weights, **more):
    sources = [
        {"id": name, "weight": weight, "columns": ["text"]} for name, weight in zip(files, weights, strict=True)
    ]
    return ScriptArguments(dataset_mixture={"datasets": sources, **more})


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.29), (0.02, 0.9, 0.1)])
@pytest.mark.parametrize("test_split_size", [None, 0.1, 10])
def test_same_rows_in_the_same_order_as_open_r1(files, weights, seed, test_split_size):
    ours = get_dataset(mixture(files, weights, seed=seed, test_split_size=test_split_size))
    theirs = as_open_r1(list(zip(files, weights, strict=True)), seed, test_split_size)
    assert set(ours) == set(theirs)
    for part in theirs:
        assert ours[part]["text"] == theirs[part]["text"]
        assert len(ours[part]) > 3


def test_a_weight_above_one_repeats_the_source_and_adds_the_fraction(files):
    counts = Counter(get_dataset(mixture(files, (2.5, 1.0, 0.1)))["train"]["text"])
    times = [counts[f"a{row}"] for row in range(101)]
    assert Counter(times) == {2: 51, 3: 50}
    assert [counts[f"b{row}"] for row in range(37)] == [1] * 37


@pytest.mark.parametrize(("weight", "rows"), [(2.3, 23), (4.1, 41), (1.1, 11), (0.3, 3)])
def test_a_fractional_weight_loses_no_row_to_rounding(weight, rows):
    args = mixture(["x"], [weight])
    assert len(draw([10], args, ["x"])) == rows


def pairs(order):
    return list(zip(*(column.tolist() for column in columns_of(order)), strict=True))


def halves_of(args, sizes, prompt_of=lambda source, row: (source, row)):
    order = draw(sizes, args, "abc"[: len(sizes)])
    prompts = np.array([hash(prompt_of(*pair)) for pair in pairs(order)])
    return split(order, prompts, args)


def test_a_repeated_row_is_never_on_both_sides_of_a_split(files):
    sizes = [101, 37, 250]
    halves = halves_of(mixture(files, (3.0, 1.0, 1.0), test_split_size=0.2), sizes)
    train, test = pairs(halves["train"]), pairs(halves["test"])
    assert len(test) > 20
    assert not set(train) & set(test)
    assert len(set(test)) == len(test)
    assert set(train) | set(test) == {(s, row) for s, size in enumerate(sizes) for row in range(size)}


@pytest.mark.parametrize("size", [0.1, 50])
def test_many_answers_to_a_prompt_stay_on_one_side(files, size):
    args = mixture(files, (1.0, 1.0, 1.0), test_split_size=size)
    halves, again = (halves_of(args, [101, 37, 250], lambda source, row: row // 16) for _ in range(2))
    train, test = pairs(halves["train"]), pairs(halves["test"])
    assert not {row // 16 for _, row in train} & {row // 16 for _, row in test}
    assert sorted(train + test) == [(s, row) for s, n in enumerate((101, 37, 250)) for row in range(n)]
    assert abs(len(test) - (388 * size if size < 1 else size)) <= 24  # half of the largest group
    assert (pairs(again["train"]), pairs(again["test"])) == (train, test)
    other = halves_of(
        mixture(files, (1.0, 1.0, 1.0), test_split_size=size, seed=1), [101, 37, 250], lambda _, row: row // 16
    )
    assert pairs(other["test"]) != test


@pytest.mark.parametrize(("rows", "size", "held_out"), [(5, 0.1, 1), (9, 0.1, 1), (5, 0.7, 4), (5, 4, 4)])
def test_a_share_is_rounded_up(rows, size, held_out):
    halves = halves_of(mixture("a", (1.0,), test_split_size=size), [rows])
    assert (len(halves["test"]), len(halves["train"])) == (held_out, rows - held_out)
    doubled = halves_of(mixture("a", (1.0,), test_split_size=size), [rows], lambda source, row: row // 2)
    assert 0 < len(doubled["test"]) < rows


@pytest.mark.parametrize("size", [0.9, 0.95, 5, 9])
def test_something_is_left_to_train_on(size):
    with pytest.raises(UserError, match="leaves nothing on one side of the 5 rows"):
        halves_of(mixture("a", (1.0,), test_split_size=size), [5])


def test_one_prompt_alone_cannot_be_split(files):
    with pytest.raises(UserError, match="all 388 rows ask the same"):
        halves_of(mixture(files, (1.0, 1.0, 1.0), test_split_size=0.1), [101, 37, 250], lambda *_: 7)


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.05, 0.05, 0.9), (0.9, 0.05, 0.05), (3, 1, 1)])
def test_proportions_are_reached(files, stopping, shares):
    args = mixture(files, (1.0, 1.0, 1.0), stopping_strategy=stopping)
    for source, share in zip(args.dataset_mixture.datasets, shares, strict=True):
        source.proportion = share
    sizes = [300, 100, 700]
    order = draw(sizes, args, "abc")
    amounts = np.random.default_rng(0).integers(0, 50, len(order)).astype(float)
    chosen = in_proportion(order.add_column("place", np.arange(len(order))), amounts, args.dataset_mixture, "abc")
    of, _ = columns_of(chosen)
    given = np.bincount(of, weights=amounts[chosen["place"][:]])
    assert np.abs(given / given.sum() - np.array(shares) / sum(shares)).max() < 0.01
    times = Counter(pairs(chosen))
    for source, size in enumerate(sizes):
        mine = [times[source, row] for row in range(size)]
        if stopping == "first_exhausted":
            assert max(mine) <= 1
        else:
            assert min(mine) >= 1 and max(mine) - min(mine) <= 1
    if stopping == "first_exhausted":
        assert any(sum(times[s, row] for row in range(size)) >= size - 3 for s, size in enumerate(sizes))


def test_rows_start_over_in_a_new_order():
    args = mixture("ab", (1.0, 1.0), stopping_strategy="all_exhausted")
    for source in args.dataset_mixture.datasets:
        source.proportion = 1
    order = draw([40, 120], args, "ab")
    chosen = pairs(in_proportion(order, np.ones(160), args.dataset_mixture, "ab"))
    rounds = [[row for source, row in chosen if source == 0]]
    assert Counter(rounds[0]) == dict.fromkeys(range(40), 3)
    assert rounds[0][:40] != rounds[0][40:80]
    args.dataset_mixture.seed = 1
    assert pairs(in_proportion(order, np.ones(160), args.dataset_mixture, "ab")) != chosen


def test_a_source_with_nothing_to_give_is_named():
    args = mixture("ab", (1.0, 1.0))
    for source in args.dataset_mixture.datasets:
        source.proportion = 1
    order = draw([4, 4], args, "ab")
    with pytest.raises(UserError, match="b: nothing of it can be trained on"):
        in_proportion(order, 1.0 - columns_of(order)[0], args.dataset_mixture, "ab")


def test_proportions_are_said_of_all_sources_or_none():
    with pytest.raises(ValueError, match="dataset_mixture: b has no proportion, others have"):
        ScriptArguments(dataset_mixture={"datasets": [{"id": "a", "proportion": 1}, {"id": "b"}]})


def test_a_weight_that_selects_no_row_names_the_source(files):
    with pytest.raises(UserError, match=r"b\.jsonl:train: weight 0.01 selects no row of its 37"):
        get_dataset(mixture(files, (1.0, 0.01, 1.0)))


def test_another_seed_is_another_order(files):
    first, second = (get_dataset(mixture(files, (1.0, 1.0, 1.0), seed=seed))["train"]["text"] for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_single_dataset_keeps_its_order_and_can_be_split(files):
    args = ScriptArguments(dataset_name=files[0])
    assert get_dataset(args)["train"]["extra"] == list(range(101))
    halves = get_dataset(ScriptArguments(dataset_name=files[0], test_split_size=0.1))
    assert sorted([*halves["train"]["extra"], *halves["test"]["extra"]]) == list(range(101))
    assert len(halves["test"]) == 11
    with pytest.raises(UserError, match="test_split_size 200.0 leaves nothing on one side"):
        get_dataset(ScriptArguments(dataset_name=files[0], test_split_size=200.0))


def test_sources_whose_columns_differ_in_type_are_refused_by_name(files, tmp_path):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"text": "x", "extra": {"deep": 1}}])
    args = ScriptArguments(dataset_mixture={"datasets": [{"id": files[0]}, {"id": odd}]})
    with pytest.raises(UserError, match=r"odd\.jsonl:train: their columns differ"):
        get_dataset(args)
