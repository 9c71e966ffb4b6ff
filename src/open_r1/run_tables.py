"""What a report says of a run in words and tables; each number with the place where it stands.

`metrics.jsonl:12#loss` is key `loss` in line 12, `ledger.json#train/total/tokens` a path of keys; where that holds
several numbers, it is their sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from open_r1.figures import Lines, is_number
from open_r1.ledger import ROWS_SHOWN, TOKENS_SHOWN, WITHOUT_PROPORTION
from open_r1.run_files import Run, cleaned
from open_r1.run_state import RUN_STATE
from open_r1.schema import looks_secret

LINES_SHOWN = 8  # of rejected rows, spikes, and of what is said to one prompt in the course of a run
BLUNT = ("output_dir", "run_name", "resume")  # settings that differ between any two runs


class Value(NamedTuple):
    """What a cell shows: its text, and where it is a number that number and its source."""

    text: str
    raw: float | None = None
    source: str = ""


class Table(NamedTuple):
    """A table: what it is, its source in small print, heads of columns and lines; `wide` where cells are texts."""

    title: str
    source: str
    heads: list[str]
    lines: list[list[Value]]
    wide: bool = False


# Numbers in words


def count(number: float) -> str:
    """12,345"""
    return f"{number:,.0f}"


def share(number: float) -> str:
    """12.3%"""
    return f"{number:.1%}"


def figure(number: float) -> str:
    """0.1235, 1.2e-05"""
    return f"{number:.4g}"


def seconds(number: float) -> str:
    """1 h 2 min, 3 min 4 s, 5.6 s"""
    if number >= 3600:
        return f"{number // 3600:,.0f} h {number % 3600 // 60:.0f} min"
    return f"{number // 60:.0f} min {number % 60:.0f} s" if number >= 60 else f"{number:.1f} s"


def hours(number: float) -> str:
    """1.234 h, of seconds"""
    return f"{number / 3600:,.3f} h"


def gib(number: float) -> str:
    """1.23 GiB"""
    return f"{number / 2**30:,.2f} GiB"


def value(number: Any, source: str, words: Callable[[float], str] = figure) -> Value:
    """A number with its source; texts and nothing as they are."""
    if isinstance(number, dict):
        number = sum(number.values())
    return Value(words(number), number, source) if is_number(number) else Value("" if number is None else str(number))


def logged(run: Run, key: str) -> list[tuple[float, int]]:
    """The numbers that were logged under a key, each with its line."""
    return [(line[key], number) for number, line in run.metrics if is_number(line.get(key))]


def of_line(found: tuple[float, int], key: str, words: Callable[[float], str] = figure) -> Value:
    """A logged number and its line as a value."""
    return value(found[0], f"metrics.jsonl:{found[1]}#{key}", words)


def newest(run: Run, key: str, words: Callable[[float], str] = figure) -> Value:
    """The last number that was logged under a key, an empty value without any."""
    found = logged(run, key)
    return of_line(found[-1], key, words) if found else Value("")


# What is shown

# Name, keys of which the first that was logged counts, which of its numbers (the last one unless said), in words.
RESULTS: list[tuple[str, tuple[str, ...], Callable | None, Callable[[float], str]]] = [
    ("loss at last", ("loss",), None, figure),
    ("evaluation loss at last", ("eval_loss",), None, figure),
    ("evaluation loss at best", ("eval_loss",), min, figure),
    ("epochs", ("epoch",), None, figure),
    ("training time", ("train_runtime",), None, seconds),
    ("tokens read", ("train_real_tokens", "real_tokens", "num_tokens"), None, count),
    ("supervised tokens", ("train_supervised_tokens", "supervised_tokens"), None, count),
    ("tokens/s per device", ("train_real_tokens_per_second", "real_tokens_per_second"), None, count),
    (
        "supervised tokens/s per device",
        ("train_supervised_tokens_per_second", "supervised_tokens_per_second"),
        None,
        count,
    ),
    ("padding", ("train_padding_share", "padding_share"), None, share),
    ("MFU", ("train_mfu", "mfu"), None, share),
    ("peak memory", ("train_peak_memory_bytes", "peak_memory_bytes"), max, gib),
]
TIMES = ("compute", "data", "other", "evaluation", "saving")


def headlines(run: Run) -> dict[str, Value]:
    """What a run came to, by name."""
    found = {"status": Value(f"{run.state.get('status', 'unknown')}")}
    found["steps"] = value(run.state.get("global_step"), f"{RUN_STATE}#global_step", count)
    for name, keys, choose, words in RESULTS:
        key = next((key for key in keys if logged(run, key)), None)
        if key is not None:
            numbers = logged(run, key)
            found[name] = of_line(choose(numbers) if choose else numbers[-1], key, words)
    for device, spent in run.state.get("device_seconds", {}).items():
        found[f"device time, {device}"] = value(spent, f"{RUN_STATE}#device_seconds/{escaped(device)}", hours)
    return found


def totals(run: Run) -> list[Table]:
    """What was measured over the whole run: where its time went, and the loss of each source."""
    tables = []
    lines = [
        [Value(name), newest(run, f"train_{name}_seconds", seconds)]
        for name in TIMES
        if logged(run, f"train_{name}_seconds")
    ]
    if lines:
        tables.append(Table("Where the time went", "metrics.jsonl: train_*_seconds", ["", "seconds"], lines))
    prefixes = ("train_loss/", "train_loss_tokens/", "eval_loss/", "eval_loss_tokens/")
    keys = [key for _, line in run.metrics for key in line if key.startswith(("train_loss/", "eval_loss/"))]
    lines = [
        [
            Value(cleaned(name)),
            *(newest(run, prefix + name, count if "tokens" in prefix else figure) for prefix in prefixes),
        ]
        for name in dict.fromkeys(key.partition("/")[2] for key in keys)
    ]
    if lines:
        heads = ["source", "train loss", "of tokens", "evaluation loss at last", "of tokens"]
        source = "metrics.jsonl: train_loss/*, train_loss_tokens/*, eval_loss/*, eval_loss_tokens/*"
        tables.append(Table("Loss by source", source, heads, lines))
    return tables


def escaped(key: str) -> str:
    """A key as a part of a path."""
    return key.replace("~", "~0").replace("/", "~1")


def ledger_tables(ledger: dict[str, Any], part: str) -> list[Table]:
    """The ledger of a part: rows, tokens, what was dropped and why, padding."""
    entries = [(f"sources/{number}", entry) for number, entry in enumerate(ledger["sources"])]
    entries += [("total", ledger["total"])] if len(entries) > 1 else []
    tables = []
    for what, columns in (("rows", ROWS_SHOWN), ("tokens", TOKENS_SHOWN)):
        heads = columns if ledger["in_proportion"] else [WITHOUT_PROPORTION.get(name, name) for name in columns]
        lines = [
            [Value(entry["source"]), *(cell(entry, key, f"ledger.json#{part}/{at}") for key in columns.values())]
            for at, entry in entries
        ]
        tables.append(Table(f"{part.capitalize()}, {what}", f"ledger.json: {part}", ["source", *heads], lines))
    dropped = [
        [
            Value(entry["source"]),
            Value(reason),
            value(rows, f"ledger.json#{part}/{at}/dropped/{escaped(reason)}", count),
        ]
        for at, entry in entries
        if at != "total"
        for reason, rows in sorted(entry["dropped"].items(), key=lambda pair: -pair[1])
    ]
    if dropped:
        tables.append(
            Table(f"{part.capitalize()}, dropped rows", f"ledger.json: {part}", ["source", "reason", "rows"], dropped)
        )
    total = {
        key: ledger["total"].get(key)
        for key in ("padding_share", "packs", "packing_efficiency", "packed_padding_share")
    }
    lines = [
        [Value(PADDING[key]), value(number, f"ledger.json#{part}/total/{key}", count if key == "packs" else share)]
        for key, number in total.items()
        if number is not None
    ]
    return [*tables, Table(f"{part.capitalize()}, padding", f"ledger.json: {part}/total", ["what", ""], lines)]


PADDING = {
    "padding_share": "padding in a batch of rows in a random order",
    "packs": "packed rows",
    "packing_efficiency": "of a packed row is filled",
    "packed_padding_share": "padding in a batch of packed rows",
}


def cell(entry: dict[str, Any], key: str, at: str) -> Value:
    """A number of a ledger's entry."""
    nested = key not in entry and key in entry["lengths"]
    found = entry["lengths"].get(key) if nested else entry.get(key)
    words = share if key.endswith("share") else figure if key == "epochs" else count
    return value(found, f"{at}/{'lengths/' if nested else ''}{key}", words)


