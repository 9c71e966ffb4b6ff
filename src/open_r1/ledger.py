"""The ledger: what became of every row and token, by source and by reason. Nothing else counts; messages quote it."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from open_r1.errors import UserError

logger = logging.getLogger(__name__)
Entry = dict[str, Any]
BAD_ROW = "bad row: "  # how the reason for dropping a row begins where the row is at fault
REASONS_SHOWN = 5  # on screen; ledger.json has all
LENGTHS = ("p50", "p90", "p99", "max")
# The columns of the two tables on screen.
ROWS_SHOWN = {
    "in": "rows_in",
    "expanded": "expanded",
    "split": "split",
    "trained": "trained",
    "dropped": "dropped",
    "cut": "truncated",
    "lost ends": "lost_end",
    "duplicates": "duplicates",
    "epochs": "epochs",
}
TOKENS_SHOWN = {
    "trained": "tokens",
    "supervised": "supervised",
    "share": "supervised_share",
    "requested": "requested_share",
    "achieved": "achieved_share",
    **{key: key for key in LENGTHS},
}
WITHOUT_PROPORTION = {"requested": "of rows", "achieved": "of supervised"}
COUNTS = ("tokens", "supervised", "cut", "answers", "lost_end", "masked_turns", "control_tokens", "stop_added")
COUNTS += ("expanded", "split")
"""What is counted of each tokenised row: `tokens` kept; `supervised` of them, as far as they enter the loss; `cut`
tokens beyond max_length; `answers` the supervised stretches and `lost_end` those of them whose end was cut off;
`masked_turns` rewritten and not trained; `control_tokens` spelled out in contents and encoded as text; `stop_added`
stop tokens that the template does not write; `expanded` is 1 for every row but the first that rewritten turns make of
a conversation, `split` for every part of a text but the first."""


def entry_of(name: str, source_rows: int, drawn: np.ndarray, columns: dict[str, np.ndarray]) -> Entry:
    """What became of one source.

    Args: `drawn[i]` is how often its chosen row i is in the mixture; `columns` are the tokenised table's counts, one
    value a tokenised row.
    """
    times = drawn[columns["row"]]
    kept = np.equal(columns["dropped"], None)
    dropped: Counter = Counter()
    require_each_once(name, drawn, columns)
    sums = {column: int((columns[column] * times).sum()) for column in COUNTS}
    gone = np.flatnonzero(~kept & (times > 0))
    bad = {row for row, why in zip(columns["row"][gone], columns["dropped"][gone], strict=True) if is_bad(why)}
    for reason, count in zip(columns["dropped"][gone], times[gone], strict=True):
        dropped[brief_reason(reason)] += int(count)
    lengths = np.repeat(columns["tokens"][kept], times[kept])
    return {
        "source": name,
        "rows_in_source": source_rows,
        "rows_in": int(drawn.sum()),
        "rows_used": int((drawn > 0).sum()),
        "bad_rows": len(bad),
        "expanded_tokens": 0 if sums["split"] else growth(columns["row"], columns["tokens"], times),
        "trained": int(times[kept].sum()),
        "dropped": dict(dropped),
        "truncated": int(times[kept & (columns["cut"] > 0)].sum()),
        "duplicates": int((kept & (times > 0)).sum() - len(np.unique(columns["digest"][kept & (times > 0)]))),
        **sums,
        "epochs": round(float(drawn.sum() / source_rows), 4),
        "lengths": lengths_of(lengths),
        "histogram": histogram_of(lengths),
    }


def require_each_once(name: str, drawn: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    """Every drawn row has one tokenised row of its own, beside those that it was expanded or split into."""
    own = columns["row"][(columns["expanded"] == 0) & (columns["split"] == 0)]
    if lost := np.flatnonzero((np.bincount(own, minlength=len(drawn)) != 1) & (drawn > 0)).tolist():
        raise RuntimeError(
            f"the ledger of {name} does not close: {len(lost)} rows are lost or doubled, first {lost[0]}"
        )


def is_bad(reason: str) -> bool:
    """Whether a row was dropped for what is wrong with it."""
    return reason.startswith(BAD_ROW)


def brief_reason(reason: str) -> str:
    """Why a row was dropped, short enough to count by: without what was found and how to mend it."""
    return reason.partition(";")[0][:80]


def growth(rows: np.ndarray, tokens: np.ndarray, times: np.ndarray) -> int:
    """Tokens added by rows made of rewritten turns: all that come of a conversation but the longest."""
    if len(rows) == 0:
        return 0
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    longest = np.maximum.reduceat(tokens, starts)
    return int((tokens * times).sum() - (longest * times[starts]).sum())


def lengths_of(lengths: np.ndarray) -> dict[str, int]:
    """Percentiles of row lengths in tokens, empty without rows."""
    if len(lengths) == 0:
        return {}
    return {f"p{p}": int(np.percentile(lengths, p)) for p in (50, 90, 99)} | {"max": int(lengths.max())}


def histogram_of(lengths: np.ndarray) -> dict[str, int]:
    """Rows by their length in tokens: the least length of each bin that has any -> rows.

    Bins are the same for all data, four each time the length doubles: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 ...
    """
    octaves = 2 ** np.maximum(np.frexp(lengths)[1].astype(np.int64) - 1, 0)
    firsts, rows = np.unique(octaves + octaves * ((lengths - octaves) * 4 // octaves) // 4, return_counts=True)
    return dict(zip(map(str, firsts.tolist()), rows.tolist(), strict=True))


def last_in_bin(first: int) -> int:
    """The greatest length in the bin of a histogram that begins with `first`."""
    octave = 2 ** max(0, first.bit_length() - 1)
    return first + max(1, octave // 4) - 1


def total_of(entries: list[Entry]) -> Entry:
    """All sources of one part together."""
    numbers = [key for key, value in entries[0].items() if isinstance(value, int)]
    total: Entry = {"source": "all", **{key: sum(entry[key] for entry in entries) for key in numbers}}
    total["dropped"] = dict(sum((Counter(entry["dropped"]) for entry in entries), Counter()))
    return total


def require_closed(entry: Entry) -> None:
    """Rows in + expanded + split = trained + dropped; anything else is our bug."""
    before = entry["rows_in"] + entry["expanded"] + entry["split"]
    after = entry["trained"] + sum(entry["dropped"].values())
    if before != after:
        raise RuntimeError(f"the ledger of {entry['source']} does not close: {before} rows before, {after} after")


def close(
    part: str,
    entries: list[Entry],
    lengths: np.ndarray,
    batch: int,
    proportions: list[float] | None = None,
    unit: str = "",
) -> Entry:
    """Close the ledger of `train` or `eval`: check its sums, add shares and padding. Returns it.

    Args: `lengths` of the rows to train on, in tokens, before packing; `batch` rows on a device; `proportions` asked
    of the sources and their `unit` (`rows`, else supervised tokens). Without them a source's rows in are asked.
    """
    for entry in entries:
        require_closed(entry)
    total = total_of(entries)
    if total["trained"] != len(lengths):
        raise RuntimeError(
            f"the ledger of {part} does not close: {total['trained']} rows counted, {len(lengths)} laid out"
        )
    for entry in [*entries, total]:
        entry["supervised_share"] = round(entry["supervised"] / max(1, entry["tokens"]), 4)
        entry["requested_share"] = round(entry["rows_in"] / max(1, total["rows_in"]), 4)
        given = "trained" if unit == "rows" else "supervised"
        entry["achieved_share"] = round(entry[given] / max(1, total[given]), 4)
    for entry, proportion in zip(entries, proportions or (), strict=proportions is not None):
        entry["requested_share"] = round(proportion / sum(proportions), 4)
    total["lengths"], total["histogram"] = lengths_of(lengths), histogram_of(lengths)
    total["batch"] = batch
    total["padding_share"] = round(padding_share(lengths, batch), 4)
    return {"part": part, "in_proportion": proportions is not None, "sources": entries, "total": total}


def add_packing(closed: Entry, packs: Dataset, batch: int, pack_length: int, strategy: str) -> None:
    """Add to a closed ledger how well rows fill `packs` of `pack_length` tokens, and the padding that is left.

    Documents packed by `bfd` and `bfd_split` reach the model as one long row without padding, `wrapped` ones do not.
    """
    total = closed["total"]
    total["packs"] = len(packs)
    total["packing_efficiency"] = round(total["tokens"] / (len(packs) * pack_length), 4)
    padded = strategy == "wrapped"
    lengths = pc.list_value_length(packs.data.column("input_ids")).to_numpy() if padded else None
    total["packed_padding_share"] = round(padding_share(lengths, batch), 4) if padded else 0.0
    total["packed_supervised"] = total["supervised"] if strategy == "bfd" else supervised_in(packs)


def supervised_in(packs: Dataset) -> int:
    """Tokens of packs that enter the loss: not the first one of a document, nor of a pack that tells none apart."""
    count = 0
    for batch in packs.with_format("arrow").iter(batch_size=1000):
        labels = batch["labels"].combine_chunks()
        values, lengths = labels.flatten().to_numpy(), pc.list_value_length(labels)
        if "seq_lengths" in batch.column_names:
            lengths = batch["seq_lengths"].combine_chunks().flatten()
        starts = np.cumsum(lengths.to_numpy()) - lengths.to_numpy()
        count += int((values != -100).sum() - (values[starts] != -100).sum())
    return count


def padding_share(lengths: np.ndarray, batch: int, seed: int = 0) -> float:
    """Share of padding in batches of `batch` rows drawn in a random order."""
    order = np.random.default_rng(seed).permutation(lengths)
    order = order[: len(order) // batch * batch].reshape(-1, batch) if len(order) >= batch else order[None]
    return float(1 - order.sum() / (order.max(axis=1) * order.shape[1]).sum())


def require_answers(ledger: Entry, limit: float | None) -> None:
    """Raise `UserError` when a larger share of the answers than `limit` lost its end."""
    total = ledger["total"]
    answers = total["answers"]
    share = total["lost_end"] / max(1, answers)
    if limit is not None and share > limit:
        raise UserError(
            f"{total['lost_end']} of {answers} answers ({share:.1%}) lose their end to max_length, more than "
            f"max_truncated_answers {limit:.1%}; raise max_length, or set on_long_row: drop"
        )


def require_good_rows(ledgers: list[Entry], limit: float | None) -> None:
    """Raise `UserError` when more rows are bad than `limit`: a share below 1, or a count. Repeats count once."""
    entries = [entry for ledger in ledgers for entry in ledger["sources"]]
    rows = sum(entry["rows_used"] for entry in entries)
    bad = [
        (count, f"{entry['source']}: {count} rows: {reason}")
        for entry in entries
        for reason, count in entry["dropped"].items()
        if is_bad(reason)
    ]
    found = sum(entry["bad_rows"] for entry in entries)
    if limit is not None and found > (limit * rows if limit < 1 else limit):
        listed = "\n  ".join(line for _, line in sorted(bad, reverse=True)[:10])
        raise UserError(
            f"{found} of {rows} rows are bad, more than max_bad_rows {limit:g}; mend them (rejected.jsonl in "
            f"output_dir names each), or raise it\n  {listed}"
        )


def show(ledger: Entry) -> None:
    """Log the ledger: its rows, its tokens, padding and packing, and a warning for all that was cut or dropped."""
    entries = [*ledger["sources"], *([ledger["total"]] if len(ledger["sources"]) > 1 else [])]
    for what, columns in (("rows", ROWS_SHOWN), ("tokens", TOKENS_SHOWN)):
        names = columns if ledger["in_proportion"] else [WITHOUT_PROPORTION.get(name, name) for name in columns]
        heads = [f"{ledger['part']}, {what}", *names]
        lines = [[entry["source"], *(cell(entry, key) for key in columns.values())] for entry in entries]
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        for first, *others in (heads, *lines):
            logger.info("%s  %s", first.ljust(widths[0]), "  ".join(map(str.rjust, others, widths[1:])))
    total = ledger["total"]
    packing = ""
    if "packs" in total:
        packing = f"; packed, {total['packs']:,} rows are {total['packing_efficiency']:.1%} full, and padding is "
        packing += f"{total['packed_padding_share']:.1%}"
    padding = f"{total['padding_share']:.1%} of a batch of {total['batch']}"
    logger.info("%s: padded, %s would be padding%s", ledger["part"], padding, packing)
    if ledger.get("asked_in_eval"):
        logger.warning(
            "train: %d rows ask what the evaluation data asks; dedup: true drops them", ledger["asked_in_eval"]
        )
    for entry in ledger["sources"]:
        asked, achieved = entry["requested_share"], entry["achieved_share"]
        if ledger["in_proportion"] and abs(asked - achieved) > 0.01:
            logger.warning(
                "%s %s: a proportion of %.1f%% is asked and %.1f%% reached: it has too few rows, or too large ones",
                *(ledger["part"], entry["source"], 100 * asked, 100 * achieved),
            )
        dropped = Counter(entry["dropped"]).most_common()
        for reason, count in dropped[:REASONS_SHOWN]:
            logger.warning("%s %s: %d rows dropped: %s", ledger["part"], entry["source"], count, reason)
        if rest := dropped[REASONS_SHOWN:]:
            count = sum(count for _, count in rest)
            logger.warning("%s %s: %d more rows for other reasons", ledger["part"], entry["source"], count)
        if entry["truncated"]:
            logger.warning(
                "%s %s: %d rows are longer than max_length; %d tokens are cut off and %d answers lost their end",
                ledger["part"],
                entry["source"],
                entry["truncated"],
                entry["cut"],
                entry["lost_end"],
            )


def cell(entry: Entry, key: str) -> str:
    """A number of an entry as it is shown; empty where there is none."""
    value = entry["lengths"].get(key) if key in LENGTHS else entry.get(key)
    if isinstance(value, dict):
        value = sum(value.values())
    if isinstance(value, float):
        return f"{value:.2f}" if key == "epochs" else f"{value:.1%}"
    return "" if value is None else f"{value:,}"


def write(output_dir: str, ledgers: dict[str, Entry]) -> None:
    """Write `ledger.json`: one entry for `train`, one for `eval` where there is one."""
    path = Path(output_dir) / "ledger.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ledgers, indent=1) + "\n")
