"""From recipe to rows that the trainer takes as they are: load, draw, tokenise, select, pack; each row accounted for.

One process makes each table, the others find it (`cache.py`). No rank waits inside a collective meanwhile.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from open_r1 import ledger
from open_r1.data import Source, asks_nothing, excerpt_of, load_sources, places_of
from open_r1.errors import UserError
from open_r1.metrics import metric_names
from open_r1.mixture import columns_of, draw, in_proportion, numbered, split
from open_r1.packing import packed
from open_r1.run_state import RUN_STATE
from open_r1.tokenization import COUNTS, Supervision, counts_of, tokenize_source

if TYPE_CHECKING:
    from open_r1.configs import DatasetMixtureConfig, ScriptArguments, SFTConfig


logger = logging.getLogger(__name__)


@dataclass
class Part:
    """One part of the data, `train` or `eval`.

    `rows` are for the trainer: `input_ids`, `labels`, `source` (a number, its name is in `sources`) and `row` (counted
    from 0 in that source's table). Packed, `source` and `row` are lists with a value for each document of the pack,
    and there are `seq_lengths`. `unpacked` are the same before packing. `ledger` says how they came about, `rejected`
    names the rows that were dropped: `part`, `source`, `row`, `place` and `reason`, with an `excerpt` of bad ones.
    `tables` are what they were chosen from, one a source. `lengths` are the tokens of each of `rows`. `key` is equal
    for equal rows in equal order.
    """

    rows: Dataset
    unpacked: Dataset
    sources: list[str]
    ledger: ledger.Entry
    rejected: list[dict[str, Any]]
    tables: list["Tokenized"]
    lengths: np.ndarray
    key: str


@dataclass
class Prepared:
    """The data of a recipe; `eval` is None unless `eval_strategy` or `do_eval` asks for it."""

    train: Part
    eval: Part | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """The parts that there are, by name."""
        return {"train": self.train, **({"eval": self.eval} if self.eval else {})}


@dataclass
class Tokenized:
    """The rows of a source that are needed, tokenised.

    `rows` are their numbers in the source, increasing; `tokens` the tokenised table, of which `counts` are the columns
    that are no tokens. `counts["row"]` is a position in `rows`.
    """

    source: Source
    rows: np.ndarray
    tokens: Dataset
    counts: dict[str, np.ndarray]

    @property
    def trained(self) -> np.ndarray:
        """Which tokenised rows are trained on."""
        return np.equal(self.counts["dropped"], None)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """`values`, one a tokenised row, added up for each raw row."""
        return np.bincount(self.counts["row"], weights=values, minlength=len(self.rows))

    def without(self, mask: np.ndarray, reason: str) -> "Tokenized":
        """The same where the raw rows of `mask` are dropped for `reason`, unless they are already."""
        gone = mask[self.counts["row"]] & self.trained
        counts = dict(self.counts)
        counts |= {name: np.where(gone, 0, counts[name]) for name in COUNTS if name not in ("split", "expanded")}
        counts["dropped"] = np.where(gone, reason, counts["dropped"])
        return replace(self, counts=counts)


def prepare(
    script_args: "ScriptArguments", training_args: "SFTConfig", tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """Prepare the data of a recipe and show its ledger. Raises `UserError` for data that cannot be trained on."""
    if unknown := set(training_args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise UserError(f"dataset_kwargs: {', '.join(sorted(unknown))} is not known; data is prepared from other keys")
    if training_args.supervision == "template" and not re.search(r"\{%-?\s*generation\b", tokenizer.chat_template):
        raise UserError(
            "supervision: template needs {% generation %} blocks, and the chat template has none; leave it out"
        )
    args, mixture = training_args, script_args.dataset_mixture
    sources, held_out = load_sources(script_args, args.dataset_text_field, args.do_eval)
    names = [source.name for source in sources]
    order = draw([len(source.rows) for source in sources], script_args, names)
    tables = tokenized(sources, order, tokenizer, args, args.packing)
    halves = split(order, of_rows(tables, order, prompts), script_args)
    train, test = halves["train"], halves.get("test")
    others: list[Tokenized] = []
    packing = args.packing if args.eval_packing is None else args.eval_packing
    if args.do_eval and held_out:
        test = concatenate_datasets([numbered(n, len(source.rows)) for n, source in enumerate(held_out)])
        others = tokenized(held_out, test, tokenizer, args, packing)
    elif args.do_eval:
        alike = Supervision.of(args, packing) == Supervision.of(args, args.packing)
        others = tables if alike else tokenized(sources, test, tokenizer, args, packing)
    asked = of_rows(others, test, prompts)[of_rows(others, test, is_trained)] if others else []
    if args.dedup:
        tables = without_repeats(tables, train, np.isin(of_rows(tables, train, prompts), asked))
    if mixture is not None and mixture.in_proportion:
        train = in_proportion(train, amounts(tables, train, mixture.proportion_unit), mixture, names)
    in_both = np.isin(of_rows(tables, train, prompts), asked) & of_rows(tables, train, is_trained)
    prepared = Prepared(assemble("train", tables, train, args, args.packing, mixture))
    prepared.train.ledger["asked_in_eval"] = int(in_both.sum())
    if others:
        prepared.eval = assemble("eval", others, test, args, packing)
    entries = [entry for part in prepared.parts.values() for entry in part.ledger["sources"]]
    for entry, name in zip(entries, metric_names([entry["source"] for entry in entries]), strict=True):
        entry["metric"] = name
    if args.process_index == 0 and not (args.dry_run and Path(args.output_dir, RUN_STATE).exists()):  # a run's own
        write_rejected(args.output_dir, prepared)
    for part in prepared.parts.values():
        ledger.show(part.ledger)
    ledger.require_good_rows([part.ledger for part in prepared.parts.values()], args.max_bad_rows)
    ledger.require_answers(prepared.train.ledger, args.max_truncated_answers)
    return prepared


def tokenized(
    sources: list[Source], order: Dataset, tokenizer: PreTrainedTokenizerBase, args: "SFTConfig", packing: bool
) -> list[Tokenized]:
    """Every row that an order draws, tokenised, source by source."""
    how = Supervision.of(args, packing)
    of, rows = columns_of(order)
    tables = []
    for number, source in enumerate(sources):
        needed = np.unique(rows[of == number])
        tokens = tokenize_source(source, needed, tokenizer, how, args.dataset_num_proc)
        tables.append(Tokenized(source, needed, tokens, counts_of(tokens)))
    return tables


def of_rows(tables: list[Tokenized], order: Dataset, read: Callable[[Tokenized], np.ndarray]) -> np.ndarray:
    """What `read` gives for each raw row of a table, for each row of an order."""
    of, rows = columns_of(order)
    values = [read(table) for table in tables]
    found = np.zeros(len(order), dtype=values[0].dtype)
    for number, table in enumerate(tables):
        mine = of == number
        found[mine] = values[number][np.searchsorted(table.rows, rows[mine])]
    return found


def prompts(table: Tokenized) -> np.ndarray:
    """What each raw row asks, as 64 bits."""
    first = np.searchsorted(table.counts["row"], np.arange(len(table.rows)))
    found, why = table.counts["prompt"][first], table.counts["dropped"][first]
    for place in np.flatnonzero(~np.equal(why, None)):
        if ledger.is_bad(why[place]):
            found[place] = asks_nothing(table.source, int(table.rows[place]))
    return found


def is_trained(table: Tokenized) -> np.ndarray:
    """Whether anything of each raw row is trained on."""
    return table.sums(table.trained) > 0


def contents(table: Tokenized) -> np.ndarray:
    """What is trained on of each raw row, as 64 bits; 0 for nothing."""
    digests = np.zeros(len(table.rows), dtype=np.int64)
    kept = table.trained
    np.add.at(digests, table.counts["row"][kept], table.counts["digest"][kept])
    return digests


def amounts(tables: list[Tokenized], order: Dataset, unit: str) -> np.ndarray:
    """What each row of an order gives to its source's proportion: supervised tokens, or rows to train on."""
    return of_rows(
        tables, order, lambda table: table.sums(table.counts["supervised"] if unit != "rows" else table.trained)
    )


def without_repeats(tables: list[Tokenized], order: Dataset, in_both: np.ndarray) -> list[Tokenized]:
    """Tables without rows that are exact duplicates of earlier ones in the order, or asked in the evaluation data too.

    A row that a weight repeats is no duplicate of itself.
    """
    of, rows = columns_of(order)
    held = of_rows(tables, order, contents)
    _, first, same = np.unique(held, return_index=True, return_inverse=True)
    first = first[same]
    duplicate = (held != 0) & ((of != of[first]) | (rows != rows[first]))
    for number, table in enumerate(tables):
        for drop, reason in ((in_both, "asked in the evaluation data"), (duplicate, "exact duplicate")):
            mask = np.zeros(len(table.rows), dtype=bool)
            mask[np.searchsorted(table.rows, rows[(of == number) & drop])] = True
            table = table.without(mask, reason)
        tables[number] = table
    return tables


def assemble(
    part: str,
    tables: list[Tokenized],
    order: Dataset,
    args: "SFTConfig",
    packing: bool,
    mixture: "DatasetMixtureConfig | None" = None,
) -> Part:
    """Lay out tokenised rows as `order` draws them, without what was dropped, and pack."""
    of, rows = columns_of(order)
    entries, rejected, start = [], [], 0
    first, last = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    for number, table in enumerate(tables):
        mine, counts = of == number, table.counts
        position = np.searchsorted(table.rows, rows[mine])
        first[mine] = start + np.searchsorted(counts["row"], position, side="left")
        last[mine] = start + np.searchsorted(counts["row"], position, side="right")
        drawn = np.bincount(position, minlength=len(table.rows))
        entry = ledger.entry_of(table.source.name, len(table.source.rows), drawn, counts)
        entries.append({**entry, "contents": table.source.table.contents})
        rejected += rejections(part, table, drawn)
        start += len(table.tokens)
    places = ranges(first, last)
    places = places[np.concatenate([table.trained for table in tables])[places]]
    if len(places) == 0:
        why = sum((Counter(entry["dropped"]) for entry in entries), Counter())
        because = "; ".join(f"{count} rows: {reason}" for reason, count in why.most_common(3)) or "none is drawn"
        raise UserError(f"no row of the {part} data can be trained on: {because}")
    if args.shuffle_dataset:
        places = np.random.default_rng(args.seed).permutation(places)
    together = [with_ids(table.tokens, n, table.rows[table.counts["row"]]) for n, table in enumerate(tables)]
    unpacked = made = concatenate_datasets(together).select(places)
    names = [table.source.name for table in tables]
    if packing:
        made = packed(f"{part} of {', '.join(names)}, packed", together, places, unpacked, args)
    batch = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
    lengths = np.concatenate([table.counts["tokens"] for table in tables])[places]
    asked = [source.proportion for source in mixture.datasets] if mixture and mixture.in_proportion else None
    closed = ledger.close(part, entries, lengths, batch, asked, mixture.proportion_unit if asked else "")
    digests = np.concatenate([table.counts["digest"] for table in tables])
    closed["total"]["duplicates"] = len(np.unique(places)) - len(np.unique(digests[places]))
    if packing:
        ledger.add_packing(closed, made, batch, args.max_length, args.packing_strategy)
        lengths = pc.list_value_length(made.data.column("input_ids")).to_numpy()
    packs = repr((args.packing_strategy, args.max_length)).encode() + lengths.tobytes() if packing else b""
    key = hashlib.sha256(digests[places].tobytes() + packs).hexdigest()[:32]
    return Part(made, unpacked, names, closed, rejected, tables, lengths, key)


def rejections(part: str, table: Tokenized, drawn: np.ndarray) -> list[dict[str, Any]]:
    """What was dropped of the rows of a source, and why; `drawn[i]` is how often row i of them is drawn."""
    counts, source = table.counts, table.source
    dropped = np.flatnonzero(~table.trained & (drawn[counts["row"]] > 0))
    numbers = table.rows[counts["row"][dropped]].tolist()
    found = {}
    for piece, row, place in zip(dropped, numbers, places_of(source, numbers), strict=True):
        reason = counts["dropped"][piece]
        excerpt = {"excerpt": excerpt_of(source, row)} if ledger.is_bad(reason) else {}
        times = {"times": int(drawn[counts["row"][piece]])}
        about = {"part": part, "source": source.name, "row": row, "place": place, "reason": reason, **times, **excerpt}
        found[row, reason] = about
    return list(found.values())


def write_rejected(output_dir: str, prepared: Prepared) -> None:
    """Write `rejected.jsonl`, a line for each row that was dropped; removed when there is none."""
    lines = [json.dumps(row) + "\n" for part in prepared.parts.values() for row in part.rejected]
    path = Path(output_dir) / "rejected.jsonl"
    path.unlink(missing_ok=True)
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        logger.warning("%d rows were dropped: %s says which and why", len(lines), path)


def with_ids(table: Dataset, source: int, rows: np.ndarray) -> Dataset:
    """The tokens of a source's table, and where each row comes from."""
    table = table.select_columns(["input_ids", "labels"])
    fingerprint = table._fingerprint  # what is added follows from what the fingerprint is of, and need not be hashed
    for name, values in (("source", np.full(len(rows), source)), ("row", rows)):
        table = table.add_column(name, values.astype(np.int32), new_fingerprint=fingerprint)
    return table


def ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers first[0] .. last[0] - 1, first[1] .. last[1] - 1, and so on."""
    counts = last - first
    skipped = np.cumsum(counts) - counts
    return np.repeat(first - skipped, counts) + np.arange(counts.sum())
