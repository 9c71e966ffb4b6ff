"""Raw rows -> `input_ids` and `labels`, in one batched pass per source; every row and token is accounted for.

The pass writes int32 ids and labels and, for each row, small counts from which the ledger is added up. No text and no
intermediate column is written.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from open_r1 import encoding, formats, records, supervision
from open_r1.cache import Key, digest, file_digest, prepared_table
from open_r1.data import Source, places_of
from open_r1.encoding import IGNORED, TAKEN_APART, TEXTS, Piece, Spelling, encode_pieces, ranges_of, spelling_of
from open_r1.errors import BadRow, UserError
from open_r1.formats import Row, prompt_id
from open_r1.ledger import BAD_ROW, COUNTS
from open_r1.processes import cores_here
from open_r1.supervision import (
    CLOSE,
    OPEN,
    Rendering,
    Template,
    conversation_rows,
    is_plain,
    mark_control_tokens,
    probe_template,
    with_arguments,
)

if TYPE_CHECKING:
    from open_r1.configs import SFTConfig

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),  # empty in a row that was dropped
        "labels": List(Value("int32")),  # -100 where not supervised
        "row": Value("int32"),  # which of the source's chosen rows this comes from
        **{name: Value("int32") for name in COUNTS},
        "digest": Value("int64"),  # equal for equal ids and labels
        "prompt": Value("int64"),  # equal for rows that ask the same
        "dropped": Value("string"),  # why there is nothing to train on, null otherwise
    }
)
SCHEMA = FEATURES.arrow_schema
ESCAPED_MARK = re.compile(r"\\ufdd[01]", re.IGNORECASE)  # a template that prints what `repr` makes of a value
CODE = (records, formats, supervision, encoding, sys.modules[__name__])  # what tables depend on
BATCH_ROWS, BATCH_BYTES = 1024, 2**21  # raw rows tokenised at once: whichever is less


@dataclass(frozen=True)
class Supervision:
    """What the recipe says about labels, length and bad rows, as far as tokenising depends on it."""

    supervision: str
    completion_only: bool
    on_rewritten_turn: str
    empty_reasoning: str
    on_long_row: str
    on_bad_row: str
    max_length: int | None
    keep_end: bool
    system_prompt: str | None

    @classmethod
    def of(cls, args: "SFTConfig", packing: bool) -> "Supervision":
        """Read it from the training arguments; `bfd_split` and `wrapped` packing cut nothing, they spread rows."""
        spreads = packing and args.packing_strategy != "bfd"
        return cls(
            supervision=args.supervision,
            completion_only=args.completion_only_loss is not False,
            on_rewritten_turn=args.on_rewritten_turn,
            empty_reasoning=args.empty_reasoning,
            on_long_row=args.on_long_row,
            on_bad_row=args.on_bad_row,
            max_length=None if spreads else args.max_length,
            keep_end=args.truncation_mode == "keep_end",
            system_prompt=args.system_prompt,
        )


def tokenize_source(
    source: Source, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, how: Supervision, num_proc: int | None = None
) -> Dataset:
    """Tokenise `rows` (row numbers, increasing) of a source into a table of `FEATURES`, sorted by `row`.

    A raw row gives one row, several where turns are expanded or texts split, or one with `dropped` set. Kept by
    content, so that other ranks and later runs read it. Raises `UserError` naming source and row.
    """
    chosen = source.rows if len(rows) == len(source.rows) else source.rows.select(rows)
    # Rows may be sorted by length, so the longest stretch of them counts.
    largest = max(batch.nbytes // len(batch) for batch in source.rows.data.to_batches(max_chunksize=TEXTS)) + 1
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // largest))

    def write(path: str) -> None:
        encode = partial(
            encode_batch,
            to_row=source.to_row,
            tokenizer=tokenizer,
            spelling=spelling_of(tokenizer),
            template=probe_template(tokenizer) if tokenizer.chat_template else None,
            how=how,
        )
        write_table(chosen, encode, size, num_proc, path)

    try:
        return prepared_table(table_key(source, rows, tokenizer, how), write)
    except BadRow as bad:
        raise UserError(f"{places_of(source, [int(rows[bad.row])])[0]}: {bad.problem}") from None
    except UnicodeDecodeError:  # of a typed table, whose texts nobody has checked
        raise not_utf8(source, rows) from None


def not_utf8(source: Source, rows: np.ndarray) -> UserError:
    """The error that names the first of `rows` that cannot be read as text."""
    for row in rows.tolist():
        try:
            source.rows[row]
        except UnicodeDecodeError as error:
            return UserError(f"{places_of(source, [row])[0]}: a text is not UTF-8: {error}; write the file anew")
    raise AssertionError(f"{source.name}: each row alone can be read")


def write_table(chosen: Dataset, encode: Callable[..., pa.Table], size: int, num_proc: int | None, path: str) -> None:
    """Tokenise `chosen`, `size` rows at once, into the arrow file `path` (several, numbered, with `num_proc`).

    No more processes than cores that this one may use: a scheduler's share of a machine can be small.
    """
    num_proc = min(num_proc or 1, len(cores_here()))
    if num_proc > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are enough
    if len(chosen) == 0:  # nothing of this source is held out, and `map` would write no file
        with pa.OSFile(path, "wb") as target, pa.ipc.new_stream(target, SCHEMA):
            return
    chosen.map(
        encode,
        batched=True,
        batch_size=size,
        with_indices=True,
        remove_columns=chosen.column_names,
        features=FEATURES,
        num_proc=num_proc if num_proc > 1 else None,  # a pool of one costs more than it brings
        cache_file_name=path,
        # Else all that `encode` holds would be pickled to name the result, and the name is written into the file.
        new_fingerprint="tokens",
        desc="Tokenizing",
    )


def table_key(source: Source, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, how: Supervision) -> Key:
    """Everything that the tokenised table of a source depends on. The tokenizer enters by what it writes."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return {
        "what": f"{source.name}, tokenised",
        "code": [file_digest(module.__file__) for module in CODE],
        "libraries": [tokenizers.__version__, transformers.__version__],
        "contents": list(source.table.contents.values()),
        "rows": hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()[:32],
        "reading": source.reading,
        "tokenizer": digest([backend.to_str(), tokenizer.special_tokens_map]),
        "template": digest(tokenizer.chat_template),
        **asdict(how),
    }


