"""Training on one GPU beside `trl sft`: models with random weights made on the device, rows of random tokens.

`python scripts/bench.py gpu` runs the cells of `CELLS` in turn, each in a process of its own that has imported
everything while the one before it trained. Ours runs `open_r1.sft.main`, stock `trl.scripts.sft.main`; of both only
the loading of weights is replaced, so that there need be none. Nothing is saved.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_results import Results
from bench_runs import ATTENTION, SCRIPTS, SFT, about, read, settled, wait

# Qwen3's shapes. 8B has a head of its own, the others share theirs with the embeddings.
WIDTHS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "0.6B": dict(zip(WIDTHS, (1024, 28, 3072, 16, 8), strict=True)),
    "1.7B": dict(zip(WIDTHS, (2048, 28, 6144, 16, 8), strict=True)),
    "8B": dict(zip(WIDTHS, (4096, 36, 12288, 32, 8), strict=True)),
    "toy": dict(zip(WIDTHS, (64, 2, 128, 4, 2), strict=True)),
}
HEAD = {"toy": 16}  # numbers of an attention head; else 128
VOCABULARY = {"toy": 512}  # else Qwen3's
UNTIED = ("8B",)
LORA = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
# bf16 weights: they and both moments of AdamW, on all sides. In float32 an 8B takes 122 GiB without activations.
METHODS: dict[str, dict[str, Any]] = {"full": {}, "full, bf16 weights": {"dtype": "bfloat16"}, "LoRA": LORA}
METHODS["LoRA, 2 rows"] = {**LORA, "per_device_train_batch_size": 2}  # as the published figure is measured
METHODS |= {
    f"{name}, {how}": {**told, **more}
    for name, told in METHODS.items()
    for how, more in {
        "no Liger": {"use_liger_kernel": False},
        "Liger": {"use_liger_kernel": True},  # which ours settles by itself, and stock does not
        "compiled": {"torch_compile": True},
    }.items()
}
# Tokens of a document: lognormal, cut at the context, as answers of reasoning models are long. Packs of them, `bfd`.
MEDIAN, SIGMA, DOCUMENTS = 3000, 0.65, 900
ACCUMULATED = 2  # micro-batches of an optimiser step, of a pack each or, "2 rows", of two
SKIPPED = 3  # steps that are not counted, in which kernels are made and chosen and the optimiser gets its state
LEAST, SECONDS, STEPS = 3, 9, 16  # of training behind these at least, if not longer, and of all at most
STARTING = 240  # seconds for what a process imports, on a machine that has not done so before
SHORTEST = 30  # seconds that a cell needs at least
FULL = ("out of memory", "outofmemory", "memory is full")  # what a run says, and ours, when a device's memory is


@dataclass(frozen=True)
class Cell:
    """A model of `shape` trained by `method` on packs of `context` tokens by a side, in `limit` seconds all in all."""

    shape: str
    method: str
    context: int
    side: str
    limit: float = 140

    @property
    def key(self) -> dict[str, Any]:
        """What it is called in the figures."""
        return {"shape": self.shape, "method": self.method, "context": self.context, "side": self.side}

    @property
    def name(self) -> str:
        """What it is called in what is printed."""
        context = f"{self.context // 1024}k" if self.context >= 1024 else self.context
        return f"{self.shape} {self.method} {context} {self.side}"


# By importance: what time does not suffice for is at the end. Tuned takes its flags from ours, which comes before it.
WANTED = [
    ("8B", "full, bf16 weights", 8192, ("ours", "stock", "tuned")),
    ("8B", "LoRA, 2 rows", 4096, ("ours", "stock", "tuned")),
    ("1.7B", "full", 32768, ("ours", "stock", "tuned")),
    ("8B", "LoRA, 2 rows, compiled", 4096, ("ours", "stock")),
    ("8B", "LoRA", 4096, ("ours", "stock", "tuned")),
    ("8B", "full, bf16 weights, compiled", 8192, ("ours", "stock")),
    ("1.7B", "full", 4096, ("ours", "tuned", "stock")),
    ("0.6B", "full", 4096, ("ours", "tuned", "stock")),
    ("8B", "LoRA", 16384, ("ours", "tuned", "stock")),
    ("1.7B", "full", 16384, ("ours", "tuned", "stock")),
    ("8B", "full, bf16 weights", 4096, ("ours", "tuned", "stock")),
    ("8B", "full, bf16 weights", 16384, ("ours", "tuned", "stock")),
    ("8B", "LoRA", 32768, ("ours", "tuned", "stock")),
    ("0.6B", "full", 32768, ("ours", "tuned", "stock")),
    ("8B", "full, bf16 weights", 32768, ("ours", "tuned", "stock")),
    ("1.7B", "LoRA", 4096, ("ours", "tuned", "stock")),
]
CELLS = [
    Cell(shape, method, context, side, limit=200 if "compiled" in method else 140)
    for shape, method, context, sides in WANTED
    for side in sides
]
TOY = [
    Cell("toy", method, context, side)
    for method in ("full", "LoRA")
    for context in (64, 512)
    for side in ("ours", "stock", "tuned")
]


def measure_gpu(results: Results, work: Path, minutes: float, toy: bool, only: list[str], again: bool) -> int:
    """Measure what is not there yet until time is up; returns the exit code."""
    ends = time.monotonic() + 60 * minutes
    cells = [cell for cell in (TOY if toy else CELLS) if not only or any(part in cell.name for part in only)]
    write_rows(work, sorted({cell.context for cell in cells}), toy)
    for shape in {cell.shape for cell in cells}:
        write_shape(work, shape)
    device, said = finish(start(work, 0), {"what": "ceilings", "toy": toy}, STARTING)
    if device is None:
        print(said, file=sys.stderr)
        return 1
    reached = device.pop("ceilings")
    facts = {**about(), **device, "command": f"python scripts/bench.py gpu{' --toy' if toy else ''}"}
    del facts["commit"]  # that of each run is noted: cells that are there stay
    results.begin("gpu", facts, again)
    section = results.sections["gpu"]
    section.setdefault("ceilings", reached)
    section["runs"] = [run for run in section["runs"] if run["outcome"] != "failed"]  # they are tried again
    print(f"{facts['device']}: {', '.join(f'{value:,} {name}' for name, value in reached.items())}", flush=True)
    missing = [cell for cell in cells if not results.runs("gpu", **cell.key)]
    left = measure_cells(missing, results, work, ends, toy)
    if left:
        print(f"no time is left for {', '.join(cell.name for cell in left)}: start again")
    return 0


def measure_cells(cells: list[Cell], results: Results, work: Path, ends: float, toy: bool) -> list[Cell]:
    """Measure cells until time is up; each is printed and written when it is done. Returns those that are left."""
    facts, commit = results.sections["gpu"], about()["commit"]
    waiting = start(work, 1)
    try:
        for number, cell in enumerate(cells):
            if (left := ends - time.monotonic()) < SHORTEST:
                return cells[number:]
            figures = too_large(cell, facts.get("memory_bytes"))
            if figures is None:
                settings = settings_of(cell, work, toy, results)
                current, waiting = waiting, start(work, number + 2)
                figures = measured(cell, current, settings, min(cell.limit, left), facts.get("peak_flops"))
                if figures["outcome"] == "failed" and time.monotonic() >= ends:
                    return cells[number:]  # it was cut short
            results.add("gpu", {**cell.key, **figures, "commit": commit})
            print(f"{cell.name}: {in_words(figures)}", flush=True)
        return []
    finally:
        end(waiting)


def in_words(figures: dict[str, Any]) -> str:
    """A cell's figures in a line."""
    if figures["outcome"] != "done":
        return f"{figures['outcome']} {figures.get('why', '')}".strip()
    mfu = "unknown" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
    return (
        f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, {figures['tflops']:,.1f} TFLOP/s, "
        f"{figures['step_seconds']:.3f} s a step, {figures['allocated_gib']:.1f} GiB"
    )


