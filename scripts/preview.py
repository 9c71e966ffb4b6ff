"""See what a recipe trains on: samples of every source token by token, the ledger and the lengths.

    python scripts/preview.py --config recipe.yaml [--samples 3] [--html preview.html] [--key value ...]

Rows are prepared as sft.py prepares them and kept for it; no weights are loaded. The terminal shows supervised tokens
green and the rest dim. The page, one file that needs no other, adds token boundaries, ids and histograms.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader

from open_r1.errors import UserError
from open_r1.recipe import Recipe, load_recipe, set_environment
from open_r1.views import IN_WORDS, Token, View, bars_of, stretches, views_of, visible

if TYPE_CHECKING:
    from open_r1.ledger import Entry

GREEN, DIM, BOLD, RESET = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
TERMINAL_TOKENS = 1500  # of a longer sample the terminal shows start and end; the page shows all of it


def main(argv: list[str] | None = None) -> int:
    """Show the recipe of `argv` (default: the command line); returns the exit code, as sft.py does."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="--config RECIPE.yaml and any other --key value are those of sft.py, whose --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=int, default=3, help="samples of each source (default: 3)")
    parser.add_argument("--html", type=Path, default="preview.html", help="page to write (default: preview.html)")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal")
    options, rest = parser.parse_known_args(argv)
    logger = logging.getLogger("open_r1")
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.WARNING)
    on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        recipe = load_recipe([*rest, "--use_cpu"])
        set_environment(recipe)
        for note in recipe.notes:
            logger.warning(note)
        views, ledgers = look(recipe, max(1, options.samples))
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page(recipe, views, ledgers), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    print(in_terminal(views, ledgers, {"always": True, "never": False}.get(options.color, on_terminal)))
    print(f"\n{options.html}: the same as a page, with token boundaries, ids and lengths")
    return 0


def look(recipe: Recipe, count: int) -> "tuple[list[View], list[Entry]]":
    """Prepare the recipe as sft.py does. Returns what to show of each training source, and the ledgers."""
    from open_r1.chat import get_tokenizer
    from open_r1.preparation import prepare
    from open_r1.sft import build_configs
    from open_r1.trainer import tell_libraries

    recipe.values.setdefault("output_dir", "data/sft")
    script_args, args, model_args = build_configs(recipe)
    tell_libraries(args)
    args.max_truncated_answers = None  # a recipe that is refused for what it cuts is one to look at
    tokenizer = get_tokenizer(model_args, args)
    prepared = prepare(script_args, args, tokenizer)
    views = views_of(prepared.train, tokenizer, count)
    return views, [part.ledger for part in prepared.parts.values()]


def in_terminal(views: list[View], ledgers: "list[Entry]", color: bool) -> str:
    """Samples and ledgers as text, with ANSI codes when `color`."""
    parts = []
    for view in views:
        for sample in view.samples:
            parts.append(paint(f"== {view.name}, {sample.title}", BOLD, color) + "\n" + painted(sample.tokens, color))
        if not view.samples:
            parts.append(f"== {view.name}: no row of it is trained on")
    for table in map(table_of, ledgers):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
        parts.append(paint("  ".join(lines[0]), BOLD, color) + "".join("\n" + "  ".join(line) for line in lines[1:]))
    return "\n\n".join(parts)


def painted(tokens: list[Token], color: bool) -> str:
    """The text of a sample, stretch by stretch; the middle of a very long one is left out."""
    half = TERMINAL_TOKENS // 2
    if len(tokens) > TERMINAL_TOKENS:
        gap = f"\n[... {len(tokens) - 2 * half:,} tokens that the page shows ...]\n"
        return painted(tokens[:half], color) + gap + painted(tokens[-half:], color)
    text = "".join(paint(text, GREEN if said else DIM, color) for text, said in stretches(tokens))
    return text.removesuffix("\n")


def paint(text: str, code: str, color: bool) -> str:
    """`text` in a colour, line by line, since pagers forget a colour at the end of a line."""
    return "\n".join(f"{code}{line}{RESET}" if line and color else line for line in text.split("\n"))


def table_of(ledger: "Entry") -> list[list[str]]:
    """All that a ledger holds as a table: a line for each count, a column for each source and one for their total."""
    sources, total = ledger["sources"], ledger["total"]
    columns = [*sources, total] if len(sources) > 1 else [{**sources[0], **total, "source": sources[0]["source"]}]
    flat = [counts_of(entry, dict.fromkeys(total["dropped"], 0)) for entry in columns]
    keys = dict.fromkeys(key for counts in flat for key in counts)
    head = [ledger["part"], *(visible(entry["source"]) for entry in columns)]
    return [head, *([visible(key), *(counts.get(key, "") for counts in flat)] for key in keys)]


def counts_of(entry: "Entry", reasons: dict[str, int]) -> dict[str, str]:
    """The counts of a ledger's entry by name, as text: one for each key of a mapping, `reasons` to drop among them."""
    counts = {}
    for key, value in entry.items():
        name = IN_WORDS.get(key, key.replace("_", " "))
        if key == "dropped":
            counts[name], value = f"{sum(value.values()):,}", {**reasons, **value}
        if isinstance(value, dict) and key not in ("contents", "histogram"):
            counts |= {f"{name.rstrip('s')} {part}": f"{count:,}" for part, count in value.items()}
        elif isinstance(value, (int, float)):
            counts[name] = f"{value:.1%}" if key.endswith(("share", "efficiency")) else f"{value:,}"
    return counts


def page(recipe: Recipe, views: list[View], ledgers: "list[Entry]") -> str:
    """Samples, ledgers and histograms as one HTML document; whatever comes from the data is escaped."""
    loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader("open_r1", "templates")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("preview.html.jinja").render(
        model=visible(recipe.values["model_name_or_path"]),
        views=views,
        tables=list(map(table_of, ledgers)),
        histograms=bars_of(ledgers[0]["sources"]),
        powers=[2**power for power in range(40)],
    )


if __name__ == "__main__":
    sys.exit(main())