def counts_of(table: Dataset) -> dict[str, np.ndarray]:
    """The columns of a tokenised table that are not tokens, one value a row.

    They are kept beside it as a table of their own: read out of the big one, where they lie between the tokens, they
    would bring all of it into memory at every start.
    """
    names = [name for name in FEATURES if name not in ("input_ids", "labels")]
    key = {"part": "counts", "of": table._fingerprint}
    counts = prepared_table(key, partial(write_columns, [part["filename"] for part in table.cache_files], names))
    return {name: counts.data.column(name).to_numpy() for name in names}


def write_columns(files: list[str], names: list[str], path: str) -> None:
    """Copy some columns of arrow files to the arrow file `path`, a batch at a time."""
    schema = pa.schema([SCHEMA.field(name) for name in names])
    options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in names])
    with pa.OSFile(path, "wb") as target, pa.ipc.new_stream(target, schema) as writer:
        for name in files:
            with pa.OSFile(name) as file, pa.ipc.open_stream(file, options=options) as batches:
                for batch in batches:
                    writer.write_batch(batch)


def encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    to_row: Callable[[Row], Row],
    tokenizer: PreTrainedTokenizerBase,
    spelling: Spelling,
    template: Template | None,
    how: Supervision,
) -> pa.Table:
    """Tokenise and label a batch of raw rows. Raises `BadRow` with the index of the first row that is wrong."""
    pieces: list[Piece] = []
    columns = [batch[name] for name in batch]
    for index, values in zip(indices, zip(*columns, strict=True), strict=True):
        try:
            row = to_row(dict(zip(batch, values, strict=True)))
            made, prompt = row_pieces(row, index, tokenizer, template, how), prompt_id(row)
            for piece in made:
                piece.prompt = prompt
            pieces += made
        except Exception as error:  # also a template may raise anything; it is still this row's fault
            pieces.append(bad_piece(index, error, how))
    failed = False
    try:
        encode_pieces([piece for piece in pieces if piece.spans is not None], tokenizer, spelling)
    except Exception:  # behind it, what threads have still to encode is dropped
        failed = True
    if failed:  # one of them cannot be encoded: row by row they tell which
        rows = [list(row) for _, row in groupby(pieces, attrgetter("row"))]
        pieces = [piece for row in rows for piece in encoded(row, tokenizer, spelling, how)]
    return table_of([cut for piece in pieces for cut in fit_length(piece, how)])


def encoded(row: list[Piece], tokenizer: PreTrainedTokenizerBase, spelling: Spelling, how: Supervision) -> list[Piece]:
    """The pieces of one row, encoded."""
    try:
        encode_pieces([piece for piece in row if piece.spans is not None], tokenizer, spelling)
    except Exception as error:
        return [bad_piece(row[0].row, error, how)]
    return row


