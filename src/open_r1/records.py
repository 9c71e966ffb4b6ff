"""JSON, JSON lines and CSV files as a table of records: a row's text as JSON, and where it stands.

A record is parsed where its row is needed. So whatever is wrong with one is that row's fault alone and is named with
its line, and numbers, nulls and texts stay what the file says, whatever other rows hold in the same column.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from datasets import Dataset

from open_r1.cache import file_digest, prepared_table
from open_r1.errors import UserError
from open_r1.formats import Row, brief

SCHEMA = pa.schema([("record", pa.binary()), ("problem", pa.string()), ("file", pa.int32()), ("at", pa.string())])
COLUMN = pa.schema([("column", pa.string())])
BATCH_ROWS, BATCH_BYTES = 2**14, 2**23  # records written at once: whichever is less
OPENERS: dict[bytes, Callable[[str], Any]] = {  # by the first bytes of a file
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": partial(pa.input_stream, compression="zstd"),
}
ZIPPED = (b"PK\x03\x04", b"PK\x05\x06")
BOM = b"\xef\xbb\xbf"
BETWEEN = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """A row as JSON text, the line it begins in, and what is wrong with it beyond its text."""

    text: bytes
    line: int
    problem: str | None = None


def records_of(files: list[str], kind: str) -> Dataset:
    """A table of the records of `files`, all `json` or all `csv`, in order and kept by content.

    `file` is a number in `files` and `at` what stands behind its name: `:line`. Raises `UserError` for a file that
    cannot be read, holds none, or is no JSON or CSV at all.
    """
    key = {"what": f"{files[0]}, read", "kind": kind, "files": [file_digest(file) for file in files]}
    key["code"] = file_digest(__file__)
    return prepared_table(key, partial(write_records, files, kind))


def columns_in(records: Dataset) -> list[str]:
    """Every key of every record, in order of appearance; empty when no record is an object."""
    key = {"part": "columns", "of": records._fingerprint}
    return prepared_table(key, partial(write_columns, records))["column"][:]


def read_record(row: Row, columns: list[str], then: Callable[[Row], Row]) -> Row:
    """What `then` makes of the record in a row of `records_of`, under `columns`; absent ones are null.

    Raises `ValueError` when the record is no object of distinct keys.
    """
    found = row_of(row)
    return then({column: found.get(column) for column in columns})


def row_of(row: Row) -> Row:
    """The record in a row of `records_of`, as it is; a text alone is one under `text`. Raises `ValueError`."""
    if row["problem"]:
        raise ValueError(row["problem"])
    found = parse(row["record"])
    if isinstance(found, str):
        return {"text": found}
    if not isinstance(found, dict):
        raise ValueError(f"a row of JSON is an object; found {brief(found)}")
    return found


def problem_of(row: Row) -> str:
    """What is wrong with a row of `records_of` of which no record has a key."""
    try:
        return f"a row of JSON is an object with keys; found {brief(row_of(row))}"
    except ValueError as error:
        return str(error)


def parse(text: bytes) -> Any:
    """The value of a JSON text. Raises `ValueError`."""
    try:
        return DECODER.decode(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {text[error.start]:#x} at {error.start}; convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}; found {brief(error.doc)}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def distinct(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object. Raises `ValueError` when a key stands in it twice: readers disagree on which of them counts."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {brief(twice)} is there twice; remove one")
    return made


DECODER, SCANNER = json.JSONDecoder(object_pairs_hook=distinct), json.JSONDecoder()


def write_records(files: list[str], kind: str, path: str) -> None:
    """Write the arrow file `path` of the records of `files`."""
    with pa.OSFile(path, "wb") as target, pa.ipc.new_stream(target, SCHEMA) as writer:
        for number, file in enumerate(files):
            rows: list[tuple[Any, ...]] = []
            size = written = 0
            for part, record in records_in(file, kind):
                rows.append((record.text, record.problem, number, f"{part}:{record.line}"))
                size += len(record.text)
                if len(rows) == BATCH_ROWS or size > BATCH_BYTES:
                    writer.write_batch(batch_of(rows))
                    written, rows, size = written + len(rows), [], 0
            if not written + len(rows):
                raise UserError(f"{file}: holds no rows")
            writer.write_batch(batch_of(rows))


def batch_of(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    """Rows as a batch of `SCHEMA`."""
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, SCHEMA)


def write_columns(records: Dataset, path: str) -> None:
    """Write the arrow file `path` of the keys of all records."""
    found: dict[str, None] = {}
    for row in records.select_columns(["record", "problem"]):
        try:
            found.update(dict.fromkeys(row_of(row)))
        except ValueError:
            continue  # it is reported when its row is needed
    names = [name for name in found if name.isprintable()]  # others cannot be written in a recipe
    with pa.OSFile(path, "wb") as target, pa.ipc.new_stream(target, COLUMN) as writer:
        writer.write_batch(pa.record_batch([pa.array(names, pa.string())], COLUMN))


def records_in(file: str, kind: str) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with the part of it that it stands in: empty, or a file in a zip archive."""
    read = csv_records if kind == "csv" else json_records
    try:
        for part, stream in parts_of(file):
            for record in read(stream, file + part):
                yield part, record
    except UserError:
        raise
    except Exception as error:  # every kind of compression has errors of its own
        raise UserError(f"{file}: cannot be read: {str(error) or type(error).__name__}") from error


