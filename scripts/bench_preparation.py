"""Preparation against stock TRL on the same rows: CPU and wall seconds, cache size, peak memory, equal ids and labels.

    python scripts/bench_preparation.py [--rows 100000] [--long 600] [--repeats 3]
    python scripts/bench_preparation.py --scale

Short rows are docstrings of the standard library as ChatML conversations; long rows are docstrings joined to answers
of 4,000 to 16,000 tokens. Answers do not begin with white space, where stock lets a token hold the end of the prompt
too. Every measurement is a process of its own with an empty cache, all kinds in turn; medians are printed. `limit` is
the floor: one rendering and a bare `encode_batch` of the same texts, in one process (whose tokenizer uses all cores,
as that of ours does with one process). Stock is TRL's `SFTTrainer._prepare_dataset`, what `trl sft` runs. `again` is a
second start on what `ours` has left; `stock / wall` says how often the wall time goes into stock's.

`--scale` measures ours alone, packing included, on 10,000 to 1,000,000 short rows and on 1 GB of them: time per row,
and peak memory in all and without the pages of mapped files, which the kernel takes back when it wants.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = ("limit", "stock", "ours", "again")
SCALES = (10_000, 100_000, 1_000_000)


def pairs_and_model(out: Path) -> list[tuple[str, str]]:
    """Questions and answers; writes a model whose tokenizer has a vocabulary of 16,000."""
    from make_docstrings import docstrings, write_model

    pairs = [(question, text.strip()) for question, text in docstrings()]
    write_model(out / "model", (text for pair in pairs for text in pair), vocabulary=16000, hidden=32, layers=1)
    return pairs


def short_rows(pairs: list[tuple[str, str]]) -> Iterator[str]:
    """One conversation after the other as lines of JSON, without end."""
    for number, (question, text) in enumerate(itertools.cycle(pairs)):
        yield line_of(f"{question} ({number})", text)


def long_rows(pairs: list[tuple[str, str]]) -> Iterator[str]:
    """The same with answers of 16,000 to 64,000 characters, some 4,000 to 16,000 tokens."""
    for number in itertools.count():
        size, answer, start = 16000 + number * 12345 % 48000, "", number * 997
        while len(answer) < size:
            answer += pairs[start % len(pairs)][1] + "\n\n"
            start += 1
        yield line_of(f"Tell me more. ({number})", answer)


def line_of(question: str, answer: str) -> str:
    """A line of JSON."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def measure(kind: str, model: str, data: str, processes: int, cache: str) -> dict[str, Any]:
    """Run one kind of preparation in this process; returns seconds, bytes and a digest of the result."""
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    raw = datasets.load_dataset("json", data_files=data, split="train")
    import trl  # noqa: F401  imports are not preparation

    import open_r1.preparation  # noqa: F401
    from open_r1.configs import ScriptArguments
    from open_r1.data import load_sources

    load_sources(ScriptArguments(dataset_name=data))  # nor is reading the file, which has been read for stock

    prepare = {"ours": ours, "again": ours, "packed": packed, "stock": stock, "limit": limit}[kind]
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow"))
    anonymous = watch_memory()
    cpu, wall = cpu_seconds(), time.perf_counter()
    table = prepare(raw, tokenizer, model, data, processes if processes > 1 else None)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    written = sum(path.stat().st_size for path in Path(cache).rglob("*.arrow")) - before
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024
    return {
        "cpu": cpu,
        "wall": wall,
        "written_mib": written / 2**20,
        "peak_mib": peak,
        "anonymous_mib": max(anonymous),
        "digest": None if kind == "packed" else digest_of(table),
    }


def watch_memory() -> list[int]:
    """MiB of this process's memory that is not mapped from files, noted every 20 ms from now on (Linux; else 0)."""
    noted, status = [0], Path("/proc/self/status")

    def watch() -> None:
        while status.exists():
            noted.append(int(status.read_text().partition("RssAnon:")[2].split()[0]) // 1024)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    return noted


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


def packed(raw: Any, tokenizer: Any, model: str, data: str, processes: int | None) -> Any:
    """Ours, with packing."""
    return ours(raw, tokenizer, model, data, processes, packing=True, max_length=4096)


def ours(raw: Any, tokenizer: Any, model: str, data: str, processes: int | None, **settings: Any) -> Any:
    """`open_r1.preparation.prepare`."""
    from trl import ModelConfig

    from open_r1.chat import get_tokenizer
    from open_r1.configs import ScriptArguments, SFTConfig
    from open_r1.preparation import prepare

    settings = {"max_length": 32768, **settings}
    args = SFTConfig(output_dir="unused", use_cpu=True, dataset_num_proc=processes, **settings)
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=model), args)
    return prepare(ScriptArguments(dataset_name=data), args, tokenizer).train.rows