def bad_piece(index: int, error: Exception, how: Supervision) -> Piece:
    """What stands for a row that cannot be trained on. Raises `BadRow` when that stops the run."""
    if isinstance(error, (NameError, MemoryError)):
        raise error  # not the row's fault
    problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if how.on_bad_row == "error":
        raise BadRow(index, problem) from error
    return Piece(index, dropped=f"{BAD_ROW}{problem}", prompt=index)


def row_pieces(
    row: Row, index: int, tokenizer: PreTrainedTokenizerBase, template: Template | None, how: Supervision
) -> list[Piece]:
    """A row in TRL's format as texts with supervised spans, or as the ids that it brings."""
    if "input_ids" in row:
        ids, labels = (np.array(row[name], dtype=np.int64) for name in ("input_ids", "labels"))
        for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
            if ((values < 0) | (values >= len(tokenizer))).any():
                raise ValueError(f"{name} holds tokens outside the vocabulary of {len(tokenizer)}")
        if (wrong := np.flatnonzero((labels != IGNORED) & (labels != ids))).size:
            at = int(wrong[0])
            raise ValueError(
                f"labels hold {labels[at]} where input_ids hold {ids[at]} (token {at}); a label is -100 or the token "
                "itself, not shifted"
            )
        ids, labels = ids.astype(np.int32), labels.astype(np.int32)
        return [Piece(index, ids=ids, ranges=ranges_of(labels), labels=labels)]
    if "text" in row:
        text = with_stop(row["text"], tokenizer)
        return [Piece(index, {}, text, [(0, len(text))], add_bos=True)]
    if isinstance(row.get("prompt"), str):
        text = with_stop(row["prompt"] + row["completion"], tokenizer)
        start = len(row["prompt"]) if how.completion_only else 0
        return [Piece(index, {}, text, [(start, len(text))], add_bos=True)]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    given = 0 if "messages" in row or not how.completion_only else len(row["prompt"])
    untrained = row.get("untrained", [])
    if how.system_prompt is not None and messages[0]["role"] != "system":
        messages, given = [{"role": "system", "content": how.system_prompt}, *messages], given and given + 1
        untrained = [index + 1 for index in untrained]
    turns = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and index >= given and index not in untrained
    ]
    renderings, counts = render_conversation(messages, given, turns, template_kwargs(row), template, how)
    if not renderings:
        return [Piece(index, counts, dropped="every turn is rewritten by the template")]
    return [Piece(index, {"expanded": 1} if number else counts, *text) for number, text in enumerate(renderings)]


def template_kwargs(row: Row) -> dict[str, Any]:
    """A row's tools and template arguments, absent ones left out."""
    return {**({"tools": row["tools"]} if row.get("tools") else {}), **row.get("chat_template_kwargs", {})}


def render_conversation(
    messages: list[Row], given: int, turns: list[int], kwargs: dict[str, Any], template: Template, how: Supervision
) -> tuple[list[Rendering], dict[str, int]]:
    """Texts and spans of a conversation: of its first `given` messages nothing is learnt, of the rest `turns`.

    Control tokens in it are marked.
    """
    plain = not kwargs and is_plain(messages)
    if not plain and template.text_arguments is not None:
        messages = [with_arguments(message, as_text=template.text_arguments) for message in messages]
    texts = "\n\n".join([message["content"] for message in messages] if plain else texts_in([messages, kwargs]))
    spelled = len(template.control.findall(texts))
    if spelled or OPEN in texts or CLOSE in texts:  # marks of a user's own are taken out
        messages, kwargs = (
            mark_control_tokens(messages, template.control),
            mark_control_tokens(kwargs, template.control),
        )
        plain = plain and not spelled
    counts: dict[str, int] = {}
    if how.supervision in ("full", "template"):
        require_all(messages[given:], turns, how.supervision)
    if how.supervision == "full":
        text = template.render_plain(messages) if plain else template.render(messages, **kwargs)
        renderings = [(text, [(0, len(text))])]
    elif not turns:
        raise ValueError("no assistant turn to learn from; add one, or set supervision: full")
    elif how.supervision == "template":
        text, spans = template.render_with_markers(messages, **kwargs)
        asked = len(template.render(messages[:given], prompt=True, **kwargs)) if given else 0
        renderings = [(text, [span for span in spans if span[1] > asked])]
    else:
        renderings, counts = conversation_rows(
            messages,
            template,
            turns=turns[-1:] if how.supervision == "last_turn" else turns,
            plain=plain,
            on_rewritten=how.on_rewritten_turn,
            empty_reasoning=how.empty_reasoning,
            **kwargs,
        )
    if spelled:
        counts["control_tokens"] = spelled
        if any(ESCAPED_MARK.search(text) for text, _ in renderings):
            raise ValueError(TAKEN_APART)
    return renderings, counts


