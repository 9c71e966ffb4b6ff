"""From recipe to rows that the trainer takes as they are: load, draw, tokenise, select, pack; each row accounted for.

One process prepares, under a file lock; the others find its results in the `datasets` cache. No rank waits inside a
collective meanwhile.
"""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from open_r1.data import Source, load_sources
from open_r1.errors import UserError
from open_r1.mixture import draw, numbered
from open_r1.tokenization import Supervision, tokenize_source

if TYPE_CHECKING:
    from open_r1.configs import ScriptArguments, SFTConfig

logger = logging.getLogger(__name__)


def prepare(
    script_args: "ScriptArguments", training_args: "SFTConfig", tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """The train and evaluation rows of a recipe: `input_ids`, `labels` and, when packed, `seq_lengths`.

    Evaluation rows are None unless `eval_strategy` or `do_eval` asks for them. Raises `UserError`.
    """
    if unknown := set(training_args.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
        raise UserError(f"dataset_kwargs: {', '.join(sorted(unknown))} is not known; data is prepared from other keys")
    evaluate = training_args.do_eval
    with FileLock(lock_path(script_args)):
        sources, held_out = load_sources(script_args, training_args.dataset_text_field, evaluate)
        names = [source.name for source in sources]
        orders = draw([len(s.rows) for s in sources], [s.weight for s in sources], script_args, names)
        train = assemble("train", sources, orders["train"], tokenizer, training_args, training_args.packing)
        if not evaluate:
            return train, None
        packing = training_args.packing if training_args.eval_packing is None else training_args.eval_packing
        order = orders["test"] if "test" in orders and not held_out else None
        if held_out or order is None:
            sources = held_out
            order = concatenate_datasets([numbered(number, len(s.rows)) for number, s in enumerate(held_out)])
        return train, assemble("eval", sources, order, tokenizer, training_args, packing)


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
) -> Dataset:
    """Tokenise what `order` draws, lay it out in that order, drop rows with nothing to learn (counted), and pack."""
    how = Supervision.of(args, packing)
    drawn_from, drawn_rows = np.array(order["source"]), np.array(order["row"])
    tables, places, start = [], np.zeros(len(order), dtype=np.int64), 0
    for number, source in enumerate(sources):
        mine = drawn_from == number
        rows, position = np.unique(drawn_rows[mine], return_inverse=True)
        table = tokenize_source(source, rows, tokenizer, how, args.dataset_num_proc)
        places[mine] = start + position
        account(part, source, table, position, how)
        tables.append(table)
        start += len(rows)
    together = concatenate_datasets(tables)
    learnable = np.array(together["supervised"]) > 0
    chosen = together.select(places[learnable[places]]).select_columns(["input_ids", "labels"])
    if len(chosen) == 0:
        raise UserError(f"no row of the {part} data has a supervised token within max_length {args.max_length}")
    if args.shuffle_dataset:
        chosen = chosen.shuffle(seed=args.seed)
    if not packing:
        return chosen
    packed = pack_dataset(chosen, args.max_length, args.packing_strategy, {"desc": f"Packing {part}"})
    logger.info("%s: %d rows packed into %d of %d tokens", part, len(chosen), len(packed), args.max_length)
    return packed


def account(part: str, source: Source, table: Dataset, position: np.ndarray, how: Supervision) -> None:
    """Say what became of a source: rows drawn, tokens, share supervised, and everything cut or dropped."""
    tokens, cut, supervised = (np.array(table[count])[position] for count in ("tokens", "cut", "supervised"))
    rows, name = len(source.rows), f"{part} {source.name}"
    share = 100 * supervised.sum() / max(1, tokens.sum())
    logger.info("%s: %d of %d rows, %d tokens, %.1f %% supervised", name, len(position), rows, tokens.sum(), share)
    if (cut > 0).any():
        logger.warning(
            "%s: %d rows are longer than max_length %d; %d tokens are cut off",
            name,
            (cut > 0).sum(),
            how.max_length,
            cut.sum(),
        )
    if (supervised == 0).any():
        logger.warning("%s: %d rows dropped: nothing supervised is left of them", name, (supervised == 0).sum())