def recipe_table(run: Run) -> Table:
    """The settings of a run, each with where it is from."""
    values, origin, _ = run.recipe
    lines = [[Value(key), Value(setting(key, said)), Value(origin.get(key, ""))] for key, said in values.items()]
    return Table("Settings", "recipe.yaml", ["setting", "value", "from"], lines, wide=True)


def setting(key: str, said: Any) -> str:
    """A setting as YAML, without a secret."""
    if looks_secret(key, said):
        return "a secret, not shown"
    return (
        yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    )


def about(run: Run) -> list[Table]:
    """Hardware, versions and code."""
    tables = []
    for title in ("hardware", "versions", "code"):
        name, held = next(
            (
                (name, file[title])
                for name, file in (("manifest.json", run.manifest), (RUN_STATE, run.state))
                if title in file
            ),
            ("", {}),
        )
        lines = [[Value(key), Value(str(said))] for key, said in held.items() if said is not None]
        if lines:
            tables.append(Table(title.capitalize(), f"{name}: {title}", ["what", ""], lines))
    return tables


def events(run: Run) -> list[Table]:
    """Losses that jumped, and rows that were dropped."""
    tables = []
    if run.spikes:
        lines = [
            [
                value(said.get("step"), f"loss_spikes.jsonl:{number}#step", count),
                value(said.get("loss"), f"loss_spikes.jsonl:{number}#loss"),
                value(said.get("median"), f"loss_spikes.jsonl:{number}#median"),
                Value(said.get("place", "")),
                Value(said.get("excerpt", "")),
            ]
            for number, said in run.spikes[:LINES_SHOWN]
        ]
        heads = ["step", "loss", "median before", "row", "excerpt"]
        tables.append(Table("Losses that jumped", shown_of("loss_spikes.jsonl", run.spikes), heads, lines, wide=True))
    if run.rejected:
        lines = [
            [Value(said.get("place", "")), Value(said.get("reason", "")), Value(said.get("excerpt", ""))]
            for _, said in run.rejected[:LINES_SHOWN]
        ]
        heads = ["row", "reason", "excerpt"]
        tables.append(
            Table("Rows that were dropped", shown_of("rejected.jsonl", run.rejected), heads, lines, wide=True)
        )
    return tables


