"""What a report says of a run in words and tables; each number with the place where it stands.

`metrics.jsonl:12#loss` is key `loss` in line 12, `ledger.json#train/total/tokens` a path of keys; where that holds
several numbers, it is their sum. The one mean is that of a speed or of padding while a run has not ended.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import yaml

from open_r1.figures import is_number, numbers_in
from open_r1.ledger import ROWS_SHOWN, TOKENS_SHOWN, WITHOUT_PROPORTION
from open_r1.run_files import LINES_SHOWN, Lines, Run, cleaned
from open_r1.run_state import RUN_STATE
from open_r1.schema import looks_secret

NO_NUMBER = "not a number"
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
    """12.3%, 0.022%"""
    return f"{number:.1%}" if number >= 0.001 or number <= 0 else f"{100 * number:.2g}%"


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
    if isinstance(number, dict) and all(map(is_number, number.values())):
        number = sum(number.values())
    return Value(words(number), number, source) if is_number(number) else Value("" if number is None else str(number))


def logged_at(run: Run, key: str, at: int, words: Callable[[float], str]) -> Value:
    """What was logged under a key, at a place of its column; null is no number, as a loss that diverged."""
    column = run.metrics[key]
    number, source = column.values[at], f"metrics.jsonl:{column.lines[at]}#{key}"
    return value(number, source, words) if is_number(number) else Value(NO_NUMBER, None, source)


def newest(run: Run, key: str, words: Callable[[float], str] = figure) -> Value:
    """What was logged last under a key, an empty value where nothing was."""
    return logged_at(run, key, -1, words) if key in run.metrics else Value("")


def least(run: Run, key: str, words: Callable[[float], str] = figure) -> Value:
    """The least number that was logged under a key."""
    values = run.metrics[key].values
    return logged_at(run, key, min(numbers_in(run.metrics, key), key=values.__getitem__, default=-1), words)


def greatest(run: Run, key: str, words: Callable[[float], str] = figure) -> Value:
    """The greatest number that was logged under a key."""
    values = run.metrics[key].values
    return logged_at(run, key, max(numbers_in(run.metrics, key), key=values.__getitem__, default=-1), words)


def mean(run: Run, key: str, words: Callable[[float], str] = figure) -> Value:
    """The mean so far of a speed, each window by its seconds, or of padding, by its positions.

    That is what the last log says of a whole run. Where windows cannot be weighed, the last one's, which says so.
    """
    column, padding = run.metrics[key], key == "padding_share"
    size = run.metrics.get("padded_tokens" if padding else "step_seconds")
    if size is not None and size.lines == column.lines and all(map(is_number, [*column.values, *size.values])):
        weights = np.diff(size.values, prepend=0) if padding else size.values * np.diff(size.steps, prepend=0)
        if weights.min() >= 0 < weights.sum():
            found = float(np.average(column.values, weights=weights))
            return Value(words(found), found, f"metrics.jsonl: mean of {key}")
    last = newest(run, key, words)
    return last._replace(text=f"{last.text} in the last window")


# What is shown

# Name, key of a whole run where there is one, key of a log, which of those counts until the run has ended, in words.
RESULTS: list[tuple[str, str, str, Callable[..., Value], Callable[[float], str]]] = [
    ("loss at last", "", "loss", newest, figure),
    ("evaluation loss at last", "", "eval_loss", newest, figure),
    ("evaluation loss at best", "", "eval_loss", least, figure),
    ("epochs", "", "epoch", greatest, figure),
    ("training time", "train_runtime", "", newest, seconds),
    ("tokens read", "train_real_tokens", "real_tokens", newest, count),
    ("supervised tokens", "train_supervised_tokens", "supervised_tokens", newest, count),
    ("tokens/s per device", "train_real_tokens_per_second", "real_tokens_per_second", mean, count),
    (
        "supervised tokens/s per device",
        "train_supervised_tokens_per_second",
        "supervised_tokens_per_second",
        mean,
        count,
    ),
    ("padding", "train_padding_share", "padding_share", mean, share),
    ("MFU", "train_mfu", "mfu", mean, share),
    ("peak memory", "train_peak_memory_bytes", "peak_memory_bytes", greatest, gib),
]
TIMES = ("compute", "data", "other", "evaluation", "saving")


def headlines(run: Run) -> dict[str, Value]:
    """What a run came to, by name."""
    found = {"status": Value(f"{run.state.get('status', 'unknown')}")}
    found["steps"] = value(run.state.get("global_step"), f"{RUN_STATE}#global_step", count)
    for name, of_run, of_log, choose, words in RESULTS:
        if measured(run, of_run):
            found[name] = newest(run, of_run, words)
        elif measured(run, of_log):
            found[name] = choose(run, of_log, words)
    for device, spent in (run.state.get("device_seconds") or {}).items():
        found[f"device time, {device}"] = value(spent, f"{RUN_STATE}#device_seconds/{escaped(device)}", hours)
    return found


def measured(run: Run, key: str) -> bool:
    """Whether anything was logged under a key. Null alone is what is not known; of a loss it is one that diverged."""
    return key in run.metrics and ("loss" in key or bool(numbers_in(run.metrics, key)))


def names_of(run: Run) -> dict[str, str]:
    """The sources that losses were logged of: what stands for each in keys, and its name.

    The ledger has the names; where it has none, as of an older run, it is what stands in keys.
    """
    entries = [entry for part in ("train", "eval") for entry in run.ledger.get(part, {}).get("sources", ())]
    known = {entry["metric"]: entry["source"] for entry in entries if entry.get("metric")}
    kinds = ("loss", "eval_loss", "train_loss")
    keys = dict.fromkeys(key.partition("/")[2] for key in run.metrics if "/" in key and key.partition("/")[0] in kinds)
    return {key: known.get(key) or name for key, name in zip(keys, cleaned([*keys]), strict=True)}


def totals(run: Run) -> list[Table]:
    """What was measured over the whole run: where its time went, and the loss of each source."""
    tables = []
    lines = [
        [Value(name), newest(run, f"train_{name}_seconds", seconds)]
        for name in TIMES
        if measured(run, f"train_{name}_seconds")
    ]
    if lines:
        tables.append(Table("Where the time went", "metrics.jsonl: train_*_seconds", ["", "seconds"], lines))
    prefixes = ("train_loss/", "train_loss_tokens/", "eval_loss/", "eval_loss_tokens/")
    lines = [
        [
            Value(name),
            *(newest(run, prefix + key, count if "tokens" in prefix else figure) for prefix in prefixes),
        ]
        for key, name in names_of(run).items()
        if f"train_loss/{key}" in run.metrics or f"eval_loss/{key}" in run.metrics
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


def facts(run: Run, title: str) -> tuple[str, dict[str, Any]]:
    """`hardware`, `versions` or `code`, and the file that says so: the manifest of a complete run, else the state.

    A run that goes on has the manifest of what it was before.
    """
    complete = run.state.get("status") == "complete" and run.manifest.get(title)
    name, file = ("manifest.json", run.manifest) if complete else (RUN_STATE, run.state)
    return name, file.get(title) or {}


def about(run: Run) -> list[Table]:
    """Hardware, versions and code."""
    tables = []
    for title in ("hardware", "versions", "code"):
        name, held = facts(run, title)
        lines = [[Value(key), Value(str(said))] for key, said in held.items() if said is not None]
        if lines:
            tables.append(Table(title.capitalize(), f"{name}: {title}", ["what", ""], lines))
    return tables


def events(run: Run) -> list[Table]:
    """Losses that jumped, and rows that were dropped."""
    tables = []
    spikes, number_of_spikes = run.spikes
    if spikes:
        lines = [
            [
                value(said.get("step"), f"loss_spikes.jsonl:{number}#step", count),
                value(said.get("loss"), f"loss_spikes.jsonl:{number}#loss"),
                value(said.get("median"), f"loss_spikes.jsonl:{number}#median"),
                Value(said.get("place", "")),
                Value(said.get("excerpt", "")),
            ]
            for number, said in spikes
        ]
        heads = ["step", "loss", "median before", "row", "excerpt"]
        source = shown_of("loss_spikes.jsonl", number_of_spikes)
        tables.append(Table("Losses that jumped", source, heads, lines, wide=True))
    rejected, number_of_rejected = run.rejected
    if rejected:
        lines = [
            [Value(said.get("place", "")), Value(said.get("reason", "")), Value(said.get("excerpt", ""))]
            for _, said in rejected
        ]
        heads = ["row", "reason", "excerpt"]
        source = shown_of("rejected.jsonl", number_of_rejected)
        tables.append(Table("Rows that were dropped", source, heads, lines, wide=True))
    return tables


def shown_of(file: str, lines: int) -> str:
    """The source of a table that shows the first of a file's lines."""
    return f"{file}: the first {LINES_SHOWN} of {lines:,} lines" if lines > LINES_SHOWN else file


