"""One source at a time: its raw table, and the pure function that turns its rows into TRL's formats.

Nothing here tokenises.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value

from open_r1.cache import file_digest
from open_r1.errors import UserError
from open_r1.formats import Row, brief, row_function
from open_r1.mixture import draw

if TYPE_CHECKING:
    from open_r1.configs import DatasetConfig, ScriptArguments

logger = logging.getLogger(__name__)

LOADERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


@dataclass
class Source:
    """A loaded source: raw `rows`, `to_row` into TRL's format, the `weight` it is mixed with.

    `contents` identifies what the rows hold: digests of the files, or the library's fingerprint of a hub dataset.
    """

    name: str
    rows: Dataset
    to_row: Callable[[Row], Row]
    weight: float = 1.0
    contents: Any = None


def load_sources(
    args: "ScriptArguments", text_field: str = "text", evaluate: bool = False
) -> tuple[list[Source], list[Source]]:
    """Load what to train on and, when `evaluate`, what to evaluate on (empty when it is split off later).

    Raises `UserError` for a file, split or format that is not there, and when evaluation is asked for without data.
    """
    mixture = args.dataset_mixture
    if mixture is not None:
        train = [load_source(source, source.split, text_field) for source in mixture.datasets]
        require_same_format(train)
        held_out = [load_source(s, s.test_split, text_field) for s in mixture.datasets if evaluate and s.test_split]
        split_size = mixture.test_split_size
    else:
        train = [load_named(args.dataset_name, args.dataset_config, args.dataset_train_split, text_field)]
        held_out, split_size = [], args.test_split_size
    if not evaluate:
        return train, []
    if (args.eval_dataset_name is not None or held_out) and split_size is not None:
        raise UserError(
            "evaluation data is given twice: by test_split_size, and by eval_dataset_name or test_split; keep one"
        )
    if args.eval_dataset_name is not None:
        return train, [load_named(args.eval_dataset_name, None, "train", text_field, fallback=args.dataset_test_split)]
    if held_out or split_size is not None:
        return train, held_out
    if mixture is not None:
        raise UserError(
            "evaluation is asked for, but the mixture has no evaluation data: set dataset_mixture.test_split_size, "
            "test_split of a source, or eval_dataset_name; or set eval_strategy: 'no' and do_eval: false"
        )
    try:
        return train, [load_named(args.dataset_name, args.dataset_config, args.dataset_test_split, text_field)]
    except UserError as error:
        raise UserError(
            f"evaluation is asked for: {error}; set dataset_test_split, test_split_size or eval_dataset_name, "
            "or eval_strategy: 'no' and do_eval: false"
        ) from error


def load_source(source: "DatasetConfig", split: str, text_field: str) -> Source:
    """One source of a mixture, reduced to its `columns`."""
    rows = load_table(source.id, source.config, split)
    name = source_name(source.id, source.config, split)
    if source.columns is not None:
        if missing := [column for column in source.columns if column not in rows.column_names]:
            raise UserError(f"{name}: no column {', '.join(missing)}; its columns are {', '.join(rows.column_names)}")
        rows = rows.select_columns(source.columns)
    to_row = row_function(rows.column_names, name, text_field)
    return Source(name, rows, to_row, source.weight, contents_of(source.id, split, rows))


def load_named(name: str, config: str | None, split: str, text_field: str, fallback: str | None = None) -> Source:
    """A dataset given by name alone; `fallback` is a second split to look for."""
    try:
        rows = load_table(name, config, split)
    except UserError:
        if fallback is None:
            raise
        rows = load_table(name, config, split := fallback)
    title = source_name(name, config, split)
    to_row = row_function(rows.column_names, title, text_field)
    return Source(title, rows, to_row, contents=contents_of(name, split, rows))


def contents_of(name: str, split: str, rows: Dataset) -> Any:
    """What identifies the contents of a source, wherever it lies: for files their digests, in order."""
    files = local_files(name)
    return [split, *map(file_digest, files)] if files else rows._fingerprint


def local_files(name: str) -> list[str]:
    """The files that a name or glob stands for, sorted; none when it is no file."""
    name = os.path.expanduser(name)
    if glob.has_magic(name):
        return sorted(glob.glob(name, recursive=True))
    return [name] if os.path.isfile(name) else []


def source_name(name: str, config: str | None, split: str) -> str:
    """How messages call a source: `id[/config]:split`."""
    return f"{name}{'/' + config if config else ''}:{split}"


def load_table(name: str, config: str | None, split: str) -> Dataset:
    """Load one split of a hub dataset, a directory, a file or glob, or a `save_to_disk` directory, uncopied.

    Raises `UserError` when nothing is there, it cannot be read, or it holds no rows.
    """
    files, name = local_files(name), os.path.expanduser(name)
    title = source_name(name, config, split)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error it raises
    try:
        if config is not None and (files or os.path.isdir(name) and is_saved(Path(name))):
            raise UserError(f"{name}: dataset_config {config!r} belongs to a hub dataset; a file has none")
        if files:
            loader = loader_of(files)
            options = as_written(files) if loader == "csv" else {}
            table = datasets.load_dataset(loader, data_files={"train": files}, split=split, **options)
        elif os.path.isdir(name) and is_saved(Path(name)):
            table = saved_split(name, split)
        elif os.path.isdir(name) or not looks_local(name):
            table = datasets.load_dataset(name, config, split=split)
        else:
            raise UserError(f"{name}: no such file or directory (relative paths start at {os.getcwd()})")
    except UserError:
        raise
    except Exception as error:  # every loader raises its own kinds; all become one line that names the source
        raise UserError(reason_of(error, title, files)) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if len(table) == 0:
        raise UserError(f"{title}: holds no rows")
    return table


def looks_local(name: str) -> bool:
    """Whether a name that is not on disk can only have been meant as a path."""
    return (
        name.startswith(("/", "./", "../", "~"))
        or name.count("/") > 1
        or bool(file_kind(name))
        or glob.has_magic(name)
    )


def file_kind(name: str) -> str:
    """The data suffix of a file name, its compression suffix aside: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in LOADERS else ""


