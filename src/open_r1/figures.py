"""What a report plots: series of numbers as `metrics.jsonl` and `ledger.json` have them, for plotly.js to draw.

A figure says what it is, the series say where each number is from; nothing is smoothed, averaged or interpolated.
"""

import math
import re
from typing import Any, NamedTuple

from open_r1.ledger import Entry
from open_r1.views import bars_of

POINTS = 1000  # of a series; of more, those at both ends of every stretch stay
Lines = list[tuple[int, dict[str, Any]]]  # of metrics.jsonl: the number of a line, counted from 1, and what it says


class Series(NamedTuple):
    """Numbers `y` over `x`, of one key of a file, in the `color` of a number; `aside` is drawn dashed."""

    name: str
    key: str
    file: str
    x: list[Any]
    y: list[float]
    color: int = 0
    aside: bool = False


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
    ("Model FLOPs utilisation", {"mfu": "MFU"}, "", ".1%", "level"),
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
    ("mfu", "Model FLOPs utilisation", "", ".1%"),
]


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be plotted."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: list[tuple[Any, float]], most: int = POINTS) -> list[tuple[Any, float]]:
    """At most `most` of many points: of every stretch the least and the greatest, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept += sorted({min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])})
    return [points[at] for at in kept]


def series_of(lines: Lines, key: str, name: str, color: int, aside: bool = False) -> list[Series]:
    """The series of a key of metrics.jsonl over steps: one, or none where no line has a number of it."""
    points = thinned([(line["step"], line[key]) for _, line in lines if is_number(line.get(key))])
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [Series(name, key, "metrics.jsonl", list(x), list(y), color, aside)]


def by_source(lines: Lines) -> Figure:
    """Losses of each source: `loss/<source>`, and dashed those of the evaluation."""
    keys = dict.fromkeys(key for _, line in lines for key in line if key.startswith(("loss/", "eval_loss/")))
    sources = list(dict.fromkeys(key.partition("/")[2] for key in keys))
    names = dict(zip(sources, short(sources), strict=True))
    series = []
    for key in keys:
        name, evaluated = key.partition("/")[2], key.startswith("eval_")
        title = names[name] + (" (eval)" if evaluated else "")
        series += series_of(lines, key, title, sources.index(name), aside=evaluated)
    return Figure("Loss by source", series, format=".4~f")


def figures_of(lines: Lines) -> list[Figure]:
    """The figures of a run; those of which nothing was logged are left out."""
    figures = []
    for title, keys, unit, number, kind in OF_A_RUN:
        found = [
            series_of(lines, key, name, color, key.startswith("eval_"))
            for color, (key, name) in enumerate(keys.items())
        ]
        figures.append(Figure(title, sum(found, []), unit=unit, format=number, kind=kind))
    figures.insert(1, by_source(lines))
    return [figure for figure in figures if figure.series]


def compared(runs: dict[str, Lines]) -> list[Figure]:
    """What several runs, by name, logged under the same keys, each figure with a line for every run."""
    figures = []
    for key, title, unit, number in COMPARED:
        found = [series_of(lines, key, name, color) for color, (name, lines) in enumerate(runs.items())]
        kind = "level" if unit or number.endswith("%") else "line"
        figures.append(Figure(title, sum(found, []), unit=unit, format=number, kind=kind))
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
