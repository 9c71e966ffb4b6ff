"""Prepared tables: whole or not there, found by content, mended when damaged; what killed makers left is removed."""

import os
import shutil
import time

import pyarrow as pa
import pytest
from conftest import write_jsonl
from datasets import Dataset
from filelock import FileLock

from open_r1.cache import ALIVE, digest, prepared_table, root
from open_r1.configs import ScriptArguments
from open_r1.data import load_sources
from open_r1.errors import UserError


def writer(values, calls):
    def write(path):
        calls.append(path)
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, pa.schema({"a": pa.int64()})) as stream:
            stream.write_table(pa.table({"a": values}))

    return write


@pytest.fixture
def key(request):
    return {"what": request.node.name, "time": time.time()}


def test_a_table_is_made_once(key):
    calls = []
    for _ in range(2):
        assert prepared_table(key, writer([1, 2], calls))["a"][:] == [1, 2]
    assert len(calls) == 1
    assert sorted(path.name for path in (root() / digest(key)).iterdir()) == ["data.arrow", "key.json"]


@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_table_is_made_again(key, damage, caplog):
    calls = []
    prepared_table(key, writer([1, 2], calls))
    path = root() / digest(key) / "data.arrow"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == "cut" else 0])
    assert prepared_table(key, writer([1, 2], calls))["a"][:] == [1, 2]
    assert len(calls) == 2
    assert "is damaged" in caplog.text


def test_what_killed_makers_left_is_removed_and_what_live_ones_make_is_not(key):
    dead, alive, begun = (root() / f"x{n}.partial-{time.time_ns()}" for n in range(3))
    for path in (dead, alive, begun):
        path.mkdir()
    for path in (dead, alive):
        os.utime(path, (0, 0))
    with FileLock(alive / ALIVE):
        os.utime(alive, (0, 0))
        prepared_table(key, writer([1], []))
        assert (dead.exists(), alive.exists(), begun.exists()) == (False, True, True)
    shutil.rmtree(alive)
    shutil.rmtree(begun)


def test_a_cache_that_cannot_be_written_is_named(key, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="prepared data cannot be kept there: .*No space left.*set HF_DATASETS_CACHE"):
        prepared_table(key, full)
    assert not list(root().glob(f"{digest(key)}*"))


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
