"""Rows packed by TRL, kept by content, with the source, row and length of every document in them."""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import trl
from datasets import Dataset
from trl import pack_dataset

from open_r1.cache import file_digest, prepared_table
from open_r1.mixture import columns_of

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

PACKS = 128  # read at once: each can be as long as the context


def packed(what: str, tables: list[Dataset], places: np.ndarray, unpacked: Dataset, args: "SFTConfig") -> Dataset:
    """The rows packed, kept under what they are made of: the sources' tables, the order and the packing."""
    key = {
        "what": what,
        "sources": [table._fingerprint for table in tables],
        "order": hashlib.sha256(places.tobytes()).hexdigest()[:32],
        "packing": [args.max_length, args.packing_strategy],
        "code": [file_digest(__file__), trl.__version__],
    }
    return prepared_table(key, lambda path: pack(unpacked, args, path))


def pack(unpacked: Dataset, args: "SFTConfig", path: str) -> None:
    """Pack rows into the arrow file `path`, with `source`, `row` and `lengths` of the documents in each pack.

    TRL packs, in one process: its bins depend on how rows are dealt out. Beside each token it carries the number of
    the row that the token is from.
    """
    origin = dict(zip(("source", "row"), columns_of(unpacked), strict=True))
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as scratch:
        numbered = (
            unpacked.select_columns(["input_ids", "labels"])
            .with_format("arrow")
            .map(
                numbered_tokens,
                with_indices=True,
                batched=True,
                cache_file_name=f"{scratch}/numbered.arrow",
                desc="Numbering",
            )
        )
        how = {"cache_file_name": f"{scratch}/packs.arrow", "desc": "Packing"}
        packs = pack_dataset(numbered, args.max_length, args.packing_strategy, how)
        packs.map(
            documents,
            batched=True,
            batch_size=PACKS,
            fn_kwargs={"origin": origin},
            remove_columns=["place"],
            cache_file_name=path,
            new_fingerprint="packs",  # else `origin` would be pickled to name the result
            desc="Naming documents",
        )


def numbered_tokens(rows: pa.Table, indices: list[int]) -> pa.Table:
    """Rows with a list as long as their tokens, which holds the row's number as often."""
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    values = np.repeat(np.array(indices, dtype=np.int32), lengths)
    places = pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), values)
    return rows.append_column("place", places)


def documents(packs: pa.Table, origin: dict[str, np.ndarray]) -> pa.Table:
    """Packs with what `origin` says of the rows in each, instead of numbers, and how many of their tokens are in it.

    A row that is split over packs is in all of them.
    """
    column = packs["place"].combine_chunks()
    places, starts = column.flatten().to_numpy(), np.cumsum([0, *pc.list_value_length(column).to_numpy()])
    first = np.union1d(np.flatnonzero(np.diff(places, prepend=-1)), starts[:-1])
    offsets = np.searchsorted(first, starts).astype(np.int32)
    found = {name: values[places[first]] for name, values in origin.items()}
    found["lengths"] = np.diff(first, append=len(places)).astype(np.int32)
    packs = packs.drop_columns("place")
    for name, values in found.items():
        packs = packs.append_column(name, pa.ListArray.from_arrays(offsets, values))
    return packs
