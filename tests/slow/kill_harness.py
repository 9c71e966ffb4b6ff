"""Kill runs with SIGKILL at seeded moments, start them again, and compare what comes out with runs that nobody killed.

    python tests/slow/kill_harness.py --kills 60 --seed 0 --out docs/kills.md [--only zero3] [--stock] [--log FILE]

Each scenario (a launch, packed or not, with its own saving, logging and noise) has one reference run. A torn run is
killed once for each of its moments, every time started again with the same command, and in the end must have the same
losses, metrics, rows and weights, bit for bit. A kill counts as what it hit; where that is not what it was meant to
hit, another is made, so that there are more than were asked for. One that came behind the end counts as nothing.
`--stock` does the same, with a quarter as many kills, to `stock_sft.py`: TRL and transformers alone. What is done is
kept in `--log` and not done again. Exit code 1 when a kill cost anything.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

LAUNCHES = {"one": "one process", "ddp": "DDP x2", "zero2": "ZeRO-2 x2", "zero3": "ZeRO-3 x2"}
KINDS = ("mid-save", "training", "preparing", "start-up", "final save")
STOCK_KINDS = ("mid-save", "training", "mid-save", "training", "final save")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "training_args.bin")
FINAL = (*MODEL_FILES, "train_results.json", "trainer_state.json", "manifest.json")  # written behind the last step
TIMED = re.compile(r"runtime|second|tflops|memory_bytes|_time$|^step$")
RESUMED = re.compile(r"(?:resum\w*|go\w* on|continu\w*) from \S*checkpoint-(\d+)")
RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+(?:Error|Exception|Timeout)|Exception)\b.*)$", re.MULTILINE)
TOKEN = "KILL_HARNESS"  # in the environment of every process of a start: by it they are found
LONGEST, LONGEST_FIRST = 150, 900  # seconds after which a start hangs; the first may compile a DeepSpeed op
GLANCE = 1e-4  # seconds between two looks at the disk: a save takes some ten milliseconds


ABOUT = """\
Every kill is SIGKILL to the launcher and all its workers at a seeded moment: while starting up, while preparing data
into an empty cache, while training, while a file of a checkpoint is being written, while the final model is being
saved. The run is started again with the same command, killed again, and so on. Identical means, against a run that
nobody killed: each logged value that is not a time equal as a float, `order.jsonl` equal as bytes,
`train_results.json` equal but for times, all final weights equal bit for bit."""
ABOUT_STOCK = """\
The same model, data, launches and kinds of moments with TRL's trainer, `get_last_checkpoint` and
`resume_from_checkpoint`, each run killed once and compared with upstream's own uninterrupted run (its order of rows is
not looked at)."""


class Scenario(NamedTuple):
    """A way to train: `launch` is a key of LAUNCHES, `values` go to the command line."""

    launch: str
    name: str
    values: dict[str, Any]

    @property
    def title(self) -> str:
        return f"{LAUNCHES[self.launch]}, {self.name}"


class Moment(NamedTuple):
    """When to kill: `delay` seconds after `due()`."""

    text: str
    due: Callable[[], bool]
    delay: float = 0.0


@dataclass
class Reference:
    """A run that nobody killed, and what is to be known of it to kill others like it."""

    out: Path
    cache: Path
    total: int  # steps
    saves: list[int]  # steps at which it saves
    seconds: float  # until the first step is done
    files: set[str]  # of a checkpoint, relative to it
    cached: int  # files that preparing leaves
    tables: int  # of them prepared tables
    extensions: Path
    sharded: bool  # by DeepSpeed, which has ops to compile

    @property
    def interval(self) -> int:
        """Steps that a kill may cost: the most between one save and the next."""
        return max(after - before for before, after in itertools.pairwise([0, *self.saves]))


@dataclass
class Start:
    """One start of a run: its launcher, and all processes that come of it."""

    command: list[str]
    cache: Path
    extensions: Path  # where torch keeps what it compiles
    log: Path
    longest: float = LONGEST
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    code: int | None = None  # exit code of the launcher, None where it was killed or hung
    hung: bool = False
    seconds: float = 0.0

    def until(self, moment: Moment | None) -> bool:
        """Run to the end, or to a moment and kill; returns whether it was killed there."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"HF_DATASETS_CACHE": str(self.cache), TOKEN: self.token, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"TORCH_EXTENSIONS_DIR": str(self.extensions)}
        began = looked = time.monotonic()
        pids: list[int] = []
        with (
            self.log.open("w") as log,
            subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                while process.poll() is None:
                    now = time.monotonic()
                    if moment is not None and moment.due():
                        time.sleep(moment.delay)
                        break
                    if now - looked > 0.25:
                        pids, looked = processes(self.token), now
                    if now - began > self.longest:
                        self.hung = True
                        break
                    time.sleep(GLANCE if moment is not None else 0.1)
            finally:
                ended = process.poll()
                kill(self.token, [*pids, process.pid] if ended is None else [])
        self.seconds = time.monotonic() - began
        killed = ended is None and process.returncode == -signal.SIGKILL
        self.code = None if killed else process.returncode
        return killed and not self.hung


def processes(token: str) -> list[int]:
    """The living processes of a start. A launcher gives workers sessions of their own, so no group has them all."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def kill(token: str, known: list[int]) -> None:
    """Kill a start at once: first the processes that are known, then any other, until none is left."""
    for pid in known:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while left := processes(token):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            raise SystemExit(f"{len(left)} processes of a start outlived SIGKILL")
        time.sleep(0.01)


def scenarios(launch: str) -> list[Scenario]:
    """The four ways to train of a launch; an epoch is 12 steps, or about 8 packed."""
    dropout, noise = {"model_name_or_path": "dropout"}, {"neftune_noise_alpha": 5}
    evaluated = {"eval_dataset_name": "eval.jsonl"}
    ways = {
        "dropout": {"num_train_epochs": 3, "save_steps": 5, "save_total_limit": 2, **dropout},
        "packed, noise, epochs": {
            "num_train_epochs": 4,
            "packing": True,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
            **evaluated,
            **noise,
        },
        "dropout, noise, unaligned": {
            "num_train_epochs": 3,
            "save_steps": 7,
            "logging_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "train_sampling_strategy": "group_by_length",
            **evaluated,
            **dropout,
            **noise,
        },
        "packed, dropout, unaligned": {
            "num_train_epochs": 4,
            "packing": True,
            "save_steps": 5,
            "logging_steps": 4,
            "save_total_limit": 1,
            **dropout,
        },
    }
    return [Scenario(launch, name, values) for name, values in ways.items()]


def schedule(kills: int, launches: list[str], kinds: tuple[str, ...]) -> list[tuple[Scenario, list[str]]]:
    """Which kinds of kills each scenario gets: every launch as many, every kind in turn, three or more a scenario."""
    kind, plan = itertools.cycle(kinds), []
    for number, launch in enumerate(launches):
        count = kills // len(launches) + (number < kills % len(launches))
        ways = scenarios(launch)
        used = max(1, min(len(ways), count // 3))
        dealt: list[list[str]] = [[] for _ in range(used)]
        for turn in range(count):
            dealt[turn % used].append(next(kind))
        plan += [(ways[(number + place) % len(ways)], dealt[place]) for place in range(used) if dealt[place]]
    return plan


def write_inputs(folder: Path) -> None:
    """Write 50 conversations to train on, 12 to evaluate on, and a tiny model with and without dropout."""
    from make_docstrings import docstrings, write_model

    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.islice(docstrings(), 600))
    for name, part in (("chat.jsonl", pairs[:50]), ("eval.jsonl", pairs[50:62])):
        with (folder / name).open("w") as file:
            for question, text in part:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text[:400]}]
                file.write(json.dumps({"messages": messages}) + "\n")
    write_model(folder / "model", itertools.chain.from_iterable(pairs), vocabulary=600, hidden=32, layers=2)
    turns = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    opened = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    (folder / "model" / "chat_template.jinja").write_text(turns + opened)
    shutil.copytree(folder / "model", folder / "dropout", dirs_exist_ok=True)
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "dropout" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))


def copy_extensions(folder: Path) -> None:
    """Copy what torch has compiled already: a kill may leave its lock there, on which any other run would wait."""
    from torch.utils.cpp_extension import get_default_build_root

    built = Path(get_default_build_root(), f"py{sys.version_info.major}{sys.version_info.minor}_cpu")
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", built))
    folder.mkdir(exist_ok=True)
    if built.exists():
        shutil.copytree(built, folder, ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True)


def command(scenario: Scenario, inputs: Path, out: Path, stock: bool) -> list[str]:
    """The command line of a start. Steps take four rows, or packs, in every launch."""
    values = {
        "use_cpu": True,
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2 if scenario.launch == "one" else 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "model_name_or_path": "model",
        "dataset_name": "chat.jsonl",
        **scenario.values,
        "output_dir": out,
    }
    values |= {key: inputs / values[key] for key in values if key.endswith(("_or_path", "dataset_name"))}
    arguments = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    script = "tests/slow/stock_sft.py" if stock else "src/open_r1/sft.py"
    if scenario.launch == "one":
        return [sys.executable, script, *arguments]
    launcher = ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{scenario.launch}.yaml"]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", script, *arguments]


def refer(scenario: Scenario, work: Path, stock: bool, times: list[float]) -> Reference:
    """Run a scenario to its end, preparing its data, and look at what it wrote."""
    out, cache, log = work / "whole", work / "whole-cache", work / "whole.log"
    extensions = work.parent / "inputs" / "extensions"
    seen: list[float] = []
    began = time.monotonic()

    def first_step() -> bool:
        if not seen and steps(out):
            seen.append(time.monotonic() - began)
        return False

    start = Start(command(scenario, work.parent / "inputs", out, stock), cache, extensions, log, LONGEST_FIRST)
    start.until(Moment("", first_step))
    if start.code != 0:
        raise SystemExit(f"the reference of {scenario.title} failed:\n{log.read_text()[-6000:]}")
    times.append(start.seconds)
    total, values = steps(out), scenario.values
    each = values.get("save_steps") or total // values["num_train_epochs"]
    saves = sorted({*range(each, total + 1, each), total})
    files = names_in(out / f"checkpoint-{total}", total)
    return Reference(
        out,
        cache,
        total,
        saves,
        seen[0],
        files,
        count_files(cache),
        count_tables(cache),
        extensions,
        "zero" in scenario.launch,
    )


def steps(out: Path) -> int:
    """The last step that a run has written down."""
    try:
        lines = (out / "order.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines[-2:] if line.endswith(b"}\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def stamp(path: Path) -> tuple[int, int, int]:
    """Tells whether a file was written, replaced or removed since: inode, size and time of the last change."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def names_in(checkpoint: Path, step: int) -> set[str]:
    """The files of a checkpoint, relative to it; its step, which DeepSpeed puts into names, as {step}."""
    paths = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return {str(path).replace(f"step{step}", "step{step}") for path in paths}


def is_whole(checkpoint: Path, reference: Reference) -> bool:
    """Whether a checkpoint has all files and its state, which is written last."""
    step = int(checkpoint.name.rpartition("-")[2])
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return names_in(checkpoint, step) >= reference.files


def count_files(cache: Path) -> int:
    """Files in a cache of prepared data."""
    return sum(len(names) for _, _, names in os.walk(cache))


def count_tables(cache: Path) -> int:
    """Prepared tables in a cache that are whole."""
    return sum(".partial-" not in str(path) for path in cache.glob("*/*/key.json"))


def is_complete(out: Path) -> bool:
    """Whether a run says that it is finished."""
    try:
        return json.loads((out / "run_state.json").read_text())["status"] == "complete"
    except (OSError, ValueError):
        return False


def locks(extensions: Path) -> list[Path]:
    """The locks of torch's compiled extensions."""
    return list(extensions.glob("*/lock"))


class Before:
    """A torn run before a start, to tell what the start has done. `at` is the step of its last whole checkpoint."""

    def __init__(self, reference: Reference, out: Path, cache: Path) -> None:
        self.reference, self.out, self.cache = reference, out, cache
        self.clock, self.time = time.monotonic(), time.time_ns()
        self.cached = count_files(cache)
        self.order = stamp(out / "order.jsonl")
        whole = [step for step, folder in checkpoints(out) if is_whole(folder, reference)]
        self.at = max(whole, default=0)

    def trained(self) -> bool:
        """Whether the start has begun to train."""
        return stamp(self.out / "order.jsonl") != self.order

    def steps(self) -> int:
        """The last step that the start has done, 0 before any."""
        return steps(self.out) if self.trained() else 0

    def saving(self) -> bool:
        """Whether the start has left a checkpoint that is not whole, or not in its place."""
        begun = [folder for _, folder in checkpoints(self.out) if not is_whole(folder, self.reference)]
        begun += [folder for _, folder in checkpoints(self.out / ".saving")]
        return any(path.stat().st_ctime_ns > self.time for folder in begun for path in [folder, *folder.rglob("*")])

    def publishing(self) -> bool:
        """Whether the start has written to the final model."""
        places = (self.out / ".saving" / "final", self.out)
        found = [place / name for place in places for name in FINAL if (place / name).exists()]
        return any(path.stat().st_ctime_ns > self.time for path in found)

    def hit(self) -> str | None:
        """What a kill has hit, one of KINDS, None when the run was done."""
        if is_complete(self.out):
            return None
        if self.saving():
            return "mid-save"
        if self.steps() >= self.reference.total or (self.at >= self.reference.total and self.publishing()):
            return "final save"
        if count_tables(self.cache) < self.reference.tables and count_files(self.cache) != self.cached:
            return "preparing"
        return "training" if self.steps() > self.at else "start-up"


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a directory, whole or not, each with its step."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in out.glob("checkpoint-*")]
    return [(int(step), path) for step, path in found if step.isdigit()]


def moment_of(kind: str, share: int, before: Before, random: random.Random) -> Moment | None:
    """A moment of a kind, for the next start of a run; None where its last step is behind it.

    `share` says for how many kills what is left of the run must do.
    """
    reference, out, at = before.reference, before.out, before.at
    if kind == "start-up" and reference.sharded and random.random() < 0.4:
        # torch holds a lock file there while it looks whether an op must be compiled.
        old = {lock: stamp(lock) for lock in locks(reference.extensions)}
        return Moment(
            "at torch's lock", lambda: any(stamp(lock) != old.get(lock) for lock in locks(reference.extensions))
        )
    if kind == "start-up":
        wait = random.uniform(0.05, 0.95) * reference.seconds
        return Moment(f"after {wait:.2f} s", lambda: time.monotonic() - before.clock > wait)
    if kind == "preparing":
        number, delay = random.randint(1, reference.cached - 1), random.choice([0, random.uniform(0, 0.02)])
        text = f"at file {number} of {reference.cached} in the cache"
        return Moment(text, lambda: count_files(before.cache) >= number, delay)
    if kind == "training":
        last = min(reference.total - 1, max(at + 1, at + (reference.total - at) // max(1, share)))
        if at >= last:
            return None
        step = random.randint(at + 1, last)
        return Moment(f"after step {step}", lambda: before.steps() >= step, random.uniform(0, 0.02))
    if kind == "mid-save":
        ahead = [step for step in reference.saves if step > at]
        if not ahead:
            return None
        step = random.choice(ahead[: -(-len(ahead) // max(1, share))])
        name = random.choice([".", *sorted(reference.files)])
        places = [place / f"checkpoint-{step}" / name.replace("{step}", str(step)) for place in (out, out / ".saving")]
        text, delay = f"at {name} of checkpoint-{step}", random.choice([0, 0, random.uniform(0, 0.004)])
    else:
        name = random.choice([name for name in FINAL if (reference.out / name).exists()])
        places = [out / name, out / ".saving" / "final" / name]
        text, delay = f"at {name}", random.choice([0, random.uniform(0, 0.01)])
    watched = {path: stamp(path) for path in places}
    return Moment(text, lambda: any(path.exists() and stamp(path) != was for path, was in watched.items()), delay)


def tear(
    scenario: Scenario, reference: Reference, kinds: list[str], random: random.Random, work: Path, stock: bool
) -> tuple[list[dict[str, Any]], list[str], list[float]]:
    """Kill one run once for each kind, start it again until it is finished, and compare it with its reference.

    Returns its kills, the kinds that are left where it ended before all of them, and the seconds of its starts.
    """
    out, cache = work / "torn", reference.cache
    for path in (out, *work.glob("torn-cache-*")):
        shutil.rmtree(path, ignore_errors=True)
    for lock in locks(reference.extensions):  # of a run before, that could not go on
        lock.unlink()
    kills: list[dict[str, Any]] = []
    left, times, seen, differs, beside = list(kinds), [], 0, [], 0
    while True:
        if left and left[0] == "preparing":  # the cache is lost, and this and later starts begin another
            cache = work / f"torn-cache-{len(times)}"
        share = sum(kind in ("training", "mid-save") for kind in left)
        before = Before(reference, out, cache)
        log = work / f"torn-{len(times)}.log"
        moment = moment_of(left[0], share, before, random) if left and beside < 4 else None
        start = Start(command(scenario, work.parent / "inputs", out, stock), cache, reference.extensions, log)
        killed = start.until(moment)
        times.append(start.seconds)
        text = log.read_text(errors="replace")
        pending = [each for each in kills if each["from"] is None]
        trained = before.trained()
        if (match := RESUMED.search(text)) or trained or start.code == 0:
            # Without a word about a checkpoint it began anew, unless nothing was left to train.
            went = int(match.group(1)) if match else 0 if trained else reference.total
            for each in pending:
                each |= {"from": went, "lost": max(0, each["seen"] - went)}
            seen = max(went, steps(out)) if trained else went
        if not killed:
            break
        meant, hit = left[0], before.hit()
        if hit is not None:
            kills.append(
                {"kind": hit, "meant": meant, "moment": moment.text, "seen": seen, "from": None, "lost": None}
            )
        left, beside = (left[1:], 0) if hit == meant else (left, beside + 1)
    died = start.code != 0
    if died:
        said = RAISED.search(text.replace(f"{work}/", "").replace(f"{ROOT}/", ""))
        reason = f"hung for {LONGEST} s" if start.hung else said.group(1)[:160] if said else f"exit code {start.code}"
        if not kills:
            raise SystemExit(f"{scenario.title} failed without a kill: {reason}")
    else:
        differs = differences(reference.out, out, stock)
    for each in kills:
        # What was killed and has been trained on since did go on; the rest died with the last start.
        fell = died and each in pending
        each |= {"died": reason if fell else None, "differs": differs, "judged": not died or fell}
        each["extra"] = sorted(
            path.name for path in out.iterdir() if not died and not (reference.out / path.name).exists()
        )
    return kills, left, times


def differences(whole: Path, torn: Path, stock: bool) -> list[str]:
    """What two finished runs do not have in common, empty when they are the same."""
    from safetensors.torch import load_file
    from torch import uint8

    def read(name: str) -> tuple[Any, Any]:
        return tuple(json.loads((out / name).read_text()) if (out / name).exists() else {} for out in (whole, torn))

    found = []
    for name in sorted({path.name for out in (whole, torn) for path in out.glob("model*.safetensors")}):
        if not all((out / name).exists() for out in (whole, torn)):
            found.append(f"{name} is missing")
            continue
        one, two = (load_file(out / name) for out in (whole, torn))
        same = one.keys() == two.keys() and all(
            one[key].shape == two[key].shape and one[key].view(uint8).equal(two[key].view(uint8)) for key in one
        )
        found += [] if same else ["weights"]
    one, two = (state.get("log_history", []) for state in read("trainer_state.json"))
    if [entry["step"] for entry in one] != [entry["step"] for entry in two]:
        found.append(f"log_history has {len(two)} entries for {len(one)}")
    first: dict[str, int] = {}
    at = defaultdict(dict)
    for number, history in enumerate((one, two)):
        for entry in history:
            for key in entry:
                if not TIMED.search(key):
                    at[key, entry["step"]].setdefault(number, []).append(entry[key])
    for (key, step), values in at.items():
        if values.get(0) != values.get(1):
            first.setdefault(key, step)
    found += [f"{key} from step {step}" for key, step in first.items()]
    one, two = read("train_results.json")
    found += [f"{key} in train_results.json" for key in one if not TIMED.search(key) and one[key] != two.get(key)]
    if not stock and (whole / "order.jsonl").read_bytes() != (torn / "order.jsonl").read_bytes():
        found.append("order.jsonl")
    return found


def do(scenario: Scenario, kinds: list[str], seed: int, work: Path, stock: bool) -> dict[str, Any]:
    """All kills of a scenario: its record for the log."""
    times: list[float] = []
    draw = random.Random(f"{seed} {scenario.title}")
    kinds = sorted(draw.sample(kinds, len(kinds)), key=lambda kind: kind == "final save")  # nothing trains after it
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if not (work.parent / "inputs" / "extensions").exists():
        write_inputs(work.parent / "inputs")
        copy_extensions(work.parent / "inputs" / "extensions")
    reference = refer(scenario, work, stock, times)
    kills: list[dict[str, Any]] = []
    # Upstream's runs are killed once each: one that differs or died would tell nothing about the next kill.
    waiting = [[kind] for kind in kinds] if stock else [kinds]
    for round_ in range(4 * len(kinds)):
        if not waiting:
            break
        print(f"{'stock ' if stock else ''}{scenario.title}: {', '.join(waiting[0])}", flush=True)
        done, left, seconds = tear(scenario, reference, waiting.pop(0), draw, work, stock)
        kills += done
        times += seconds
        for each in done:
            meant = "" if each["kind"] == each["meant"] else f" (meant: {each['meant']})"
            result = each["died"] or "; ".join(each["differs"]) or "identical"
            print(f"  {each['kind']}{meant} {each['moment']}, {each['seen']} -> {each['from']}: {result}", flush=True)
        if not stock and any(each["died"] or each["differs"] for each in done):  # to be looked at
            kept = work.with_name(f"{re.sub('[^A-Za-z0-9]+', '-', scenario.title)}-{round_}")
            shutil.copytree(work, kept, dirs_exist_ok=True)
        waiting = [left, *waiting] if left else waiting
    record = {"stock": stock, "scenario": scenario.title, "launch": scenario.launch, "seed": seed, "kinds": kinds}
    record |= {"interval": reference.interval, "kills": kills, "times": times}
    record["unhit"] = [kind for rest in waiting for kind in rest]
    return record


def good(each: dict[str, Any], interval: int) -> bool:
    """Whether a kill cost nothing but the way back to the last save."""
    return each["judged"] and not each["died"] and not each["differs"] and each["lost"] <= interval


def rows_of(records: list[dict[str, Any]], stock: bool) -> list[str]:
    """The table of a side, a row for each scenario and kind of kill."""
    heads = ["scenario", "killed", "kills", "went on"]
    heads += ["other weights", "same weights, other log"] if stock else []
    heads += ["identical", "most steps lost (may lose)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    total: Counter[str] = Counter()
    for record in records:
        for kind in KINDS:
            kills = [each for each in record["kills"] if each["kind"] == kind]
            if not kills:
                continue
            counts = Counter(verdict(each) for each in kills)
            total += Counter({"kills": len(kills)}) + counts
            most = max((each["lost"] for each in kills if each["lost"] is not None), default="-")
            cells = [record["scenario"], kind, len(kills), len(kills) - counts["died"]]
            cells += [counts["other weights"], counts["other log"]] if stock else []
            cells += [counts["identical"], f"{most} ({record['interval']})"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    cells = ["**all**", "", total["kills"], total["kills"] - total["died"]]
    cells += [total["other weights"], total["other log"]] if stock else []
    return [*lines, f"| {' | '.join(map(str, [*cells, total['identical'], '']))} |"]


def verdict(each: dict[str, Any]) -> str:
    """What became of a run that was killed."""
    if each["died"]:
        return "died"
    if not each["judged"]:
        return "not judged"
    if not each["differs"]:
        return "identical"
    return "other weights" if any(w == "weights" or "model" in w for w in each["differs"]) else "other log"


def notes_of(records: list[dict[str, Any]]) -> list[str]:
    """What went wrong, how often, and for which kills."""
    notes: Counter[str] = Counter()
    for record in records:
        for each in record["kills"]:
            if each["died"] or each["differs"]:
                what = f"died: `{each['died']}`" if each["died"] else f"differs: {'; '.join(each['differs'])}"
                notes[f"{record['scenario']}, {each['kind']} {each['moment']}: {what}"] += 1
            if each["lost"] is not None and each["lost"] > record["interval"]:
                notes[f"{record['scenario']}, {each['kind']} {each['moment']}: {each['lost']} steps lost"] += 1
        notes.update(f"{record['scenario']}: a kill {kind} was never hit" for kind in record["unhit"])
        left = sorted({name for each in record["kills"] for name in each["extra"]})
        if left:
            notes[f"{record['scenario']}: left in output_dir, {', '.join(left)}"] += 1
    return [f"- {note}{f' ({count} times)' if count > 1 else ''}" for note, count in notes.items()]


def paragraph(text: str) -> list[str]:
    """Lines of a paragraph, and an empty one."""
    return [*textwrap.wrap(text, 119), ""]


def report(records: list[dict[str, Any]], given: str) -> str:
    """The Markdown page."""
    ours, stock = ([record for record in records if record["stock"] == side] for side in (False, True))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    with contextlib.suppress(ImportError):
        libraries += f", deepspeed {version('deepspeed')}"
    kills = [(each, record["interval"]) for record in ours for each in record["kills"]]
    lines = [
        "# Killed anywhere, the same run",
        "",
        f"    python tests/slow/kill_harness.py {given}",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, Python {sys.version.split()[0]}, {libraries}; CPU.",
        "",
        *paragraph(ABOUT),
        *rows_of(ours, False),
        "",
        *paragraph(
            f"{len(kills)} kills, {sum(good(*pair) for pair in kills)} came back as the same run. "
            f"{sum(each['kind'] != each['meant'] for each, _ in kills)} of them landed beside the moment they were "
            "meant for; they are counted as what they hit, and others were made for that moment."
        ),
        *notes_of(ours),
    ]
    if stock:
        lines += ["", "## Upstream alone", "", *paragraph(ABOUT_STOCK), *rows_of(stock, True), "", *notes_of(stock)]
    lines += ["", "| seconds of a start | mean | starts |", "|---|---|---|"]
    for launch, name in LAUNCHES.items():
        times = [value for record in records if record["launch"] == launch for value in record["times"]]
        lines += [f"| {name} | {sum(times) / len(times):.1f} | {len(times)} |"] if times else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def main() -> int:
    """Do what the log does not have yet, write the page, say whether all came back."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=LAUNCHES, help="spread the kills over these launches")
    parser.add_argument("--stock", action="store_true", help="then kill upstream alone, a quarter as often")
    parser.add_argument("--out", type=Path, help="the page to write (default: print it)")
    parser.add_argument("--log", type=Path, help="JSON lines: what is in it is not done again")
    parser.add_argument("--work", type=Path, help="where runs are; those that went wrong stay there")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    plan = [(False, *each) for each in schedule(args.kills, args.only or list(LAUNCHES), KINDS)]
    if args.stock:
        plan += [(True, *each) for each in schedule(args.kills // 4, args.only or list(LAUNCHES), STOCK_KINDS)]
    records = []
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        for stock, scenario, kinds in plan:
            record = next(
                (
                    each
                    for each in known
                    if (each["stock"], each["scenario"], each["seed"]) == (stock, scenario.title, args.seed)
                    and sorted(each["kinds"]) == sorted(kinds)
                ),
                None,
            )
            if record is None:
                record = do(scenario, kinds, args.seed, work.resolve() / "now", stock)
                if args.log:
                    with args.log.open("a") as file:
                        file.write(json.dumps(record) + "\n")
            records.append(record)
    given = f"--kills {args.kills} --seed {args.seed}"
    given += f" --only {' '.join(args.only)}" if args.only else ""
    given += " --stock" if args.stock else ""
    page = report(records, given)
    if args.out:
        args.out.write_text(page)
    else:
        print(page)
    ours = [record for record in records if not record["stock"]]
    fine = all(good(each, record["interval"]) for record in ours for each in record["kills"])
    return 0 if fine and not any(record["unhit"] for record in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
