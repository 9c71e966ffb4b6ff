"""One source at a time: its raw table, and the pure function that turns its rows into TRL's formats.

Nothing here tokenises.
"""

import csv
import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import fsspec
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value

from open_r1.cache import digest, file_digest, root
from open_r1.configs import DatasetConfig
from open_r1.errors import UserError
from open_r1.formats import Row, brief, prompt_id, row_function
from open_r1.mixture import columns_of, draw, in_proportion, split

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments

logger = logging.getLogger(__name__)

LOADERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


@dataclass
class Source:
    """A loaded source: raw `rows`, and `to_row` into TRL's format.

    `contents` identifies what the rows hold: digests of the files, or the library's fingerprint of a hub dataset.
    `files` are the local files that hold its rows in order, one row after the other; empty when that is not known.
    """

    name: str
    rows: Dataset
    to_row: Callable[[Row], Row]
    contents: Any = None
    files: list[str] = field(default_factory=list)


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
    if (args.eval_dataset_name is not None or splits) and split_size is not None:
        raise UserError(
            "evaluation data is given twice: by test_split_size, and by eval_dataset_name or test_split; keep one"
        )
    if args.eval_dataset_name is not None:
        named = DatasetConfig(id=args.eval_dataset_name, mapping=args.dataset_mapping, columns=args.dataset_columns)
        return train, [load_either(named, ("train", args.dataset_test_split), text_field)]
    if splits or split_size is not None:
        return train, [load_source(replace(each, max_samples=None), each.test_split, text_field) for each in splits]
    if mixture is not None:
        raise UserError(
            "evaluation is asked for, but the mixture has no evaluation data: set dataset_mixture.test_split_size, "
            "test_split of a source, or eval_dataset_name; or set eval_strategy: 'no' and do_eval: false"
        )
    try:
        alone = replace(args.sources[0], max_samples=None)
        return train, [load_source(alone, args.dataset_test_split, text_field)]
    except UserError as error:
        raise UserError(
            f"evaluation is asked for: {error}; set dataset_test_split, test_split_size or eval_dataset_name, "
            "or eval_strategy: 'no' and do_eval: false"
        ) from error


def load_source(source: DatasetConfig, split: str, text_field: str = "text") -> Source:
    """One source, reduced to its `columns` and `max_samples`. Raises `UserError`."""
    rows = load_table(source.id, source.config, split, source.data_files, source.revision)
    name = source.name or source_name(source.id or source.data_files[0], source.config, split)
    if source.columns is not None:
        if missing := [column for column in source.columns if column not in rows.column_names]:
            raise UserError(f"{name}: no column {', '.join(missing)}; its columns are {', '.join(rows.column_names)}")
        rows = rows.select_columns(source.columns)
    mapping = source.mapping and source.mapping.columns
    to_row = row_function(rows.column_names, name, text_field, mapping)
    if source.max_samples is not None:
        rows = rows.select(range(min(source.max_samples, len(rows))))
    held = contents_of(source.id, source.data_files)
    contents = [split, held] if held else rows._fingerprint
    files = local_files(source.id, source.data_files) if split == "train" else []
    return Source(name, rows, to_row, contents, files)


def load_either(source: DatasetConfig, splits: tuple[str, str], text_field: str) -> Source:
    """A source under the first of two splits that it has."""
    try:
        return load_source(source, splits[0], text_field)
    except UserError:
        return load_source(source, splits[1], text_field)


def tell_apart(sources: list[Source]) -> None:
    """Number sources of one name, so that the ledger knows them apart."""
    names = Counter(source.name for source in sources)
    seen: Counter = Counter()
    for source in sources:
        if names[source.name] > 1:
            seen[source.name] += 1
            source.name += f" #{seen[source.name]}"


def local_files(name: str | None, data_files: list[str] | None = None) -> list[str]:
    """The files that a name or glob, or without a name `data_files`, stand for; none when it is no file."""
    if name is None or name in set(LOADERS.values()):  # tutorials say `dataset_name: json` beside data_files
        return [file for pattern in data_files or () for file in local_files(pattern) or [pattern]]
    name = os.path.expanduser(name)
    if glob.has_magic(name):
        return sorted(glob.glob(name, recursive=True))
    return [name] if os.path.isfile(name) else []


def contents_of(name: str | None, data_files: list[str] | None) -> list[str]:
    """Digests of the local files that hold a source, in order; none for a hub dataset."""
    folder = Path(os.path.expanduser(name or ""))
    files = local_files(name, data_files)
    if not files and name and folder.is_dir():
        files = [
            str(path) for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("cache-")
        ]
    return [file_digest(file) for file in files]


def source_name(name: str, config: str | None, split: str) -> str:
    """How messages call a source: `id[/config]:split`."""
    return f"{name}{'/' + config if config else ''}:{split}"


def places_of(source: Source, rows: list[int]) -> list[str]:
    """Where rows (increasing) stand, for messages: their numbers and, in JSON lines, `file:line`."""
    places = [f"{source.name}: row {row} (counting from 0)" for row in rows]
    lines = data_lines(source.files)
    at, line = -1, ""
    for number, row in enumerate(rows):
        while at < row and (line := next(lines, "")):
            at += 1
        places[number] += f", {line}" if line else ""
    return places


