"""Runs that benchmarks compare: `trl sft` and ours on the same rows, each a process of its own, stamped at every step.

What is started is what a person starts; `stamps/sitecustomize.py` notes from within what the steps cost.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
SFT = SCRIPTS.parent / "src/open_r1/sft.py"
LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
SIDES = {
    "stock": ["trl", "sft"],
    "tuned": ["trl", "sft"],
    "tuned, keeping": ["trl", "sft"],
    "ours": ["accelerate", "launch", *LAUNCH, str(SFT)],
    "ours, accelerate-launch": ["accelerate-launch", *LAUNCH, str(SFT)],
    "ours, python sft.py": [sys.executable, str(SFT)],
}
ALIKE = ("ours", "tuned, keeping")  # which do the same, but for what ours surrounds a step with
# What else a side finds in its environment: here what has glibc keep freed memory, as ours does on a CPU.
ENVIRONMENTS = {"tuned, keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}}
# What makes `trl sft` learn what ours learns by default, in float32: answers and their end.
STOCK = {"assistant_only_loss": True, "eos_token": "<|im_end|>", "bf16": False}
# Settings that ours settles by itself and TRL can be told, by the names of the trainer's arguments.
TUNED = {
    "per_device_train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "packing": "packing",
    "packing_strategy": "packing_strategy",
    "padding_free": "padding_free",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "dataloader_num_workers": "dataloader_num_workers",
    "dataloader_prefetch_factor": "dataloader_prefetch_factor",
    "dataloader_persistent_workers": "dataloader_persistent_workers",
    "torch_compile": "torch_compile",
    "optim": "optim",
    "use_liger_kernel": "use_liger_kernel",
}
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")  # what stock knows by name
PARITY = 1e-4
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft")


class Failed(Exception):
    """A run that did not do its steps; the first line says why, the others are the end of what it said."""


class Unequal(Exception):
    """Runs that should have done the same and did not: what they cost cannot be compared."""


def run(side: str, settings: dict[str, Any], out: Path, steps: int, cache: Path, limit: float = 900) -> dict[str, Any]:
    """Train `steps` steps (0: all) in a process of its own, with its files in `out`, and return what it cost.

    `begin` is what the trainer was told, `steps` the stamps; `started` is when the command began, in UNIX seconds.
    Raises `Failed` when the steps are not done within `limit` seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamps, recipe = out / "stamps.jsonl", out / "recipe.yaml"
    stamps.unlink(missing_ok=True)
    recipe.write_text(json.dumps({**settings, "output_dir": str(out / "run")}, indent=1))  # JSON is YAML
    environment = {
        **os.environ,
        "STAMPS": str(stamps),
        "STAMPS_STEPS": str(steps),
        "PYTHONPATH": os.pathsep.join(
            [str(SCRIPTS / "stamps"), str(SFT.parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": threads(),
        **ENVIRONMENTS.get(side, {}),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # pip compiled stock's; ours would be compiled at each start
    with (out / "log.txt").open("w") as log:
        started = time.time()
        process = subprocess.Popen(
            [*SIDES[side], "--config", str(recipe)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the CPU seconds of a session are those of a command
        )
        ended = wait(process, limit)
    begin, done = read(stamps)
    if not ended or process.returncode or not done or (steps and done[-1]["step"] != steps):
        said = (out / "log.txt").read_text(errors="replace").strip()
        why = (said.splitlines() or ["nothing was said"])[-1] if ended else f"not more in {limit:.0f} s"
        raise Failed(f"{side}: {len(done)} of {steps or 'all'} steps: {why}\n{said[-1500:]}")
    return {"started": started, "begin": begin, "steps": done}


def wait(process: subprocess.Popen, limit: float) -> bool:
    """Wait for a process and end whatever of its session is left; whether it ended by itself."""
    try:
        process.wait(timeout=limit)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(stamps: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the trainer was told, and a line for each step."""
    lines = [json.loads(line) for line in stamps.read_text().splitlines()] if stamps.exists() else []
    return (lines[0] if lines else {}), lines[1:]


def first_step(made: dict[str, Any]) -> dict[str, float]:
    """Seconds from the command to the end of the first step: CPU of all its processes, wall, and those before it."""
    begin, first = made["begin"], made["steps"][0]
    return {
        "cpu": round(first["session_cpu"], 2),
        "wall": round(first["time"] - made["started"], 2),
        "cpu_before_training": round(begin["session_cpu"], 2),
    }


def steady(made: dict[str, Any], skip: int) -> dict[str, Any]:
    """What the steps behind the first `skip` cost: tokens in all, and CPU and wall seconds of each."""
    marks, steps = [made["begin"], *made["steps"]][skip:], made["steps"][skip:]
    return {
        "real": sum(step["real"] for step in steps),
        "padded": sum(step["padded"] for step in steps),
        "cpu": [round(now["cpu"] - last["cpu"], 4) for last, now in itertools.pairwise(marks)],
        "wall": [round(now["wall"] - last["wall"], 4) for last, now in itertools.pairwise(marks)],
        "losses": [round(step["loss"], 6) for step in made["steps"]],
    }


def settled(begin: dict[str, Any], ours: bool = False) -> dict[str, Any]:
    """What a run settled, as settings that a run of ours takes, or `trl sft`: as far as that can be told."""
    told = {key: begin["told"][name] for name, key in TUNED.items() if begin["told"].get(name) is not None}
    attention = begin["attn_implementation"]
    if not told["packing"]:
        told.pop("packing_strategy", None)
    if ours:
        return {**told, "attn_implementation": attention}
    if told["padding_free"] and not told["packing"]:
        told["max_length"] = None  # TRL refuses a limit that it would not enforce; the rows are within it
    return {**told, "attn_implementation": attention if attention in ATTENTION else "sdpa"}


def require_parity(losses: list[float], others: list[float], what: str) -> None:
    """Raise `Unequal` where the losses of two runs are not equal to 1e-4 at every step."""
    pairs = itertools.zip_longest(losses, others, fillvalue=float("inf"))
    for step, (one, other) in enumerate(pairs, 1):
        if not abs(one - other) <= PARITY:
            raise Unequal(f"{what}: step {step} has a loss of {one} where it was {other}")


def give_template(model: Path) -> None:
    """Write ChatML into a tokenizer: stock has no template of its own for a base model."""
    from transformers import AutoTokenizer

    from open_r1.chat import CHATML

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)


def write_inputs(out: Path, shapes: dict[str, tuple[int, int]], rows: int | None, longest: int) -> int:
    """Write a model for each of `shapes` (hidden size, layers) and `data/train.jsonl`, docstrings of the standard
    library as conversations of at most `longest` tokens, in a random order; returns how many."""
    from make_docstrings import docstrings, write_model
    from transformers import AutoTokenizer

    pairs = [(question, text.strip()) for question, text in dict.fromkeys(docstrings())]
    for name, (hidden, layers) in shapes.items():
        write_model(out / name, itertools.chain.from_iterable(pairs), hidden=hidden, layers=layers)
        give_template(out / name)
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    random.Random(0).shuffle(pairs)
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": text}] for question, text in pairs
    ]
    lengths = map(len, tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"])
    kept = [chat for chat, length in zip(chats, lengths, strict=True) if length <= longest][:rows]
    (out / "data").mkdir(exist_ok=True)
    (out / "data/train.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in kept))
    return len(kept)


def threads() -> str:
    """Threads that torch computes with, on both sides."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def about() -> dict[str, Any]:
    """The machine and the versions that figures hold for."""
    git = ["git", "-C", str(SCRIPTS.parent)]
    last = [*git, "log", "-1", "--format=%h", "--", "src"]  # what is measured, whatever was written about it since
    commit, changed = (answer_of(command) for command in (last, [*git, "status", "--porcelain", "src"]))
    models = [line.partition(":")[2].strip() for line in cpu_facts() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "device": f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}",
        "memory_gib": round(memory),
        "threads": int(threads()),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": commit + ("+" if changed else "") or os.environ.get("COMMIT", "unknown"),
    }


def answer_of(command: list[str]) -> str:
    """What a command prints; nothing where it is not installed."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def cpu_facts() -> list[str]:
    """Lines of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
