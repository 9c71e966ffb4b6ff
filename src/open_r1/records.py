"""JSON, JSON lines and CSV files as a table of records: a row's text as JSON, and where it stands.

A record is parsed where its row is needed. So whatever is wrong with one is that row's fault alone and is named with
its line, and numbers, nulls and texts stay what the file says, whatever other rows hold in the same column.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Set
from functools import partial
from itertools import islice, zip_longest
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from datasets import Dataset

from open_r1.cache import file_digest, prepared_table
from open_r1.errors import UserError
from open_r1.formats import Row, brief

SCHEMA = pa.schema([("record", pa.binary()), ("problem", pa.string()), ("file", pa.int32()), ("at", pa.string())])
COLUMNS = pa.schema([("column", pa.string()), ("row", pa.int64())])
BATCH_ROWS, BATCH_BYTES = 2**14, 2**23  # records written at once: whichever is less
ZIPPED = (b"PK\x03\x04", b"PK\x05\x06")
LOOKED_AT = 100  # lines that tell JSON lines from documents, and records whose keys are read at once
BOM = b"\xef\xbb\xbf"
BETWEEN = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """A row as JSON text, the line it begins in, and what is wrong with it beyond its text."""

    text: bytes
    line: int
    problem: str | None = None


class Streams(io.RawIOBase):
    """A bz2 or xz file of one stream or several. Python's own readers leave out what follows a broken one."""

    def __init__(self, make: Callable[[], Any], file: str) -> None:
        self.make, self.file, self.decoder = make, open(file, "rb"), make()  # noqa: SIM115

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill some of the buffer; 0 at the end. Raises `EOFError` when the file ends inside a stream."""
        data = b""
        while not data:
            more = self.file.read(2**16) if self.decoder.eof or self.decoder.needs_input else b""
            if self.decoder.eof:
                more = (self.decoder.unused_data + more).lstrip(b"\0")
                if not more:
                    return 0
                self.decoder = self.make()
            elif self.decoder.needs_input and not more:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = self.decoder.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)


OPENERS: dict[str, Callable[[str], Any]] = {  # by a pattern of a file's first bytes
    r"\x1f\x8b": gzip.open,
    r"BZh[1-9](1AY&SY|\x17rE8P\x90)": partial(Streams, bz2.BZ2Decompressor),
    r"\xfd7zXZ\0": partial(Streams, lzma.LZMADecompressor),
    r"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": partial(pa.input_stream, compression="zstd"),
}


def records_of(files: list[str], kind: str) -> Dataset:
    """A table of the records of `files`, all `json` or all `csv`, in order and kept by content.

    `file` is a number in `files` and `at` what stands behind its name: `:line`. Raises `UserError` for a file that
    cannot be read, holds none, or is no JSON or CSV at all.
    """
    key = {"what": f"{files[0]}, read", "kind": kind, "files": [file_digest(file) for file in files]}
    key["code"] = file_digest(__file__)
    return prepared_table(key, partial(write_records, files, kind))


def columns_in(records: Dataset) -> dict[str, int]:
    """Every key of every record, and the first row that has it; empty when no record is an object.

    Where no record is an object, texts are records under `text`.
    """
    key = {"part": "columns", "of": records._fingerprint}
    columns = prepared_table(key, partial(write_columns, records))
    return dict(zip(columns["column"][:], columns["row"][:], strict=True))


def read_record(row: Row, columns: list[str], then: Callable[[Row], Row]) -> Row:
    """What `then` makes of the record in a row of `records_of`, under `columns`; absent ones are null.

    Raises `ValueError` when the record is no object of distinct keys.
    """
    found = row_of(row, texts=columns == ["text"])
    return then({column: found.get(column) for column in columns})


def row_of(row: Row, texts: bool = False) -> Row:
    """The record in a row of `records_of`, as it is; with `texts` a text is one under `text`. Raises `ValueError`."""
    if row["problem"]:
        raise ValueError(row["problem"])
    found = parse(row["record"])
    if texts and isinstance(found, str):
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
        raise ValueError(f"not UTF-8: byte {text[error.start]:#x}; convert the file") from None
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        raise ValueError(f"not valid JSON: {problem} at column {error.colno}; found {brief(error.doc)}") from None
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
    found: dict[str, int] = {}
    text = -1
    batches = records.select_columns(["record", "problem"]).with_format("arrow").iter(LOOKED_AT)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        if found and has_only(row["record"], found.keys()):
            continue
        try:
            value = row_of(row, texts=True)
        except ValueError:
            continue  # it is reported when its row is needed
        if text < 0 and not row["record"].startswith(b"{"):
            text = number
        elif row["record"].startswith(b"{"):
            for name in value:
                found.setdefault(name, number)
    if not found and text >= 0:
        found["text"] = text
    names = [name for name in found if name.isascii() or name == name.encode(errors="ignore").decode()]
    with pa.OSFile(path, "wb") as target, pa.ipc.new_stream(target, COLUMNS) as writer:
        numbers = [found[name] for name in names]
        writer.write_batch(pa.record_batch([pa.array(names, pa.string()), pa.array(numbers, pa.int64())], COLUMNS))


def has_only(record: bytes, keys: Set[str]) -> bool:
    """Whether a record begins with an object that has no other keys: told sooner than whether all of it is right."""
    try:
        value, _ = SCANNER.raw_decode(record.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() <= keys


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
        start = stream.read(16)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file}: this file is in UTF-16; convert it to UTF-8")
    if start.startswith(ZIPPED):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if not name.endswith("/") and not name.startswith("__MACOSX/"):
                    yield f"/{name}", partial(archive.open, name)
    else:
        found = (opened for magic, opened in OPENERS.items() if re.match(magic.encode("latin-1"), start, re.DOTALL))
        yield "", partial(next(found, partial(open, mode="rb")), file)


def json_records(opened: Callable[[], Any], name: str) -> Iterator[Record]:
    """The records of JSON lines, or of JSON documents over any number of lines: objects, or one list of them.

    It is JSON lines where at least half of the first lines are objects of their own.
    """
    with opened() as stream:
        lines = (line for line in io.BufferedReader(stream) if line.strip())
        first = [type_of(line.removeprefix(BOM)) is dict for line in islice(lines, LOOKED_AT)]
    by_line = any(first) and sum(first) >= len(first) / 2
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
        header: list[str] = []
        line, at_end = 1, False
        while not at_end:
            try:
                row = next(rows, None)
            except csv.Error as error:
                if "unexpected end" in str(error) or not header:
                    raise UserError(f"{name}:{line}: no valid CSV: {error}; a cell in quotes ends with one") from None
                yield Record(b"null", line, f"no valid CSV: {error}; a quote inside quotes is written twice")
            else:
                at_end = row is None
                if row and header:
                    yield csv_record(header, row, line)
                elif row:
                    header = named(row, f"{name}:{line}")
            line = rows.line_num + 1


def named(header: list[str], where: str) -> list[str]:
    """The names of a CSV header, also where it has none. Raises `UserError` for what is no header."""
    if any("\0" in cell or cell != cell.encode(errors="ignore").decode() for cell in header):
        raise UserError(f"{where}: no header of CSV in UTF-8; found {brief(header)}")
    if len(header) == 1 and (sign := next((sign for sign in ";\t|" if sign in header[0]), "")):
        raise UserError(
            f"{where}: cells of CSV stand between commas, here between {sign!r}; write the file with commas"
        )
    if twice := [cell for cell, times in Counter(header).items() if cell and times > 1]:
        raise UserError(f"{where}: the column {', '.join(twice)} is there twice; give each its own name")
    made: list[str] = []
    for number, cell in enumerate(header, 1):
        name = cell or f"column {number}"
        while not cell and name in header:
            name += "'"
        made.append(name)
    return made


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
