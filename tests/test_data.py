"""Sources: what can be named, what formats are known, and one clear error for everything else."""

import bz2
import gzip
import json
import lzma
import re

import datasets
import pytest
import zstandard
from conftest import write_jsonl
from datasets import Dataset, DatasetDict

from open_r1.configs import ScriptArguments
from open_r1.data import load_sources, places_of
from open_r1.errors import UserError
from open_r1.formats import prompt_id, row_function
from open_r1.records import row_of
from open_r1.tables import load_table

ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(7)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_in(table):
    return [row_of(row) if table.files else row for row in table.rows]


def contents(table):
    return [row["messages"][1]["content"] for row in rows_in(table)]


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
    assert [row["completion"] for row in rows_in(load_table(str(tmp_path / "c.csv"), None, "train"))] == ["1", "NA"]


def test_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), val=Dataset.from_list(ROWS[:2])).save_to_disk(tmp_path / "two")
    assert len(load_table(str(tmp_path / "one"), None, "train").rows) == 7
    assert len(load_table(str(tmp_path / "two"), None, "val").rows) == 2
    assert contents(load_table(str(tmp_path / "two"), None, "train[5:]+val[:1]")) == ["a5", "a6", "a0"]
    with pytest.raises(UserError, match="two:test: no split test; it has train, val"):
        load_table(str(tmp_path / "two"), None, "test")


UNREADABLE = {
    "empty.jsonl": (b"", r"empty\.jsonl: this file is empty"),
    "blank.jsonl": (b"\n\n", "holds no rows"),
    "broken.jsonl": (b'{"messages": [\n' * 3, r"broken\.jsonl:4: not valid JSON: Expecting value$"),
    "half.jsonl.gz": (gzip.compress(LINES * 99)[:-20], r"half\.jsonl\.gz: cannot be read: "),
    "half.parquet": (b"PAR1", "half.parquet:train: cannot be loaded: "),
    "notes.txt": (b"text", r"notes\.txt: unknown kind of data file; known are \.jsonl"),
}


@pytest.mark.parametrize(("name", "case"), UNREADABLE.items())
def test_an_unreadable_file_is_named(tmp_path, name, case):
    data, message = case
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_table(str(tmp_path / name), None, "train")


def test_broken_lines_at_the_top_are_their_rows_faults(tmp_path):
    lines = [b"oops", b'{"messages": [', b"[1]", *LINES.splitlines()]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    (source,), _ = load_sources(ScriptArguments(dataset_name=str(tmp_path / "x.jsonl")))
    for number in range(3):
        with pytest.raises(ValueError, match="not valid JSON|is an object"):
            source.to_row(source.rows[number])
    assert [source.to_row(source.rows[number]) for number in range(3, 10)] == ROWS


def test_a_kind_of_file_is_no_dataset():
    with pytest.raises(UserError, match="json is a kind of file: name files of it in data_files"):
        load_table("json", None, "train")


