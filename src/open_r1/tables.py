"""A name in a recipe -> the rows behind it, as they are stored: files, directories, `save_to_disk`, the hub."""

import errno
import glob
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetBuilder, DatasetDict, ReadInstruction, concatenate_datasets
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig

from open_r1.cache import digest, file_digest, one_at_a_time, root
from open_r1.errors import NoSplit, UserError
from open_r1.records import records_of

logger = logging.getLogger(__name__)
LOADERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv"}
COMMIT = re.compile(r"hf://datasets/[^@]+@[0-9a-f]+")
SETTINGS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # of a directory, on how its files are read
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


@dataclass
class Table:
    """Rows as they are stored. `files` hold them where they are records of text files, `file` numbers into it.

    `contents` says what was read: file -> SHA-256, or hub dataset at its commit -> the library's fingerprint.
    """

    rows: Dataset
    contents: dict[str, str]
    files: list[str] = field(default_factory=list)


def load_table(
    name: str | None,
    config: str | None,
    split: str,
    data_files: list[str] | None = None,
    revision: str | None = None,
) -> Table:
    """Load one split of a hub dataset, a directory, files or globs, or a `save_to_disk` directory, uncopied.

    `split` may be a slice or a sum (`train[:10%]+test`). Raises `UserError` when nothing is there, it cannot be read,
    or it holds no rows.
    """
    files = local_files(name, data_files)
    name = os.path.expanduser(name) if name else files[0]
    split = "".join(split.split())
    title = source_name(name, config, split)
    if files and (config or revision):
        raise UserError(f"{name}: a dataset_config or revision ({config or revision!r}) belongs to a hub dataset")
    if name in LOADERS.values() and not files and not os.path.isdir(name):
        raise UserError(f"{name} is a kind of file: name files of it in data_files")
    if folders := [file for file in files if os.path.isdir(file)]:
        raise UserError(f"{folders[0]}: is a directory; name the files in it ({folders[0]}/*)")
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{missing[0]}: no such file (relative paths start at {os.getcwd()})")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error it raises
    try:
        if files:
            table = from_files(files, split, title)
        elif os.path.isdir(name) and is_saved(Path(name)):
            if config or revision or data_files:
                raise UserError(f"{name}: what save_to_disk wrote has no config, revision or data_files; remove them")
            table = from_saved(name, split, title)
        elif os.path.isdir(name):
            table = from_folder(name, config, split, data_files, title)
        elif not looks_local(name):
            table = from_hub(name, config, split, data_files, revision)
        else:
            raise UserError(f"{name}: no such file or directory (relative paths start at {os.getcwd()})")
    except UserError:
        raise
    except Exception as error:  # every loader raises its own kinds; all become one line that names the source
        raise refusal_of(error, title) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    if len(table.rows) == 0:
        raise UserError(f"{title}: holds no rows")
    return table


def from_files(files: list[str], split: str, title: str) -> Table:
    """Local files of one kind, which together are the split `train`."""
    kind, contents = loader_of(files), digests_of(files)
    if kind != "parquet":
        splits_in(split, ["train"], title)
        return from_text(kind, {"train": files}, split, contents)
    kept = kept_at(contents)
    builder = datasets.load_dataset_builder(kind, data_files={"train": files}, cache_dir=kept)
    return Table(rows_of(builder, split, title), contents)


def from_text(kind: str, splits: dict[str, list[str]], split: str, contents: dict[str, str]) -> Table:
    """JSON or CSV files, the splits that `split` names, as records."""
    files = [file for part in splits.values() for file in part]
    records = records_of(files, kind)
    sizes = iter(np.bincount(records.with_format("numpy")["file"][:], minlength=len(files)).tolist())
    held = {name: sum(next(sizes) for _ in part) for name, part in splits.items()}
    return Table(part_of(records, held, split), contents, files)


def from_saved(name: str, split: str, title: str) -> Table:
    """A `save_to_disk` directory; one without splits counts as `train`."""
    saved = datasets.load_from_disk(name)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    named = splits_in(split, list(splits), title)
    rows = concatenate_datasets([splits[each].with_format(None) for each in named])
    files = [str(path) for path in sorted(Path(name).rglob("*")) if path.suffix in (".arrow", ".json")]
    return Table(part_of(rows, {each: len(splits[each]) for each in named}, split), digests_of(files))


def from_folder(name: str, config: str | None, split: str, data_files: list[str] | None, title: str) -> Table:
    """A directory laid out as a hub dataset; its JSON and CSV become records."""
    if glob.has_magic(name):
        raise UserError(f"{name}: a directory whose name holds * ? or [ cannot be read; rename it")
    builder = datasets.load_dataset_builder(name, config, data_files=data_files)
    splits = {str(each): list(map(str, files)) for each, files in builder.config.data_files.items()}
    inside = [str(path) for path in sorted(Path(name).glob("*")) if path.is_file()]
    known = {os.path.abspath(file) for files in splits.values() for file in files}
    if left := [file for file in inside if file_kind(file) and os.path.abspath(file) not in known and not data_files]:
        logger.warning("%s: in no split, by their names, and not read: %s", name, ", ".join(left))
    splits = {each: splits[each] for each in splits_in(split, list(splits), title)}
    contents = digests_of([file for files in splits.values() for file in files])
    contents |= digests_of([file for file in inside if os.path.basename(file) in SETTINGS])
    if kind := kind_of(builder):
        return from_text(kind, splits, split, contents)
    builder = datasets.load_dataset_builder(name, config, data_files=data_files, cache_dir=kept_at(contents))
    return Table(rows_of(builder, split, title), contents)