def stock(raw: Any, tokenizer: Any, model: str, data: str, processes: int | None) -> Any:
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


def limit(raw: Any, tokenizer: Any, model: str, data: str, processes: int | None) -> None:
    """One rendering and a bare `encode_batch` of every row; nothing is labelled or written."""
    from open_r1.chat import CHATML

    tokenizer.chat_template = CHATML
    for batch in raw.iter(256):
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=100000, help="short rows")
    parser.add_argument("--long", type=int, default=600, help="long rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", action="store_true", help="measure time and memory up to 1 GB instead")
    parser.add_argument(
        "--one", nargs=5, metavar=("KIND", "MODEL", "DATA", "PROCESSES", "CACHE"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.one:
        kind, model, data, processes, cache = args.one
        print("RESULT " + json.dumps(measure(kind, model, data, int(processes), cache)))
        return 0
    out = Path(tempfile.mkdtemp())
    try:
        scale(out) if args.scale else compare(out, args)
    finally:
        shutil.rmtree(out)
    return 0


def compare(out: Path, args: argparse.Namespace) -> None:
    """Measure all kinds in turn and print the table."""
    pairs = pairs_and_model(out)
    with (out / "short.jsonl").open("w") as file:
        file.writelines(itertools.islice(short_rows(pairs), args.rows))
    with (out / "long.jsonl").open("w") as file:
        file.writelines(itertools.islice(long_rows(pairs), args.long))
    print("| rows | processes | kind | CPU s | wall s | CPU / limit | stock / wall | written MiB | peak MiB | equal |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for data in ("short", "long"):
        for processes in (1, 2):
            runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
            for _ in range(args.repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for kind in KINDS:
                        folder = "ours" if kind == "again" else kind
                        runs[kind].append(run(kind, out, data, processes, f"{cache}/{folder}"))
            report(data, processes, runs)


def scale(out: Path) -> None:
    """Measure ours on more and more rows and print the table."""
    pairs = pairs_and_model(out)
    print("| rows | JSONL MB | CPU s | CPU us a row | wall s | peak MiB | without mapped files MiB |")
    print("|---|---|---|---|---|---|---|")
    for rows in (*SCALES, None):
        size, count = 0, 0
        with (out / "rows.jsonl").open("w") as file:
            for line in itertools.islice(short_rows(pairs), rows):
                size, count = size + file.write(line), count + 1
                if rows is None and size > 1e9:
                    break
        with tempfile.TemporaryDirectory(dir=out) as cache:
            done = run("packed", out, "rows", 1, cache)
        print(
            f"| {count:,} | {size / 1e6:.0f} | {done['cpu']:.1f} | {done['cpu'] / count * 1e6:.0f} "
            f"| {done['wall']:.1f} | {done['peak_mib']:.0f} | {done['anonymous_mib']:.0f} |",
            flush=True,
        )


def run(kind: str, out: Path, data: str, processes: int, cache: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, out / "model", out / f"{data}.jsonl", processes, cache]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
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
    same = "yes" if len({r["digest"] for kind in KINDS[1:] for r in runs[kind]}) == 1 else "NO"
    for kind, m in middle.items():
        share = ratio(runs[kind], runs["limit"], "cpu")
        gain = f"{ratio(runs['stock'], runs[kind], 'wall'):.1f}" if kind != "limit" else ""
        equal = same if kind == "ours" else ""
        print(
            f"| {data} | {processes} | {kind} | {m['cpu']:.1f} | {m['wall']:.1f} | {share:.2f} | {gain} "
            f"| {m['written_mib']:.0f} | {m['peak_mib']:.0f} | {equal} |",
            flush=True,
        )


def ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> float:
    """Median over pairs of runs."""
    return statistics.median(one[name] / other[name] for one, other in zip(runs, others, strict=True))


if __name__ == "__main__":
    sys.exit(main())