def test_files_that_are_in_no_split_are_named(tmp_path, caplog):
    for name in ("train", "test", "extra"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    assert len(load_table(str(tmp_path), None, "train").rows) == 7
    assert re.search(r"in no split, by their names, and not read: \S*extra.jsonl", caplog.text)


def test_what_was_saved_with_a_format_is_read_without(tmp_path):
    Dataset.from_list([{"input_ids": [1, 2]}]).with_format("torch").save_to_disk(tmp_path / "d")
    (source,), _ = load_sources(ScriptArguments(dataset_name=str(tmp_path / "d")))
    assert source.to_row(source.rows[0]) == {"input_ids": [1, 2], "labels": [1, 2]}


BROKEN = {
    "cut off": (json.dumps(ROWS[4])[:-1].encode(), "not valid JSON: Expecting ',' delimiter at column"),
    "a list": (b"[1]", r"a row of JSON is an object; found \[1\]"),
    "bytes": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff; convert the file"),
    "a key twice": (b'{"messages": [], "messages": []}', "the key 'messages' is there twice; remove one"),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_broken_line_is_the_fault_of_its_row(tmp_path, line, message, at):
    lines = LINES.splitlines()
    lines.insert(at, line)
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (source,), _ = load_sources(ScriptArguments(dataset_name=str(tmp_path / "x.jsonl")))
    for number, row in enumerate(source.rows):
        if number == at:
            with pytest.raises(ValueError, match=message):
                source.to_row(row)
        else:
            assert source.to_row(row) == ROWS[number - (number > at)]
    assert places_of(source, [at])[0].endswith(f"x.jsonl:{at + 1}")


@pytest.mark.parametrize("name", ["/no/where.jsonl", "./here", "data.jsonl", "some/where/else", "no/*.jsonl"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(UserError, match="no such file or directory"):
        load_table(name, None, "train")


def test_a_split_that_is_not_there(chat_file):
    with pytest.raises(UserError, match="chat.jsonl:train_sft: no split train_sft; it has train"):
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
    "nulls that somebody wrote": (
        {"messages": CHAT, "tools": [{"name": "f", "x": None}], "chat_template_kwargs": {"a": None, "b": 1}},
        {"messages": CHAT, "tools": [{"name": "f", "x": None}], "chat_template_kwargs": {"a": None, "b": 1}},
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
        (["ask", "say"], r"s: no known format in its columns ask, say; known are messages.*mapping: \{prompt: ask"),
        (["messages", "text"], r"s: its columns messages, text hold several formats \(messages; text\); say which"),
        (["messages", "image"], "s: column image holds images"),
    ],
)
def test_columns_that_say_nothing_or_too_much(columns, message):
    with pytest.raises(UserError, match=message):
        row_function(columns, "s")


SAID = {"messages": CHAT}
MAPPED = {
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, None, SAID),
    "alpaca with input": (
        {"instruction": "q", "input": "more", "output": "a", "text": None},
        {"prompt": "instruction", "query": "input", "response": "output"},
        {"messages": [{"role": "user", "content": "q\nmore"}, CHAT[1]]},
    ),
    "with a system prompt and history": (
        {"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["q0", "a0"]]},
        None,
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q0"},
                {"role": "assistant", "content": "a0"},
                *CHAT,
            ]
        },
    ),
    "problem and solution": ({"problem": "q", "solution": "a", "level": 3}, None, SAID),
    "question and answer": ({"question": "q", "answer": "a"}, None, SAID),
    "nested": (
        {"meta": {"ask": ["x", "q"]}, "answers": [{"text": "a"}]},
        {"prompt": "meta.ask.1", "response": "answers.0.text"},
        SAID,
    ),
    "other names": (
        {"frage": "q", "antwort": "a"},
        {"prompt": "frage", "completion": "antwort"},
        {"prompt": "q", "completion": "a"},
    ),
    "messages elsewhere": (
        {"talk": {"turns": CHAT}, "rules": "s", "t": '[{"a": 1}]'},
        {"messages": "talk.turns", "system": "rules", "tools": "t"},
        {"messages": [{"role": "system", "content": "s"}, *CHAT], "tools": [{"a": 1}]},
    ),
    "text elsewhere": ({"body": "t", "text": "other"}, {"text": "body"}, {"text": "t"}),
    "a turn that is not trained": (
        {"messages": [CHAT[0], {**CHAT[1], "train": False}, CHAT[0], {**CHAT[1], "weight": 1}]},
        None,
        {"messages": CHAT * 2, "untrained": [1]},
    ),
    "a turn of no weight": ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, None, {**SAID, "untrained": [1]}),
}


@pytest.mark.parametrize(("raw", "mapping", "expected"), MAPPED.values(), ids=MAPPED)
def test_flat_tables_become_conversations(raw, mapping, expected):
    assert row_function(list(raw), "s", mapping=mapping)(raw) == expected


def test_the_shape_that_was_recognised_is_logged(caplog):
    caplog.set_level("INFO", "open_r1")
    row_function(["instruction", "input", "output"], "mine")
    assert (
        "mine: read as instruction data: mapping: {prompt: instruction, response: output, query: input}" in caplog.text
    )


def test_a_table_that_could_be_two_things_is_shown_what_to_write():
    with pytest.raises(UserError) as caught:
        row_function(["question", "answer", "problem", "solution"], "s")
    assert "hold several formats (question+answer; problem+solution)" in str(caught.value)
    assert "mapping: {prompt: question, response: answer}" in str(caught.value)
    with pytest.raises(UserError, match=r"its mapping names ask; its columns are question, answer"):
        row_function(["question", "answer"], "s", mapping={"prompt": "ask", "response": "answer"})


