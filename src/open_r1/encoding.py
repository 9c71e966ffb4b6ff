"""Texts with supervised character spans -> token ids and labels, encoded in batches.

Where tokens begin and end in a text is told by the bytes that they spell: when those of all its tokens, one behind the
other, are the bytes of the text, their lengths are the bounds. That is a proof and costs less than having the library
keep track of offsets, which it does for texts where the proof fails (an NFC tokenizer that had something to compose).
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from open_r1.processes import cores_here
from open_r1.supervision import CLOSE, OPEN

IGNORED = -100
TEXTS = 64  # encoded at once: what the library makes of short ones stays in a core's cache
THREADS = 4  # at most: what is left to Python takes a third of the time, so more would wait for it
TEXT_BYTES = 2**16  # characters encoded at once, so that threads share long ones, too
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte that no token of its own holds
TAKEN_APART = "a control token is spelled out where the chat template takes texts apart; remove it from the row"
SAMPLE = "Hi, <b>you</b>!\n\n\tÉmile 四 🙂  x7"


@dataclass(slots=True)
class Piece:
    """One row to train on while it is being made: text and character spans, then ids and token ranges, then labels.

    `add_bos` says that the text is no rendering of a template, so that BOS has to be put before it.
    """

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


@dataclass
class Spelling:
    """What encoding needs to know of a tokenizer.

    `texts` are the bytes that each token id stands for, None when they cannot be told from the vocabulary, and `sizes`
    how many they are; `bos` the ids that it puts before a text; `inner` encodes what stands inside a text: as the
    tokenizer (`backend`) does, but without the space that some put before everything they are given.
    """

    texts: list[bytes] | None
    sizes: np.ndarray
    bos: list[int]
    backend: Tokenizer

    @cached_property
    def inner(self) -> Tokenizer:
        """Made when it is needed, which is rare."""
        return without_prefix(self.backend)


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Learn how a tokenizer spells."""
    backend = tokenizer.backend_tokenizer
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()} | added
    as_bytes = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = "ByteLevel" in repr(backend.decoder)
    texts = [b""] * (max(vocabulary, default=-1) + 1)
    for number, token in vocabulary.items():
        if number in added:
            texts[number] = token.encode()
        elif byte_level:
            texts[number] = bytes(as_bytes.get(char, 0) for char in token)
        elif byte := BYTE_TOKEN.fullmatch(token):
            texts[number] = bytes.fromhex(byte[1])
        else:
            texts[number] = token.replace("▁", " ").encode()
    bare, dressed = (backend.encode(SAMPLE, add_special_tokens=special).ids for special in (False, True))
    before = next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)
    spelling = Spelling(texts, np.array([len(text) for text in texts]), dressed[:before], backend)
    return spelling if spells(spelling, bare, SAMPLE) else replace(spelling, texts=None)


def without_prefix(backend: Tokenizer) -> Tokenizer:
    """A tokenizer that puts no space before what it is given."""
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    for part in ("normalizer", "pre_tokenizer"):
        state[part] = unprefixed(state[part])
    return Tokenizer.from_str(json.dumps(state))


