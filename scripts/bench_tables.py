"""Tables of docs/performance.md, from the figures that are committed beside it."""

import re
import statistics
import sys
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench_gpu import WANTED
from bench_results import read_results
from bench_runs import ALIKE

Section = dict[str, Any]
NAMES = {
    "stock": "`trl sft`",
    "tuned": "`trl sft`, tuned",
    "tuned, keeping": "the same, freed memory kept",
    "ours": "ours",
    "ours, accelerate-launch": "ours, `accelerate-launch`",
    "ours, python sft.py": "ours, `python sft.py`",
}
SIDES = ("ours", "stock", "tuned")
TARGETS = {
    ("8B", "full, bf16 weights", 8192): "MFU of 45 % on one H200",
    ("8B", "LoRA, 2 rows", 4096): "12,500 tokens/s",
    ("1.7B", "full", 32768): "fits",
}
# What is asked of ours: CPU seconds to the first step beside stock's, by cache.
STARTS = {"cold": 0.35, "warm": 0.6}


def fill(doc: Path, figures: Path) -> int:
    """Write the tables of a document anew, between `<!-- table NAME -->` and `<!-- end -->`; returns the exit code."""
    text = doc.read_text(encoding="utf-8")
    doc.write_text(filled(text, figures), encoding="utf-8")
    print(f"{doc}: {', '.join(names_in(text))}")
    return 0


def filled(text: str, figures: Path) -> str:
    """A document with its tables as the figures in a folder say."""
    sections = {**read_results(figures / "cpu.json").sections, **read_results(figures / "gpu.json").sections}

    def table(mark: re.Match[str]) -> str:
        name = mark[1]
        made = TABLES[name](sections.get(name)) if name in sections or name == "gpu" else "Not measured."
        return f"<!-- table {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def names_in(text: str) -> list[str]:
    """Names of a document's tables."""
    return re.findall(r"<!-- table (\w+) -->", text)


def markdown(head: str, lines: Iterable[list[Any]], about: str) -> str:
    """A table in Markdown; its head names columns, `about` says under which circumstances it holds."""
    columns = head.split(" | ")
    rows = [f"| {head} |", "|" + "---|" * len(columns), *(f"| {' | '.join(map(str, line))} |" for line in lines)]
    return "\n".join([*rows, "", about])


def circumstances(section: Section) -> str:
    """Where and how a section was measured."""
    repeats = max((run.get("repeat", 1) for run in section["runs"]), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    threads, times = section["threads"], f"{repeats} repeat{'s' if repeats != 1 else ''}"
    gib = round(section["memory_bytes"] / 2**30) if "memory_bytes" in section else section["memory_gib"]
    machine = f"{section['device']} with {gib} GiB, {threads} thread{'s' if threads > 1 else ''}"
    commits = {section["commit"]} if "commit" in section else {run["commit"] for run in section["runs"]}
    return f"`{section['command']}`, {times}, on {machine}; {versions}; commit {', '.join(sorted(commits))}."


def spread(values: list[float], form: str = ",.2f") -> str:
    """The median, and between which values it lies."""
    if not values:
        return "failed"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}}" + (f" ({low:{form}}–{high:{form}})" if len(values) > 1 else "")


def good(section: Section, **key: Any) -> dict[int, dict[str, Any]]:
    """The runs that hold `key` and did not fail, by repeat."""
    return {run["repeat"]: run for run in section["runs"] if key.items() <= run.items() and "failed" not in run}


def paired(ones: dict[int, Any], others: dict[int, Any], value: Callable[[dict[str, Any]], float]) -> list[float]:
    """One run's value divided by the other's, for each repeat that has both."""
    return [value(run) / value(others[repeat]) for repeat, run in ones.items() if repeat in others]


def keys_of(section: Section, *names: str) -> list[tuple[Any, ...]]:
    """What has been measured, in the order in which it was."""
    return list(dict.fromkeys(tuple(run[name] for name in names) for run in section["runs"]))


