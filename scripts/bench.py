"""What ours costs beside `trl sft`: start-up, preparation, training, each default, metrics; and the same on a GPU.

    python scripts/bench.py [SECTION ...] [--repeats N] [--out FILE.json] [--again] [--quick]
    python scripts/bench.py gpu [--minutes 9] [--only NAME ...] [--toy]
    python scripts/bench.py table

Without a section, all that a CPU can tell: `startup`, `preparation`, `train`, `overhead`, `ablation`, in float32, on
the standard library's docstrings. `trl sft` is run as a person would run it (stock), and with the flags that ours
settles by itself (tuned; with freed memory kept, too, as ours does: tuned, keeping); sides take turns, every run is a
process of its own, and where both train the same rows their losses must be equal at every step. Each run is written to
FILE at once (docs/performance/cpu.json, or gpu.json): started again, what is there already is kept, unless `--again`.
`table` writes the tables of docs/performance.md anew.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench_results import Results, read_results
from bench_runs import (
    ALIKE,
    STOCK,
    Failed,
    Unequal,
    about,
    first_step,
    require_parity,
    run,
    settled,
    steady,
    write_inputs,
)

DOC = Path(__file__).parents[1] / "docs/performance.md"
FIGURES = DOC.parent / "performance"
# Models by hidden size and layers: on a tiny one what surrounds the arithmetic shows, on a larger one the arithmetic.
SHAPES = {"1M": (128, 4), "6M": (256, 6)}
LONGEST = 1024  # tokens of a row, which is stock's max_length

# What ours may settle by itself, and what stock does: the ablation measures those that differ on this machine.
DEFAULTS = {
    "padding_free": False,
    "attn_implementation": "sdpa",
    "activation_checkpointing": True,
    "dataloader_num_workers": 0,
    "torch_compile": False,
    "packing": False,
}
# Settings that are no defaults, each on top of ours; a line more is a setting more that is measured.
CANDIDATES: dict[str, dict[str, Any]] = {
    "random order": {"train_sampling_strategy": "random", "longest_first": False},
    "random order, longest_first": {"train_sampling_strategy": "random", "longest_first": True},
    "group_by_length": {"train_sampling_strategy": "group_by_length", "longest_first": False},
    "packing, a pack of 1,024 a step": {
        "packing": True,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "random",
    },
    "batches of one row, 8 accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "two dataloader workers": {"dataloader_num_workers": 2},
    "torch_compile": {"torch_compile": True},
    "a log after each step": {"logging_steps": 1},
    "no logs": {"logging_strategy": "no"},
}
# What of a conversation is learnt, by settings of ours and of stock: our default, and stock's.
LEARNT = {"answers": ({}, STOCK), "everything": ({"supervision": "full"}, {**STOCK, "assistant_only_loss": False})}
OTHER_STEPS = {"train_sampling_strategy", "packing"}  # settings with which steps are of other rows


@dataclass
class Scale:
    """How much is measured. Steps are those of a run, of which the first `skip` are not counted."""

    cold_rows: int = 85_000
    prepared: tuple[int, int] = (30_000, 200)  # short and long rows
    steps: tuple[int, ...] = (32, 18)  # one for each shape
    overhead_steps: int = 64
    ablation_rows: int = 160
    compile_seconds: float = 240
    shapes: dict[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)
    rows: int | None = None
    skip: int = 4


QUICK = Scale(
    cold_rows=200,
    prepared=(60, 2),
    steps=(4, 4),
    overhead_steps=4,
    ablation_rows=32,
    compile_seconds=60,
    shapes={"tiny": (32, 1), "small": (32, 2)},
    rows=80,
    skip=2,
)


@dataclass
class Cell:
    """One thing that is measured: `key` says what, `measure` returns figures, at most `times` repeats are made."""

    key: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    times: int | None = None


@dataclass
class Bench:
    """A section that is measured: where its files are for now, at which scale, and what has been measured of it."""

    section: str
    work: Path
    scale: Scale
    results: Results

    def runs(self, **key: Any) -> list[dict[str, Any]]:
        """The runs of this section so far whose key holds `key`."""
        return self.results.runs(self.section, **key)


def measure(bench: Bench, cells: list[Cell], repeats: int) -> None:
    """All cells in turn, back, and again, but those that are there already; prints each when it is done.

    A run that does not reach its steps is a result, too. Raises `Unequal`.
    """
    for repeat in range(1, repeats + 1):
        for cell in cells if repeat % 2 else reversed(cells):
            key = {"repeat": repeat, **cell.key}
            if bench.runs(**key) or repeat > (cell.times or repeats):
                continue
            started = time.monotonic()
            try:
                figures = cell.measure()
            except Failed as error:
                figures = {"failed": str(error).splitlines()[0][:200]}
                print(error, file=sys.stderr)
            bench.results.add(bench.section, {**key, **figures})
            took = f"{time.monotonic() - started:.0f} s"
            print(f"{bench.section} {repeat}, {', '.join(map(str, cell.key.values()))}: {shown(figures)} ({took})")
            sys.stdout.flush()


def shown(figures: dict[str, Any]) -> str:
    """The figures of a run in short."""
    if "real" in figures:
        each = {"CPU second": figures["real"] / sum(figures["cpu"]), "second": figures["real"] / sum(figures["wall"])}
        return ", ".join(f"{value:,.0f} useful tokens a {name}" for name, value in each.items())
    return ", ".join(f"{name} {value:,.2f}" for name, value in figures.items() if isinstance(value, float)) or str(
        figures.get("failed")
    )


def startup(bench: Bench) -> list[Cell]:
    """From the command to the end of the first optimiser step, with an empty cache and with what that has left."""
    from bench_preparation import pairs_and_model, short_rows
    from bench_runs import give_template

    work = bench.work
    pairs = pairs_and_model(work)
    give_template(work / "model")
    (work / "data").mkdir()
    with (work / "data/train.jsonl").open("w") as file:
        file.writelines(itertools.islice(short_rows(pairs), bench.scale.cold_rows))

    def first(side: str, learns: str, cached: bool) -> dict[str, Any]:
        cache, settings = work / "caches" / learns / side, recipe_of(work, "model") | LEARNT[learns][side == "stock"]
        if not cached:
            shutil.rmtree(cache, ignore_errors=True)
        elif not cache.exists():
            run(side, settings, work / "run", 1, cache)
        return first_step(run(side, settings, work / "run", 1, cache))

    return [
        Cell(
            {"cache": state, "learns": learns, "side": side},
            lambda side=side, learns=learns, state=state: first(side, learns, state == "warm"),
            most,
        )
        for state, most in (("cold", 2), ("warm", None))
        for learns in LEARNT
        for side in ("stock", "ours", "ours, accelerate-launch", "ours, python sft.py")
        if learns == "answers" or side in ("stock", "ours")
    ]


def preparation(bench: Bench) -> list[Cell]:
    """Preparation alone, as `bench_preparation.py` measures it, in one process."""
    import bench_preparation as single

    work = bench.work
    pairs = single.pairs_and_model(work)
    kinds = {"short": single.short_rows, "long": single.long_rows}
    for (name, rows), count in zip(kinds.items(), bench.scale.prepared, strict=True):
        with (work / f"{name}.jsonl").open("w") as file:
            file.writelines(itertools.islice(rows(pairs), count))

    def prepare(kind: str, data: str) -> dict[str, Any]:
        cache = work / "caches" / data / ("ours" if kind == "again" else kind)
        if kind != "again":
            shutil.rmtree(cache, ignore_errors=True)
        elif not cache.exists():
            single.run("ours", work, data, 1, str(cache))
        made = single.run(kind, work, data, 1, str(cache))
        others = {each["digest"] for each in bench.runs(rows=data) if each["kind"] != "limit"}
        if kind != "limit" and others - {made["digest"]}:
            raise Unequal(f"{kind} makes other ids or labels of the {data} rows")
        return made

    return [
        Cell({"rows": data, "kind": kind}, lambda kind=kind, data=data: prepare(kind, data), 2)
        for data in kinds
        for kind in single.KINDS
    ]


def train(bench: Bench) -> list[Cell]:
    """Useful tokens of the steady state, on the same rows in the same order."""
    write_inputs(bench.work, bench.scale.shapes, bench.scale.rows, LONGEST)
    return [
        Cell(
            {"model": model, "side": side},
            lambda model=model, side=side, steps=steps: trained(bench, model, side, steps),
        )
        for model, steps in zip(bench.scale.shapes, bench.scale.steps, strict=True)
        for side in ("stock", "ours", "tuned", "tuned, keeping")
    ]


def overhead(bench: Bench) -> list[Cell]:
    """What ours adds to a tiny model's step, all metrics included: beside `trl sft` with the same flags.

    Both with SDPA and with freed memory kept, else what `varlen` and that save would hide it.
    """
    model, shape = next(iter(bench.scale.shapes.items()))
    write_inputs(bench.work, {model: shape}, bench.scale.rows, LONGEST)
    steps = bench.scale.overhead_steps
    return [
        Cell(
            {"model": model, "logging_steps": every, "side": side},
            lambda side=side, every=every: trained(
                bench, model, side, steps, {"logging_steps": every, "attn_implementation": "sdpa"}
            ),
        )
        for every in (10, 1)
        for side in ALIKE
    ]


def ablation(bench: Bench) -> list[Cell]:
    """Each of our defaults alone and all but each; and settings that are no defaults.

    A run is an epoch of a few rows and is counted from its first step, so that in any order it is of the same rows.
    """
    model, shape = list(bench.scale.shapes.items())[-1]
    write_inputs(bench.work, {model: shape}, bench.scale.ablation_rows, LONGEST)
    about_it = bench.results.sections["ablation"]
    if "settled" not in about_it:
        made = run("ours, python sft.py", recipe_of(bench.work, model), bench.work / "run", 1, bench.work / "cache")
        mine = settled(made["begin"], ours=True)
        about_it["settled"] = {key: mine[key] for key, stocks in DEFAULTS.items() if mine.get(key, stocks) != stocks}
    on = about_it["settled"]
    off = {key: DEFAULTS[key] for key in on}
    variants: dict[str, dict[str, Any]] = {"none of our defaults": off, "our defaults": {}}
    for name in on if len(on) > 1 else ():
        variants |= {f"{name} alone": {**off, name: on[name]}, f"all but {name}": {**on, name: off[name]}}
    return [
        Cell({"model": model, "variant": name}, lambda more=more: trained(bench, model, "ours", 0, more), 2)
        for name, more in {**variants, **CANDIDATES}.items()
    ]


def trained(bench: Bench, model: str, side: str, steps: int, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run of so many steps (0: an epoch), with `more` settings; its losses must be those of the runs before it.

    Raises `Failed`, `Unequal`.
    """
    more, work = more or {}, bench.work
    settings = {**recipe_of(work, model, steps), "train_sampling_strategy": "sequential"}
    if side != "ours":
        settings |= STOCK
    if side.startswith("tuned"):
        before = [each["settled"] for each in bench.runs(model=model, side="ours") if "settled" in each]
        if not before:
            raise Failed("no run of ours has said what it settles")
        settings |= before[-1]
    shutil.rmtree(work / "run", ignore_errors=True)
    limit = bench.scale.compile_seconds if more.get("torch_compile") else 900
    how = "ours, python sft.py" if side == "ours" else side
    made = run(how, {**settings, **more}, work / "run", steps, work / "cache", limit)
    figures = {**steady(made, bench.scale.skip if steps else 0), "settled": settled(made["begin"])}
    if OTHER_STEPS & more.keys():
        return {**figures, "other_steps": True}
    alike = (each for each in bench.runs(model=model) if "losses" in each and "other_steps" not in each)
    if (first := next(alike, None)) is not None:
        require_parity(figures["losses"], first["losses"], f"{model}, {side} {more or ''}")
    return figures


