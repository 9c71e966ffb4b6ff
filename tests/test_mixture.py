"""Mixtures: Open-R1's own formula for weights up to 1, whole repeats above, and splits that share no row."""

from collections import Counter

import datasets
import pytest
from conftest import write_jsonl

from open_r1.configs import ScriptArguments
from open_r1.data import get_dataset
from open_r1.errors import UserError
from open_r1.mixture import draw, pairs


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
    for split in theirs:
        assert ours[split]["text"] == theirs[split]["text"]
        assert len(ours[split]) > 3


def test_a_weight_above_one_repeats_the_source_and_adds_the_fraction(files):
    counts = Counter(get_dataset(mixture(files, (2.5, 1.0, 0.1)))["train"]["text"])
    times = [counts[f"a{row}"] for row in range(101)]
    assert Counter(times) == {2: 51, 3: 50}
    assert [counts[f"b{row}"] for row in range(37)] == [1] * 37


@pytest.mark.parametrize(("weight", "rows"), [(2.3, 23), (4.1, 41), (1.1, 11), (0.3, 3)])
def test_a_fractional_weight_loses_no_row_to_rounding(weight, rows):
    args = mixture(["x"], [weight])
    assert len(draw([10], [weight], args, ["x"])["train"]) == rows


def test_a_repeated_row_is_never_on_both_sides_of_a_split(files):
    halves = draw([101, 37, 250], [3.0, 1.0, 1.0], mixture(files, (3.0, 1.0, 1.0), test_split_size=0.2), files)
    train, test = pairs(halves["train"]), pairs(halves["test"])
    assert len(test) > 20
    assert not set(train) & set(test)
    assert len(set(test)) == len(test)
    assert set(train) | set(test) == {(s, row) for s, size in enumerate((101, 37, 250)) for row in range(size)}


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