def parts_of(file: str) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """What opens a file, decompressed as its first bytes tell, or each file in a zip archive."""
    with open(file, "rb") as stream:
        start = stream.read(6)
    if start.startswith(ZIPPED):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    yield f"/{name}", partial(archive.open, name)
    else:
        opened = next(
            (opened for magic, opened in OPENERS.items() if start.startswith(magic)), partial(open, mode="rb")
        )
        yield "", partial(opened, file)


def json_records(opened: Callable[[], Any], name: str) -> Iterator[Record]:
    """The records of JSON lines, or of JSON documents over any number of lines: objects, or one list of them."""
    with opened() as stream:
        lines = iter(partial(io.BufferedReader(stream).readline, 2**24), b"")
        first, second = (next((line for line in lines if line.strip()), b"").removeprefix(BOM) for _ in "12")
    begins_list = first.lstrip().startswith(b"[") and type_of(first) is None
    by_line = type_of(first) is dict or (type_of(second) is dict and not begins_list)
    with opened() as stream:
        yield from by_lines(io.BufferedReader(stream)) if by_line else documents(stream, name)


def type_of(text: bytes) -> type | None:
    """The type of a text's JSON value, None when it is not one alone."""
    try:
        return type(json.loads(text.decode()))
    except (ValueError, RecursionError):
        return None


def by_lines(stream: BinaryIO) -> Iterator[Record]:
    """A record a line; blank lines hold none."""
    for number, line in enumerate(stream, 1):
        text = line.strip() if number > 1 else line.removeprefix(BOM).strip()
        if text:
            yield Record(text, number)


def documents(stream: BinaryIO, name: str) -> Iterator[Record]:
    """A record a JSON document, or a record an item where the file is one list; the file is read at once."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="").read()
    begin, line, counted = after_space(text, 0), 1, 0
    for start, end in items(text, begin + 1, name) if text.startswith("[", begin) else values(text, begin, name):
        line, counted = line + text.count("\n", counted, start), start
        yield Record(text[start:end].encode("utf-8", "surrogateescape"), line)


def values(text: str, at: int, name: str) -> Iterator[tuple[int, int]]:
    """Where each of the JSON values that follow each other in a text starts and ends."""
    while at < len(text):
        end = end_of(text, at, name)
        yield at, end
        at = after_space(text, end)


def items(text: str, at: int, name: str) -> Iterator[tuple[int, int]]:
    """Where each item of the JSON list whose bracket stands before `at` starts and ends; nothing follows the list."""
    at = after_space(text, at)
    sign = "," if not text.startswith("]", at) else "]"
    while sign == ",":
        end = end_of(text, at, name)
        yield at, end
        at = after_space(text, end)
        sign = text[at : at + 1]
        if sign not in ("]", ","):
            raise not_json(text, at, "a comma or the end of the list belongs here", name)
        at = after_space(text, at + 1) if sign == "," else at
    if (at := after_space(text, at + 1)) < len(text):
        raise not_json(text, at, "nothing follows the list that a file holds", name)


def end_of(text: str, at: int, name: str) -> int:
    """The end of the JSON value that starts at `at`. Where it is broken none can be told, so it is a `UserError`."""
    try:
        return SCANNER.raw_decode(text, at)[1]
    except json.JSONDecodeError as error:
        raise not_json(text, error.pos, error.msg, name) from None
    except (ValueError, RecursionError) as error:
        raise not_json(text, at, str(error), name) from None


def after_space(text: str, at: int) -> int:
    """The first place from `at` on that is not JSON's white space."""
    return BETWEEN.match(text, at).end()


def not_json(text: str, at: int, problem: str, name: str) -> UserError:
    """The error that names the line of a place in a file's text."""
    found = f"; found {brief(text[at : at + 60])}" if at < len(text) else ""
    return UserError(f"{name}:{text.count(chr(10), 0, at) + 1}: not valid JSON: {problem}{found}")


def csv_records(opened: Callable[[], Any], name: str) -> Iterator[Record]:
    """A record a row of CSV: its cells, which are texts, under the names of the header; cells too few are null."""
    csv.field_size_limit(sys.maxsize)
    with opened() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, strict=True)
        try:
            header = next((row for row in rows if row), [])
            if any(not cell.isprintable() for cell in header):
                raise UserError(f"{name}:{rows.line_num}: no header of CSV in UTF-8; found {brief(header)}")
            if twice := [cell for cell, times in Counter(header).items() if cell and times > 1]:
                raise UserError(
                    f"{name}:{rows.line_num}: the column {', '.join(twice)} is there twice; give each its own name"
                )
            header = [cell or f"column {number}" for number, cell in enumerate(header, 1)]
            line = rows.line_num + 1
            for row in rows:
                if row:
                    yield csv_record(header, row, line)
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(f"{name}:{line}: no valid CSV: {error}; a cell in quotes ends with one") from None


def csv_record(header: list[str], row: list[str], line: int) -> Record:
    """A row of CSV as a record."""
    problem, found = None, dict(zip_longest(header, row[: len(header)]))
    if len(row) > len(header):
        problem = (
            f"{len(row)} cells under a header of {len(header)}; a cell that holds a comma or a line's end stands in "
            f"double quotes; found {brief(row)}"
        )
        found = row
    return Record(json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogateescape"), line, problem)
