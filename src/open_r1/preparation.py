"""From recipe to rows that the trainer takes as they are: load, draw, tokenise, select, pack; each row accounted for.

One process prepares, under a file lock; the others find its tables. No rank waits inside a
collective meanwhile.
"""

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from open_r1 import ledger
from open_r1.cache import prepared_table, root
from open_r1.data import Source, load_sources, places_of
from open_r1.errors import UserError
from open_r1.formats import brief
from open_r1.mixture import draw, numbered
from open_r1.tokenization import Supervision, counts_of, tokenize_source

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments, SFTConfig


logger = logging.getLogger(__name__)


@dataclass
class Part:
    """One part of the data, `train` or `eval`.

    `rows` are for the trainer: `input_ids`, `labels`, `source` (a number, its name is in `sources`) and `row` (counted
    from 0 in that source's table). Packed, `source` and `row` are lists with a value for each document of the pack,
    and there are `seq_lengths`. `unpacked` are the same before packing. `ledger` says how they came about, `rejected`
    names the rows that were dropped: `part`, `source`, `row`, `place` and `reason`, with an `excerpt` of bad ones.
    """

    rows: Dataset
    unpacked: Dataset
    sources: list[str]
    ledger: ledger.Entry
    rejected: list[dict[str, Any]]


@dataclass
class Prepared:
    """The data of a recipe; `eval` is None unless `eval_strategy` or `do_eval` asks for it."""

    train: Part
    eval: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that there are, by name."""
        return {"train": self.train, **({"eval": self.eval} if self.eval else {})}


def prepare(
    script_args: "ScriptArguments", training_args: "SFTConfig", tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """Prepare the data of a recipe and show its ledger. Raises `UserError` for data that cannot be trained on."""
    if unknown := set(training_args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise UserError(f"dataset_kwargs: {', '.join(sorted(unknown))} is not known; data is prepared from other keys")
    args, evaluate = training_args, training_args.do_eval
    with FileLock(lock_path(script_args)):
        sources, held_out = load_sources(script_args, args.dataset_text_field, evaluate)
        names = [source.name for source in sources]
        orders = draw([len(s.rows) for s in sources], [s.weight for s in sources], script_args, names)
        # Every row of a source that either part draws is tokenised at once, so that another split or seed finds it.
        needed = rows_by_source([orders[part] for part in orders], len(sources))
        prepared = Prepared(assemble("train", sources, needed, orders["train"], tokenizer, args, args.packing))
        if evaluate:
            packing = args.packing if args.eval_packing is None else args.eval_packing
            order = orders.get("test")
            if held_out:
                sources = held_out
                order = concatenate_datasets([numbered(number, len(s.rows)) for number, s in enumerate(held_out)])
                needed = rows_by_source([order], len(sources))
            prepared.eval = assemble("eval", sources, needed, order, tokenizer, args, packing)
    for part in prepared.parts.values():
        ledger.show(part.ledger)
    ledger.require_good_rows([part.ledger for part in prepared.parts.values()], args.max_bad_rows)
    ledger.require_answers(prepared.train.ledger, args.max_truncated_answers)
    return prepared


def rows_by_source(orders: list[Dataset], sources: int) -> list[np.ndarray]:
    """The row numbers that orders draw from each source, increasing."""
    drawn = [(order.with_format("numpy")["source"][:], order.with_format("numpy")["row"][:]) for order in orders]
    return [np.unique(np.concatenate([rows[of == number] for of, rows in drawn])) for number in range(sources)]


def lock_path(script_args: "ScriptArguments") -> Path:
    """One lock per data recipe, beside the cache it guards."""
    return root() / f"{hashlib.sha256(repr(script_args).encode()).hexdigest()[:16]}.lock"


def assemble(
    part: str,
    sources: list[Source],
    needed: list[np.ndarray],
    order: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: "SFTConfig",
    packing: bool,
) -> Part:
    """Tokenise the `needed` rows, lay them out as `order` draws them without what was dropped, and pack."""
    how = Supervision.of(args, packing)
    numbers = order.with_format("numpy")
    drawn_from, drawn_rows = numbers["source"][:], numbers["row"][:]
    tables, entries, lengths, trained, rejected, start = [], [], [], [], [], 0
    first, last = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    for number, source in enumerate(sources):
        table = tokenize_source(source, needed[number], tokenizer, how, args.dataset_num_proc)
        counts = counts_of(table)
        mine = drawn_from == number
        position = np.searchsorted(needed[number], drawn_rows[mine])
        first[mine] = start + np.searchsorted(counts["row"], position, side="left")
        last[mine] = start + np.searchsorted(counts["row"], position, side="right")
        drawn = np.bincount(position, minlength=len(needed[number]))
        entries.append(
            ledger.entry_of(source.name, len(source.rows), drawn, counts, splits=how.on_long_row == "split")
        )
        rejected += rejections(part, source, needed[number], drawn, counts)
        tables.append(with_ids(table, number, needed[number][counts["row"]]))
        lengths.append(counts["tokens"])
        trained.append(np.equal(counts["dropped"], None))
        start += len(table)
    places = ranges(first, last)
    places = places[np.concatenate(trained)[places]]
    if len(places) == 0:
        raise UserError(f"no row of the {part} data has a supervised token within max_length {args.max_length}")
    if args.shuffle_dataset:
        places = np.random.default_rng(args.seed).permutation(places)
    rows = unpacked = concatenate_datasets(tables).select(places)
    names = [source.name for source in sources]
    if packing:
        rows = packed(f"{part} of {', '.join(names)}, packed", tables, places, unpacked, args)
    batch = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
    closed = ledger.close(part, entries, np.concatenate(lengths)[places], batch)
    if packing:
        ledger.add_packing(closed, rows, batch, args.max_length, args.packing_strategy)
    return Part(rows, unpacked, names, closed, rejected)


def rejections(
    part: str, source: Source, rows: np.ndarray, drawn: np.ndarray, counts: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """What was dropped of the `rows` of a source that are drawn, and why."""
    dropped = np.flatnonzero(~np.equal(counts["dropped"], None) & (drawn[counts["row"]] > 0))
    numbers = rows[counts["row"][dropped]].tolist()
    found = []
    for row, place, reason in zip(numbers, places_of(source, numbers), counts["dropped"][dropped], strict=True):
        excerpt = {"excerpt": brief(source.rows[row], 400)} if reason.startswith(ledger.BAD_ROW) else {}
        found.append({"part": part, "source": source.name, "row": row, "place": place, "reason": reason, **excerpt})
    return found


def write_rejected(output_dir: str, prepared: Prepared) -> None:
    """Write `rejected.jsonl`, a line for each row that was dropped; removed when there is none."""
    lines = [json.dumps(row) + "\n" for part in prepared.parts.values() for row in part.rejected]
    path = Path(output_dir) / "rejected.jsonl"
    path.unlink(missing_ok=True)
    if lines:
        path.write_text("".join(lines), encoding="utf-8")
        logger.warning("%d rows were dropped: %s says which and why", len(lines), path)


def with_ids(table: Dataset, source: int, rows: np.ndarray) -> Dataset:
    """The tokens of a source's table, and where each row comes from."""
    table = table.select_columns(["input_ids", "labels"])
    fingerprint = table._fingerprint  # what is added follows from what the fingerprint is of, and need not be hashed
    for name, values in (("source", np.full(len(rows), source)), ("row", rows)):
        table = table.add_column(name, values.astype(np.int32), new_fingerprint=fingerprint)
    return table


