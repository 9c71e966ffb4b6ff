"""Which rows of which source, in which order: drawn from weights, proportions and seed alone, alike on every rank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from open_r1.errors import UserError

if TYPE_CHECKING:
    from open_r1.configs import DatasetMixtureConfig, ScriptArguments


def draw(sizes: Sequence[int], args: "ScriptArguments", names: Sequence[str]) -> Dataset:
    """Draw the rows that weights ask for as a table of (`source`, `row`) numbers.

    `sizes[i]` are the rows of source i. Shuffle, selection, concatenation and shuffle are those of Open-R1's
    `get_dataset`, done on row numbers, so weights up to 1 give its rows in its order. Raises `UserError` when a weight
    selects no row of a source.
    """
    mixture = args.dataset_mixture
    if mixture is None:
        return numbered(0, sizes[0])
    weights = [source.weight for source in mixture.datasets]
    parts = [
        take(numbered(source, size), weight, mixture.seed, name)
        for source, (size, weight, name) in enumerate(zip(sizes, weights, names, strict=True))
    ]
    return concatenate_datasets(parts).shuffle(seed=mixture.seed)


def numbered(source: int, size: int) -> Dataset:
    """The rows of one source as (`source`, `row`) numbers."""
    return Dataset.from_dict({"source": np.full(size, source), "row": np.arange(size)})


def take(rows: Dataset, weight: float, seed: int, name: str) -> Dataset:
    """`weight` times the rows: a seeded shuffle, whole as often as `weight` says, then its first part."""
    shuffled = rows.shuffle(seed=seed)
    wholes = int(weight)
    part = int(len(rows) * weight) - wholes * len(rows)
    if wholes == 0 and part == 0:
        raise UserError(f"{name}: weight {weight} selects no row of its {len(rows)}; raise it or remove the source")
    return concatenate_datasets([shuffled] * wholes + [shuffled.select(range(part))])


def columns_of(order: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """`source` and `row` of every row of an order, or of any table that has them.

    Reading the rows would gather them one by one: seconds and hundreds of MB for a million (datasets 5.2).
    """
    source, row = (order.data.column(name).to_numpy() for name in ("source", "row"))
    if order._indices is None:
        return source, row
    places = order._indices.column(0).to_numpy()
    return source[places], row[places]


def in_proportion(
    order: Dataset, amounts: np.ndarray, mixture: "DatasetMixtureConfig", names: Sequence[str]
) -> Dataset:
    """Of the rows drawn so many of each source that their `amounts` are in the proportions asked for.

    `amounts[i]` is what row i of the order gives, in tokens or rows. `first_exhausted` ends when a source has given
    all it has, so no row is repeated; `all_exhausted` when every source has, and the others start over, each time in a
    new order. Raises `UserError` when a source has nothing to give.
    """
    of, _ = columns_of(order)
    shares = np.array([source.proportion for source in mixture.datasets], dtype=float)
    shares /= shares.sum()
    held = np.bincount(of, weights=amounts, minlength=len(shares))
    if not held.all():
        raise UserError(f"{names[int(held.argmin())]}: nothing of it can be trained on, so it has no proportion")
    whole = (held / shares).min() if mixture.stopping_strategy == "first_exhausted" else (held / shares).max()
    random = np.random.default_rng(mixture.seed)
    chosen = [fill(np.flatnonzero(of == n), amounts, whole * share, random) for n, share in enumerate(shares)]
    return order.select(random.permutation(np.concatenate(chosen)))


def fill(places: np.ndarray, amounts: np.ndarray, wanted: float, random: np.random.Generator) -> np.ndarray:
    """Some of `places` in a random order, as often over as it takes, whose amounts come nearest to `wanted`."""
    rounds = int(np.ceil(wanted / amounts[places].sum() - 1e-9))
    many = np.concatenate([random.permutation(places) for _ in range(max(1, rounds))])
    reached = np.cumsum(amounts[many])
    return many[: int(np.abs(reached - wanted).argmin()) + 1] if reached[-1] > wanted + 0.5 else many


def split(order: Dataset, prompts: np.ndarray | None, args: "ScriptArguments") -> DatasetDict:
    """Split off the test part that the recipe asks for, if it does. No prompt is asked in both parts.

    `prompts[i]` identifies what row i of the order asks. Where every row asks something else, the split is that of
    Open-R1. A row that is repeated counts once, and is once in the test part.
    """
    mixture = args.dataset_mixture
    size, seed = (args.test_split_size, 0) if mixture is None else (mixture.test_split_size, mixture.seed)
    if size is None:
        return DatasetDict({"train": order})
    of, rows = columns_of(order)
    _, once = np.unique(of * (rows.max() + 1) + rows, return_index=True)
    asked, group = np.unique(prompts, return_inverse=True)
    wanted = int(size) if size >= 1 else int(np.ceil(size * len(once)))
    if not 0 < wanted < len(once):
        raise UserError(f"test_split_size {size} leaves nothing on one side of the {len(once)} rows; change it")
    if len(asked) == len(order):
        return order.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    if len(asked) == 1:
        raise UserError(f"test_split_size {size}: all {len(order)} rows ask the same, so none can be held out")
    groups = np.random.default_rng(seed).permutation(len(asked))
    reached = np.cumsum(np.bincount(group[once])[groups])[:-1]  # one is left to train on
    held_out = np.zeros(len(asked), dtype=bool)
    held_out[groups[: int(np.abs(reached - wanted).argmin()) + 1]] = True
    test = np.sort(once[held_out[group[once]]])
    return DatasetDict({"train": order.select(np.flatnonzero(~held_out[group])), "test": order.select(test)})