def require_all(messages: list[Row], turns: list[int], supervision: str) -> None:
    """Raise `ValueError` when not every turn of the assistant is to be learnt, where nothing else can be had."""
    if len(turns) < sum(message["role"] == "assistant" for message in messages):
        raise ValueError(f"a message says train: false, which supervision: {supervision} cannot heed; remove it")


def texts_in(value: Any) -> list[str]:
    """Every text inside lists and mappings."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else []


def with_stop(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` ending with EOS, so that the model learns to stop."""
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def fit_length(piece: Piece, how: Supervision) -> list[Piece]:
    """Apply `on_long_row` to a row longer than `max_length`, and count. Raises `BadRow` when that is `error`."""
    if piece.dropped is not None:
        return [piece]
    limit, size = how.max_length, len(piece.ids)
    if limit is None or size <= limit:
        return [part_of(piece, 0, size)]
    if how.on_long_row == "error":
        raise BadRow(piece.row, f"{size} tokens exceed max_length {limit}; raise it, or set on_long_row")
    if how.on_long_row == "drop":
        counts = {**piece.counts, "cut": size}
        return [Piece(piece.row, counts, dropped="longer than max_length", prompt=piece.prompt)]
    if how.on_long_row == "split":
        if not piece.add_bos or piece.spans != [(0, len(piece.text))]:
            raise BadRow(piece.row, "on_long_row: split is for plain text; an answer cut in pieces teaches no answer")
        parts = [part_of(piece, start, min(start + limit, size)) for start in range(0, size, limit)]
        for part in parts[1:]:
            part.counts["split"] = 1
        return parts
    kept = part_of(piece, size - limit, size) if how.keep_end else part_of(piece, 0, limit)
    kept.counts["cut"] = kept.counts.get("cut", 0) + size - limit
    kept.counts["answers"] = len(piece.ranges)
    kept.counts["lost_end"] = 0 if how.keep_end else sum(last > limit for _, last in piece.ranges)
    return [kept]


def part_of(piece: Piece, start: int, end: int) -> Piece:
    """Tokens [start, end) of a row, counted; dropped when nothing in them is learnt.

    The first label of a row never enters the loss, since nothing comes before it.
    """
    supervised = sum(max(0, min(last, end) - max(first, start + 1)) for first, last in piece.ranges)
    answers = sum(first < end and last > start for first, last in piece.ranges)
    if not supervised:
        counts = {**piece.counts, "cut": end - start, "answers": answers}
        return Piece(piece.row, counts, dropped="nothing supervised in it", prompt=piece.prompt)
    counts = {**piece.counts, "tokens": end - start, "supervised": supervised, "answers": answers}
    if end - start == len(piece.ids):
        piece.counts = counts
        return piece
    ids, labels = piece.ids[start:end], piece.labels[start:end]
    return Piece(piece.row, counts, ids=ids, labels=labels, prompt=piece.prompt)


def digest_of(piece: Piece) -> int:
    """64 bits of the ids and labels, equal for exact duplicates."""
    if piece.ids is None:
        return 0
    found = hashlib.blake2b(piece.ids, digest_size=8)
    found.update(piece.labels)
    return int.from_bytes(found.digest(), "little", signed=True)


def table_of(pieces: list[Piece]) -> pa.Table:
    """The pieces as a table of `SCHEMA`."""
    empty = np.zeros(0, dtype=np.int32)
    ids = [empty if piece.ids is None or piece.dropped else piece.ids for piece in pieces]
    labels = [empty if piece.labels is None or piece.dropped else piece.labels for piece in pieces]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    columns = [pa.ListArray.from_arrays(offsets, np.concatenate(part or [empty])) for part in (ids, labels)]
    columns.append(pa.array([piece.row for piece in pieces], pa.int32()))
    columns += [pa.array([piece.counts.get(name, 0) for piece in pieces], pa.int32()) for name in COUNTS]
    columns.append(pa.array([digest_of(piece) for piece in pieces], pa.int64()))
    columns.append(pa.array([piece.prompt for piece in pieces], pa.int64()))
    columns.append(pa.array([piece.dropped for piece in pieces], pa.string()))
    return pa.Table.from_arrays(columns, schema=SCHEMA)
