"""What the files of an output directory say of its run, also of one that is still going or was killed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from open_r1.errors import UserError
from open_r1.figures import Lines, is_number
from open_r1.recipe import read_back
from open_r1.run_state import RUN_STATE
from open_r1.schema import masked
from open_r1.views import TRAIN_SAMPLES, visible


class Run(NamedTuple):
    """What the files of an output directory say of its run; what is not there is empty."""

    name: str
    metrics: Lines
    ledger: dict[str, Any]
    state: dict[str, Any]
    manifest: dict[str, Any]
    recipe: tuple[dict[str, Any], dict[str, str], dict[str, str]]
    samples: Lines
    rows: list[dict[str, Any]]
    spikes: Lines
    rejected: Lines


def read_run(path: Path) -> Run:
    """Read a run, also one that is still going or was killed. Raises `UserError` when there is none."""
    if not (path / RUN_STATE).is_file():
        raise UserError(f"{path}: holds no run ({RUN_STATE} is missing); name the output_dir of one")
    recipe = (path / "recipe.yaml").read_text(encoding="utf-8") if (path / "recipe.yaml").exists() else ""
    return Run(
        name=cleaned(path.absolute().name),
        metrics=[line for line in read_lines(path / "metrics.jsonl", plain=True) if is_number(line[1].get("step"))],
        ledger=cleaned(read_json(path / "ledger.json")),
        state=cleaned(read_json(path / RUN_STATE)),
        manifest=cleaned(read_json(path / "manifest.json")),
        recipe=cleaned(read_back(recipe)),
        samples=read_lines(path / "samples.jsonl"),
        rows=cleaned(read_json(path / TRAIN_SAMPLES) or []),
        spikes=read_lines(path / "loss_spikes.jsonl"),
        rejected=read_lines(path / "rejected.jsonl"),
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds, {} when it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_lines(path: Path, plain: bool = False) -> Lines:
    """The objects in a file of JSON lines, each with its number; `plain` ones hold numbers alone."""
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            said = json.loads(line)
        except ValueError:  # the last one, while it is written
            continue
        if isinstance(said, dict):
            lines.append((number, said if plain else cleaned(said)))
    return lines


def cleaned(value: Any) -> Any:
    """A value whose texts show what would hide in them, and no secret."""
    if isinstance(value, str):
        return visible(masked(value))
    if isinstance(value, dict):
        return {cleaned(str(key)): cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value
