"""One source at a time: its raw table, and the pure function that turns its rows into TRL's formats.

Nothing here tokenises.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from open_r1.configs import DatasetConfig
from open_r1.errors import NoSplit, UserError
from open_r1.formats import Row, brief, from_table, listed, prompt_id, row_function
from open_r1.mixture import columns_of, draw, in_proportion, split
from open_r1.records import columns_in, problem_of, read_record, row_of
from open_r1.tables import Table, load_table, source_name

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments


@dataclass
class Source:
    """A loaded source: its raw table, and `to_row` from a raw row into TRL's format, of which `reading` is the key."""

    name: str
    table: Table
    columns: list[str]
    to_row: Callable[[Row], Row]
    reading: Any

    @property
    def rows(self) -> Dataset:
        """The raw rows."""
        return self.table.rows


def load_sources(
    args: "ScriptArguments", text_field: str = "text", evaluate: bool = False
) -> tuple[list[Source], list[Source]]:
    """Load what to train on and, when `evaluate`, what to evaluate on (empty when it is split off later).

    Raises `UserError` for a file, split or format that is not there, and when evaluation is asked for without data.
    """
    mixture = args.dataset_mixture
    train = [load_source(source, source.split, text_field) for source in args.sources]
    tell_apart(train)
    if not evaluate:
        return train, []
    split_size = args.test_split_size if mixture is None else mixture.test_split_size
    splits = [source for source in args.sources if source.test_split] if mixture is not None else []
    named = {"eval_datasets": args.eval_datasets, "eval_dataset_name": args.eval_dataset_name}
    given = {**named, "test_split": splits, "test_split_size": split_size}
    ways = [name for name, value in given.items() if value]
    if len(ways) > 1 and ways != ["eval_dataset_name", "test_split"]:
        raise UserError(f"evaluation data is given twice: by {' and by '.join(ways)}; keep one")
    if args.eval_datasets:
        sets = [load_source(source, source.split, text_field) for source in args.eval_datasets]
        tell_apart(sets)
        return train, sets
    if args.eval_dataset_name is not None:
        named = DatasetConfig(id=args.eval_dataset_name, mapping=args.eval_dataset_mapping)
        if named.mapping is None:
            named = replace(named, mapping=args.dataset_mapping, columns=args.dataset_columns)
        return train, [load_either(named, (args.dataset_test_split, "train"), text_field)]
    if splits or split_size is not None:
        # Slices of one source have one test split, which counts once.
        distinct = {repr(one): one for one in (replace(s, split="", max_samples=None, weight=1.0) for s in splits)}
        held_out = [load_source(each, each.test_split, text_field) for each in distinct.values()]
        tell_apart(held_out)
        return train, held_out
    if mixture is not None:
        raise UserError(
            "evaluation is asked for, but the mixture has no evaluation data: set dataset_mixture.test_split_size, "
            "test_split of a source, eval_datasets or eval_dataset_name; or set eval_strategy: 'no' and do_eval: false"
        )
    try:
        alone = replace(args.sources[0], max_samples=None)
        return train, [load_source(alone, args.dataset_test_split, text_field)]
    except UserError as error:
        raise UserError(
            f"evaluation is asked for: {error}; set dataset_test_split, test_split_size or eval_dataset_name (or "
            "eval_datasets), or eval_strategy: 'no' and do_eval: false"
        ) from error


def load_source(source: DatasetConfig, split: str, text_field: str = "text") -> Source:
    """One source, reduced to its `columns` and `max_samples`. Raises `UserError`."""
    name = source.name or source_name(source.id or source.data_files[0], source.config, split)
    table = load_table(source.id, source.config, split, source.data_files, source.revision)
    first = columns_in(table.rows) if table.files else dict.fromkeys(table.rows.column_names, 0)
    columns = list(first)
    if not columns:
        raise UserError(f"{table.files[0]}{table.rows[0]['at']}: {problem_of(table.rows[0])}")
    if source.columns is not None:
        if missing := [column for column in source.columns if column not in columns]:
            raise UserError(f"{name}: no column {listed(missing)}; its columns are {listed(columns)}")
        columns = source.columns
    mapping = source.mapping and source.mapping.columns
    try:
        to_row, rows = row_function(columns, name, text_field, mapping), table.rows
    except UserError as error:
        late = [(column, table.rows[first[column]]) for column in columns if first[column] > 0]
        places = [f"{listed([column])} in {table.files[row['file']]}{row['at']}" for column, row in late[:3]]
        raise UserError(f"{error}; first met: {', '.join(places)}" if places else str(error)) from None
    if table.files:
        to_row = partial(read_record, columns=columns, then=to_row)
    else:
        rows = rows.select_columns(columns)
        nested = [column for column in columns if "struct<" in str(rows.data.schema.field(column).type)]
        to_row = partial(from_table, nested=nested, then=to_row)
    if source.max_samples is not None:
        rows = rows.select(range(min(source.max_samples, len(rows))))
    return Source(name, replace(table, rows=rows), columns, to_row, [split, columns, text_field, mapping])