def from_hub(name: str, config: str | None, split: str, data_files: list[str] | None, revision: str | None) -> Table:
    """A hub dataset, also one that the library has prepared before and now finds without a network."""
    builder = datasets.load_dataset_builder(name, config, data_files=data_files, revision=revision)
    rows = rows_of(builder, split, source_name(name, config, split))
    files = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    address = COMMIT.match(files[0]) if files else None
    return Table(rows, {address[0] if address else name: rows._fingerprint})


def rows_of(builder: DatasetBuilder, split: str, title: str) -> Dataset:
    """A split as the library prepares it: by one process, the library's own lock waits without a word."""
    if os.path.exists(builder.cache_dir):
        builder.download_and_prepare()  # reads what it says of itself
    else:
        with one_at_a_time(root() / f"{digest(builder.cache_dir)}.lock", f"it downloads or converts {title}"):
            builder.download_and_prepare()
    return builder.as_dataset(split=split)


def kind_of(builder: DatasetBuilder) -> str:
    """`json` or `csv` when a dataset is such files, read with the library's own settings; empty otherwise."""
    settings = builder.config
    about = {"name", "version", "data_dir", "data_files", "description"}
    for kind, plain in (("json", JsonConfig()), ("csv", CsvConfig())):
        if isinstance(settings, type(plain)):
            said = {key for key, value in vars(plain).items() if vars(settings)[key] != value}
            return kind if said <= about else ""
    return ""


def splits_in(split: str, known: list[str], title: str) -> list[str]:
    """The splits that a slice or sum (`train[:10%]+test`) is of. Raises `UserError` for one that is not there."""
    named = list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))
    if unknown := [name for name in named if name not in known]:
        raise NoSplit(f"{title}: no split {unknown[0]}; it has {', '.join(known)}")
    return named


def part_of(rows: Dataset, sizes: dict[str, int], split: str) -> Dataset:
    """The rows that `split` means, of splits that stand one behind the other in `rows`."""
    chosen, starts = [], dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    for part in ReadInstruction.from_spec(split).to_absolute(sizes):
        start = starts[part.splitname]
        chosen.append(range(start + part.from_, start + part.to))
    if len(chosen) == 1:
        return rows if chosen[0] == range(len(rows)) else rows.select(chosen[0])
    return rows.select(np.concatenate(chosen))


def digests_of(files: list[str]) -> dict[str, str]:
    """SHA-256 of local files."""
    return {file: file_digest(file) for file in files}


def kept_at(contents: dict[str, str]) -> str:
    """Where the library keeps what it reads from local files.

    It knows a file again by path and time alone; under the digest of its contents other contents are read anew.
    """
    return str(root() / "raw" / digest(list(contents.values())))


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
    """The kind of these files: json, csv or parquet. Raises `UserError` for empty, unknown or mixed kinds."""
    kinds = {file_kind(file) for file in files}
    if "" in kinds:
        odd = next(file for file in files if not file_kind(file))
        raise UserError(f"{odd}: unknown kind of data file; known are {', '.join(LOADERS)}, also compressed")
    if len({LOADERS[kind] for kind in kinds}) > 1:
        raise UserError(f"{files[0]} and others: one source holds one kind of file; found {', '.join(sorted(kinds))}")
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise UserError(f"{empty[0]}: this file is empty")
    return LOADERS[kinds.pop()]


def is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    alone = all((directory / name).is_file() for name in ("state.json", "dataset_info.json"))
    return alone or (directory / "dataset_dict.json").is_file()


def refusal_of(error: Exception, title: str) -> UserError:
    """The error that says in one line why a source cannot be read."""
    text = " ".join(str(error).split())
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if unknown := re.match(r'Unknown split "(.*)"\. Should be one of \[(.*)\]', text):
        return NoSplit(f"{title}: no split {unknown[1]}; it has {unknown[2]}")
    if "corresponds to no data" in text or "BatchSize must be greater than 0" in str(cause):
        return UserError(f"{title}: holds no rows")
    if isinstance(cause, OSError) and cause.errno in UNWRITABLE and in_cache(cause.filename):
        text += "; the datasets library writes and locks files in its cache even to read it: set HF_DATASETS_CACHE"
    because = "" if str(cause) in str(error) else f" ({' '.join(str(cause).split())})"
    return UserError(f"{title}: cannot be loaded: {text or type(error).__name__}{because}")


def in_cache(file: str | None) -> bool:
    """Whether the library's own files are meant; of one that cannot be locked it does not say which."""
    return file is None or os.path.abspath(file).startswith(os.path.abspath(datasets.config.HF_DATASETS_CACHE))


def local_files(name: str | None, data_files: list[str] | None = None) -> list[str]:
    """The files that a name or glob, or without a name `data_files`, stand for; none when it is no file."""
    if name is None or name in set(LOADERS.values()):  # tutorials say `dataset_name: json` beside data_files
        return [file for pattern in data_files or () for file in local_files(pattern) or [pattern]]
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        return [name]
    return sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not os.path.isdir(name) else []


def source_name(name: str, config: str | None, split: str) -> str:
    """How messages call a source: `id[/config]:split`."""
    return f"{name}{'/' + config if config else ''}:{split}"
