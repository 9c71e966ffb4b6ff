"""Rows packed by TRL, kept by content, with the source, row and length of every document in them."""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import trl
from datasets import Dataset, concatenate_datasets
from trl import pack_dataset

from open_r1.cache import file_digest, prepared_table
from open_r1.mixture import columns_of

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig


def packed(what: str, tables: list[Dataset], places: np.ndarray, unpacked: Dataset, args: "SFTConfig") -> Dataset:
    """The rows packed, kept under what they are made of: the sources' tables, the order and the packing."""
    key = {
        "what": what,
        "sources": [table._fingerprint for table in tables],
        "order": hashlib.sha256(places.tobytes()).hexdigest()[:32],
        "packing": [args.max_length, args.packing_strategy],
        "code": [file_digest(__file__), trl.__version__],
    }
    tokens = unpacked.select_columns(["input_ids", "labels"])
    packs = prepared_table(key, lambda path: pack(tokens, args, path))
    key = {"part": "source, row and length of each document", "of": packs._fingerprint}
    return concatenate_datasets([packs, prepared_table(key, lambda path: pack_ids(unpacked, args, path))], axis=1)


def pack(rows: Dataset, args: "SFTConfig", path: str) -> Dataset:
    """Pack rows into the arrow file `path`, with TRL, in one process: its bins depend on how rows are dealt out."""
    return pack_dataset(rows, args.max_length, args.packing_strategy, {"cache_file_name": path, "desc": "Packing"})


def pack_ids(unpacked: Dataset, args: "SFTConfig", path: str) -> None:
    """Write `source`, `row` and `lengths` of the documents in each pack.

    TRL packs numbers of rows as it packs tokens: by lengths alone.
    """
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as scratch:
        numbers = unpacked.with_format("arrow").map(
            numbered_tokens,
            with_indices=True,
            batched=True,
            remove_columns=unpacked.column_names,
            cache_file_name=f"{scratch}/numbers.arrow",
            desc="Numbering",
        )
        places = pack(numbers, args, f"{scratch}/packs.arrow")
        origin = dict(zip(("source", "row"), columns_of(unpacked), strict=True))
        places.with_format("arrow").map(
            documents,
            batched=True,
            fn_kwargs={"origin": origin},
            remove_columns=places.column_names,
            cache_file_name=path,
            desc="Numbering packs",
        )


def numbered_tokens(rows: pa.Table, indices: list[int]) -> pa.Table:
    """Each token as the number of its row, in lists as long as the rows'."""
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    values = np.repeat(np.array(indices, dtype=np.int32), lengths)
    return pa.table({"place": pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), values)})


def documents(packs: pa.Table, origin: dict[str, np.ndarray]) -> pa.Table:
    """What `origin` says of the rows in each pack of numbered tokens, and how many of their tokens are in it.

    A row that is split over packs is in each of them.
    """
    column = packs["place"].combine_chunks()
    places, starts = column.flatten().to_numpy(), np.cumsum([0, *pc.list_value_length(column).to_numpy()])
    first = np.union1d(np.flatnonzero(np.diff(places, prepend=-1)), starts[:-1])
    offsets = np.searchsorted(first, starts).astype(np.int32)
    found = {name: values[places[first]] for name, values in origin.items()}
    found["lengths"] = np.diff(first, append=len(places)).astype(np.int32)
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in found.items()})
