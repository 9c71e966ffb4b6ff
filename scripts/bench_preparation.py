"""Preparation against stock TRL on the same rows: CPU and wall seconds, cache size, peak memory, equal ids and labels.

    python scripts/bench_preparation.py [--rows 50000] [--long 400] [--repeats 3]

Short rows are docstrings of the standard library as ChatML conversations; long rows are docstrings joined to answers
of 4,000 to 16,000 tokens. Every measurement is a process of its own with an empty cache, ours and theirs in turn;
medians are printed. `limit` is the floor: one rendering and a bare `encode_batch` of the same texts. Stock is TRL's
`SFTTrainer._prepare_dataset`, what `trl sft` runs.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("limit", "stock", "ours")


def write_data(out: Path, rows: int, long: int) -> None:
    """Write `short.jsonl`, `long.jsonl` and a tokenizer with a vocabulary of 16,000."""
    from make_docstrings import docstrings, write_model

    pairs = list(docstrings())
    write_model(out / "model", (text for pair in pairs for text in pair), vocabulary=16000, hidden=32, layers=1)
    with (out / "short.jsonl").open("w") as file:
        for number in range(rows):
            question, text = pairs[number % len(pairs)]
            messages = [{"role": "user", "content": f"{question} ({number})"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")
    texts = [text for _, text in pairs]
    with (out / "long.jsonl").open("w") as file:
        for number in range(long):
            size, answer = 16000 + number * 12345 % 48000, ""  # characters: some 4,000 to 16,000 tokens
            start = number * 997
            while len(answer) < size:
                answer += texts[start % len(texts)] + "\n\n"
                start += 1
            messages = [
                {"role": "user", "content": f"Tell me more. ({number})"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(kind: str, model: str, data: str, processes: int, cache: str) -> dict[str, Any]:
    """Run one kind of preparation in this process; returns seconds, bytes and a digest of the result."""
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    raw = datasets.load_dataset("json", data_files=data, split="train")
    import trl  # noqa: F401  imports are not preparation

    import open_r1.preparation  # noqa: F401

    prepare = {"ours": ours, "stock": stock, "limit": limit}[kind]
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow"))
    cpu, wall = cpu_seconds(), time.perf_counter()
    table = prepare(raw, tokenizer, model, data, processes)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    written = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow")) - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
    return {"cpu": cpu, "wall": wall, "written_mib": written / 2**20, "peak_mib": peak, "digest": digest_of(table)}


def cpu_seconds() -> float:
    """CPU seconds of this process and its children."""
    return sum(os.times()[:4])


def digest_of(table: Any) -> str | None:
    """Digest of all ids and labels in order, None where there are none."""
    if table is None:
        return None
    import hashlib

    found = hashlib.sha256()
    for row in table.select_columns(["input_ids", "labels"]).with_format("numpy"):
        found.update(row["input_ids"].astype("int32").tobytes() + row["labels"].astype("int32").tobytes())
    return found.hexdigest()[:16]


def ours(raw: Any, tokenizer: Any, model: str, data: str, processes: int) -> Any:
    """`open_r1.preparation.prepare`."""
    from trl import ModelConfig

    from open_r1.chat import get_tokenizer
    from open_r1.configs import ScriptArguments, SFTConfig
    from open_r1.preparation import prepare

    args = SFTConfig(output_dir="unused", use_cpu=True, max_length=32768, dataset_num_proc=processes)
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=model), args)
    return prepare(ScriptArguments(dataset_name=data), args, tokenizer).train.rows


def stock(raw: Any, tokenizer: Any, model: str, data: str, processes: int) -> Any:
    """TRL's own preparation, assistant-only loss through ChatML with generation markers."""
    from types import SimpleNamespace

    from trl import SFTConfig, SFTTrainer

    from open_r1.chat import CHATML

    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    args = SFTConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        max_length=32768,
        assistant_only_loss=True,
        dataset_num_proc=processes,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    return SFTTrainer._prepare_dataset(trainer, raw, tokenizer, args, False, None, "train")


def limit(raw: Any, tokenizer: Any, model: str, data: str, processes: int) -> None:
    """One rendering and a bare `encode_batch` of every row; nothing is labelled or written."""
    from open_r1.chat import CHATML

    tokenizer.chat_template = CHATML
    for batch in raw.iter(256):
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def main() -> int:
    """Measure all kinds in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=50000, help="short rows")
    parser.add_argument("--long", type=int, default=400, help="long rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one", nargs=5, metavar=("KIND", "MODEL", "DATA", "PROCESSES", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.one:
        kind, model, data, processes, cache = args.one
        print("RESULT " + json.dumps(measure(kind, model, data, int(processes), cache)))
        return 0
    out = Path(tempfile.mkdtemp())
    write_data(out, args.rows, args.long)
    print("| rows | processes | kind | CPU s | wall s | CPU / limit | written MiB | peak MiB | same ids and labels |")
    print("|---|---|---|---|---|---|---|---|---|")
    for data in ("short", "long"):
        for processes in (1, 2):
            runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
            for _ in range(args.repeats):
                for kind in KINDS:
                    runs[kind].append(run(kind, out, data, processes))
            report(data, processes, runs)
    shutil.rmtree(out)
    return 0


def run(kind: str, out: Path, data: str, processes: int) -> dict[str, Any]:
    """One measurement in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", kind, out / "model", out / f"{data}.jsonl", processes, cache]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def report(data: str, processes: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of each kind as a line of the table."""
    middle = {
        kind: {
            name: statistics.median(r[name] for r in results) for name in ("cpu", "wall", "written_mib", "peak_mib")
        }
        for kind, results in runs.items()
    }
    same = "yes" if len({r["digest"] for kind in ("stock", "ours") for r in runs[kind]}) == 1 else "NO"
    for kind, m in middle.items():
        ratio = f"{m['cpu'] / middle['limit']['cpu']:.2f}"
        equal = same if kind == "ours" else ""
        print(
            f"| {data} | {processes} | {kind} | {m['cpu']:.1f} | {m['wall']:.1f} | {ratio} | {m['written_mib']:.0f} "
            f"| {m['peak_mib']:.0f} | {equal} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
