"""Compare two runs: whether they saw the same data, and where their losses part.

    python scripts/compare_runs.py A B [--tolerance 1e-3]

A and B are output directories, also of runs that are still going or were killed. That one run is shorter is said, and
is no difference. Exit code 0: the same data and losses, no further apart than the tolerance (0: to the last bit);
1: they differ; 2: a file cannot be read, or there is nothing to compare.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from open_r1.checkpoints import checkpoints
from open_r1.errors import UserError
from open_r1.run_state import RUN_STATE
from open_r1.schema import SECRET

ORDER, STATE, MANIFEST = "order.jsonl", "trainer_state.json", "manifest.json"
LOSSES, BESIDE = ("loss", "eval_loss"), ("learning_rate", "grad_norm")
PARTS = ("settings", "versions", "code", "hardware")
ROUNDING = 1e-6  # relative, of means over the same steps that were summed up in float32 in other portions
LONGEST = 60  # characters of a value that are shown
MISSING = object()

Series = dict[int, float]


class Run(NamedTuple):
    """What is known of a run: rows and data of each step, what it logged by name and step, what it was, and notes."""

    order: dict[int, tuple[str, str]]
    logged: dict[str, Series]
    about: dict[str, dict[str, Any]]
    notes: list[str]


class Parting(NamedTuple):
    """Where two series part: what to say of it, in how many steps they were compared, how far apart they are at most,
    and the first step in which that is too far."""

    text: str
    compared: int = 0
    most: float = 0.0
    step: int | None = None


def main(argv: list[str] | None = None) -> int:
    """Compare the runs of `argv` (default: the command line); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("a", type=Path, metavar="A", help="output directory of a run")
    parser.add_argument("b", type=Path, metavar="B", help="output directory of another")
    parser.add_argument("--tolerance", type=float, default=0.0, help="by which losses and grad_norm may differ (0)")
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        parser.error("--tolerance: is a number from 0")
    try:
        return compare(args.a, args.b, args.tolerance)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2


def compare(path_a: Path, path_b: Path, tolerance: float) -> int:
    """Print how two runs compare; returns the exit code. Raises `UserError`."""
    a, b = read_run(path_a), read_run(path_b)
    for name, path, run in (("A", path_a, a), ("B", path_b, b)):
        losses = run.logged.get("loss")
        said = [counted(len(run.order)), f"losses up to step {max(losses)}" if losses else "no losses", *run.notes]
        print(f"{name}: {path}: {'; '.join(said)}")
    other_data, lines = compare_data(a, b)
    print("\n".join(lines))

    partings: dict[str, Parting] = {}
    for key in (*LOSSES, *BESIDE):
        one, two = (run.logged.get(key, {}) for run in (a, b))
        if one or two:
            allowed = 0.0 if key == "learning_rate" else tolerance  # it is computed, not measured
            partings[key] = compare_series(one, two, allowed, mean=key == "loss")
            print(f"{key}: {partings[key].text}")
    print("\n".join(compare_about(a, b, other_data is not None)))
    code, text = verdict(a, b, other_data, partings, tolerance)
    print(text)
    return code


def verdict(a: Run, b: Run, other_data: int | None, partings: dict[str, Parting], tolerance: float) -> tuple[int, str]:
    """The exit code, and what it comes to. Raises `UserError` when no loss could be compared."""
    steps = {key: parting.step for key, parting in partings.items() if parting.step is not None}
    losses = [steps[key] for key in LOSSES if key in steps]
    if other_data is not None:
        before = f", other losses from step {min(losses)}" if losses and min(losses) < other_data else ""
        return 1, f"other data from step {other_data}{before}"
    if losses:
        only = "" if "loss" in steps else " (of the evaluation only)"
        return 1, f"the same data, other losses from step {min(losses)}{only}"
    if "loss" not in partings or not partings["loss"].compared:
        raise UserError("the same data so far, but no loss that both logged: nothing more can be said")
    if beside := [f"{key} from step {steps[key]}" for key in BESIDE if key in steps]:
        return 0, f"the same data and losses, other {', other '.join(beside)}"
    within = f", within {tolerance:g}" if any(parting.most for parting in partings.values()) else ""
    ends = {max(steps) for run in (a, b) for steps in (run.order, run.logged["loss"])}
    return 0, f"the same run{within}" + (f", as far as both go: step {min(ends)}" if len(ends) > 1 else "")