def startup(section: Section) -> str:
    """CPU and wall seconds to the end of the first step, beside stock's."""
    lines = []
    for cache, learns, side in keys_of(section, "cache", "learns", "side"):
        key = {"cache": cache, "learns": learns}
        runs, stock = good(section, **key, side=side), good(section, **key, side="stock")
        ratios = [[] if side == "stock" else paired(runs, stock, itemgetter(kind)) for kind in ("cpu", "wall")]
        lines.append(
            [
                f"{cache}, {section['scale']['cold_rows']:,} rows",
                learns,
                NAMES[side],
                spread([run["cpu"] for run in runs.values()], ".1f"),
                spread([run["wall"] for run in runs.values()], ".1f"),
                spread([run["cpu_before_training"] for run in runs.values()], ".1f"),
                *[spread(each) if each else "" for each in ratios],
                f"{STARTS[cache]}" if side == "ours" else "",
            ]
        )
    head = (
        "cache | learns | command | CPU s | wall s | CPU s before training | CPU ÷ stock's | wall ÷ stock's | at most"
    )
    return markdown(head, lines, circumstances(section))


def preparation(section: Section) -> str:
    """CPU and wall seconds of preparation alone."""
    lines = []
    for rows, kind in keys_of(section, "rows", "kind"):
        runs = good(section, rows=rows, kind=kind)
        floor, stock = good(section, rows=rows, kind="limit"), good(section, rows=rows, kind="stock")
        lines.append(
            [
                f"{section['scale']['prepared'][rows == 'long']:,} {rows}",
                kind,
                spread([run["cpu"] for run in runs.values()], ".1f"),
                spread([run["wall"] for run in runs.values()], ".1f"),
                spread(paired(runs, floor, lambda run: run["cpu"])),
                spread(paired(runs, stock, lambda run: run["cpu"])),
                f"{statistics.median(run['peak_mib'] for run in runs.values()):.0f}",
            ]
        )
    head = "rows | kind | CPU s | wall s | CPU ÷ limit's | CPU ÷ stock's | peak MiB"
    return markdown(head, lines, circumstances(section))


def per_cpu(run: dict[str, Any]) -> float:
    """Useful tokens a CPU second."""
    return run["real"] / sum(run["cpu"])


def per_wall(run: dict[str, Any]) -> float:
    """Useful tokens a second."""
    return run["real"] / sum(run["wall"])


def train(section: Section) -> str:
    """Useful tokens of the steady state."""
    lines = []
    for model, side in keys_of(section, "model", "side"):
        runs = good(section, model=model, side=side)
        stock, tuned = (good(section, model=model, side=other) for other in ("stock", "tuned"))
        gains = [] if side == "stock" else paired(runs, stock, per_cpu)
        limits = [run["padded"] / run["real"] for run in stock.values()]
        limit = statistics.median(limits) if limits else float("nan")
        padding = statistics.median(1 - run["real"] / run["padded"] for run in runs.values()) if runs else float("nan")
        lines.append(
            [
                model,
                NAMES[side],
                spread([per_cpu(run) for run in runs.values()], ",.0f"),
                spread([per_wall(run) for run in runs.values()], ",.0f"),
                f"{padding:.1%}",
                spread(gains) if gains else "",
                f"{statistics.median(gains) / limit:.2f} of {limit:.2f}" if gains else "",
                spread(paired(runs, tuned, per_cpu)) if side == "ours" else "",
            ]
        )
    head = "model | command | useful tokens a CPU s | a wall s | padding | CPU: × stock's | of all padding removed"
    return markdown(f"{head} | × tuned's", lines, circumstances(section))


def overhead(section: Section) -> str:
    """CPU milliseconds of a step, and the share that ours adds to that of `trl sft` with the same flags."""
    lines = []
    for model, every in keys_of(section, "model", "logging_steps"):
        ours, tuned = (good(section, model=model, logging_steps=every, side=side) for side in ALIKE)
        each = [sum(one) / sum(other) - 1 for one, other in pairs_of(ours, tuned)]
        added = f"{undisturbed(ours) / undisturbed(tuned) - 1:.1%}" if each else "failed"
        times = [f"{1000 * undisturbed(runs):.1f}" if runs else "failed" for runs in (tuned, ours)]
        lines.append([model, every, *times, added, spread(each, ".1%"), "3 %"])
    head = "model | logs every | CPU ms a step, tuned | ours | ours adds | of each repeat | at most"
    return markdown(head, lines, circumstances(section))


