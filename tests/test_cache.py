"""Prepared tables: whole or not there, found by content, mended when damaged; what killed makers left is removed."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest
from conftest import settings, write_jsonl
from datasets import Dataset

from open_r1 import cache
from open_r1.cache import folder_of, prepared_table, root
from open_r1.configs import ScriptArguments
from open_r1.data import load_sources
from open_r1.errors import UserError
from open_r1.sft import main
from open_r1.stopping import Preempted, heeded


def writer(values, calls):
    def write(path):
        calls.append(path)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, pa.schema({"a": pa.int64()})) as stream:
            for value in values:
                stream.write_table(pa.table({"a": [value]}))

    return write


@pytest.fixture
def key(request):
    return {"what": request.node.name, "time": time.time()}


def test_a_table_is_made_once(key):
    calls = []
    for _ in range(2):
        assert prepared_table(key, writer([1, 2], calls))["a"][:] == [1, 2]
    assert len(calls) == 1
    assert sorted(path.name for path in (folder_of(key)).iterdir()) == [
        "cost.json",
        "data.arrow",
        "key.json",
        "sizes.json",
    ]


@pytest.mark.parametrize("damage", ["gone", "cut", "cut behind a batch", "empty"])
def test_a_damaged_table_is_made_again(key, damage, caplog):
    calls = []
    prepared_table(key, writer([1, 2], calls))
    path = folder_of(key) / "data.arrow"
    if damage == "gone":
        path.unlink()
    else:
        prepared_table({"one": key, "what": "one"}, writer([1], []))
        whole = (folder_of({"one": key}) / "data.arrow").stat().st_size - 8  # without its end of stream
        path.write_bytes(path.read_bytes()[: {"cut": 100, "cut behind a batch": whole, "empty": 0}[damage]])
    assert prepared_table(key, writer([1, 2], calls))["a"][:] == [1, 2]
    assert len(calls) == 2
    assert "is damaged" in caplog.text


def test_what_killed_makers_left_is_removed_and_what_live_ones_make_is_not(key):
    old, begun, alive, abandoned = (root() / f"x{n}.partial-{time.time_ns()}" for n in range(4))
    mine = root() / f"{folder_of(key).name}.partial-0"
    for path in (old, begun, alive, abandoned, mine):
        path.mkdir()
    for number in (2, 3):
        (root() / f"x{number}.lock").touch()
    for path in (old, alive, abandoned, root() / "x3.lock"):
        os.utime(path, (0, 0))
    prepared_table(key, writer([1], []))
    left = [path.exists() for path in (old, begun, alive, abandoned, mine, root() / "x2.lock", root() / "x3.lock")]
    assert left == [False, True, True, False, False, True, False]
    for path in (begun, alive):
        shutil.rmtree(path)
    (root() / "x2.lock").unlink()


HOLDER = """
import socket, sys, time, filelock
socket.gethostname = lambda: sys.argv[2] or host()
lease = filelock.SoftFileLease(sys.argv[1], lease_duration=float(sys.argv[3]), heartbeat_interval=0.1)
lease.acquire()
print("held", flush=True)
time.sleep(float(sys.argv[4]))
lease.release()
""".replace("host()", repr(os.uname().nodename))


def hold(key, host="", lease=60.0, seconds=60.0):
    """A process that makes the table of a key, on another machine where `host` is given."""
    lock = folder_of(key).with_suffix(".lock")
    command = [sys.executable, "-c", HOLDER, str(lock), host, str(lease), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_one_that_is_killed_is_waited_for_and_followed(key, host, monkeypatch, caplog):
    caplog.set_level("INFO", "open_r1")
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    monkeypatch.setattr(cache, "LEASE", 1.0)
    monkeypatch.setattr(cache, "BEAT", 0.1)
    holder = hold(key, host, lease=1.0)
    threading.Timer(
        1.5, lambda: (holder.kill(), holder.wait())
    ).start()  # it shows that it is alive for longer than a lease
    begun, calls = time.monotonic(), []
    assert prepared_table(key, writer([1], calls))["a"][:] == [1]
    assert 1.4 < time.monotonic() - begun < (6 if host else 2.2)
    name = host or os.uname().nodename
    assert f"waiting for process {holder.pid} on {name}, since 0 s: it prepares {key['what']}" in caplog.text
    assert len(calls) == 1
    assert not list(root().glob(f"{folder_of(key).name}.*"))


def test_what_another_process_made_meanwhile_is_taken(key):
    holder = hold(key, seconds=1)
    made = []

    def make_it():
        cache.write(folder_of(key), key, writer([2], made))

    threading.Timer(0.5, make_it).start()
    calls = []
    assert prepared_table(key, writer([1], calls))["a"][:] == [2]
    assert (len(made), calls, holder.wait()) == (1, [], 0)


def test_a_signal_ends_the_waiting_at_once(key):
    holder = hold(key)
    begun = time.monotonic()
    with heeded(), pytest.raises(Preempted, match="SIGTERM"):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        prepared_table(key, writer([1], []))
    assert time.monotonic() - begun < 2
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    assert prepared_table(key, writer([1], []))["a"][:] == [1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_file_systems_without_locks_do(number, tiny_model, chat_file, tmp_path, monkeypatch, caplog):
    """Lustre without its flock option, NFS without a lock daemon: the kernel's locks fail, ours is none of them."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    caplog.set_level("INFO", "open_r1")
    system_prompt = f"another one for {number}"
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run", packing=True)
    for _ in range(2):
        assert main([*argv, "--dry_run", "--system_prompt", system_prompt]) == 0
    assert len(re.findall("tokenised (again|for the first time)", caplog.text)) == 1