def read_run(path: Path) -> Run:
    """What the files of an output directory say of its run. Raises `UserError`."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory")
    notes: list[str] = []
    order = read_order(path / ORDER, notes)
    return Run(order, read_history(path, max(order), notes), read_about(path, notes), notes)


def read_order(path: Path, notes: list[str]) -> dict[int, tuple[str, str]]:
    """Rows and data of each step. A last line that was not written to its end is left out, as on a resume."""
    lines = read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("}\n"):
        notes.append(f"the last line of {ORDER} was not written to its end")
        lines.pop()
    order = {}
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            order[int(step["step"])] = (step["rows"], step["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: is no line with step, rows and data: {line.strip()[:80]!r}") from error
    if not order:
        raise UserError(f"{path}: no step is in it: the run has taken none yet")
    return order


def read_history(path: Path, last: int, notes: list[str]) -> dict[str, Series]:
    """What was logged, by name and step: of the output directory, or of the newest checkpoint where that is newer.

    A history that goes on after the last step of the order is that of an earlier run in this directory.
    """
    final = path / STATE
    saved = [file for folder in checkpoints(path) if (file := folder / STATE).exists()]
    newer = final.exists() and not (saved and saved[0].stat().st_mtime_ns > final.stat().st_mtime_ns)
    files = [final, *saved] if newer else [*saved, *([final] if final.exists() else [])]
    for number, file in enumerate(files):
        try:
            state = read_json(file)
            entries = [(int(entry["step"]), entry) for entry in state["log_history"]]
            step = int(state["global_step"])
        except UserError:
            if file == final or number == len(files) - 1:
                raise
            notes.append(f"{file.relative_to(path)} is broken and passed over")  # killed while saving
            continue
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: has no log_history with steps, as the trainer writes it") from error
        if step > last:
            notes.append(f"{file.relative_to(path)} is of an earlier run (step {step}) and passed over")
            continue
        if file != final:
            notes.append(f"from {file.parent.name}")
        logged: dict[str, Series] = {}
        for step, entry in entries:
            for key in (*LOSSES, *BESIDE):
                if key in entry:  # of two evaluations in one step the last
                    logged.setdefault(key, {})[step] = number_of(entry[key])
        return logged
    notes.append("nothing saved yet that says its losses")
    return {}


def read_about(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """What the run was: of its manifest, else (it has not ended) of its state; empty where neither is there."""
    manifest, state = path / MANIFEST, path / RUN_STATE
    try:
        if manifest.exists():
            said = read_json(manifest)
            if said["order"] == hashlib.sha256((path / ORDER).read_bytes()).hexdigest():
                recipe = {key: value["value"] for key, value in said["recipe"].items()}
                about = {key: said[key] for key in ("versions", "code", "hardware")}
                return {"settings": recipe, "resolved": said["settings"], "sources": said["data"], **about}
            notes.append(f"{MANIFEST} is of other steps and passed over")
        if state.exists():
            said = read_json(state)
            return {key: said[key] for key in PARTS if isinstance(said.get(key), dict)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: is not what a run writes: {error!r}") from error
    return {}


def read_text(path: Path) -> str:
    """The text of a file. Raises `UserError`."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; name the output directory of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError`."""
    try:
        said = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is no JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(said, dict):
        raise UserError(f"{path}: holds no JSON object")
    return said


