"""Rows as they are trained on, token by token, for people: `scripts/preview.py` and the report show them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from open_r1.checkpoints import write_whole
from open_r1.ledger import last_in_bin
from open_r1.schema import masked

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from open_r1.ledger import Entry
    from open_r1.preparation import Part

IN_WORDS = {
    "cut": "tokens cut off",
    "lost_end": "lost ends",
    "masked_turns": "turns masked",
    "control_tokens": "control tokens as text",
    "stop_added": "stop tokens added",
}
TRAIN_SAMPLES = "train_samples.json"
KEPT, LONGEST_KEPT = 2, 1000  # samples of a source in it, and tokens of one


class Token(NamedTuple):
    """A token: its id, the text it adds (empty when it is only a part of a character), whether it is supervised."""

    id: int
    text: str
    supervised: bool


class Sample(NamedTuple):
    """A tokenised row: a line that says where it comes from and what was done to it, and its tokens."""

    title: str
    tokens: list[Token]


class View(NamedTuple):
    """What is shown of a source: its name, and samples of the rows that are trained on."""

    name: str
    samples: list[Sample]


def views_of(
    train: "Part", tokenizer: "PreTrainedTokenizerBase", count: int, longest: int | None = None
) -> list[View]:
    """`count` samples of each training source; of a row of more than `longest` tokens, its start and its end."""
    of, numbers = (train.unpacked.with_format("numpy")[name][:] for name in ("source", "row"))
    views = []
    for number, table in enumerate(train.tables):
        counts, rows, made_of = table.counts, table.rows, table.counts["row"]
        drawn = np.bincount(np.searchsorted(rows, numbers[of == number]), minlength=len(rows))
        kept = np.flatnonzero(table.trained & (drawn[made_of] > 0))
        several = np.bincount(made_of, minlength=1)[made_of[kept]] > 1
        places = pick(kept, counts["cut"][kept] > 0, several, count)
        samples = [sample_of(table.tokens, place, rows, tokenizer, longest) for place in places]
        views.append(View(visible(table.source.name), samples))
    return views


def pick(kept: np.ndarray, cut: np.ndarray, several: np.ndarray, count: int) -> list[int]:
    """`count` of the rows `kept`: the first, one that was `cut`, two of `several` made of one row, then spread."""
    special = dict.fromkeys([*kept[:1], *kept[cut][:1], *kept[several][:2]])
    spread = np.linspace(0, len(kept) - 1, max(0, count - len(special)) + 2)[1:-1].round().astype(int)
    spaced = kept[spread] if len(kept) else kept
    return sorted(int(place) for place in list(dict.fromkeys([*special, *spaced, *kept[:count]]))[:count])


def sample_of(
    table: "Dataset", place: int, rows: np.ndarray, tokenizer: "PreTrainedTokenizerBase", longest: int | None = None
) -> Sample:
    """The tokenised row at `place` of the table of a source's `rows`."""
    row = table[place]
    siblings = np.flatnonzero(table.data.column("row").to_numpy() == row["row"])
    title = f"row {rows[row['row']]}, {row['tokens']:,} tokens, {row['supervised']:,} supervised"
    if len(siblings) > 1:
        title += f"; {place - siblings[0] + 1} of {len(siblings)} made of this row"
    title += "".join(f"; {words}: {row[key]:,}" for key, words in IN_WORDS.items() if row[key])
    ids, labels = row["input_ids"], row["labels"]
    parts = [slice(None)]
    if longest and len(ids) > longest:
        parts = [slice(longest // 2), slice(-longest // 2, None)]
        title += f"; {len(ids) - longest // 2 * 2:,} tokens in the middle are left out"
    tokens: list[Token] = []
    for part in parts:
        texts = map(visible, texts_of(ids[part], tokenizer))
        tokens += map(Token, ids[part], texts, (label != -100 for label in labels[part]))
    return Sample(title, tokens)


def texts_of(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What each token adds to the text. A character spread over several tokens counts for the last of them."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        # With the token before it, since some tokenizers strip the space that a first token starts with.
        before, both = (
            tokenizer.decode(ids[max(0, start - 1) : stop], clean_up_tokenization_spaces=False)
            for stop in (start, end)
        )
        if both.endswith("\ufffd") and end - start < 4 and end < len(ids):
            texts.append("")
        else:
            texts.append(both[len(before) :] if both.startswith(before) else tokenizer.decode(ids[start:end]))
            start = end
    return texts


def stretches(tokens: list[Token]) -> list[tuple[str, bool]]:
    """The text of tokens, cut only where supervision begins or ends: (text, supervised)."""
    found: list[tuple[str, bool]] = []
    bounds = [at for at in range(1, len(tokens)) if tokens[at].supervised != tokens[at - 1].supervised]
    for start, end in zip([0, *bounds], [*bounds, len(tokens)], strict=True):
        if start < end:
            found.append(("".join(token.text for token in tokens[start:end]), tokens[start].supervised))
    return found


def visible(text: str) -> str:
    """`text` with what would steer a terminal, hide, or turn the direction of a line as code points."""
    return "".join(c if c.isprintable() or c in "\n\t\u3000" else f"<U+{ord(c):04X}>" for c in text)


def bars_of(entries: "list[Entry]") -> list[list[tuple[int, int, int]]]:
    """For each entry of a ledger the bars (first, last, rows) of its histogram, all of them on one common scale."""
    firsts = [int(first) for entry in entries for first in entry["histogram"]]
    scale, first = [], min(firsts, default=1)
    while first <= max(firsts, default=0):
        scale.append((first, last_in_bin(first)))
        first = scale[-1][1] + 1
    return [[(first, last, entry["histogram"].get(str(first), 0)) for first, last in scale] for entry in entries]


def write_samples(output_dir: str, train: "Part", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write `train_samples.json`, the rows that the report shows: `title` and `stretches` of each source's samples.

    A row with what looks like a secret stays out of it.
    """
    said = [
        {
            "source": view.name,
            "samples": [
                {"title": sample.title, "stretches": stretches(sample.tokens)}
                for sample in view.samples
                if (text := "".join(token.text for token in sample.tokens)) == masked(text)
            ],
        }
        for view in views_of(train, tokenizer, KEPT, LONGEST_KEPT)
    ]
    write_whole(Path(output_dir) / TRAIN_SAMPLES, json.dumps(said) + "\n", durable=False)
