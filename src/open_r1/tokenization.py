"""Raw rows -> `input_ids` and `labels`, in one batched pass per source; every row and token that is cut is counted."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from open_r1.chat import assistant_spans
from open_r1.data import Source
from open_r1.errors import BadRow, UserError
from open_r1.formats import Row

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
VERSION = 1  # part of the cache key: raise it whenever this module would tokenise a row differently
IGNORED = -100
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tokens": Value("int32"),  # tokens kept
        "cut": Value("int32"),  # tokens beyond max_length
        "supervised": Value("int32"),  # tokens that count in the loss
    }
)


@dataclass(frozen=True)
class Supervision:
    """What `SFTConfig` says about labels and length, as far as tokenising depends on it."""

    assistant_only: bool
    completion_only: bool
    max_length: int | None
    keep_end: bool
    system_prompt: str | None

    @classmethod
    def of(cls, args: "SFTConfig", packing: bool) -> "Supervision":
        """Read it from the training arguments; `bfd_split` and `wrapped` packing cut nothing, they spread rows."""
        spreads = packing and args.packing_strategy != "bfd"
        return cls(
            assistant_only=args.assistant_only_loss is not False,
            completion_only=args.completion_only_loss is not False,
            max_length=None if spreads else args.max_length,
            keep_end=args.truncation_mode == "keep_end",
            system_prompt=args.system_prompt,
        )


def tokenize_source(
    source: Source, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, how: Supervision, num_proc: int | None = None
) -> Dataset:
    """Tokenise `rows` (row numbers, increasing) of a source.

    Returns a table of len(rows) with `input_ids`, `labels` (-100 where not supervised) and the counts `tokens`,
    `cut` and `supervised`. Cached by content, so other ranks and later runs read it. Raises `UserError` naming source and row.
    """
    chosen = source.rows if len(rows) == len(source.rows) else source.rows.select(rows)
    render = assistant_spans(tokenizer)
    encode = partial(encode_batch, to_row=source.to_row, tokenizer=tokenizer, render=render, how=how)
    try:
        return chosen.map(
            encode,
            batched=True,
            batch_size=256,
            with_indices=True,
            remove_columns=chosen.column_names,
            features=FEATURES,
            num_proc=num_proc,
            new_fingerprint=cache_key(chosen, source, tokenizer, how),
            desc=f"Tokenizing {source.name}",
        )
    except BadRow as bad:
        raise UserError(f"{source.name}: row {rows[bad.row]} (counting from 0): {bad.problem}") from None


def cache_key(chosen: Dataset, source: Source, tokenizer: PreTrainedTokenizerBase, how: Supervision) -> str:
    """Content key of a tokenised source. The tokenizer enters by what it writes, since its pickle changes with use."""
    parts = [
        VERSION,
        chosen._fingerprint,
        repr(getattr(source.to_row, "func", source.to_row).__name__),
        repr(getattr(source.to_row, "keywords", {})),
        json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None},
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        [getattr(how, field.name) for field in fields(how)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    to_row: Callable[[Row], Row],
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[..., Any],
    how: Supervision,
) -> dict[str, list[Any]]:
    """Tokenise and label a batch of raw rows. Raises `BadRow` with the index of the first row that is wrong."""
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    ready: dict[int, Row] = {}
    plain: list[bool] = []
    for position, index in enumerate(indices):
        try:
            row = to_row({column: values[position] for column, values in batch.items()})
            if "input_ids" in row:
                ready[position] = row
                continue
            text, said, is_plain = render_row(row, tokenizer, render, how)
        except (ValueError, TypeError, KeyError) as error:
            raise BadRow(index, str(error)) from error
        except Exception as error:  # a template may raise anything; it is still this row's
            raise BadRow(index, f"cannot be rendered: {type(error).__name__}: {error}") from error
        texts.append(text)
        spans.append(said)
        plain.append(is_plain)
    encoded = iter(encode_texts(texts, spans, plain, tokenizer))
    pieces = [
        (ready[p]["input_ids"], ready[p]["labels"]) if p in ready else next(encoded) for p in range(len(indices))
    ]
    return columns_of(pieces, how)


def render_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, render: Callable[..., Any], how: Supervision
) -> tuple[str, list[tuple[int, int]], bool]:
    """A row in TRL's format as text, its supervised character spans, and whether BOS is still to be added."""
    if "text" in row:
        text = with_stop(row["text"], tokenizer)
        return text, [(0, len(text))], True
    if isinstance(row.get("prompt"), str):
        text = with_stop(row["prompt"] + row["completion"], tokenizer)
        return text, [(len(row["prompt"]) if how.completion_only else 0, len(text))], True
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    first_said = 0 if "messages" in row or not how.completion_only else len(row["prompt"])
    if how.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": how.system_prompt}, *messages]
        first_said += bool(first_said)
    tools = row.get("tools")
    kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **{key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None},
    }
    if not how.assistant_only:
        template = tokenizer.get_chat_template(tools=kwargs["tools"])
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
        return text, [(0, len(text))], False
    text, said = render(messages, **kwargs)
    if first_said:
        turns_before = sum(message["role"] == "assistant" for message in messages[:first_said])
        said = said[turns_before:]
    if not said:
        raise ValueError("no assistant turn to learn from; add one, or set assistant_only_loss: false")
    return text, said, False


def with_stop(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` ending with EOS, so that the model learns to stop."""
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def encode_texts(
    texts: list[str], spans: list[list[tuple[int, int]]], plain: list[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each text; a token is supervised when it holds a character of a span."""
    if not texts:
        return []
    # Rows of one source are of one format, so either all or none still need BOS: templates write their own.
    encoded = tokenizer(
        texts, add_special_tokens=plain[0], return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    pieces = []
    for ids, offsets, said in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        for start, end in said:
            supervised |= (starts < end) & (ends > start)
        if plain[0] and said[0][0] == 0:
            supervised |= starts == ends  # BOS of a text that is trained on in full
        pieces.append((ids, np.where(supervised, ids, IGNORED).tolist()))
    return pieces


def columns_of(pieces: list[tuple[list[int], list[int]]], how: Supervision) -> dict[str, list[Any]]:
    """Cut to `max_length` and count what was cut and what is left to learn from."""
    limit = how.max_length
    part = slice(None) if limit is None else slice(-limit, None) if how.keep_end else slice(None, limit)
    return {
        "input_ids": [ids[part] for ids, _ in pieces],
        "labels": [labels[part] for _, labels in pieces],
        "tokens": [len(ids[part]) for ids, _ in pieces],
        "cut": [max(0, len(ids) - limit) if limit is not None else 0 for ids, _ in pieces],
        "supervised": [sum(label != IGNORED for label in labels[part][1:]) for _, labels in pieces],
    }