def settings_of(cell: Cell, work: Path, toy: bool, results: Results) -> dict[str, Any]:
    """What a side is told: by a person, or for `tuned` what ours settled."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(work / cell.shape),
        "dataset_name": str(work / f"rows-{cell.context}"),
        "output_dir": str(work / "run" / cell.name.replace(" ", "-")),
        "packing": True,
        "max_length": cell.context,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": 1000,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        **METHODS[cell.method],
    }
    if toy:
        settings |= {"use_cpu": True, "bf16": False}
    if cell.side == "tuned":
        ours = results.runs("gpu", **{**cell.key, "side": "ours"})
        settings |= ours[0].get("settled", {}) if ours else {}
        settings["attn_implementation"] = best_of(settings.get("attn_implementation", "sdpa"))
    return settings


def best_of(attention: str) -> str:
    """The attention that stock is tuned with: that of ours, else what is installed of what it knows by name."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if attention in ATTENTION and attention != "sdpa":
        return attention
    installed = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    return next((name for name, there in installed.items() if there), "sdpa")


def too_large(cell: Cell, memory: int | None) -> dict[str, Any] | None:
    """Why a cell is not tried: weights, gradients and optimiser alone would not fit."""
    weights, adapters = parameters(cell.shape, cell.method)
    wide = "bf16" not in cell.method and (not adapters or cell.side == "stock")  # which loads float32 weights
    needed = weights * (4 if wide else 2) * (1 if adapters else 4) + 16 * adapters
    if memory is None or needed < memory:
        return None
    return {
        "outcome": "skipped",
        "why": f"takes {needed / 2**30:,.0f} GiB of {memory / 2**30:,.0f} without activations",
    }


