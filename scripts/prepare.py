"""Prepare the data of a recipe on a CPU machine, so that training starts without reading a row.

    python scripts/prepare.py --config recipe.yaml [--export DIR] [--key value ...]

Tokenises and packs as `sft.py` would and keeps the tables where `sft.py` looks for them, by content, under
$HF_DATASETS_CACHE/open_r1. `--export` also writes them as an ordinary `save_to_disk` directory: `train` and, when the
recipe evaluates, `eval`, with `input_ids`, `labels`, `source` and `row` (unpacked).
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from open_r1.errors import UserError
from open_r1.recipe import load_recipe, set_environment
from open_r1.sft import build_configs

logger = logging.getLogger("open_r1")


def main(argv: list[str] | None = None) -> int:
    """Prepare, show the ledger, export when asked; returns the exit code (2: something to mend)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--export", metavar="DIR", type=Path, help="also write input_ids, labels and source there")
    args, recipe_argv = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger().setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    try:
        prepare_recipe(recipe_argv, args.export)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    return 0


def prepare_recipe(argv: list[str], export: Path | None) -> None:
    """Prepare the recipe of a command line like `sft.py`'s."""
    recipe = load_recipe([*argv, "--use_cpu"])
    set_environment(recipe)
    if export is not None and export.exists():
        raise UserError(f"--export {export}: exists already; name a new directory")
    if export is not None and any(parent.is_file() for parent in export.parents):
        raise UserError(f"--export {export}: a file is in the way; name another directory")

    from datasets import DatasetDict

    from open_r1.chat import get_tokenizer
    from open_r1.preparation import prepare
    from open_r1.trainer import tell_libraries

    script_args, training_args, model_args = build_configs(recipe)
    tell_libraries(training_args)
    prepared = prepare(script_args, training_args, get_tokenizer(model_args, training_args))
    if export is not None:
        export.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=export.parent) as scratch:
            parts = {
                name: part.unpacked.map(
                    name_sources,
                    batched=True,
                    fn_kwargs={"names": part.sources},
                    cache_file_name=f"{scratch}/{name}.arrow",
                    desc="Exporting",
                )
                for name, part in prepared.parts.items()
            }
            DatasetDict(parts).save_to_disk(export)
        logger.info("exported to %s", export)


def name_sources(rows: dict[str, list[Any]], names: list[str]) -> dict[str, list[str]]:
    """The sources of rows by name instead of number."""
    return {"source": [names[number] for number in rows["source"]]}


if __name__ == "__main__":
    sys.exit(main())
