"""Preparation under fire: killed at any moment, started by many at once."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_preparation import pairs_and_model, short_rows
from conftest import ROOT, settings, write_jsonl


def environment(cache):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}


def start(cache, argv):
    command = [sys.executable, "scripts/prepare.py", *map(str, argv)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def tables(cache):
    """Name and bytes of every prepared table."""
    found = {path.parent.name: path.read_bytes() for path in (cache / "open_r1").glob("*/data*.arrow")}
    assert found
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory, conversations):
    folder = tmp_path_factory.mktemp("rows")
    return write_jsonl(folder / "rows.jsonl", conversations * 20)


def arguments(model, rows, **values):
    return settings(model_name_or_path=model, dataset_name=rows, output_dir="unused", packing=True, **values)


def test_killed_at_ten_random_moments_the_next_start_gives_the_same_bytes(tiny_model, rows, tmp_path):
    argv = arguments(tiny_model, rows)
    started = time.monotonic()
    finish(start(tmp_path / "whole", argv))
    seconds = time.monotonic() - started
    whole = tables(tmp_path / "whole")
    torn = tmp_path / "torn"
    moments = random.Random(0)
    for _ in range(10):
        process = start(torn, argv)
        time.sleep(moments.uniform(0.3 * seconds, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finish(start(torn, argv))
        assert tables(torn) == whole
        for path in (torn / "open_r1").glob("*/key.json"):
            if moments.random() < 0.7:  # make the next start prepare this again
                subprocess.run(["rm", "-r", path.parent], check=True)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_started_by_many_at_once_it_is_prepared_once(tiny_model, rows, tmp_path, processes):
    running = [start(tmp_path, arguments(tiny_model, rows)) for _ in range(processes)]
    outputs = [finish(process) for process in running]
    assert sum("tokenised for the first time" in output for output in outputs) == 1
    assert sum("packed for the first time" in output for output in outputs) == 1
    assert len(tables(tmp_path)) == 5  # records, their columns, tokens, their counts, packs with what is in them
    assert not list((tmp_path / "open_r1").glob("*.partial*"))


def memory_group(limit):
    """A new memory cgroup of `limit` bytes and the file that tells its peak; None where none can be made."""
    lines = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    first = Path("/sys/fs/cgroup/memory" + lines["memory"]) if "memory" in lines else None
    group = (first or Path("/sys/fs/cgroup" + lines.get("", "/"))) / f"prepare-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError:
        return None
    return group


def test_a_gigabyte_of_rows_is_prepared_and_packed_in_two(tmp_path):
    """All memory counts: that of both processes and every page of a file that the kernel holds for them."""
    group = memory_group(2 * 2**30)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    pairs = pairs_and_model(tmp_path)
    size, count = 0, 0
    with (tmp_path / "rows.jsonl").open("w") as file:
        for line in short_rows(pairs):
            size, count = size + file.write(line), count + 1
            if size > 1e9:
                break
    argv = arguments(tmp_path / "model", tmp_path / "rows.jsonl", max_length=4096, dataset_num_proc=2)
    command = [sys.executable, "scripts/prepare.py", *map(str, argv)]
    join = f'echo $$ > "{group}/cgroup.procs"; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", join, "bash", *command],
        cwd=ROOT,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    group.rmdir()
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"  {count:,}  " in done.stderr  # the ledger's rows
    assert len(list((tmp_path / "cache" / "open_r1").glob("*/key.json"))) == 5


def mounted(cache, options, argv):
    """Exit code and output of a preparation into a cache on a mount of its own."""
    mount = f'mount {options} "$0" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, str(cache), sys.executable, "scripts/prepare.py"]
    done = subprocess.run(
        [*command, *map(str, argv)],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "mount" in done.stdout and done.returncode in (1, 32):
        pytest.skip(f"nothing can be mounted here: {done.stdout}")
    return done.returncode, done.stdout


def test_a_cache_that_can_only_be_read_is_read(tiny_model, rows, tmp_path):
    read_only = '--bind -o ro "$0"'
    cache, argv = tmp_path / "cache", arguments(tiny_model, rows)
    finish(start(cache, argv))
    whole = tables(cache)
    code, output = mounted(cache, read_only, argv)
    assert code == 0, output
    assert "preparing" not in output
    code, output = mounted(cache, read_only, [*argv, "--max_length", "99"])
    assert (code, "prepared data cannot be kept there: [Errno 30] Read-only file system" in output) == (2, True)
    assert "set HF_DATASETS_CACHE" in output
    assert tables(cache) == whole


def test_a_cache_without_room_is_named(tiny_model, rows, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    code, output = mounted(cache, "-t tmpfs -o size=400k tmpfs", arguments(tiny_model, rows))
    assert (code, "No space left on device" in output, "set HF_DATASETS_CACHE" in output) == (2, True, True), output


def test_parquet_in_a_cache_that_can_only_be_read_is_refused_with_the_reason(tiny_model, conversations, tmp_path):
    from datasets import Dataset

    Dataset.from_list(conversations).to_parquet(tmp_path / "rows.parquet")
    cache, argv = tmp_path / "cache", arguments(tiny_model, tmp_path / "rows.parquet")
    finish(start(cache, argv))
    code, output = mounted(cache, '--bind -o ro "$0"', argv)
    assert (code, "writes and locks files in its cache even to read it: set HF_DATASETS_CACHE" in output) == (2, True)
