"""Which rows of which source, in which order: drawn from weights and seed alone, before anything is tokenised."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from open_r1.errors import UserError

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments


def draw(sizes: Sequence[int], weights: Sequence[float], args: "ScriptArguments", names: Sequence[str]) -> DatasetDict:
    """Draw the mixture as tables of (`source`, `row`) numbers: `train` and, when a split size is set, `test`.

    Args: `sizes[i]` and `weights[i]` are the rows and the weight of source i. Shuffle, selection, concatenation,
    shuffle and split are those of Open-R1's `get_dataset`, done on row numbers, so weights up to 1 give its rows in
    its order. Raises `UserError` when a weight selects no row of a source.
    """
    mixture = args.dataset_mixture
    if mixture is None:
        order = numbered(0, sizes[0])
        return split(order, args.test_split_size, seed=0, repeated=False)
    parts = [
        take(numbered(source, size), weight, mixture.seed, name)
        for source, (size, weight, name) in enumerate(zip(sizes, weights, names, strict=True))
    ]
    order = concatenate_datasets(parts).shuffle(seed=mixture.seed)
    return split(order, mixture.test_split_size, mixture.seed, repeated=max(weights) > 1)


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


def split(order: Dataset, test_size: float | None, seed: int, repeated: bool) -> DatasetDict:
    """Split off `test_size` rows (a share below 1, or a count). A row that is repeated is never on both sides."""
    if test_size is None:
        return DatasetDict({"train": order})
    size = int(test_size) if test_size >= 1 else test_size
    if not 0 < int(size if size >= 1 else len(order) * size) < len(order):
        raise UserError(f"test_split_size {test_size} leaves nothing on one side of the {len(order)} rows; change it")
    halves = order.train_test_split(test_size=size, seed=seed)
    if repeated:
        held_out = set(pairs(halves["test"]))
        halves["train"] = halves["train"].select(
            [i for i, p in enumerate(pairs(halves["train"])) if p not in held_out]
        )
        halves["test"] = halves["test"].select(sorted({p: i for i, p in enumerate(pairs(halves["test"]))}.values()))
    return halves


def pairs(order: Dataset) -> list[tuple[int, int]]:
    """(source, row) of every row of an order."""
    columns = order.with_format("numpy")
    return list(zip(columns["source"][:].tolist(), columns["row"][:].tolist(), strict=True))