def packed(what: str, tables: list[Dataset], places: np.ndarray, unpacked: Dataset, args: "SFTConfig") -> Dataset:
    """The rows packed, kept under what they are made of: the sources' tables, the order and the packing."""
    key = {
        "what": what,
        "sources": [table._fingerprint for table in tables],
        "order": hashlib.sha256(places.tobytes()).hexdigest()[:32],
        "packing": [args.max_length, args.packing_strategy],
    }
    tokens = unpacked.select_columns(["input_ids", "labels"])
    packs = prepared_table(key, lambda path: pack(tokens, args, path))
    key = {"what": "source and row of each document", "of": packs._fingerprint}
    return concatenate_datasets([packs, prepared_table(key, lambda path: pack_ids(unpacked, args, path))], axis=1)


def pack(rows: Dataset, args: "SFTConfig", path: str) -> Dataset:
    """Pack rows into the arrow file `path`, with TRL, in one process: its bins depend on how rows are dealt out."""
    return pack_dataset(rows, args.max_length, args.packing_strategy, {"cache_file_name": path, "desc": "Packing"})


def pack_ids(unpacked: Dataset, args: "SFTConfig", path: str) -> None:
    """Write `source` and `row` of the documents in each pack, which TRL packs as it packs tokens: by lengths alone."""
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
        origin = unpacked.select_columns(["source", "row"]).with_format("numpy")[:]
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
    """What `origin` says of the rows in each pack of numbered tokens; a row split over packs is in each of them."""
    column = packs["place"].combine_chunks()
    places, starts = column.flatten().to_numpy(), np.cumsum([0, *pc.list_value_length(column).to_numpy()])
    first = np.union1d(np.flatnonzero(np.diff(places, prepend=-1)), starts[:-1])
    offsets = np.searchsorted(first, starts).astype(np.int32)
    columns = {name: pa.ListArray.from_arrays(offsets, values[places[first]]) for name, values in origin.items()}
    return pa.table(columns)


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers first[0] .. last[0] - 1, first[1] .. last[1] - 1, and so on."""
    counts = last - first
    skipped = np.cumsum(counts) - counts
    return np.repeat(first - skipped, counts) + np.arange(counts.sum())