def test_data_files_samples_and_names(tmp_path):
    for name, rows in (("1.json", ROWS[:3]), ("2.json", ROWS[3:])):
        (tmp_path / name).write_text(json.dumps(rows))
    files = [str(tmp_path / "1.json"), str(tmp_path / "2.js*")]
    for values in ({"dataset_data_files": files}, {"dataset_name": "json", "dataset_data_files": files}):
        (source,), _ = load_sources(ScriptArguments(**values, dataset_max_samples=5))
        assert contents(source.table) == [f"a{n}" for n in range(5)]
    with pytest.raises(UserError, match="3.json: no such file"):
        load_sources(ScriptArguments(dataset_data_files=[*files, str(tmp_path / "3.json")]))
    with pytest.raises(UserError, match="revision .*'abc'.* belongs to a hub dataset"):
        load_sources(ScriptArguments(dataset_name=files[0], dataset_revision="abc"))


def test_a_hub_dataset_is_pinned_by_its_revision(tmp_path, monkeypatch):
    asked = {}
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
    here = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))

    def builder(name, config, **named):
        asked.update(named, name=name, config=config)
        here.config.data_files = {"train": [f"hf://datasets/{name}@{named['revision']}/train.parquet"]}
        return here

    here.download_and_prepare()
    monkeypatch.setattr(here, "download_and_prepare", lambda: None)
    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    commit = "0123456789abcdef" * 2 + "01234567"
    arguments = ScriptArguments(dataset_name="some/data", dataset_revision=commit, dataset_data_files=["x.parquet"])
    (source,), _ = load_sources(arguments)
    assert asked == {"name": "some/data", "config": None, "revision": commit, "data_files": ["x.parquet"]}
    assert list(source.table.contents) == [f"hf://datasets/some/data@{commit}"]
    assert contents(source.table) == [f"a{n}" for n in range(7)]


def test_rows_are_found_in_their_files(tmp_path):
    (tmp_path / "1.jsonl").write_text("\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]) + "\n")
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(LINES))
    (source,), _ = load_sources(
        ScriptArguments(dataset_data_files=[str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl.gz")])
    )
    places = [place.rpartition(", ")[2].rpartition("/")[2] for place in places_of(source, [0, 1, 2, 5])]
    assert places == ["1.jsonl:2", "1.jsonl:4", "2.jsonl.gz:1", "2.jsonl.gz:4"]


BAD = {
    "null messages": ({"messages": None}, "messages must be a list with at least one message; found None"),
    "no messages": ({"messages": []}, "messages must be a list with at least one message"),
    "messages as text": ({"messages": "hello"}, "messages must be a list"),
    "a null message": ({"messages": [None]}, "message 0 must hold role and content; found None"),
    "no role": ({"messages": [{"content": "x"}]}, "message 0 has no role"),
    "null content": ({"messages": [*CHAT, {"role": "user", "content": None}]}, r"message 2 \(user\) has no content"),
    "image parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content in parts"),
    "null text": ({"text": None}, "text must be a text with something in it; found None"),
    "null completion": ({"prompt": "p", "completion": None}, "prompt and completion are both text or both messages"),
    "empty completion": ({"prompt": "p", "completion": ""}, "completion is empty"),
    "tools that are no JSON": ({"messages": CHAT, "tools": "[{"}, "tools is text that is not valid JSON"),
    "a template in the data": ({"messages": CHAT, "chat_template_kwargs": {"template": "x"}}, "must hold arguments"),
    "ids as text": ({"input_ids": ["a", "b"]}, "of one length; input_ids is"),
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, "of one length; labels is"),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "has the role 'narrator'; known are"),
    "a role that is a number": ({"messages": [{"role": 3, "content": "x"}]}, "message 0 has no role"),
    "an empty answer": ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, r"1 \(assistant\) is empty"),
    "an empty question": ({"messages": [{"role": "user", "content": ""}, CHAT[1]]}, r"message 0 \(user\) is empty"),
    "two answers in a row": ({"messages": [*CHAT, CHAT[1]]}, "messages 1 and 2 are both the assistant's"),
    "a tool nobody called": (
        {"messages": [CHAT[0], {"role": "tool", "content": "1"}]},
        "message before it calls none",
    ),
    "a late system message": ({"messages": [*CHAT, {"role": "system", "content": "x"}]}, "it stands first"),
    "calls that are none": ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": "f()"}]}, "no list of calls"),
    "NUL": (
        {"messages": [CHAT[0], {"role": "assistant", "content": "a\0b"}]},
        "control character NUL at 1; found 'a.x00b'",
    ),
    "half a character": ({"text": "a\ud83d"}, "text holds half a character at 1"),
    "train that is no yes or no": ({"messages": [CHAT[0], {**CHAT[1], "train": "no"}]}, "train is true or false"),
    "half a weight": ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "weight 0 or 1"),
}