def number_of(value: Any) -> float:
    """A logged value as a number; one that JSON has no number for is not a number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def compare_data(a: Run, b: Run) -> tuple[int | None, list[str]]:
    """The first step in which two runs read other rows, None without, and lines that say how they compare."""
    common = sorted(a.order.keys() & b.order.keys())
    if not common:
        raise UserError("no step is in both runs")
    lines = []
    other = [step for step in common if a.order[step] != b.order[step]]
    if other:
        (rows_a, data_a), (rows_b, data_b) = a.order[other[0]], b.order[other[0]]
        if data_a == data_b:
            why = "the same prepared rows in another order"
        else:
            why = f"other prepared rows: {data_a} -> {data_b}"
            why += ", drawn in the same order" if rows_a == rows_b else ""
        lines.append(f"data: differs first in step {other[0]}, in {len(other)} of {len(common)} common steps ({why})")
    else:
        lines.append(f"data: the same rows in all of {counted(len(common), 'common step')}")
    for name, steps in (("A", a.order.keys() - b.order.keys()), ("B", b.order.keys() - a.order.keys())):
        if steps:
            lines.append(f"data: {counted(len(steps))} only in {name}, {min(steps)} to {max(steps)}")
    return (other[0] if other else None), lines


def means(values: Series, steps: Set[int]) -> dict[int, tuple[float, int]]:
    """For each of some of the steps the mean since the one before, and of how many entries; one entry is unchanged."""
    found, held, since, before = {}, [], 0, 0
    for step in sorted(values):
        held.append((values[step], step - before))
        before = step
        if step in steps:
            mean = held[0][0] if len(held) == 1 else sum(value * n for value, n in held) / (step - since)
            found[step], held, since = (mean, len(held)), [], step
    return found


def gap(a: float, b: float) -> float:
    """How far apart two numbers are; two that are no numbers are equal, one is infinitely far from any."""
    if a == b or (a != a and b != b):
        return 0.0
    return math.inf if math.isnan(a - b) else abs(a - b)


def compare_series(one: Series, two: Series, tolerance: float, *, mean: bool) -> Parting:
    """How two logged series compare in the steps that both have.

    `mean`: a value is the mean since the entry before, so that with other `logging_steps` only means over the same
    steps compare.
    """
    common = one.keys() & two.keys()
    if not common:
        return Parting(f"logged in no step by both ({len(one)} and {len(two)} entries)")
    if mean:
        values_a, values_b = means(one, common), means(two, common)
    else:
        values_a, values_b = ({step: (values[step], 1) for step in common} for values in (one, two))
    gaps: Series = {}
    rounded = False
    for step in sorted(common):
        (x, entries_a), (y, entries_b) = values_a[step], values_b[step]
        gaps[step] = gap(x, y)
        if entries_a != entries_b:
            rounded = True
            gaps[step] = gaps[step] if gaps[step] > ROUNDING * max(abs(x), abs(y)) else 0.0
    differ = [step for step, far in gaps.items() if far]
    beyond = next((step for step in differ if gaps[step] > tolerance), None)
    most = max(gaps, key=gaps.__getitem__, default=None)
    notes = [f"{'equal up to rounding' if rounded else 'identical'} in {counted(len(gaps), 'logged step')}"]
    if differ:
        first = differ[0]
        notes = [
            f"differs first in step {first}, {values_a[first][0]!r} and {values_b[first][0]!r}",
            f"most in step {most}, by {gaps[most]:.3g}",
            f"in {len(differ)} of {len(gaps)} logged steps",
        ]
        if tolerance:
            notes.append(f"by more than {tolerance:g} {'nowhere' if beyond is None else f'from step {beyond}'}")
    reach = min(max(one), max(two))
    if any(step <= reach for step in one.keys() ^ two.keys()):
        notes.append(
            "logged in other steps: only " + ("means over the same steps" if mean else "common ones") + " count"
        )
    return Parting("; ".join(notes), len(gaps), gaps[most] if gaps else 0.0, beyond)


def compare_about(a: Run, b: Run, other_data: bool) -> list[str]:
    """Lines that say which settings, versions, code and hardware differ, and which sources if the data do."""
    one, two = dict(a.about), dict(b.about)
    if "resolved" in one and "resolved" in two:  # also what the recipe leaves out
        one, two = ({**run, "settings": {**run["resolved"], **run["settings"]}} for run in (one, two))
    lines = []
    for part in (*PARTS, *(["sources"] if other_data else [])):
        lacking = [name for name, run in (("A", one), ("B", two)) if not run.get(part)]
        if lacking:
            lines.append(f"{part}: not known of {' and '.join(lacking)}")
            continue
        flat_a, flat_b = flat(one[part]), flat(two[part])
        flat_a.pop("output_dir", None), flat_b.pop("output_dir", None)
        changed = [
            f"  {key}: {shown(flat_a.get(key, MISSING))} -> {shown(flat_b.get(key, MISSING))}"
            for key in sorted({**flat_a, **flat_b})
            if flat_a.get(key, MISSING) != flat_b.get(key, MISSING)
        ]
        lines += [f"{part}, A -> B:", *changed] if changed else [f"{part}: the same"]
        if part == "code" and (flat_a.get("changed") or flat_b.get("changed")):
            lines[-1] += "; files were changed since that commit, which may differ" if not changed else ""
    return lines


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """What is in nested objects and lists, by path."""
    if not value or not isinstance(value, (dict, list)):
        return {name: value} if name else {}
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, each in inside for k, v in flat(each, f"{name}.{key}" if name else str(key)).items()}


def counted(number: int, what: str = "step") -> str:
    """A number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def shown(value: Any) -> str:
    """A value in a line, without secrets."""
    if value is MISSING:
        return "(unset)"
    text = SECRET.sub("***", json.dumps(value, ensure_ascii=False))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


if __name__ == "__main__":
    sys.exit(main())