def measured(
    cell: Cell, process: subprocess.Popen, settings: dict[str, Any], limit: float, peak: float | None
) -> dict[str, Any]:
    """Let a waiting process train a cell; its figures, or how it failed. `peak` is the device's, in FLOP/s."""
    _, said = finish(process, {"what": "train", "side": cell.side, "settings": settings}, limit)
    begin, steps = read(process.stamps)
    if len(steps) < 2:
        if any(words in said.lower() for words in FULL):
            return {"outcome": "out of memory"}
        why = (said.strip().splitlines() or ["nothing was said"])[-1][:300]
        return {"outcome": "failed", "why": f"{len(steps)} of 2 steps: {why}"}
    skip = min(SKIPPED, len(steps) - 1)
    counted, walls = steps[skip:], [step["wall"] for step in steps[skip - 1 :]]
    seconds = [now - last for last, now in itertools.pairwise(walls)]
    tokens = sum(step["real"] for step in counted)
    packs = ACCUMULATED * METHODS[cell.method].get("per_device_train_batch_size", 1)
    rate = statistics.median(step["real"] / took for step, took in zip(counted, seconds, strict=True))
    flops = statistics.median(
        flops_of(cell.shape, cell.method, step) / took for step, took in zip(counted, seconds, strict=True)
    )
    return {
        "outcome": "done",
        "tokens_per_second": round(rate, 1),
        "filled": round(tokens / (len(counted) * packs * cell.context), 4),
        "step_seconds": round(statistics.median(seconds), 4),
        "seconds": [round(each, 4) for each in seconds],
        "steps": len(counted),
        "tflops": round(flops / 1e12, 4),
        "mfu": None if peak is None else round(flops / peak, 4),
        # The most of all steps: ours counts anew at each log.
        **{
            f"{what}_gib": round(max(step.get(what, 0) for step in steps) / 2**30, 2)
            for what in ("allocated", "reserved")
        },
        "losses": [round(steps[0]["loss"], 4), round(steps[-1]["loss"], 4)],
        "attention": begin["attn_implementation"],
        "settled": {**settled(begin), "dtype": begin["dtype"]},
    }


def parameters(shape: str, method: str) -> tuple[int, int]:
    """Parameters of a shape, and of its adapters."""
    layer, head, adapters = products(shape)
    layers = SHAPES[shape]["num_hidden_layers"]
    return layer * layers + head * (2 if shape in UNTIED else 1), adapters * layers if is_lora(method) else 0


def is_lora(method: str) -> bool:
    """Whether a method trains adapters."""
    return METHODS[method].get("use_peft", False)


def products(shape: str) -> tuple[int, int, int]:
    """Weights that a token is multiplied with: in a layer, in the head, and of a layer's adapters."""
    hidden, _, inner, heads, groups = (SHAPES[shape][name] for name in WIDTHS)
    size = HEAD.get(shape, 128)
    matrices = [(hidden, heads * size), (hidden, groups * size), (hidden, groups * size), (heads * size, hidden)]
    matrices += [(hidden, inner), (hidden, inner), (inner, hidden)]
    adapters = sum(LORA["lora_r"] * (into + out) for into, out in matrices)
    return sum(into * out for into, out in matrices), hidden * VOCABULARY.get(shape, 151_936), adapters