def loader_of(files: list[str]) -> str:
    """Which of the library's loaders reads these files. Raises `UserError` for empty, unknown or mixed kinds."""
    kinds = {file_kind(file) for file in files}
    if "" in kinds:
        odd = next(file for file in files if not file_kind(file))
        raise UserError(f"{odd}: unknown kind of data file; known are {', '.join(LOADERS)}, also compressed")
    if len({LOADERS[kind] for kind in kinds}) > 1:
        raise UserError(f"{files[0]} and others: one source holds one kind of file; found {', '.join(sorted(kinds))}")
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise UserError(f"{empty[0]}: this file is empty")
    return LOADERS[kinds.pop()]


def as_written(files: list[str]) -> dict[str, Any]:
    """Loader options that leave CSV cells the text they are: an answer 7, NA or null is no number and no hole."""
    columns = pd.read_csv(files[0], nrows=0).columns
    return {"features": Features({column: Value("string") for column in columns}), "keep_default_na": False}


def is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def saved_split(name: str, split: str) -> Dataset:
    """One split of a `save_to_disk` directory; a directory without splits counts as `train`."""
    saved = datasets.load_from_disk(name)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise UserError(f"{name}: no split {split}; it has {', '.join(splits)}")
    return splits[split]


def reason_of(error: Exception, title: str, files: list[str]) -> str:
    """One line on why a source cannot be read: for JSON lines, which file and line is broken."""
    for file in files:
        if file_kind(file) in (".jsonl", ".ndjson", ".json") and (where := broken_line(file)):
            return where
    text = " ".join(str(error).split())
    if unknown := re.match(r'Unknown split "(.*)"\. Should be one of \[(.*)\]', text):
        return f"{title}: no split {unknown[1]}; it has {unknown[2]}"
    if "corresponds to no data" in text:
        return f"{title}: holds no rows"
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    because = "" if str(cause) in str(error) else f" ({' '.join(str(cause).split())})"
    return f"{title}: cannot be loaded: {text}{because}"


def broken_line(file: str) -> str:
    """`file:line: why` of the first line that is not a JSON object, empty when there is none or it is one document."""
    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1 and line.lstrip()[:1] == b"[":
                    return ""
                try:
                    if line.strip() and not isinstance(json.loads(line.rstrip()), dict):
                        return f"{file}:{number}: a line of JSONL is an object; found {brief(line.decode().strip())}"
                except json.JSONDecodeError as error:
                    return f"{file}:{number}: not valid JSON: {error.msg} at column {error.colno}"
                except (ValueError, RecursionError) as error:
                    return f"{file}:{number}: not valid JSON: {error}"
    except (OSError, EOFError) as error:
        return f"{file}: cannot be read: {error}"
    return ""


def require_same_format(sources: list[Source]) -> None:
    """Sources of a mixture hold rows of one format; raises `UserError` naming the one that differs."""
    first = sources[0]
    for source in sources[1:]:
        if repr(source.to_row) != repr(first.to_row) and source.to_row is not first.to_row:
            raise UserError(
                f"{source.name}: its columns {', '.join(source.rows.column_names)} cannot be brought together with "
                f"those of {first.name} ({', '.join(first.rows.column_names)}); convert one to the format of the other"
            )


def get_dataset(args: "ScriptArguments") -> DatasetDict:
    """The raw rows of a recipe as Open-R1 hands them out: `train` and, where one is split off, `test`.

    Same rows in the same order as Open-R1 for weights up to 1 and the same seed.
    """
    train, _ = load_sources(args)
    orders = draw(
        [len(source.rows) for source in train], [source.weight for source in train], args, [s.name for s in train]
    )
    try:
        together = datasets.concatenate_datasets([source.rows for source in train])
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
