"""Sources: what can be named, what formats are known, and one clear error for everything else."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard
from conftest import write_jsonl
from datasets import Dataset, DatasetDict

from open_r1.configs import ScriptArguments
from open_r1.data import load_sources, load_table
from open_r1.errors import UserError
from open_r1.formats import row_function

ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(7)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def contents(table):
    return [row["messages"][1]["content"] for row in table]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
    ],
)
def test_json_files_plain_and_compressed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert contents(load_table(str(tmp_path / name), None, "train")) == [f"a{n}" for n in range(7)]


def test_parquet_csv_globs_and_directories(tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "1.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "d" / "2.jsonl", ROWS[3:])
    assert contents(load_table(str(tmp_path / "d"), None, "train")) == [f"a{n}" for n in range(7)]
    assert contents(load_table(str(tmp_path / "d" / "*.jsonl"), None, "train")) == [f"a{n}" for n in range(7)]
    Dataset.from_list(ROWS).to_parquet(tmp_path / "p.parquet")
    assert contents(load_table(str(tmp_path / "p.parquet"), None, "train[2:4]")) == ["a2", "a3"]
    (tmp_path / "c.csv").write_text("prompt,completion\none,1\ntwo,NA\n")
    assert load_table(str(tmp_path / "c.csv"), None, "train")["completion"][:] == ["1", "NA"]


def test_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), val=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "two")
    assert len(load_table(str(tmp_path / "one"), None, "train")) == 7
    assert len(load_table(str(tmp_path / "two"), None, "val")) == 2
    with pytest.raises(UserError, match="two: no split test; it has train, val"):
        load_table(str(tmp_path / "two"), None, "test")


UNREADABLE = {
    "empty.jsonl": (b"", r"empty\.jsonl: this file is empty"),
    "blank.jsonl": (b"\n\n", "holds no rows"),
    "broken.jsonl": (LINES[:200] + b'{"messages": [\n' + LINES, r"broken\.jsonl:\d+: not valid JSON: "),
    "listed.jsonl": (LINES + b"[1]\n", r"listed\.jsonl:8: a line of JSONL is an object; found '\[1\]"),
    "bytes.jsonl": (LINES + b'{"messages": "\xff"}\n', r"bytes\.jsonl:8: not valid JSON: "),
    "half.jsonl.gz": (gzip.compress(LINES * 99)[:-20], r"half\.jsonl\.gz: cannot be read: "),
    "half.parquet": (b"PAR1", "half.parquet:train: cannot be loaded: "),
    "notes.txt": (b"text", r"notes\.txt: unknown kind of data file; known are \.jsonl"),
}


@pytest.mark.parametrize(("name", "case"), UNREADABLE.items())
def test_an_unreadable_file_is_named_with_its_line(tmp_path, name, case):
    data, message = case
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_table(str(tmp_path / name), None, "train")


def test_the_broken_line_is_the_one_named(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    lines[4] = lines[4][:-1]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl:5: not valid JSON"):
        load_table(str(tmp_path / "x.jsonl"), None, "train")


@pytest.mark.parametrize("name", ["/no/where.jsonl", "./here", "data.jsonl", "some/where/else", "no/*.jsonl"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(UserError, match="no such file or directory"):
        load_table(name, None, "train")


def test_a_split_that_is_not_there(chat_file):
    with pytest.raises(UserError, match="no split train_sft; it has 'train'"):
        load_table(chat_file, None, "train_sft")


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FORMATS = {
    "messages": ({"messages": CHAT, "id": 3}, {"messages": CHAT}),
    "tools": ({"messages": CHAT, "tools": "[]"}, {"messages": CHAT, "tools": []}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": CHAT},
    ),
    "conversations by role": ({"conversations": CHAT}, {"messages": CHAT}),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    "prompt, completion as messages": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ),
    "text": ({"text": "t"}, {"text": "t"}),
    "tokens": ({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}),
    "tokens, masks": (
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]},
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
    ),
    "sharegpt with a system column": (
        {"conversations": CHAT, "system": "Be kind."},
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
    ),
    "nulls that columns fill in": (
        {"messages": CHAT, "tools": [{"name": "f", "x": None}], "chat_template_kwargs": {"a": None, "b": 1}},
        {"messages": CHAT, "tools": [{"name": "f"}], "chat_template_kwargs": {"b": 1}},
    ),
    "tokens, labels": (
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ),
}


@pytest.mark.parametrize(("raw", "expected"), FORMATS.values(), ids=FORMATS)
def test_formats(raw, expected):
    assert row_function(list(raw), "s")(raw) == expected


def test_text_field_can_be_named():
    assert row_function(["body"], "s", text_field="body")({"body": "t"}) == {"text": "t"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question", "answer"], "s: no known format in its columns question, answer; known are messages"),
        (["messages", "text"], r"s: its columns messages, text hold several formats \(messages; text\); say which"),
        (["messages", "image"], "s: column image holds images"),
    ],
)
def test_columns_that_say_nothing_or_too_much(columns, message):
    with pytest.raises(UserError, match=message):
        row_function(columns, "s")


BAD = {
    "null messages": ({"messages": None}, "messages must be a list with at least one message; found None"),
    "no messages": ({"messages": []}, "messages must be a list with at least one message"),
    "messages as text": ({"messages": "hello"}, "messages must be a list"),
    "a null message": ({"messages": [None]}, "message 0 must hold role and content; found None"),
    "no role": ({"messages": [{"content": "x"}]}, "message 0 has no role"),
    "null content": ({"messages": [*CHAT, {"role": "user", "content": None}]}, r"message 2 \(user\) has no content"),
    "image parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content in parts"),
    "null text": ({"text": None}, "text must be a text; found None"),
    "null completion": ({"prompt": "p", "completion": None}, "prompt and completion are both text or both messages"),
    "empty completion": ({"prompt": "p", "completion": ""}, "completion is empty"),
    "tools that are no JSON": ({"messages": CHAT, "tools": "[{"}, "tools is not valid JSON"),
    "a template in the data": ({"messages": CHAT, "chat_template_kwargs": {"template": "x"}}, "must hold arguments"),
    "ids as text": ({"input_ids": ["a", "b"]}, "of one length; input_ids is"),
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, "of one length; labels is"),
}


@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=BAD)
def test_bad_rows_say_what_is_wrong(raw, message):
    with pytest.raises(ValueError, match=message):
        row_function(list(raw), "s")(raw)


def test_an_assistant_message_may_be_tool_calls_alone():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert "content" not in row_function(["messages"], "s")({"messages": [call]})["messages"][0]


def mixture(*sources, **more):
    return ScriptArguments(dataset_mixture={"datasets": list(sources), **more})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "neither"),
        ({"dataset_name": "a", "dataset_mixture": {"datasets": [{"id": "a"}]}}, "both"),
        ({"dataset_mixture": {"datasets": []}}, "datasets is empty"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": 0}]}}, "a: weight must be a number above 0, found 0"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": -1}]}}, "a: weight must be a number above 0"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": "x"}]}}, "a: weight must be a number above 0"),
        ({"dataset_mixture": {"datasets": [{"id": ""}]}}, "a source needs an id"),
        (
            {
                "dataset_mixture": {
                    "datasets": [{"id": "a", "columns": ["messages"]}, {"id": "b", "columns": ["text"]}]
                }
            },
            "b keeps columns",
        ),
    ],
)
def test_script_arguments_refuse_what_cannot_be_meant(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScriptArguments(**kwargs)


def test_sources_of_different_formats_are_refused_by_name(tmp_path, chat_file):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}])
    with pytest.raises(UserError, match=r"text\.jsonl:train: its columns text cannot be brought together"):
        load_sources(mixture({"id": chat_file}, {"id": text}))


def test_a_column_that_is_not_there(chat_file):
    with pytest.raises(UserError, match="no column extra; its columns are messages"):
        load_sources(mixture({"id": chat_file, "columns": ["messages", "extra"]}))


class TestEvaluationData:
    def test_a_second_file(self, chat_file, tmp_path):
        other = write_jsonl(tmp_path / "eval.jsonl", ROWS)
        _, held_out = load_sources(ScriptArguments(dataset_name=chat_file, eval_dataset_name=other), evaluate=True)
        assert contents(held_out[0].rows) == [f"a{n}" for n in range(7)]

    def test_a_named_split(self, tmp_path):
        DatasetDict(train=Dataset.from_list(ROWS), dev=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "saved")
        args = ScriptArguments(dataset_name=str(tmp_path / "saved"), dataset_test_split="dev")
        assert len(load_sources(args, evaluate=True)[1][0].rows) == 2
        args = mixture({"id": str(tmp_path / "saved"), "test_split": "dev"})
        assert len(load_sources(args, evaluate=True)[1][0].rows) == 2

    def test_none_is_loaded_unless_asked_for(self, chat_file):
        assert load_sources(ScriptArguments(dataset_name=chat_file))[1] == []

    def test_asked_for_and_absent(self, chat_file):
        with pytest.raises(UserError, match="evaluation is asked for: .*no split test.*set dataset_test_split"):
            load_sources(ScriptArguments(dataset_name=chat_file), evaluate=True)
        with pytest.raises(UserError, match="the mixture has no evaluation data: set dataset_mixture.test_split_size"):
            load_sources(mixture({"id": chat_file}), evaluate=True)

    def test_given_twice(self, chat_file):
        args = ScriptArguments(dataset_name=chat_file, eval_dataset_name=chat_file, test_split_size=0.1)
        with pytest.raises(UserError, match="given twice"):
            load_sources(args, evaluate=True)