def shown_of(file: str, lines: Lines) -> str:
    """The source of a table that shows the first lines of a file."""
    return f"{file}: the first {LINES_SHOWN} of {len(lines):,} lines" if len(lines) > LINES_SHOWN else file


def generations(run: Run) -> list[dict[str, Any]]:
    """What the model said to each of `sample_prompts`, in the course of the run: some of the steps, first and last."""
    prompts: dict[str, Lines] = {}
    for number, said in run.samples:
        prompts.setdefault(str(said.get("prompt", "")), []).append((number, said))
    shown = []
    for prompt, lines in prompts.items():
        some = {round(at * (len(lines) - 1) / (LINES_SHOWN - 1)) for at in range(LINES_SHOWN)}
        said = [
            {
                "step": value(line.get("step"), f"samples.jsonl:{number}#step", count),
                "tokens": value(line.get("tokens"), f"samples.jsonl:{number}#tokens", count),
                "stopped": line.get("stopped"),
                "text": line.get("text", ""),
            }
            for number, line in (lines[at] for at in sorted(some))
        ]
        shown.append({"prompt": prompt, "said": said, "of": len(lines)})
    return shown


def differing(runs: dict[str, Run]) -> list[Table]:
    """Settings and versions that are not the same in all of several runs."""
    settings = {
        name: {key: setting(key, said) for key, said in {**run.recipe[2], **run.recipe[0]}.items()}
        for name, run in runs.items()
    }
    versions = {
        name: {**run.state.get("versions", {}), "open_r1": run.state.get("code", {}).get("digest")}
        for name, run in runs.items()
    }
    hardware = {name: run.manifest.get("hardware", run.state.get("hardware", {})) for name, run in runs.items()}
    tables = []
    for title, source, held in (
        ("Settings that differ", "recipe.yaml", settings),
        ("Versions that differ", RUN_STATE, versions),
        ("Hardware that differs", "manifest.json or run_state.json", hardware),
    ):
        keys = dict.fromkeys(key for said in held.values() for key in said if key not in BLUNT)
        lines = [
            [
                Value(key),
                *(Value(str(said[key])) if said.get(key) is not None else Value("") for said in held.values()),
            ]
            for key in keys
            if len({str(said.get(key)) for said in held.values()}) > 1
        ]
        if lines:
            tables.append(Table(title, source, ["", *runs], lines, wide=True))
    return tables


def results(runs: dict[str, Run]) -> Table:
    """What several runs came to, side by side."""
    found = {name: headlines(run) for name, run in runs.items()}
    names = dict.fromkeys(name for each in found.values() for name in each)
    lines = [[Value(name), *(each.get(name, Value("")) for each in found.values())] for name in names]
    return Table("Results", "each run's own files", ["", *runs], lines)
