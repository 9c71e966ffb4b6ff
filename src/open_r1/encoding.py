"""Texts with supervised character spans -> token ids and labels, encoded in batches.

Where tokens begin and end in a text is told by the bytes that they spell: when those of all its tokens, one behind the
other, are the bytes of the text, their lengths are the bounds. That is a proof and costs less than having the library
keep track of offsets, which it does for texts where the proof fails (an NFC tokenizer that had something to compose).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from open_r1.supervision import CLOSE, OPEN

IGNORED = -100
TEXT_BYTES = 2**21  # characters encoded at once, so that memory is bounded by bytes, not by rows
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte that no token of its own holds
SAMPLE = "Hi, <b>you</b>!\n\n\tÉmile 四 🙂  x7"


@dataclass(slots=True)
class Piece:
    """One row to train on while it is being made: text and character spans, then ids and token ranges, then labels."""

    row: int
    counts: dict[str, int] = field(default_factory=dict)
    text: str = ""
    spans: list[tuple[int, int]] | None = None
    add_bos: bool = False
    ids: np.ndarray | None = None
    ranges: list[tuple[int, int]] | None = None
    labels: np.ndarray | None = None
    dropped: str | None = None
    prompt: int = 0


class Spelling(NamedTuple):
    """The bytes that each token id stands for, how many they are, and the ids that a tokenizer puts before a text."""

    texts: list[bytes]
    sizes: np.ndarray
    bos: list[int]


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling | None:
    """How a tokenizer spells its tokens, None when that cannot be told from its vocabulary."""
    backend = tokenizer.backend_tokenizer
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()} | added
    if not vocabulary:
        return None
    as_bytes = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = "ByteLevel" in repr(backend.decoder)
    texts = [b""] * (max(vocabulary) + 1)
    for number, token in vocabulary.items():
        if number in added:
            texts[number] = token.encode()
        elif byte_level:
            texts[number] = bytes(as_bytes.get(char, 0) for char in token)
        elif byte := BYTE_TOKEN.fullmatch(token):
            texts[number] = bytes.fromhex(byte[1])
        else:
            texts[number] = token.replace("▁", " ").encode()
    spelling = Spelling(texts, np.array([len(text) for text in texts]), backend.encode("").ids)
    return spelling if spells(spelling, backend.encode(SAMPLE, add_special_tokens=False).ids, SAMPLE) else None


def spells(spelling: Spelling, ids: Sequence[int], text: str) -> bool:
    """Whether the tokens spell the text, byte for byte."""
    if len(ids) < 2:
        return b"".join(spelling.texts[token] for token in ids) == text.encode()
    return b"".join(itemgetter(*ids)(spelling.texts)) == text.encode()


def encode_pieces(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, spelling: Spelling | None) -> None:
    """Fill in ids and labels: a token is supervised when it holds a character of a span.

    Where a token would hold the end of a prompt and the beginning of its answer, they are encoded apart.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False  # the encoding of marked texts may have left it on
    plain = [piece for piece in pieces if piece.ids is None]
    for group in by_bytes(plain):
        unclear = group if spelling is None else encode_spelled(group, backend, spelling)
        if unclear:
            encode_with_offsets(unclear, backend)
        for piece in group:
            if piece.ranges is None:
                encode_apart(piece, tokenizer, spelling.bos if piece.add_bos else ())


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


def encode_spelled(pieces: list[Piece], backend: Any, spelling: Spelling) -> list[Piece]:
    """Encode pieces, leaving out those whose tokens do not spell their text, which are returned.

    `ranges` stays None where a token holds both the end of a prompt and the beginning of its answer. Rows of one
    source are of one format, so either all or none still need BOS: templates write their own.
    """
    add_bos = pieces[0].add_bos
    encodings = backend.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=add_bos)
    lists = [encoding.ids for encoding in encodings]
    bounds = np.cumsum([0, *map(len, lists)])
    ids = np.fromiter(chain.from_iterable(lists), np.int32, count=bounds[-1])
    ends = np.cumsum(spelling.sizes[ids])  # in bytes of all texts, BOS included
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    lead = len(spelling.bos) if add_bos else 0
    unclear = []
    for piece, tokens, start, end in zip(pieces, lists, bounds, bounds[1:], strict=False):
        piece.ids, piece.labels = ids[start:end], labels[start:end]
        if piece.add_bos and piece.spans == [(0, len(piece.text))]:
            piece.ranges = [(0, len(tokens))]  # a text that is trained on in full, BOS included
        elif tokens[:lead] == spelling.bos[:lead] and spells(spelling, tokens[lead:] if lead else tokens, piece.text):
            own = ends[start + lead : end]
            before = ends[start + lead - 1] if start + lead else 0
            piece.ranges = ranges_in(piece, own - before, lead)
        else:
            unclear.append(piece)
            continue
        for first, last in piece.ranges or ():
            piece.labels[first:last] = piece.ids[first:last]
    return unclear


def ranges_in(piece: Piece, ends: np.ndarray, lead: int) -> list[tuple[int, int]] | None:
    """The tokens [first, last) that hold each span, when token i behind the `lead` of BOS ends before byte `ends[i]`.

    None when one of them begins before its span.
    """
    ranges, at, done = [], 0, 0
    for start, end in piece.spans:
        if start == end:
            ranges.append((0, 0))
            continue
        begins, stops = start, end  # in bytes
        if not piece.text.isascii():
            begins = done + len(piece.text[at:start].encode())
            at, done = end, begins + len(piece.text[start:end].encode())
            stops = done
        first, last = ends.searchsorted([begins, stops - 1], "right").tolist()
        if (ends[first - 1] if first else 0) != begins:
            return None
        ranges.append((first + lead, last + 1 + lead))
    return ranges


def encode_with_offsets(pieces: list[Piece], backend: Any) -> None:
    """Encode pieces with the library's own character offsets; `ranges` stays None as in `encode_spelled`."""
    add_bos = pieces[0].add_bos
    for piece, encoding in zip(
        pieces, backend.encode_batch([p.text for p in pieces], add_special_tokens=add_bos), strict=True
    ):
        piece.ids = np.array(encoding.ids, dtype=np.int32)
        piece.labels = np.full(len(piece.ids), IGNORED, dtype=np.int32)
        ranges = [token_range(encoding, *span) for span in piece.spans]
        firsts = zip(ranges, piece.spans, strict=True)
        if not add_bos and not all(starts_at(encoding, first, span[0]) for (first, _), span in firsts):
            continue
        piece.ranges = [(0, len(encoding))] if add_bos and piece.spans[0][0] == 0 else ranges
        for first, last in piece.ranges:
            piece.labels[first:last] = piece.ids[first:last]


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


def encode_apart(piece: Piece, tokenizer: PreTrainedTokenizerBase, bos: Sequence[int] = ()) -> None:
    """Encode a text part by part; control tokens that a user spelled out, which are marked, become plain text.

    Pieces between marks and span ends are encoded one by one, as inference encodes a prompt apart from its answer.
    """
    said = np.zeros(len(piece.text), dtype=bool)
    for start, end in piece.spans:
        said[start:end] = True
    marks = set() if piece.add_bos else marks_in(piece.text)
    bounds = sorted({0, len(piece.text), *(bound for span in piece.spans for bound in span)} | marks)
    ids: list[int] = [*bos]
    labels: list[int] = [IGNORED] * len(ids)
    for start, end in zip(bounds, bounds[1:], strict=False):
        literal = start in marks and piece.text[start] == OPEN
        text = piece.text[start:end].strip(OPEN + CLOSE) if marks else piece.text[start:end]
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
