"""Texts with supervised character spans -> token ids and labels, encoded in batches."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_r1.supervision import CLOSE, OPEN

IGNORED = -100
TEXT_BYTES = 2**21  # characters encoded at once, so that memory is bounded by bytes, not by rows


@dataclass
class Piece:
    """One row to train on while it is being made: text and character spans, then ids and token ranges, then labels."""

    row: int
    counts: Counter
    text: str = ""
    spans: list[tuple[int, int]] | None = None
    add_bos: bool = False
    ids: np.ndarray | None = None
    ranges: list[tuple[int, int]] | None = None
    labels: np.ndarray | None = None
    dropped: str | None = None


def encode_pieces(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill in ids and labels: a token is supervised when it holds a character of a span.

    Where a token would hold the end of a prompt and the beginning of its answer, they are encoded apart.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False  # the encoding of marked texts may have left it on
    plain = [piece for piece in pieces if piece.ids is None]
    for group in by_bytes(plain):
        # Rows of one source are of one format, so either all or none still need BOS: templates write their own.
        encodings = backend.encode_batch([piece.text for piece in group], add_special_tokens=group[0].add_bos)
        bounds = np.cumsum([0, *map(len, encodings)])
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, count=bounds[-1])
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        for piece, encoding, start, end in zip(group, encodings, bounds, bounds[1:], strict=False):
            piece.ids, piece.labels = ids[start:end], labels[start:end]
            piece.ranges = [token_range(encoding, *span) for span in piece.spans]
            firsts = zip(piece.ranges, piece.spans, strict=True)
            if not piece.add_bos and not all(starts_at(encoding, first, span[0]) for (first, _), span in firsts):
                encode_marked(piece, tokenizer)
                continue
            if piece.add_bos and piece.spans[0][0] == 0:
                piece.ranges = [(0, len(encoding))]  # a text that is trained on in full, BOS included
            for first, last in piece.ranges:
                piece.labels[first:last] = piece.ids[first:last]


def by_bytes(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about `TEXT_BYTES` characters."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= TEXT_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def token_range(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """The tokens [first, last) that hold characters [start, end); characters that no token holds are skipped."""
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while start < end and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    return (first, last + 1) if start < end else (0, 0)


def starts_at(encoding: Any, token: int, start: int) -> bool:
    """Whether a token begins at character `start` and the one before it ends there.

    Some tokenizers leave white space out of a token's characters, so both are looked at.
    """
    return encoding.token_to_chars(token)[0] == start and (not token or encoding.token_to_chars(token - 1)[1] == start)


def encode_marked(piece: Piece, tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode a text part by part; control tokens that a user spelled out, which are marked, become plain text.

    Pieces between marks and span ends are encoded one by one, as inference encodes a prompt apart from its answer.
    """
    said = np.zeros(len(piece.text), dtype=bool)
    for start, end in piece.spans:
        said[start:end] = True
    bounds = sorted({0, len(piece.text), *(bound for span in piece.spans for bound in span)} | marks_in(piece.text))
    ids: list[int] = []
    labels: list[int] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        literal = piece.text[start] == OPEN
        text = piece.text[start:end].strip(OPEN + CLOSE)
        part = encode_alone(text, tokenizer, literal)
        ids += part
        labels += part if said[start] else [IGNORED] * len(part)
    piece.ids, piece.labels = np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)
    piece.ranges = ranges_of(piece.labels)


def marks_in(text: str) -> set[int]:
    """Where marked stretches begin and end."""
    return {place + (mark == CLOSE) for place, mark in enumerate(text) if mark in (OPEN, CLOSE)}


def encode_alone(text: str, tokenizer: PreTrainedTokenizerBase, literal: bool) -> list[int]:
    """Ids of a stretch of text; `literal`: control tokens as the text they are. Raises `ValueError` if it cannot."""
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=literal) if text else []
    if literal and tokenizer.convert_tokens_to_ids(text) in ids:
        raise ValueError(f"{text!r} stands in a content and this tokenizer has no way to encode it as text; remove it")
    return ids


def ranges_of(labels: np.ndarray) -> list[tuple[int, int]]:
    """The supervised stretches [first, last) of labels."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORED, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