def generations(run: Run) -> list[dict[str, Any]]:
    """What the model said to each of `sample_prompts`, in the course of the run: some of the steps, first and last.

    Prompts of one text, as with other tools, are told apart by their order in a step.
    """
    prompts: dict[tuple[str, int], Lines] = {}
    asked: Counter = Counter()
    for number, said in run.samples:
        prompt = str(said.get("prompt", ""))
        asked[str(said.get("step")), prompt] += 1
        prompts.setdefault((prompt, asked[str(said.get("step")), prompt]), []).append((number, said))
    chosen = []
    for (prompt, order), lines in prompts.items():
        some = {round(at * (len(lines) - 1) / (LINES_SHOWN - 1)) for at in range(LINES_SHOWN)}
        chosen.append((prompt, order, len(lines), [lines[at] for at in sorted(some)]))
    shown = []
    for prompt, order, count_of_lines, lines in cleaned(chosen):
        said = [
            {
                "step": value(line.get("step"), f"samples.jsonl:{number}#step", count),
                "tokens": value(line.get("tokens"), f"samples.jsonl:{number}#tokens", count),
                "stopped": line.get("stopped"),
                "text": line.get("text", ""),
            }
            for number, line in lines
        ]
        shown.append({"prompt": prompt, "order": order, "said": said, "of": count_of_lines})
    return shown