def unprefixed(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, as its JSON, without what puts a space before a text."""
    if node is None or node["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in node:
            node = {**node, key: [kept for each in node[key] if (kept := unprefixed(each)) is not None]}
    changed = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return {**node, **changed.get(node["type"], {})}


def spells(spelling: Spelling, ids: Sequence[int], text: str) -> bool:
    """Whether the tokens spell the text, byte for byte."""
    if len(ids) < 2:
        return b"".join(spelling.texts[token] for token in ids) == text.encode()
    return b"".join(itemgetter(*ids)(spelling.texts)) == text.encode()


def encode_pieces(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, spelling: Spelling) -> None:
    """Fill in ids and labels: a token is supervised when it holds a character of a span.

    Where a token would hold the end of a prompt and the beginning of its answer, they are encoded apart. Raises
    `ValueError` when a text cannot be encoded as what it is.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    groups = list(by_bytes([piece for piece in pieces if piece.ids is None]))
    plains = [[piece for piece in group if piece.add_bos or OPEN not in piece.text] for group in groups]
    if spelling.texts:
        encoded = encoders(os.getpid()).map(partial(ids_of, backend=backend), plains)
    for group, plain in zip(groups, plains, strict=True):
        unclear = take_spelled(plain, next(encoded), spelling) if spelling.texts else plain
        encode_with_offsets(unclear, backend, spelling.bos)
        for piece in group:
            if piece.ranges is None:
                encode_apart(piece, spelling)


def by_bytes(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of `TEXTS`, or of about `TEXT_BYTES` characters where that is fewer."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= TEXT_BYTES or len(group) == TEXTS:
            yield group
            group, size = [], 0
    if group:
        yield group


@lru_cache(maxsize=1)
def encoders(process: int) -> ThreadPoolExecutor:
    """The threads of a process that encode while it goes on with what only Python can do; they remember words.

    Each encodes a group by itself: the library's own threads, who share out every single group, are slower and cost
    more. `TOKENIZERS_PARALLELISM=false` means one.
    """
    alone = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return ThreadPoolExecutor(1 if alone else min(len(cores_here()), THREADS), f"encoder of {process}")


def ids_of(pieces: list[Piece], backend: Tokenizer) -> list[list[int]]:
    """The token ids of each piece's text."""
    texts = [piece.text for piece in pieces]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def take_spelled(pieces: list[Piece], lists: list[list[int]], spelling: Spelling) -> list[Piece]:
    """Give pieces the tokens of their texts, but those whose tokens do not spell their text, which are returned.

    `ranges` stays None where a token holds both the end of a prompt and the beginning of its answer.
    """
    texts = [piece.text for piece in pieces]
    bounds, flat = np.cumsum([0, *map(len, lists)]), list(chain.from_iterable(lists))
    ids = np.fromiter(flat, np.int32, count=len(flat))
    before = np.concatenate([[0], np.cumsum(spelling.sizes[ids])])  # the bytes of all texts before each token
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    unclear = []
    all_ranges = ranges_in(pieces, bounds, before)
    sizes = [len(text.encode()) for text in texts]
    all_spelled = np.diff(before[bounds]).tolist() == sizes and spells(spelling, flat, "".join(texts))
    for piece, tokens, ranges, start, end in zip(pieces, lists, all_ranges, bounds, bounds[1:], strict=False):
        if all_spelled or spells(spelling, tokens, piece.text):
            settle(piece, ids[start:end], labels[start:end], ranges, spelling.bos)
        else:
            unclear.append(piece)
    return unclear


def settle(
    piece: Piece, ids: np.ndarray, labels: np.ndarray, ranges: list[tuple[int, int]] | None, bos: list[int]
) -> None:
    """Give a piece its ids, and its labels where `ranges` tell them; BOS where it still needs one.

    A text that is learnt in full is learnt with its BOS.
    """
    if ranges is None:
        return  # to be encoded apart
    if piece.add_bos and bos:
        whole = piece.spans == [(0, len(piece.text))]
        ids = np.concatenate([np.array(bos, dtype=np.int32), ids])
        labels = np.concatenate([np.full(len(bos), IGNORED, dtype=np.int32), labels])
        ranges = [(0, len(ids))] if whole else [(first + len(bos), last + len(bos)) for first, last in ranges]
    for first, last in ranges:
        labels[first:last] = ids[first:last]
    piece.ids, piece.labels, piece.ranges = ids, labels, ranges


def ranges_in(pieces: list[Piece], bounds: np.ndarray, before: np.ndarray) -> list[list[tuple[int, int]] | None]:
    """For each piece the tokens [first, last) of its own that hold each span; None when one begins before its span.

    Piece i has tokens bounds[i] .. bounds[i + 1] - 1, and `before` token j there are before[j] bytes.
    """
    counts = [len(piece.spans) for piece in pieces]
    starts = np.repeat(bounds[:-1], counts)
    flat = chain.from_iterable(chain.from_iterable(map(in_bytes, pieces)))
    begins, stops = (np.fromiter(flat, np.int64).reshape(-1, 2) + before[starts][:, None]).T
    first = np.searchsorted(before[1:], begins, "right")
    last = np.searchsorted(before[1:], stops - 1, "right") + 1
    empty = begins == stops
    clear = (before[first] == begins) | empty
    found = list(map(tuple, np.where(empty, 0, [first - starts, last - starts]).T.tolist()))
    ends, all_clear, clear = np.cumsum([0, *counts]).tolist(), clear.all(), clear.tolist()
    return [
        found[at:end] if all_clear or all(clear[at:end]) else None for at, end in zip(ends, ends[1:], strict=False)
    ]


def in_bytes(piece: Piece) -> list[tuple[int, int]]:
    """The spans of a piece in bytes of its text."""
    if piece.text.isascii():
        return piece.spans
    spans, at, done = [], 0, 0
    for start, end in piece.spans:
        begins = done + len(piece.text[at:start].encode())
        at, done = end, begins + len(piece.text[start:end].encode())
        spans.append((begins, done))
    return spans


def encode_with_offsets(pieces: list[Piece], backend: Tokenizer, bos: list[int]) -> None:
    """Encode pieces with the library's own character offsets; `ranges` stays None as in `take_spelled`."""
    encodings = backend.encode_batch([piece.text for piece in pieces], add_special_tokens=False) if pieces else []
    for piece, encoding in zip(pieces, encodings, strict=True):
        ranges = [token_range(encoding, *span) for span in piece.spans]
        firsts = zip(ranges, piece.spans, strict=True)
        clear = all(span[0] == 0 or starts_at(encoding, first, span[0]) for (first, _), span in firsts)
        ids = np.array(encoding.ids, dtype=np.int32)
        settle(piece, ids, np.full(len(ids), IGNORED, dtype=np.int32), ranges if clear else None, bos)


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


def encode_apart(piece: Piece, spelling: Spelling) -> None:
    """Encode a text part by part; control tokens that a user spelled out, which are marked, become plain text.

    Pieces between marks and span ends are encoded one by one, as inference encodes a prompt apart from its answer.
    """
    said = np.zeros(len(piece.text), dtype=bool)
    for start, end in piece.spans:
        said[start:end] = True
    marked = [] if piece.add_bos else marked_stretches(piece.text)
    inside = {bound for stretch in (*piece.spans, *marked) for bound in stretch}
    bounds = sorted({0, len(piece.text)} | inside)
    literal = {start for start, _ in marked}
    ids: list[int] = []
    labels: list[int] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        text = piece.text[start + 1 : end - 1] if start in literal else piece.text[start:end]
        part = encode_alone(text, spelling.inner, start in literal)
        ids += part
        labels += part if said[start] else [IGNORED] * len(part)
    bos = spelling.bos if piece.add_bos else []
    piece.ids = np.array([*bos, *ids], dtype=np.int32)
    piece.labels = np.array([IGNORED] * len(bos) + labels, dtype=np.int32)
    piece.ranges = ranges_of(piece.labels)


def marked_stretches(text: str) -> list[tuple[int, int]]:
    """Where marked stretches begin and end, marks included. Raises `ValueError` when a template took one apart."""
    stretches, opened = [], None
    for place in (found.start() for found in re.finditer(f"[{OPEN}{CLOSE}]", text)):
        if (text[place] == OPEN) != (opened is None):
            raise ValueError(TAKEN_APART)
        if opened is None:
            opened = place
        else:
            stretches.append((opened, place + 1))
            opened = None
    if opened is not None:
        raise ValueError(TAKEN_APART)
    return stretches


def encode_alone(text: str, inner: Tokenizer, literal: bool) -> list[int]:
    """Ids of a stretch of text; `literal`: control tokens as the text they are. Raises `ValueError` if it cannot."""
    inner.encode_special_tokens = literal
    ids = inner.encode(text, add_special_tokens=False).ids
    if literal and inner.token_to_id(text) in ids:
        raise ValueError(f"{text!r} stands in a content and this tokenizer has no way to encode it as text; remove it")
    return ids


def ranges_of(labels: np.ndarray) -> list[tuple[int, int]]:
    """The supervised stretches [first, last) of labels."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORED, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