def data_lines(files: list[str]) -> Iterator[str]:
    """`file:line` of every line of JSON lines that holds something; nothing more once a file is of another kind."""
    for file in files:
        if file_kind(file) not in (".jsonl", ".ndjson"):
            return
        with fsspec.open(file, "rb", compression="infer") as stream:
            yield from (f"{file}:{number}" for number, line in enumerate(stream, 1) if line.strip())


def not_utf8(file: str) -> str:
    """`file:line` of the first line that is not UTF-8, empty when all are or the file is no text."""
    if file_kind(file) in (".jsonl", ".ndjson", ".csv"):
        with fsspec.open(file, "rb", compression="infer") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f"{file}:{number}"
    return ""


def load_table(
    name: str | None,
    config: str | None,
    split: str,
    data_files: list[str] | None = None,
    revision: str | None = None,
) -> Dataset:
    """Load one split of a hub dataset, a directory, files or globs, or a `save_to_disk` directory, uncopied.

    Raises `UserError` when nothing is there, it cannot be read, or it holds no rows.
    """
    files = local_files(name, data_files)
    name = os.path.expanduser(name) if name else files[0]
    title = source_name(name, config, split)
    if files and (config or revision):
        raise UserError(f"{name}: a dataset_config or revision ({config or revision!r}) belongs to a hub dataset")
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{missing[0]}: no such file (relative paths start at {os.getcwd()})")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error it raises
    try:
        if files:
            loader = loader_of(files)
            options = as_written(files) if loader == "csv" else {}
            options |= {"cache_dir": kept_at(name, data_files)}
            table = datasets.load_dataset(loader, data_files={"train": files}, split=split, **options)
        elif os.path.isdir(name) and is_saved(Path(name)):
            if config or revision or data_files:
                raise UserError(f"{name}: what save_to_disk wrote has no config, revision or data_files; remove them")
            table = saved_split(name, split)
        elif os.path.isdir(name):
            options = {"data_files": data_files, "cache_dir": kept_at(name, None)}
            table = datasets.load_dataset(name, config, split=split, **options)
        elif not looks_local(name):
            table = datasets.load_dataset(name, config, split=split, data_files=data_files, revision=revision)
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


def kept_at(name: str | None, data_files: list[str] | None) -> str:
    """Where the library keeps what it reads from local files.

    It knows a file again by path and time alone; under the digest of its contents other contents are read anew.
    """
    return str(root() / "raw" / digest(contents_of(name, data_files)))


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
    for file in files:
        if file_kind(file) == ".json":
            require_json(file)
        elif file_kind(file) == ".csv":
            require_even_rows(file)
    return LOADERS[kinds.pop()]


def require_json(file: str) -> None:
    """Raise `UserError` when a JSON file holds null, on which the library kills the process."""
    with fsspec.open(file, "rb", compression="infer") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"n":
        raise UserError(f"{file}: a JSON file holds a list of objects or an object a line; found null")


def require_even_rows(file: str) -> None:
    """Raise `UserError` with the line where a CSV file has more cells than its header has names.

    The library would take cells too many for an index, and leave names that stand twice unseen.
    """
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream)
        header = next(rows, [])
        if twice := [name for name, times in Counter(header).items() if name and times > 1]:
            raise UserError(f"{file}:1: the column {', '.join(twice)} is there twice; give each a name of its own")
        for row in rows:
            if len(row) > len(header):
                raise UserError(
                    f"{file}:{rows.line_num}: {len(row)} cells under a header of {len(header)}; a cell that holds a "
                    f"comma or a line's end stands in double quotes; found {brief(row)}"
                )


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
    return f"{title}: cannot be loaded: {text or type(error).__name__}{because}"


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
    except Exception as error:  # every kind of compression has errors of its own
        return f"{file}: cannot be read: {str(error) or type(error).__name__}"
    return ""


def prompts_of(sources: list[Source], order: Dataset) -> np.ndarray:
    """What each row of an order asks, as `prompt_id` tells it; a row that cannot be read asks something of its own."""
    of, rows = columns_of(order)
    prompts = np.zeros(len(order), dtype=np.int64)
    for number, source in enumerate(sources):
        for place in np.flatnonzero(of == number).tolist():
            try:
                prompts[place] = prompt_id(source.to_row(source.rows[int(rows[place])]))
            except ValueError:
                prompts[place] = rows[place]
    return prompts


def get_dataset(args: "ScriptArguments") -> DatasetDict:
    """The raw rows of a recipe as Open-R1 hands them out: `train` and, where one is split off, `test`.

    Same rows in the same order as Open-R1 for weights up to 1 and the same seed.
    """
    train, _ = load_sources(args)
    names, mixture = [source.name for source in train], args.dataset_mixture
    order = draw([len(source.rows) for source in train], args, names)
    if mixture is not None and mixture.in_proportion:
        if mixture.proportion_unit != "rows":
            raise UserError("proportions of supervised tokens need tokens; use open_r1.preparation.prepare instead")
        order = in_proportion(order, np.ones(len(order)), mixture, names)
    orders = split(order, prompts_of(train, order), args)
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
