"""Prepared tables: whole or not there, found by content, mended when damaged; what killed makers left is removed."""

import json
import os
import shutil
import time

import pyarrow as pa
import pytest
from conftest import settings, write_jsonl
from datasets import Dataset
from filelock import FileLock

from open_r1.cache import ALIVE, folder_of, prepared_table, root
from open_r1.configs import ScriptArguments
from open_r1.data import load_sources
from open_r1.errors import UserError
from open_r1.sft import main


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
