"""From recipe to rows that the trainer takes as they are: load, draw, tokenise, select, pack; each row accounted for.

One process prepares, under a file lock; the others find its results in the `datasets` cache. No rank waits inside a
collective meanwhile.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from open_r1 import ledger
from open_r1.data import Source, load_sources
from open_r1.errors import UserError
from open_r1.mixture import draw, numbered
from open_r1.tokenization import COUNTS, Supervision, tokenize_source

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments, SFTConfig


@dataclass
class Prepared:
    """Rows for the trainer (`input_ids`, `labels`, packed also `seq_lengths`) and the ledgers of their making."""

    train: Dataset
    eval: Dataset | None = None
    ledgers: list[ledger.Entry] = field(default_factory=list)


def prepare(
    script_args: "ScriptArguments", training_args: "SFTConfig", tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """Prepare the rows of a recipe; evaluation rows only when `eval_strategy` or `do_eval` asks for them.

    Raises `UserError` for data that cannot be trained on.
    """
    if unknown := set(training_args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise UserError(f"dataset_kwargs: {', '.join(sorted(unknown))} is not known; data is prepared from other keys")
    args, evaluate = training_args, training_args.do_eval
    with FileLock(lock_path(script_args)):
        sources, held_out = load_sources(script_args, args.dataset_text_field, evaluate)
        names = [source.name for source in sources]
        orders = draw([len(s.rows) for s in sources], [s.weight for s in sources], script_args, names)
        train, closed = assemble("train", sources, orders["train"], tokenizer, args, args.packing)
        prepared = Prepared(train, None, [closed])
        if evaluate:
            packing = args.packing if args.eval_packing is None else args.eval_packing
            order = orders.get("test")
            if held_out:
                sources = held_out
                order = concatenate_datasets([numbered(number, len(s.rows)) for number, s in enumerate(held_out)])
            prepared.eval, closed = assemble("eval", sources, order, tokenizer, args, packing)
            prepared.ledgers.append(closed)
    for closed in prepared.ledgers:
        ledger.show(closed)
    ledger.require_answers(prepared.ledgers[0], args.max_truncated_answers)
    return prepared


def lock_path(script_args: "ScriptArguments") -> Path:
    """One lock per data recipe, beside the cache it guards."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"open_r1-{hashlib.sha256(repr(script_args).encode()).hexdigest()[:16]}.lock"


def assemble(
    part: str,
    sources: list[Source],
    order: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: "SFTConfig",
    packing: bool,
) -> tuple[Dataset, ledger.Entry]:
    """Tokenise what `order` draws, lay it out in that order without what was dropped, and pack; with its ledger."""
    how = Supervision.of(args, packing)
    numbers = order.with_format("numpy")
    drawn_from, drawn_rows = numbers["source"][:], numbers["row"][:]
    tables, entries, start = [], [], 0
    first, last = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    for number, source in enumerate(sources):
        mine = drawn_from == number
        rows, position = np.unique(drawn_rows[mine], return_inverse=True)
        table = tokenize_source(source, rows, tokenizer, how, args.dataset_num_proc)
        columns = {name: table.data.column(name).to_numpy() for name in ("row", "digest", "dropped", *COUNTS)}
        first[mine] = start + np.searchsorted(columns["row"], position, side="left")
        last[mine] = start + np.searchsorted(columns["row"], position, side="right")
        splits = how.on_long_row == "split"
        drawn = np.bincount(position, minlength=len(rows))
        entries.append(ledger.entry_of(source.name, len(source.rows), drawn, columns, splits))
        tables.append(table)
        start += len(table)
    together = concatenate_datasets(tables)
    places = ranges(first, last)
    places = places[together.data.column("dropped").is_null().to_numpy()[places]]
    if len(places) == 0:
        raise UserError(f"no row of the {part} data has a supervised token within max_length {args.max_length}")
    chosen = together.select(places).select_columns(["input_ids", "labels"])
    if args.shuffle_dataset:
        chosen = chosen.shuffle(seed=args.seed)
    batch = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
    lengths = together.data.column("tokens").to_numpy()[places]
    if packing:
        chosen = pack_dataset(chosen, args.max_length, args.packing_strategy, {"desc": f"Packing {part}"})
    closed = ledger.close(part, entries, lengths, batch, len(chosen) if packing else None, args.max_length)
    return chosen, closed


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers first[0] .. last[0] - 1, first[1] .. last[1] - 1, and so on."""
    counts = last - first
    skipped = np.cumsum(counts) - counts
    return np.repeat(first - skipped, counts) + np.arange(counts.sum())