def pairs_of(ones: dict[int, Any], others: dict[int, Any]) -> list[tuple[list[float], list[float]]]:
    """CPU seconds of the steps of two sides, for each repeat that has both."""
    return [(run["cpu"], others[repeat]["cpu"]) for repeat, run in ones.items() if repeat in others]


def undisturbed(runs: dict[int, Any]) -> float:
    """Mean CPU seconds of a step, each at its least over the repeats: what else the machine does only adds to them."""
    return statistics.mean(map(min, zip(*(run["cpu"] for run in runs.values()), strict=True)))


def ablation(section: Section) -> str:
    """What each setting gains or costs."""
    lines = []
    for model, variant in keys_of(section, "model", "variant"):
        runs = good(section, model=model, variant=variant)
        none, all_ = (good(section, model=model, variant=name) for name in ("none of our defaults", "our defaults"))
        failed = next((run["failed"] for run in section["runs"] if run["variant"] == variant and "failed" in run), "")
        lines.append(
            [
                variant,
                spread([per_cpu(run) for run in runs.values()], ",.0f"),
                spread([per_wall(run) for run in runs.values()], ",.0f"),
                spread(paired(runs, none, per_cpu)),
                spread(paired(runs, all_, per_cpu)) if not failed else failed.replace("|", "/"),
            ]
        )
    settled = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in section["settled"].items())
    about = f"Our defaults that are not stock's here: {settled or 'none'}. {circumstances(section)}"
    head = "settings | useful tokens a CPU s | a wall s | CPU: × none of our defaults | × our defaults"
    return markdown(head, lines, about)


def gpu(section: Section | None) -> str:
    """Tokens, MFU and memory of every cell, also of those that nobody has measured."""
    runs = section["runs"] if section else []
    wanted = [tuple(each[:3]) for each in WANTED]
    wanted += [
        key
        for key in dict.fromkeys((run["shape"], run["method"], run["context"]) for run in runs)
        if key not in wanted
    ]
    lines = []
    for key in wanted:
        found = {run["side"]: run for run in runs if (run["shape"], run["method"], run["context"]) == key}
        sides = [cell_in_words(found.get(side)) for side in SIDES]
        lines.append([f"{key[0]}, {key[1]}", f"{key[2]:,}", *sides, TARGETS.get(key, "")])
    about = "Not measured: no GPU was at hand." if section is None else gpu_circumstances(section)
    return markdown("model | context | ours | `trl sft` | `trl sft`, tuned | target for ours", lines, about)


def gpu_circumstances(section: Section) -> str:
    """What the device does at most, and how it was measured."""
    peak = section.get("peak_flops")
    ceilings = ", ".join(f"{value:,} {name}" for name, value in section["ceilings"].items())
    of = "an unknown peak" if peak is None else f"{peak / 1e12:,} TFLOP/s"
    return f"Measured ceilings: {ceilings}; MFU is of {of}. {circumstances(section)}"


def cell_in_words(run: dict[str, Any] | None) -> str:
    """What a cell of the GPU's table says."""
    if run is None:
        return "not measured"
    if run["outcome"] != "done":
        return f"{run['outcome']}{': ' + run['why'].replace('|', '/') if run.get('why') else ''}"
    mfu = "" if run["mfu"] is None else f", MFU {run['mfu']:.1%}"
    return (
        f"{run['tokens_per_second']:,.0f} tokens/s{mfu}, {run['allocated_gib']:.0f} GiB, "
        f"{run['steps']} x {run['step_seconds']:.2f} s"
    )


TABLES: dict[str, Callable[[Any], str]] = {
    "startup": startup,
    "preparation": preparation,
    "train": train,
    "overhead": overhead,
    "ablation": ablation,
    "gpu": gpu,
}

if __name__ == "__main__":
    sys.exit("python scripts/bench.py table")