@pytest.mark.parametrize(("raw", "message"), BAD.values(), ids=BAD)
def test_bad_rows_say_what_is_wrong(raw, message):
    with pytest.raises(ValueError, match=message):
        row_function(list(raw), "s")(raw)


def test_an_assistant_message_may_be_tool_calls_alone():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert "content" not in row_function(["messages"], "s")({"messages": [CHAT[0], call]})["messages"][1]


def mixture(*sources, **more):
    return ScriptArguments(dataset_mixture={"datasets": list(sources), **more})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "neither"),
        (
            {"dataset_name": "a", "dataset_mixture": {"datasets": [{"id": "a"}]}},
            "found dataset_mixture and dataset_name",
        ),
        ({"dataset_columns": ["text"]}, "dataset_columns say nothing without dataset_name"),
        (
            {"dataset_name": "a", "dataset_mapping": {"prompt": "q"}},
            "a column mapping names messages, or .* found prompt",
        ),
        ({"dataset_mixture": {"datasets": []}}, "datasets is empty"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": 0}]}}, "a: weight must be a number above 0, found 0"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": -1}]}}, "a: weight must be a number above 0"),
        ({"dataset_mixture": {"datasets": [{"id": "a", "weight": "x"}]}}, "a: weight must be a number above 0"),
        ({"dataset_mixture": {"datasets": [{"id": ""}]}}, "a source needs an id"),
        (
            {"dataset_mixture": {"datasets": [{"id": "a", "mapping": {}}]}},
            "a: a column mapping names .* found nothing",
        ),
    ],
)
def test_script_arguments_refuse_what_cannot_be_meant(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScriptArguments(**kwargs)


def test_sources_of_different_formats_stand_side_by_side(tmp_path, chat_file):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}])
    sources, _ = load_sources(mixture({"id": chat_file}, {"id": text, "name": "plain"}, {"id": text}, {"id": text}))
    assert [source.name.rpartition("/")[2] for source in sources] == [
        "chat.jsonl:train",
        "plain",
        "text.jsonl:train #1",
        "text.jsonl:train #2",
    ]
    assert [set(source.to_row(source.rows[0])) for source in sources] == [{"messages"}, *[{"text"}] * 3]


def test_a_column_that_is_not_there(chat_file):
    with pytest.raises(UserError, match="no column extra; its columns are messages"):
        load_sources(mixture({"id": chat_file, "columns": ["messages", "extra"]}))


class TestEvaluationData:
    def test_a_second_file(self, chat_file, tmp_path):
        other = write_jsonl(tmp_path / "eval.jsonl", ROWS)
        _, held_out = load_sources(ScriptArguments(dataset_name=chat_file, eval_dataset_name=other), evaluate=True)
        assert contents(held_out[0].table) == [f"a{n}" for n in range(7)]

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


def talk(*turns, system=None):
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": before + [{"role": role, "content": text} for role, text in turns]}


def test_what_a_row_asks():
    long = talk(("user", "How do I sort a list?"), ("assistant", "a"), ("user", "And backwards?"), ("assistant", "b"))
    assert prompt_id(long) == prompt_id(talk(("user", "How do I  sort a list?"), ("assistant", "other")))
    hello = [("user", "Hi"), ("assistant", "Hello!")]
    assert prompt_id(talk(*hello, ("user", "one"))) != prompt_id(talk(*hello, ("user", "two")))
    assert prompt_id(talk(("user", "Begin."), system="one")) != prompt_id(talk(("user", "Begin."), system="two"))
    tokens = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    assert prompt_id(tokens) == prompt_id({"input_ids": [1, 2, 9], "labels": [-100, -100, 9]})
    assert prompt_id(tokens) != prompt_id({"input_ids": [1, 3, 3, 4], "labels": [-100, -100, 3, 4]})
