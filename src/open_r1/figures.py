"""What a report plots: series of numbers as `metrics.jsonl` and `ledger.json` have them, for plotly.js to draw.

A figure says what it is, the series say where each number is from; nothing is smoothed, averaged or interpolated.
"""

import math
import os
import re
from typing import Any, NamedTuple

from open_r1.ledger import Entry
from open_r1.views import bars_of

POINTS = 1000  # of a series; of more, both ends stay, and the least and the greatest of every stretch
COLORS = 6  # of style.css; series of the same one differ in how they are drawn
DASHES, DASHES_ASIDE = ("", "2 3", "10 3 2 3"), ("6 4", "3 6", "10 3 2 3 2 3")  # as SVG has them, in pixels
TEXTURES = ("", "/", "x", ".")  # of bars, as plotly.js calls them
LABEL = 34  # characters of a name beside the pointer


class Column(NamedTuple):
    """What `metrics.jsonl` says under a key: the lines, counted from 1, that have it, their steps, their values."""

    lines: list[int]
    steps: list[float]
    values: list[Any]


Metrics = dict[str, Column]


class Series(NamedTuple):
    """Numbers `y` over `x`, of one key of a file, in the `color` of a number; `aside` is drawn dashed."""

    name: str
    key: str
    file: str
    x: list[Any]
    y: list[float]
    color: int = 0
    aside: bool = False

    @property
    def dash(self) -> str:
        """How its line is broken, empty where it is not."""
        return (DASHES_ASIDE if self.aside else DASHES)[self.color // COLORS % len(DASHES)]

    @property
    def texture(self) -> str:
        """What its bars are filled with."""
        return TEXTURES[self.color // COLORS % len(TEXTURES)]


class Figure(NamedTuple):
    """A plot. `kind`: line, level (from zero), area or bar (stacked); `unit` of y; `format` of numbers, as of d3."""

    title: str
    series: list[Series]
    x: str = "step"
    unit: str = ""
    format: str = ""
    kind: str = "line"

    @property
    def source(self) -> str:
        """Where its numbers are from, in small print."""
        files: dict[str, list[str]] = {}
        for series in self.series:
            files.setdefault(series.file, []).append(re.sub(r"(?<=loss/).*|(?<=sources/)\d+", "*", series.key))
        return "; ".join(f"{file}: {', '.join(dict.fromkeys(keys))}" for file, keys in files.items())

    @property
    def summary(self) -> str:
        """What is to be seen, in words, for those who do not see it."""
        if self.x != "step":
            return f"{self.title}: {', '.join(series.name for series in self.series)}"
        courses = (
            f"{s.name} from {s.y[0]:.4g} at step {s.x[0]} to {s.y[-1]:.4g} at step {s.x[-1]}" for s in self.series
        )
        return f"{self.title}: {'; '.join(courses)}"


# Title, keys with what they are called, unit, format, kind.
OF_A_RUN: list[tuple[str, dict[str, str], str, str, str]] = [
    ("Loss", {"loss": "train", "eval_loss": "evaluation"}, "", ".4~f", "line"),
    ("Learning rate", {"learning_rate": "learning rate"}, "", ".3~g", "line"),
    ("Gradient norm", {"grad_norm": "gradient norm"}, "", ".3~g", "line"),
    ("Token accuracy", {"mean_token_accuracy": "train", "eval_mean_token_accuracy": "evaluation"}, "", ".1%", "line"),
    (
        "Tokens per second per device",
        {
            "padded_tokens_per_second": "with padding",
            "real_tokens_per_second": "real",
            "supervised_tokens_per_second": "supervised",
        },
        "tokens/s",
        ".4~s",
        "level",
    ),
    ("Padding", {"padding_share": "share of padding"}, "", ".1%", "level"),
    (
        "Seconds of a step",
        {"compute_seconds": "compute", "data_seconds": "waiting for data", "other_seconds": "other"},
        "s",
        ".3~g",
        "area",
    ),
    ("Peak memory", {"peak_memory_bytes": "of a device"}, "B", ".4~s", "level"),
    ("Model FLOPs utilisation", {"mfu": "MFU"}, "", ".3~p", "level"),
    ("Model TFLOP/s per device", {"tflops": "TFLOP/s"}, "TFLOP/s", ".4~g", "level"),
]
# Key, title, unit, format.
COMPARED = [
    ("loss", "Train loss", "", ".4~f"),
    ("eval_loss", "Evaluation loss", "", ".4~f"),
    ("learning_rate", "Learning rate", "", ".3~g"),
    ("grad_norm", "Gradient norm", "", ".3~g"),
    ("real_tokens_per_second", "Real tokens per second per device", "tokens/s", ".4~s"),
    ("supervised_tokens_per_second", "Supervised tokens per second per device", "tokens/s", ".4~s"),
    ("padding_share", "Share of padding", "", ".1%"),
    ("step_seconds", "Seconds of a step", "s", ".3~g"),
    ("peak_memory_bytes", "Peak memory", "B", ".4~s"),
    ("mfu", "Model FLOPs utilisation", "", ".3~p"),
]


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be plotted."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thinned(columns: list[list[float]], most: int = POINTS) -> list[int]:
    """Places of at most `most` of many points over one x: both ends, and of every stretch the least and the greatest
    of each column, so that no spike is lost."""
    count = len(columns[0])
    if count <= most:
        return list(range(count))
    size = math.ceil(count / ((most - 2) // (2 * len(columns))))
    kept = {0, count - 1}
    for start in range(0, count, size):
        stretch = range(start, min(start + size, count))
        for column in columns:
            kept |= {min(stretch, key=column.__getitem__), max(stretch, key=column.__getitem__)}
    return sorted(kept)


def numbers_in(metrics: Metrics, key: str) -> list[int]:
    """Where a column of metrics.jsonl has numbers; empty where there is no such column."""
    return [at for at, value in enumerate(metrics[key].values) if is_number(value)] if key in metrics else []


def series_of(metrics: Metrics, key: str, name: str, color: int, aside: bool = False) -> list[Series]:
    """The series of a key of metrics.jsonl over steps, with all of its points: one, or none without a number.

    What is said of the best model stands behind later steps.
    """
    if not (places := numbers_in(metrics, key)):
        return []
    places.sort(key=metrics[key].steps.__getitem__)
    x, y = ([column[at] for at in places] for column in (metrics[key].steps, metrics[key].values))
    return [Series(name, key, "metrics.jsonl", x, y, color, aside)]


def drawn(series: list[Series], stacked: bool = False) -> list[Series]:
    """Series with the points that are plotted; stacked ones at steps that all have: plotly.js takes 0 for the rest."""
    if not stacked or not series:
        kept = [thinned([each.y]) for each in series]
    else:
        shared = set(series[0].x).intersection(*(each.x for each in series))
        held = [{x: y for x, y in zip(each.x, each.y, strict=True) if x in shared} for each in series]
        series = [each._replace(x=list(said), y=list(said.values())) for each, said in zip(series, held, strict=True)]
        kept = [thinned([each.y for each in series])] * len(series)
    return [
        each._replace(x=[each.x[at] for at in places], y=[each.y[at] for at in places])
        for each, places in zip(series, kept, strict=True)
        if places
    ]


def by_source(metrics: Metrics, names: dict[str, str]) -> Figure:
    """Losses of each source: `loss/<source>`, and dashed those of the evaluation; `names` by what stands in keys."""
    shown = dict(zip(names, short(list(names.values())), strict=True))
    series = []
    for key in metrics:
        kind, _, source = key.partition("/")
        if source in shown and kind in ("loss", "eval_loss"):
            name = shown[source] + (" (eval)" if kind == "eval_loss" else "")
            series += series_of(metrics, key, name, list(shown).index(source), aside=kind == "eval_loss")
    return Figure("Loss by source", drawn(series), format=".4~f")


def figures_of(metrics: Metrics, names: dict[str, str]) -> list[Figure]:
    """The figures of a run with `names` of its sources; those of which nothing was logged are left out."""
    figures = []
    for title, keys, unit, number, kind in OF_A_RUN:
        found = [
            series_of(metrics, key, name, color, key.startswith("eval_"))
            for color, (key, name) in enumerate(keys.items())
        ]
        series = drawn(sum(found, []), stacked=kind == "area")
        figures.append(Figure(title, series, unit=unit, format=number, kind=kind))
    figures.insert(1, by_source(metrics, names))
    return [figure for figure in figures if figure.series]


def compared(runs: dict[str, Metrics]) -> list[Figure]:
    """What several runs, by name, logged under the same keys, each figure with a line for every run."""
    figures = []
    for key, title, unit, number in COMPARED:
        found = [series_of(metrics, key, name, color) for color, (name, metrics) in enumerate(runs.items())]
        kind = "level" if unit or number[-1:] in ("%", "p") else "line"
        figures.append(Figure(title, drawn(sum(found, [])), unit=unit, format=number, kind=kind))
    return [figure for figure in figures if figure.series]


def histogram(ledger: Entry, part: str) -> Figure:
    """How many rows of a part of the data have which length, by source."""
    entries = ledger["sources"]
    names = short([entry["source"] for entry in entries])
    series = []
    for number, (name, bars) in enumerate(zip(names, bars_of(entries), strict=True)):
        firsts, _, rows = map(list, zip(*bars, strict=True)) if bars else ([], [], [])
        key = f"{part}/sources/{number}/histogram"
        series.append(Series(name, key, "ledger.json", firsts, rows, color=number))
    return Figure(f"Row lengths, {part}", series, x="tokens of a row, from", unit="rows", format=",", kind="bar")


def short(names: list[str]) -> list[str]:
    """Names of sources without folders, and without the split that all of them end with, where they still differ."""
    last = [name.rpartition("/")[2] for name in names]
    splits = {name.rpartition(":")[2] for name in last}
    if len(splits) == 1 and all(":" in name for name in last):
        last = [name.rpartition(":")[0] for name in last]
    return last if len({*last}) == len({*names}) else names


def labels(names: list[str]) -> list[str]:
    """Names of at most `LABEL` characters: longer ones without what they all begin with, then without their middle.

    Where that leaves equal ones, they are numbered.
    """
    longer = [name for name in names if len(name) > LABEL]
    start = max(0, len(os.path.commonprefix(longer)) - LABEL // 4) if len(longer) > 1 else 0
    ends = LABEL // 2 - 1
    cut = {name: f"…{name[start:]}" if start else name for name in longer}
    cut = {name: f"{text[:ends]}…{text[-ends:]}" if len(text) > LABEL else text for name, text in cut.items()}
    alike: dict[str, list[str]] = {}
    for name, text in cut.items():
        alike.setdefault(text, []).append(name)
    for text, found in alike.items():
        if len(found) > 1:
            cut |= {name: f"{text} ({number})" for number, name in enumerate(found, 1)}
    return [cut.get(name, name) for name in names]