def load_either(source: DatasetConfig, splits: tuple[str, str], text_field: str) -> Source:
    """A source under the first of two splits that it has."""
    try:
        return load_source(source, splits[0], text_field)
    except NoSplit:
        return load_source(source, splits[1], text_field)


def tell_apart(sources: list[Source]) -> None:
    """Number sources of one name, so that the ledger knows them apart."""
    names = Counter(source.name for source in sources)
    seen: Counter = Counter()
    for source in sources:
        if names[source.name] > 1:
            seen[source.name] += 1
            source.name += f" #{seen[source.name]}"


def places_of(source: Source, rows: list[int]) -> list[str]:
    """Where rows stand, for messages: their numbers and, in JSON and CSV, `file:line`."""
    places = [f"{source.name}: row {row} (counting from 0)" for row in rows]
    if files := source.table.files:
        stand = source.rows.select(rows).select_columns(["file", "at"])
        places = [f"{place}, {files[row['file']]}{row['at']}" for place, row in zip(places, stand, strict=True)]
    return places


def excerpt_of(source: Source, row: int, length: int = 400) -> str:
    """What stands in a row, short enough for a report, with control characters escaped."""
    found = source.rows[row]
    if not source.table.files:
        return brief(found, length)
    text = found["record"][:length].decode(errors="backslashreplace")
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def asks_nothing(source: Source, row: int) -> int:
    """What stands for the prompt of a row that cannot be read: its own, which no other row asks."""
    return prompt_id({"text": f"{source.name} {row}"})


def prompts_of(sources: list[Source], order: Dataset) -> np.ndarray:
    """What each row of an order asks, as `prompt_id` tells it; a row that cannot be read asks something of its own."""
    of, rows = columns_of(order)
    prompts = np.zeros(len(order), dtype=np.int64)
    for number, source in enumerate(sources):
        for place in np.flatnonzero(of == number).tolist():
            try:
                prompts[place] = prompt_id(source.to_row(source.rows[int(rows[place])]))
            except ValueError:
                prompts[place] = asks_nothing(source, int(rows[place]))
    return prompts


def as_columns(source: Source) -> Dataset:
    """The raw rows of a source under their own columns."""
    if not source.table.files:
        return source.rows
    rows = []
    for number, row in enumerate(source.rows):
        try:
            rows.append(row_of(row, texts=source.columns == ["text"]))
        except ValueError as error:
            raise UserError(f"{places_of(source, [number])[0]}: {error}") from None
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in source.columns})
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{source.name}: a column holds values of several types: {error}") from None


def get_dataset(args: "ScriptArguments") -> DatasetDict:
    """The raw rows of a recipe as Open-R1 hands them out: `train` and, where one is split off, `test`.

    Same rows in the same order as Open-R1 for weights up to 1 and the same seed; cells of CSV are texts.
    """
    train, _ = load_sources(args)
    names, mixture = [source.name for source in train], args.dataset_mixture
    order = draw([len(source.rows) for source in train], args, names)
    asked = prompts_of(train, order) if args.test_split_size or (mixture and mixture.test_split_size) else None
    orders = split(order, asked, args)
    if mixture is not None and mixture.in_proportion:
        if mixture.proportion_unit != "rows":
            raise UserError("proportions of supervised tokens need tokens; use open_r1.preparation.prepare instead")
        orders["train"] = in_proportion(orders["train"], np.ones(len(orders["train"])), mixture, names)
    tables = [as_columns(source) for source in train]
    try:
        together = concatenate_datasets(tables)
    except (ValueError, TypeError) as error:
        raise UserError(f"{', '.join(s.name for s in train)}: their columns differ: {error}") from error
    starts = [sum(len(source.rows) for source in train[:number]) for number in range(len(train))]
    return DatasetDict(
        {
            split: together.select(
                [starts[source] + row for source, row in zip(order["source"], order["row"], strict=True)]
            )
            for split, order in orders.items()
        }
    )