def differing(runs: dict[str, Run]) -> list[Table]:
    """Settings and versions that are not the same in all of several runs."""
    settings = {
        name: {
            key: setting(key, said) if looks_secret(key, said) else said
            for key, said in {**run.recipe[2], **run.recipe[0]}.items()
        }
        for name, run in runs.items()
    }
    versions = {
        name: {**(run.state.get("versions") or {}), "open_r1": (run.state.get("code") or {}).get("digest")}
        for name, run in runs.items()
    }
    hardware = {name: facts(run, "hardware")[1] for name, run in runs.items()}
    tables = []
    for title, source, held, words in (
        ("Settings that differ", "recipe.yaml", settings, setting),
        ("Versions that differ", RUN_STATE, versions, plain),
        ("Hardware that differs", "manifest.json or run_state.json", hardware, plain),
    ):
        keys = dict.fromkeys(key for said in held.values() for key in said if key not in BLUNT)
        lines = [
            [Value(key), *(Value(words(key, said[key]) if key in said else "") for said in held.values())]
            for key in keys
            if not all(same(said.get(key), next(iter(held.values())).get(key)) for said in held.values())
        ]
        if lines:
            tables.append(Table(title, source, ["", *runs], lines, wide=True))
    return tables


def same(one: Any, other: Any) -> bool:
    """Whether two settings are the same: 10 is 10.0, and 1 is not true."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def plain(key: str, said: Any) -> str:
    """A version or the like as it is, nothing for null."""
    return "" if said is None else str(said)


def results(runs: dict[str, Run]) -> Table:
    """What several runs came to, side by side."""
    found = {name: headlines(run) for name, run in runs.items()}
    names = dict.fromkeys(name for each in found.values() for name in each)
    lines = [[Value(name), *(each.get(name, Value("")) for each in found.values())] for name in names]
    return Table("Results", "each run's own files", ["", *runs], lines)