def test_where_the_library_needs_a_lock_that_is_not_there_it_is_said(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="not supported; the datasets library writes and locks files in its cache"):
        rows_of(tmp_path / "a.parquet")


def test_tables_are_for_all_whom_the_umask_lets_read(key):
    before = os.umask(0o022)
    try:
        prepared_table(key, writer([1], []))
    finally:
        os.umask(before)
    folder = folder_of(key)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o755, {0o644})


def test_a_cache_that_cannot_be_written_is_named(key, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="prepared data cannot be kept there: .*No space left.*set HF_DATASETS_CACHE"):
        prepared_table(key, full)
    assert not list(root().glob(f"{folder_of(key).name}*"))


def rows_of(name):
    (source,), _ = load_sources(ScriptArguments(dataset_name=str(name)))
    return [source.to_row(row)["text"] for row in source.rows], source.table.contents


def test_other_contents_under_the_same_path_and_time_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    seen = []
    for text in ("one", "two, and more"):
        write_jsonl(path, [{"text": text}])
        os.utime(path, (1e9, 1e9))
        seen.append(rows_of(path))
    assert [rows for rows, _ in seen] == [["one"], ["two, and more"]]
    assert seen[0][1] != seen[1][1]


@pytest.mark.parametrize("saved", [True, False])
def test_a_directory_is_known_by_what_its_files_hold(tmp_path, saved):
    seen = []
    for text in ("one", "two"):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        if saved:
            table = Dataset.from_list([{"text": text}])
            Dataset(table.data, fingerprint="same").save_to_disk(tmp_path / "d")
        else:
            (tmp_path / "d").mkdir()
            write_jsonl(tmp_path / "d" / "a.jsonl", [{"text": text}])
            os.utime(tmp_path / "d" / "a.jsonl", (1e9, 1e9))
        seen.append(rows_of(tmp_path / "d"))
    assert [rows for rows, _ in seen] == [["one"], ["two"]]
    assert seen[0][1] != seen[1][1]


def test_settings_of_a_directory_count_as_its_contents(tmp_path):
    seen = []
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.json").write_text(json.dumps({"one": [{"text": "first"}], "two": [{"text": "second"}]}))
    for field in ("one", "two"):
        said = {"configs": [{"config_name": "default", "data_files": "x.json", "field": field}]}
        (tmp_path / "d" / "README.md").write_text(f"---\n{json.dumps(said)}\n---\n")
        seen.append(rows_of(tmp_path / "d"))
    assert [rows for rows, _ in seen] == [["first"], ["second"]]
    assert list(seen[0][1].values()) != list(seen[1][1].values())


def test_what_is_moved_or_renamed_is_not_prepared_again(tiny_model, chat_file, tmp_path, caplog):
    caplog.set_level("INFO", "open_r1")
    shutil.copy(chat_file, tmp_path / "moved.jsonl")
    for name in (chat_file, tmp_path / "moved.jsonl"):
        caplog.clear()
        argv = settings(model_name_or_path=tiny_model, dataset_name=name, output_dir=tmp_path / "run", packing=True)
        assert main([*argv, "--dry_run", "--max_length", "99"]) == 0
    assert "preparing" not in caplog.text


@pytest.mark.parametrize("part", ["code", "trl"])
def test_packs_of_another_code_are_made_anew(tiny_model, chat_file, tmp_path, caplog, monkeypatch, part):
    caplog.set_level("INFO", "open_r1")
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run", packing=True)
    assert main([*argv, "--dry_run"]) == 0
    caplog.clear()
    if part == "trl":
        monkeypatch.setattr("trl.__version__", "0.0")
    else:
        monkeypatch.setattr("open_r1.packing.file_digest", lambda path: "another")
    assert main([*argv, "--dry_run"]) == 0
    assert "packed again: code changed" in caplog.text
