"""The copy without rows that evaluation sets give away: what goes, what stays, and what is said about it."""

import json

import decontaminate
import pytest
from conftest import write_jsonl
from datasets import Dataset, load_dataset

from open_r1.configs import ScriptArguments
from open_r1.data import load_sources

PROBLEM = "Find the number of positive integers n less than 1000 such that n divides 2024."
OTHER = "A train leaves the station at noon and travels north at sixty miles an hour until it stops."
SHORT = "What is 2 + 2?"


def talk(question, answer="It is four.", system=None):
    before = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "id": question[:9],
    }


ROWS = {
    "nothing shared": (talk("Name a prime number greater than ten, please, and say why it is."), []),
    "the problem": (talk(PROBLEM), ["eval.jsonl:question"]),
    "in other case, punctuation and spacing": (
        talk("find the number\nof  POSITIVE integers, $n$ less than $1000$ such..."),
        ["eval.jsonl:question"],
    ),
    "in the answer": (talk("Go on.", f"We are asked: {PROBLEM}"), ["eval.jsonl:question"]),
    "in the system message": (talk("Go on.", "No.", system=PROBLEM), []),
    "seven words of it": (talk("Find the number of positive integers n"), []),
    "eight words of it": (talk("Find the number of positive integers n less"), ["eval.jsonl:question"]),
    "a short problem as a whole": (talk("what is 2+2"), ["other.csv:q"]),
    "a short problem in a longer text": (talk("Tell me, what is 2 + 2?"), []),
    "in what a tool is called with": (
        {
            "messages": [
                {"role": "user", "content": "Solve it."},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"problem": PROBLEM}}}]},
            ]
        },
        ["eval.jsonl:question"],
    ),
    "no words": (talk("!!!", "\U0001f44d"), []),
    "both sets": (talk(PROBLEM, OTHER), ["eval.jsonl:question", "other.csv:q"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "eval.jsonl", [{"question": PROBLEM, "answer": 1}])
    (tmp_path / "other.csv").write_text(f"q,a\n{OTHER},1\n{SHORT},4\n?!,5\n")
    return tmp_path


AGAINST = ["--against", "eval.jsonl:question", "other.csv:q", "--out", "clean"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("processes", [[], ["--num_proc", "2"]], ids=["one", "two"])
def test_rows_that_share_words_go_and_all_others_stay_as_they_are(here, capsys, processes):
    write_jsonl(here / "data.jsonl", [row for row, _ in ROWS.values()])
    before = (here / "data.jsonl").read_text().splitlines()
    assert decontaminate.main([*AGAINST, *processes, "--dataset_name", "data.jsonl"]) == 0
    (copy,) = (here / "clean").glob("0-*.jsonl")
    kept = [number for number, (_, sets) in enumerate(ROWS.values()) if not sets]
    assert copy.read_text().splitlines() == [before[number] for number in kept]
    removed = lines(here / "clean" / "removed.jsonl")
    assert [(row["place"].rpartition(":")[2], row["sets"]) for row in removed] == [
        (str(number + 1), sets) for number, (_, sets) in enumerate(ROWS.values()) if sets
    ]
    assert {row["shared"] for row in removed[:2]} <= {
        "find the number of positive integers n less",
        *decontaminate.grams_of(PROBLEM, 8),
    }
    said = capsys.readouterr().err
    assert f"data.jsonl:train: {len(kept)} of {len(ROWS)} rows kept" in said
    assert "eval.jsonl:question: 6 rows removed" in said
    assert "other.csv:q: 2 rows removed" in said


def test_the_number_of_words_can_be_chosen(here):
    write_jsonl(here / "data.jsonl", [ROWS["seven words of it"][0], ROWS["nothing shared"][0]])
    assert decontaminate.main([*AGAINST, "--ngram", "7", "--dataset_name", "data.jsonl"]) == 0
    assert [row["shared"] for row in lines(here / "clean" / "removed.jsonl")] == [
        "find the number of positive integers n"
    ]


def test_every_source_of_a_recipe_in_its_own_kind(here):
    rows = [row for row, _ in ROWS.values()]
    asked = [row["messages"][-2]["content"] for row in rows]
    Dataset.from_list([{"frage": question, "antwort": "a"} for question in asked]).to_parquet("p.parquet")
    write_jsonl(here / "bad.jsonl", [{"text": None}, {"text": PROBLEM}, {"text": "free"}])
    (here / "recipe.yaml").write_text(
        "model_name_or_path: some/model\n"
        "dataset_mixture:\n"
        "  datasets:\n"
        "    - {id: p.parquet, mapping: {prompt: frage, response: antwort}}\n"
        "    - {id: bad.jsonl}\n"
    )
    assert decontaminate.main([*AGAINST, "--config", "recipe.yaml"]) == 0
    (parquet,) = (here / "clean").glob("0-*.parquet")
    table = load_dataset("parquet", data_files=str(parquet), split="train", cache_dir=str(here / "cache"))
    assert table["frage"][:] == [asked[number] for number in (0, 3, 4, 5, 8, 9, 10)]
    (text,) = (here / "clean").glob("1-*.jsonl")
    assert lines(text) == [{"text": None}, {"text": "free"}]  # what cannot be read is not lost here
    (source,), _ = load_sources(ScriptArguments(dataset_name=str(text)))
    assert len(source.rows) == 2


def test_a_set_is_what_its_rows_ask_when_no_column_is_named(here):
    write_jsonl(here / "asks.jsonl", [talk(PROBLEM, OTHER)])
    write_jsonl(here / "data.jsonl", [talk(PROBLEM), talk("Go on.", OTHER)])
    assert decontaminate.main(["--against", "asks.jsonl", "--out", "clean", "--dataset_name", "data.jsonl"]) == 0
    assert [row["place"].rpartition(":")[2] for row in lines(here / "clean" / "removed.jsonl")] == ["1"]


REFUSED = {
    "no such set": (["--against", "nothing.jsonl:q"], "nothing.jsonl"),
    "no such column": (["--against", "eval.jsonl:problem"], "its mapping names problem; its columns are question"),
    "a column of numbers": (["--against", "eval.jsonl:answer"], "eval.jsonl:1: answer must be a text"),
    "no known format": (["--against", "eval.jsonl:question", "nums.csv"], "no known format in its columns x, y"),
    "tokens": (["--against", "eval.jsonl:question", "--dataset_name", "ids.jsonl"], "hold no text to compare"),
    "a directory that is there": (["--against", "eval.jsonl:question", "--out", "."], "exists already"),
    "no process": (["--against", "eval.jsonl:question", "--num_proc", "0"], "a number of processes, 1 or more"),
    "a set of two broken halves": (["--against", "halves:question"], "test.jsonl:1: not valid JSON"),
    "no words": (["--against", "eval.jsonl:question", "--ngram", "0"], "a number of words, 1 or more"),
    "no data": (["--against", "eval.jsonl:question", "--dataset_name", "none.jsonl"], "no such file"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_said_before_anything_is_written(here, capsys, argv, message):
    write_jsonl(here / "data.jsonl", [talk(PROBLEM)])
    write_jsonl(here / "ids.jsonl", [{"input_ids": [1, 2]}])
    (here / "nums.csv").write_text("x,y\n1,2\n")
    (here / "halves").mkdir()
    write_jsonl(here / "halves" / "train.jsonl", [{"question": PROBLEM}])
    (here / "halves" / "test.jsonl").write_text("{")
    defaults = {"--out": "clean", "--dataset_name": "data.jsonl"}
    argv = [*argv, *(item for pair in defaults.items() if pair[0] not in argv for item in pair)]
    assert decontaminate.main(argv) == 2
    assert message in capsys.readouterr().err
    assert "--out" in argv[:3] or not list(here.glob("clean*"))