def flops_of(shape: str, method: str, step: dict[str, Any]) -> float:
    """Model FLOPs of a step: what the mathematics needs, forward and backward, and nothing computed twice.

    Of a weight 2 for each token and pass; a frozen one has no gradient of its own, so LoRA takes 4 where full
    fine-tuning takes 6. Attention counts the pairs of tokens of which one attends to the other; embeddings nothing.
    """
    layer, head, adapters = products(shape)
    layers, heads = SHAPES[shape]["num_hidden_layers"], SHAPES[shape]["num_attention_heads"]
    each = 4 if is_lora(method) else 6
    weights = step["real"] * layers * layer * each + step["supervised"] * head * each
    trained = step["real"] * layers * adapters * 6 if is_lora(method) else 0
    pairs = (step["squares"] + step["real"]) / 2
    return weights + trained + pairs * 12 * heads * HEAD.get(shape, 128) * layers


# What processes do


def start(work: Path, number: int) -> subprocess.Popen:
    """A process that imports everything and waits to be told what to do."""
    stamps, log = work / f"stamps-{number}.jsonl", work / f"log-{number}.txt"
    environment = {
        **os.environ,
        "STAMPS": str(stamps),
        "STAMPS_STEPS": str(STEPS),
        "STAMPS_SECONDS": str(SECONDS),
        "STAMPS_SKIPPED": str(SKIPPED),
        "STAMPS_LEAST": str(LEAST),
        "PYTHONPATH": os.pathsep.join(
            [str(SCRIPTS / "stamps"), str(SFT.parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        "HF_DATASETS_CACHE": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, SCRIPTS / "bench_device.py"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    process.log, process.stamps = log, stamps
    return process


def finish(process: subprocess.Popen, told: dict[str, Any], limit: float) -> tuple[Any, str]:
    """Tell a waiting process what to do and wait for its end; what it answers, if it does, and all that it said."""
    with contextlib.suppress(BrokenPipeError):  # it has ended already: it has said why
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.close()
    ended = wait(process, limit)
    said = process.log.read_text(errors="replace")
    answer = [line for line in said.splitlines() if line.startswith("ANSWER ")]
    return (json.loads(answer[-1][7:]) if answer else None), said if ended else f"{said}\nnot done in {limit:.0f} s"


def end(process: subprocess.Popen) -> None:
    """End a process that waits."""
    process.stdin.close()
    wait(process, 0)


# What is trained on


def write_shape(work: Path, shape: str) -> None:
    """Write a model's config and a tokenizer, without weights."""
    from make_docstrings import docstrings, write_model
    from transformers import AutoConfig

    texts = (text for pair in itertools.islice(docstrings(), 2000) for text in pair)
    write_model(work / shape, texts, vocabulary=VOCABULARY.get(shape, 4096), hidden=32, layers=1)
    (work / shape / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(work / shape)
    settings = {
        **SHAPES[shape],
        "head_dim": HEAD.get(shape, 128),
        "vocab_size": VOCABULARY.get(shape, 151_936),
        "tie_word_embeddings": shape not in UNTIED,
        "max_position_embeddings": 40_960,
        "layer_types": ["full_attention"] * SHAPES[shape]["num_hidden_layers"],
        "max_window_layers": SHAPES[shape]["num_hidden_layers"],
    }
    for key, value in settings.items():
        setattr(config, key, value)
    config.save_pretrained(work / shape)


def write_rows(work: Path, contexts: list[int], toy: bool) -> None:
    """Write `rows-CONTEXT/train.parquet` of token ids, all of which enter the loss."""
    import numpy as np
    from datasets import Dataset

    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEDIAN / 64 if toy else MEDIAN), SIGMA, DOCUMENTS).astype(int).clip(2)
    for context in contexts:
        ids = [random.integers(3, 500 if toy else 4000, min(length, context)).tolist() for length in lengths]
        (work / f"rows-{context}").mkdir()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        rows.to_parquet(work / f"rows-{context}/train.parquet")
