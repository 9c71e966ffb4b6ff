"""What the files of an output directory say of its run, also of one that is still going or was killed."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from open_r1.errors import UserError
from open_r1.figures import Column, Metrics, is_number
from open_r1.recipe import read_back
from open_r1.run_state import RUN_STATE
from open_r1.schema import held_secrets, masked, show
from open_r1.views import TRAIN_SAMPLES, visible

Lines = list[tuple[int, dict[str, Any]]]  # of a file of JSON lines: a line's number, counted from 1, and what it says
LINES_SHOWN = 8  # of rejected rows, spikes, and of what is said to one prompt in the course of a run

# What the page takes for granted of a file: a type, an object with these keys (`?`: if at all) or any of a type, a
# list of any length or, as a tuple, of this one.
OF_A_SOURCE = {"source": str, "metric?": str, "lengths": {}, "dropped": {str: float}, "histogram?": {int: float}}
OF_A_PART = {"sources": [OF_A_SOURCE], "total": {"lengths": {}}, "in_proportion": bool}
ABOUT = {"hardware?": {}, "versions?": {}, "code?": {}}
SHAPES: dict[str, Any] = {
    "ledger.json": {"train?": OF_A_PART, "eval?": OF_A_PART},
    RUN_STATE: {"device_seconds?": {}, **ABOUT},
    "manifest.json": ABOUT,
    TRAIN_SAMPLES: [{"source": str, "samples": [{"title": str, "stretches": [(str, bool)]}]}],
}
IN_WORDS = {dict: "an object", list: "a list", str: "a text", float: "a number", bool: "true or false"}


class Run(NamedTuple):
    """What the files of an output directory say of its run; what is not there is empty.

    Of `spikes` and `rejected` the first lines and how many there are; `metrics` and `samples` are as they stand.
    """

    name: str
    metrics: Metrics
    ledger: dict[str, Any]
    state: dict[str, Any]
    manifest: dict[str, Any]
    recipe: tuple[dict[str, Any], dict[str, str], dict[str, Any]]
    samples: Lines
    rows: list[dict[str, Any]]
    spikes: tuple[Lines, int]
    rejected: tuple[Lines, int]


def read_run(path: Path) -> Run:
    """Read a run, also one that is still going or was killed.

    Raises `UserError` when there is none, or a file of it holds something else than a run writes.
    """
    if not (path / RUN_STATE).is_file():
        raise UserError(f"{path}: holds no run ({RUN_STATE} is missing); name the output_dir of one")
    return Run(
        name=cleaned(path.absolute().name),
        metrics=read_metrics(path / "metrics.jsonl"),
        ledger=read_json(path / "ledger.json"),
        state=read_json(path / RUN_STATE),
        manifest=read_json(path / "manifest.json"),
        recipe=read_recipe(path / "recipe.yaml"),
        samples=list(read_lines(path / "samples.jsonl")),
        rows=read_json(path / TRAIN_SAMPLES),
        spikes=first_lines(path / "loss_spikes.jsonl"),
        rejected=first_lines(path / "rejected.jsonl"),
    )


def read_json(path: Path) -> Any:
    """What a JSON file of `SHAPES` holds, nothing when it is not there or not whole. Raises `UserError`."""
    shape = SHAPES[path.name]
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return type(shape)()
    if problem := next(misfits(said, shape, ""), None):
        without = "" if path.name == RUN_STATE else ", or move it away, and the page goes without"
        raise UserError(f"{path}: {problem}; bring back the file as the run wrote it{without}")
    return cleaned(said)


def misfits(value: Any, shape: Any, at: str) -> Iterator[str]:
    """Where a value, at a path of keys, is not of a shape as in `SHAPES`, and what is found there."""
    kind = shape if isinstance(shape, type) else list if isinstance(shape, tuple) else type(shape)
    if not (is_number(value) if kind is float else isinstance(value, kind)):
        yield f"{at or 'it'} is to be {IN_WORDS[kind]}; found {show(value)}"
    elif isinstance(shape, tuple) and len(value) != len(shape):
        yield f"{at} is to be a list of {len(shape)}; found {show(value)}"
    elif isinstance(shape, (list, tuple)):
        for number, item in enumerate(value):
            yield from misfits(item, shape[number % len(shape)], f"{at}/{number}".lstrip("/"))
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if isinstance(key, type):
                for name, item in value.items():
                    if key is int and not name.isdecimal():
                        yield f"{at} is to have numbers as keys; found {show(name)}"
                    yield from misfits(item, inner, f"{at}/{name}".lstrip("/"))
            elif (name := key.rstrip("?")) in value and (value[name] is not None or name == key):
                yield from misfits(value[name], inner, f"{at}/{name}".lstrip("/"))
            elif name == key:
                yield f"{at or 'it'} lacks {name}; found {show(value)}"


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The recipe that a run wrote, as `recipe.read_back` has it. Raises `UserError` when the file is none."""
    try:
        said = cleaned(read_back(path.read_text(encoding="utf-8") if path.exists() else ""))
        problem = "" if isinstance(said[0], dict) else f"settings are to be key: value; found {show(said[0])}"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = f"{line}not valid YAML: {getattr(error, 'problem', None) or ' '.join(str(error).split())[:200]}"
    if problem:
        raise UserError(
            f"{path}: {problem}; bring back the file as the run wrote it, or move it away, and the page goes without"
        )
    return said


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its number."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):  # the last one, while it is written
                continue
            if isinstance(said, dict):
                yield number, said


def first_lines(path: Path) -> tuple[Lines, int]:
    """The first `LINES_SHOWN` objects in a file of JSON lines, as they can be shown, and how many lines there are."""
    shown = [(number, said) for number, said in cleaned(list(islice(read_lines(path), LINES_SHOWN)))]
    if len(shown) < LINES_SHOWN:
        return shown, len(shown)
    with path.open("rb") as file:
        return shown, sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_metrics(path: Path) -> Metrics:
    """The columns of `metrics.jsonl`, of lines that have a step; a dictionary a line would take several times the room
    where there are many."""
    columns: Metrics = {}
    for number, line in read_lines(path):
        step = line.get("step")
        if is_number(step):
            for key, value in line.items():
                column = columns.get(key)
                if column is None:
                    column = columns[key] = Column([], [], [])
                column.lines.append(number)
                column.steps.append(step)
                column.values.append(value)
    return columns


def cleaned(value: Any, held: list[str] | None = None) -> Any:
    """A value whose texts show what would hide in them, and no secret; those `held` are looked for when None."""
    held = held_secrets() if held is None else held
    if isinstance(value, str):
        return visible(masked(value, held))
    if isinstance(value, dict):
        return {cleaned(str(key), held): cleaned(item, held) for key, item in value.items()}
    return [cleaned(item, held) for item in value] if isinstance(value, (list, tuple)) else value
