"""Write a copy of a recipe's data without the rows that share words with evaluation sets.

    python scripts/decontaminate.py --against aime_2024 math_500 my_eval.jsonl:question --out DIR \\
        --config recipe.yaml [--ngram 8] [--num_proc 8] [--key value ...]
    python scripts/decontaminate.py --against my_eval.jsonl --out DIR --dataset_name my_data.jsonl

A row goes when any of its messages shares `--ngram` words in a row with a problem of an evaluation set, whatever the
case, punctuation and spacing; a problem of fewer words only when it is all of a message. An evaluation set is one of
the names below, or a file, directory or hub dataset with the column (or path) of its problems; without a column they
are what its rows ask. DIR gets a file for each source (JSON lines as they were, or parquet) and `removed.jsonl`: what
went, why, and where it stood. Rows that cannot be read are kept and counted, as training treats them as it is told to.
Of parquet the columns that the recipe names are kept, of every source the rows that it takes (`max_samples`).

The idea and the default of eight words are those of Open-R1's decontamination, after
https://arxiv.org/abs/2005.14165, appendix C.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from open_r1.errors import UserError
from open_r1.formats import THOUGHTS
from open_r1.recipe import load_recipe
from open_r1.schema import texts_in

if TYPE_CHECKING:
    from open_r1.data import Source

logger = logging.getLogger("open_r1")
KNOWN = {  # name: hub id, config, split, column of the problems
    "aime_2024": ("HuggingFaceH4/aime_2024", None, "train", "problem"),
    "aime_2025": ("yentinglin/aime_2025", None, "train", "problem"),
    "math_500": ("HuggingFaceH4/MATH-500", None, "test", "problem"),
    "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train", "Question"),
}
WORD = re.compile(r"\w+")
Grams = dict[str, int]  # words in a row, or all words of a short problem -> bits of the evaluation sets that hold them


def main(argv: list[str] | None = None) -> int:
    """Write the copies; returns the exit code (2: something to mend)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="SET",
        help=f"evaluation sets: {', '.join(KNOWN)}, or FILE_OR_ID[:COLUMN]",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--ngram", type=int, default=8, help="words in a row that give a row away (default: 8)")
    parser.add_argument("--num_proc", type=int, help="processes")
    args, recipe_argv = parser.parse_known_args(argv)
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    try:
        if args.ngram < 1:
            raise UserError(f"--ngram {args.ngram}: a number of words, 1 or more")
        if args.num_proc is not None and args.num_proc < 1:
            raise UserError(f"--num_proc {args.num_proc}: a number of processes, 1 or more")
        if args.out.exists():
            raise UserError(f"--out {args.out}: exists already; name a new directory")
        decontaminate(recipe_argv, args.against, args.out, args.ngram, args.num_proc)
    except (UserError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    return 0


def decontaminate(argv: list[str], against: list[str], out: Path, size: int, num_proc: int | None) -> None:
    """Write the sources of a recipe to `out` without rows that share `size` words in a row with a set of `against`."""
    recipe = load_recipe(argv if "--config" in argv else [*argv, "--model_name_or_path", "unused"])

    from open_r1.configs import ScriptArguments
    from open_r1.data import load_sources

    try:
        script_args = ScriptArguments(**recipe.of("ScriptArguments"))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    sources, _ = load_sources(script_args, recipe.values.get("dataset_text_field", "text"))
    grams: Grams = {}
    for number, name in enumerate(against):
        problems = problems_of(name)
        for problem in problems:
            for gram in grams_of(problem, size) or ([whole(problem)] if words_of(problem) else []):
                grams[gram] = grams.get(gram, 0) | 1 << number
        lengths = [len(words_of(problem)) for problem in problems]
        logger.info("%s: %d problems", name, len(problems))
        if short := sum(length < size for length in lengths):
            few = "    %d have fewer than %d words (which spaces tell apart): found only as whole messages"
            logger.warning(few, short, size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as scratch:
        partly = Path(scratch) / out.name
        partly.mkdir()
        with (partly / "removed.jsonl").open("w", encoding="utf-8") as removed:
            for number, source in enumerate(sources):
                sets, shared = compared(source, grams, size, num_proc)
                write_source(source, sets, shared, against, partly / file_name(source, number), removed)
        partly.rename(out)
    logger.info("written to %s", out)


def compared(source: "Source", grams: Grams, size: int, num_proc: int | None) -> tuple[list[int], list[str]]:
    """What `compare` finds for every row of a source. Raises `UserError` for texts that are not UTF-8."""
    try:
        found = source.rows.map(
            partial(compare, to_row=source.to_row, grams=grams, size=size),
            batched=True,
            remove_columns=source.rows.column_names,
            num_proc=num_proc,
            load_from_cache_file=False,
            new_fingerprint=f"compared-{source.rows._fingerprint}",
            desc=f"Comparing {source.name}",
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{source.name}: a text is not UTF-8: {error}; write the file anew") from None
    return found["sets"][:], found["shared"][:]


def problems_of(name: str) -> list[str]:
    """The problems of an evaluation set. Raises `UserError` for one that cannot be read or has no such column."""
    from open_r1.configs import DatasetConfig
    from open_r1.data import load_either, places_of

    identity, config, column, splits = name, None, "", ("test", "train")
    if name in KNOWN:
        identity, config, split, column = KNOWN[name]
        splits = (split, split)
    elif not Path(name).exists():
        identity, _, column = name.partition(":")
    mapping = {"text": column} if column else None
    source = load_either(DatasetConfig(id=identity, config=config, mapping=mapping), splits, "text")
    problems = []
    for number in range(len(source.rows)):
        try:
            problems += asked(source.to_row(source.rows[number]))
        except ValueError as error:  # of which one that a text is not UTF-8 is a kind
            raise UserError(f"{places_of(source, [number])[0]}: {error}") from None
    logger.info("%s: read from %s", name, source.name)
    return problems


def asked(row: dict[str, Any]) -> list[str]:
    """What a row in TRL's format asks: the user's messages, a prompt, or a text as a whole."""
    if "messages" in row or isinstance(row.get("prompt"), list):
        messages = row.get("messages", row.get("prompt"))
        return [message["content"] for message in messages if message["role"] == "user"]
    return [row["prompt"] if "prompt" in row else said(row)[0]]


def said(row: dict[str, Any]) -> list[str]:
    """Every text in a row in TRL's format but the system's. Raises `UserError` for rows of tokens."""
    if "input_ids" in row:
        raise UserError("rows of input_ids hold no text to compare; use the data that they were made of")
    texts = []
    for part in (row[name] for name in ("messages", "prompt", "completion", "text") if name in row):
        messages = part if isinstance(part, list) else [{"role": "user", "content": part}]
        for message in messages:
            if message["role"] != "system":
                said_in = [message.get(name) for name in ("content", "tool_calls", *THOUGHTS)]
                texts += [text for _, text in texts_in("", said_in)]
    return texts


def compare(
    batch: dict[str, list[Any]], to_row: Callable[[dict[str, Any]], dict[str, Any]], grams: Grams, size: int
) -> dict[str, list[Any]]:
    """For each raw row the bits of the sets that it shares words with (-1: it cannot be read), and the first words."""
    found: dict[str, list[Any]] = {"sets": [], "shared": []}
    for values in zip(*batch.values(), strict=True):
        sets, shared = 0, ""
        try:
            for text in said(to_row(dict(zip(batch, values, strict=True)))):
                for gram in {*grams_of(text, size), whole(text)} & grams.keys():
                    sets, shared = sets | grams[gram], shared or gram
        except UserError:
            raise
        except ValueError:
            sets = -1
        found["sets"].append(sets)
        found["shared"].append(shared)
    return found


def words_of(text: str) -> list[str]:
    """The words of a text without case, punctuation and spacing; of characters and digits that look alike one form."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams_of(text: str, size: int) -> list[str]:
    """Every `size` words in a row; none in a shorter text."""
    words = words_of(text)
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


def whole(text: str) -> str:
    """All words of a text, told apart from words in a row of a longer one."""
    return f"all of: {' '.join(words_of(text))}"


def file_name(source: "Source", number: int) -> str:
    """A name for the copy of a source: its own, as far as a file can be called so."""
    stem = re.sub(r"\W+", "-", source.name.rpartition("/")[2]).strip("-")
    return f"{number}-{stem}.{'jsonl' if source.table.files else 'parquet'}"


def write_source(
    source: "Source", sets: list[int], shared: list[str], against: list[str], path: Path, removed: TextIO
) -> None:
    """Write what is left of a source to `path` and what is not to `removed`, and say how much by set."""
    from open_r1.data import places_of

    gone = [row for row, bits in enumerate(sets) if bits > 0]
    counts: Counter = Counter()
    for row, place in zip(gone, places_of(source, gone), strict=True):
        named = [name for bit, name in enumerate(against) if sets[row] >> bit & 1]
        counts.update(named)
        removed.write(json.dumps({"place": place, "sets": named, "shared": shared[row]}) + "\n")
    kept = source.rows.select([row for row, bits in enumerate(sets) if bits <= 0])
    if source.table.files:
        with path.open("wb") as file:
            for row in kept:
                file.write(row["record"].replace(b"\n", b" ") + b"\n")  # white space, where a record has any
    else:
        kept.to_parquet(path)
    logger.info("%s: %d of %d rows kept, in %s", source.name, len(kept), len(source.rows), path)
    for name in against:
        logger.info("    %s: %d rows removed", name, counts[name])
    if unread := sets.count(-1):
        logger.warning("    %d rows cannot be read, and are kept as they are", unread)


if __name__ == "__main__":
    sys.exit(main())