def recipe_of(work: Path, model: str, steps: int = 100) -> dict[str, Any]:
    """What both sides are told: to train so many steps (0: an epoch) on a CPU."""
    paths = {"model_name_or_path": str(work / model), "dataset_name": str(work / "data")}
    return {**paths, "use_cpu": True, **({"max_steps": steps} if steps else {"num_train_epochs": 1})}


SECTIONS: dict[str, Callable[[Bench], list[Cell]]] = {
    "startup": startup,
    "preparation": preparation,
    "train": train,
    "overhead": overhead,
    "ablation": ablation,
}


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder that goes with everything in it."""
    work = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield work
    finally:
        shutil.rmtree(work)


def main(argv: list[str] | None = None) -> int:
    """Measure the sections asked for, or write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; gpu; table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file of figures (docs/performance/cpu.json or gpu.json)")
    parser.add_argument("--again", action="store_true", help="measure what is there already again")
    parser.add_argument("--quick", action="store_true", help="at toy scale: figures that mean nothing")
    parser.add_argument("--minutes", type=float, default=9, help="gpu: in so many minutes, whatever is left then")
    parser.add_argument("--only", nargs="*", default=[], help="gpu: cells whose name holds one of these")
    parser.add_argument("--toy", action="store_true", help="gpu: at toy scale, on a CPU")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - {*SECTIONS, "gpu", "table"}:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    if "table" in args.sections:
        from bench_tables import fill

        return fill(DOC, FIGURES)
    with workplace() as work:
        if "gpu" in args.sections:
            from bench_gpu import measure_gpu

            results = read_results(args.out or FIGURES / "gpu.json")
            return measure_gpu(results, work, args.minutes, args.toy, args.only, args.again)
        results = read_results(args.out or FIGURES / "cpu.json")
        try:
            for section in args.sections or SECTIONS:
                measure_section(section, work / section, results, args)
        except Unequal as error:
            print(f"{error}: nothing can be compared", file=sys.stderr)
            return 1
    return 0


def measure_section(section: str, work: Path, results: Results, args: argparse.Namespace) -> None:
    """Measure what a section lacks. Raises `Unequal`."""
    command = f"python scripts/bench.py {section}{' --quick' if args.quick else ''}"
    there = results.sections.get(section, {})
    if there.get("repeats", 0) >= args.repeats and there["command"] == command and not args.again:
        print(f"{section}: is there already; --again measures it anew")
        return
    scale = QUICK if args.quick else Scale()
    facts = {**about(), "command": command, "scale": json.loads(json.dumps(asdict(scale)))}
    results.begin(section, facts, args.again)
    work.mkdir()
    bench = Bench(section, work, scale, results)
    measure(bench, SECTIONS[section](bench), args.repeats)
    results.finish(section, args.repeats)
    shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
