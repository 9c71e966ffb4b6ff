"""Five sources of five formats in one mixture; what is dropped, repeated or asked twice is counted and named."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARES, losses, settings, write_jsonl

from open_r1.chat import get_tokenizer
from open_r1.errors import UserError
from open_r1.preparation import prepare
from open_r1.recipe import load_recipe
from open_r1.sft import build_configs, main


@pytest.fixture
def argv(tiny_model, five, tmp_path):
    def argv(shares=SHARES, **mixture):
        sources = [{**source, "proportion": share} for source, share in zip(five, shares, strict=True)]
        more = {key: mixture.pop(key) for key in ("packing", "eval_strategy", "max_length") if key in mixture}
        return settings(
            **{"model_name_or_path": tiny_model, "output_dir": tmp_path / "run", "max_length": 512, **more},
            dataset_mixture={"datasets": sources, **mixture},
        )

    return argv


def prepared(argv):
    script_args, args, model_args = build_configs(load_recipe(argv))
    tokenizer = get_tokenizer(model_args, args)
    return prepare(script_args, args, tokenizer), tokenizer


def ids(part):
    return [(row["source"], row["row"]) for row in part.unpacked]


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_five_sources_of_five_formats_in_proportion(argv, stopping):
    data, tokenizer = prepared(argv(stopping_strategy=stopping))
    part = data.train
    supervised = np.zeros(5)
    for row in part.unpacked:
        supervised[row["source"]] += sum(label != -100 for label in row["labels"][1:])
    assert np.abs(supervised / supervised.sum() - SHARES).max() < 0.01
    for number, entry in enumerate(part.ledger["sources"]):
        mine = [row for row in part.unpacked if row["source"] == number]
        assert (entry["trained"], entry["supervised"]) == (len(mine), supervised[number])
        assert entry["tokens"] == sum(len(row["input_ids"]) for row in mine)
        assert entry["requested_share"] == SHARES[number]
        ((file, digest),) = entry["contents"].items()
        assert digest == hashlib.sha256(Path(file).read_bytes()).hexdigest()
        assert entry["achieved_share"] == pytest.approx(supervised[number] / supervised.sum(), abs=1e-4)
    texts = [tokenizer.decode(next(r for r in part.unpacked if r["source"] == n)["input_ids"]) for n in range(5)]
    assert texts[0].startswith("<|im_start|>user\nWhat") and texts[1].startswith("<|im_start|>system\nBe kind.")
    assert texts[2].startswith("<|im_start|>user\n") and texts[3].startswith("What") and "<|im_start|>" not in texts[4]
    assert any("\nbriefly<|im_end|>" in tokenizer.decode(r["input_ids"]) for r in part.unpacked if r["source"] == 0)


def test_the_order_follows_from_the_seed_alone(argv):
    orders = [ids(prepared(argv(seed=seed))[0].train) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


def test_proportions_of_rows(argv):
    part = prepared(argv(proportion_unit="rows"))[0].train
    counts = np.bincount([source for source, _ in ids(part)])
    assert np.abs(counts / counts.sum() - SHARES).max() < 0.01
    assert [entry["achieved_share"] for entry in part.ledger["sources"]] == pytest.approx(
        counts / counts.sum(), abs=1e-4
    )


def shares_of(part, count=2):
    supervised = np.zeros(count)
    for row in part.unpacked:
        supervised[row["source"]] += sum(label != -100 for label in row["labels"][1:])
    return supervised / supervised.sum()


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
class TestProportionsOfWhatIsLeft:
    @pytest.fixture
    def values(self, tiny_model, tmp_path, conversations):
        twice = write_jsonl(tmp_path / "twice.jsonl", [row for row in conversations[:100] for _ in "12"])
        once = write_jsonl(tmp_path / "once.jsonl", conversations[100:500])

        def values(shares, stopping, **mixture):
            sources = [{"id": name, "proportion": n} for name, n in zip((twice, once), shares, strict=True)]
            return {
                "model_name_or_path": tiny_model,
                "dataset_mixture": {"datasets": sources, "stopping_strategy": stopping, **mixture},
                "output_dir": tmp_path / "run",
                "max_length": 512,
                "do_eval": True,
            }

        return values

    def test_duplicates_do_not_count(self, values, stopping, tmp_path, conversations):
        other = write_jsonl(tmp_path / "eval.jsonl", conversations[100:150])
        argv = settings(**values((0.5, 0.5), stopping), eval_dataset_name=other, dedup=True)
        part = prepared(argv)[0].train
        assert np.abs(shares_of(part) - 0.5).max() < 0.01
        assert part.ledger["asked_in_eval"] == 0

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_nor_does_what_is_held_out(self, values, stopping, seed):
        part = prepared(settings(**values((0.7, 0.3), stopping, test_split_size=0.1, seed=seed)))[0].train
        assert np.abs(shares_of(part) - (0.7, 0.3)).max() < 0.01

    def test_one_that_cannot_be_reached_is_said(self, values, stopping, tmp_path, conversations, capsys):
        few = write_jsonl(tmp_path / "few.jsonl", conversations[:1])
        argv = values((0.5, 0.5), "first_exhausted")
        argv["dataset_mixture"]["datasets"][0]["id"] = few
        argv["dataset_mixture"]["datasets"][1]["max_samples"] = 2
        assert main(settings(**{**argv, "do_eval": False}, dry_run=True)) == 0
        assert "a proportion of 50.0% is asked and " in capsys.readouterr().err


def test_the_mixture_trains(argv, tmp_path):
    assert main(argv(packing=True, eval_strategy="steps", test_split_size=0.1)) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert losses(tmp_path / "run", "eval_loss")


BAD = [{"role": "user", "content": "\x1b[31m"}, {"role": "assistant", "content": ""}]


class TestBadRows:
    @pytest.fixture
    def run(self, tiny_model, tmp_path, conversations):
        rows = [{"messages": BAD}, *conversations[:20], {"messages": None}, {"messages": BAD}]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)

        def run(**values):
            values = {"on_bad_row": "drop", "output_dir": tmp_path / "run", "dataset_name": path, **values}
            return main(settings(model_name_or_path=tiny_model, **values))

        return run

    def test_they_are_kept_in_a_file_that_says_where_and_why(self, run, tmp_path):
        assert run() == 0
        text = (tmp_path / "run" / "rejected.jsonl").read_text()
        assert "\x1b" not in text
        rejected = [json.loads(line) for line in text.splitlines()]
        assert [row["row"] for row in rejected] == [0, 21, 22]
        assert [row["place"].rpartition("/")[2] for row in rejected] == [f"rows.jsonl:{line}" for line in (1, 22, 23)]
        assert rejected[0]["reason"] == "bad row: message 1 (assistant) is empty; found ''"
        assert "\\u001b[31m" in rejected[0]["excerpt"]
        closed = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["sources"][0]
        assert closed["dropped"]["bad row: message 1 (assistant) is empty"] == 2
        assert sum(closed["dropped"].values()) == 3

    @pytest.mark.parametrize(("limit", "code"), [(2, 2), (0.1, 2), (3, 0), (0.2, 0)])
    def test_too_many_stop_the_run(self, run, capsys, limit, code):
        assert run(max_bad_rows=limit, dry_run=True) == code
        message = "3 of 23 rows are bad, more than max_bad_rows"
        assert (message in capsys.readouterr().err) == bool(code)

    def test_repeats_of_one_bad_row_are_one(self, run, capsys, tmp_path):
        path = str(tmp_path / "rows.jsonl")
        mixture = {"datasets": [{"id": path, "weight": 3.0}]}
        assert run(dataset_name=None, dataset_mixture=mixture, max_bad_rows=3, dry_run=True) == 0
        assert run(dataset_name=None, dataset_mixture=mixture, max_bad_rows=2, dry_run=True) == 2
        assert "3 of 23 rows are bad, more than max_bad_rows 2" in capsys.readouterr().err
        rows = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
        assert [(row["row"], row["times"]) for row in rows] == [(0, 3), (21, 3), (22, 3)]

    def test_by_default_the_first_one_stops_it(self, run, capsys):
        assert run(on_bad_row="error") == 2
        assert "rows.jsonl:1: message 1 (assistant) is empty; found ''" in capsys.readouterr().err


class TestRepeats:
    """Rows 0-39 once, 40-59 twice in another source; the evaluation asks what rows 0-9 ask."""

    @pytest.fixture
    def values(self, tiny_model, tmp_path, conversations):
        first = write_jsonl(tmp_path / "a.jsonl", conversations[:60])
        second = write_jsonl(tmp_path / "b.jsonl", conversations[40:80])
        other = [
            {"messages": [row["messages"][0], {"role": "assistant", "content": "Else."}]} for row in conversations[:10]
        ]
        return {
            "model_name_or_path": tiny_model,
            "dataset_mixture": {"datasets": [{"id": first, "weight": 2.0}, {"id": second}]},
            "eval_dataset_name": write_jsonl(tmp_path / "eval.jsonl", other),
            "do_eval": True,
            "output_dir": tmp_path / "run",
            "max_length": 512,
        }

    def test_they_are_counted(self, values):
        data, _ = prepared(settings(**values))
        assert data.train.ledger["asked_in_eval"] == 20
        assert len(data.train.unpacked) == 160

    def test_they_are_dropped_when_asked(self, values):
        part = prepared(settings(**values, dedup=True))[0].train
        drawn = ids(part)
        kept = {(0, n) for n in range(10, 60)} | {(1, n) for n in range(40)}
        once = {
            pair if pair[0] == 1 else (1, pair[1] - 40)
            for pair in set(drawn)
            if pair not in {(0, n) for n in range(40)}
        }
        assert set(drawn) < kept and len(once) == 40
        texts = {tuple(row["input_ids"]) for row in part.unpacked}
        assert len(texts) == len(set(drawn)) == 70
        dropped = [entry["dropped"] for entry in part.ledger["sources"]]
        assert dropped[0]["asked in the evaluation data"] == 20
        assert sum(entry.get("exact duplicate", 0) > 0 for entry in dropped) >= 1
        assert len(drawn) == sum(entry["trained"] for entry in part.ledger["sources"])
        assert {row["reason"] for row in part.rejected} == {"asked in the evaluation data", "exact duplicate"}

    def test_only_what_is_evaluated_on_counts(self, values, tmp_path):
        rows = [json.loads(line) for line in Path(values["eval_dataset_name"]).read_text().splitlines()]
        rows = [{"messages": None}] * 3 + rows[:9] + [{"messages": [*rows[9]["messages"], {"role": "x"}]}]
        write_jsonl(values["eval_dataset_name"], rows)
        values["dataset_mixture"]["datasets"].append(
            {"id": write_jsonl(tmp_path / "bad.jsonl", [{"messages": 1}] * 3)}
        )
        data, _ = prepared(settings(**values, on_bad_row="drop"))
        assert data.train.ledger["asked_in_eval"] == 18

    def test_duplicates_are_counted_across_sources(self, values):
        data, _ = prepared(settings(**values))
        assert [entry["duplicates"] for entry in data.train.ledger["sources"]] == [0, 0]
        assert data.train.ledger["total"]["duplicates"] == 20


def test_evaluation_is_on_the_test_split_where_there_is_one(tiny_model, tmp_path, conversations):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "train.jsonl", conversations[:40])
    write_jsonl(tmp_path / "d" / "test.jsonl", conversations[40:50])
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=tmp_path / "d",
        eval_dataset_name=tmp_path / "d",
        do_eval=True,
        output_dir=tmp_path / "run",
    )
    data, _ = prepared(argv)
    assert data.eval.sources == [f"{tmp_path / 'd'}:test"]
    assert len(data.eval.unpacked) == 10


def test_evaluation_data_may_have_columns_of_its_own(tiny_model, tmp_path, conversations):
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": write_jsonl(tmp_path / "a.jsonl", conversations[:9]),
        "eval_dataset_name": write_jsonl(tmp_path / "b.jsonl", [{"frage": "q", "antwort": "a"}]),
        "do_eval": True,
        "output_dir": tmp_path / "run",
    }
    with pytest.raises(UserError, match="b.jsonl:train: no known format in its columns frage, antwort"):
        prepared(settings(**values))
    data, _ = prepared(settings(**values, eval_dataset_mapping={"prompt": "frage", "response": "antwort"}))
    assert len(data.eval.unpacked) == 1


def test_answers_to_one_prompt_are_never_split(tiny_model, tmp_path, pairs):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{a[:99]} {n}"}]}
        for q, a in pairs[:30]
        for n in range(8)
    ]
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows),
        test_split_size=0.2,
        do_eval=True,
        output_dir=tmp_path,
    )
    data, _ = prepared(argv)
    train, test = ({row // 8 for _, row in ids(part)} for part in (data.train, data.eval))
    assert not train & test and len(train | test) == 30
    assert len(ids(data.eval)) == 48
    assert ids(prepared(argv)[0].eval) == ids(data.eval)


def test_proportions_need_something_to_train_on(argv, five, tmp_path):
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [{"messages": None}])
    line = argv()
    at = line.index("--dataset_mixture") + 1
    mixture = json.loads(line[at])
    mixture["datasets"][1] = {"id": nothing, "name": "nothing", "proportion": 1}
    line[at] = json.dumps(mixture)
    with pytest.raises(UserError, match="nothing: nothing of it can be trained on"):
        prepared([*line, "--on_bad_row", "drop"])


RECIPES = {
    "roll": """
file_name: [{folder}/1.json, {folder}/2.json]
prompt_key: instruction
query_key: input
response_key: output
system_key: system
""",
    "alpaca": "dataset_name: {folder}/alpaca.jsonl",
    "sharegpt": "dataset_name: {folder}/sharegpt.jsonl",
    "tutorial": "train_data_path: {folder}/train.jsonl\neval_data_path: {folder}/test.jsonl\neval_strategy: epoch",
    "nested": "dataset_name: {folder}/nested.jsonl\ndataset_mapping: {{prompt: ask.text, response: replies.0}}",
}
COMMON = """
model_name_or_path: {model}
chat_template: qwen2_5
max_length: 256
per_device_train_batch_size: 2
max_steps: 2
learning_rate: 1e-3
use_cpu: true
save_strategy: "no"
disable_tqdm: true
output_dir: {folder}/run
"""


@pytest.mark.parametrize("kind", RECIPES)
def test_what_others_train_on_trains_from_a_short_recipe(kind, tiny_model, tmp_path, pairs):
    flat = [{"instruction": q, "input": "", "output": a[:300], "system": "Be kind."} for q, a in pairs[:40]]
    chats = [[("system", "Be kind."), ("human", q), ("gpt", a[:300])] for q, a in pairs[:40]]
    messages = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a[:300]}]}
        for q, a in pairs[:40]
    ]
    (tmp_path / "1.json").write_text(json.dumps(flat[:20]))
    (tmp_path / "2.json").write_text(json.dumps(flat[20:]))
    write_jsonl(
        tmp_path / "alpaca.jsonl", [{key: row[key] for key in ("instruction", "input", "output")} for row in flat]
    )
    write_jsonl(
        tmp_path / "sharegpt.jsonl",
        [{"conversations": [{"from": who, "value": text} for who, text in chat]} for chat in chats],
    )
    write_jsonl(tmp_path / "train.jsonl", messages[:30])
    write_jsonl(tmp_path / "test.jsonl", messages[30:])
    write_jsonl(tmp_path / "nested.jsonl", [{"ask": {"text": q}, "replies": [a[:300], "x"]} for q, a in pairs[:40]])
    text = (COMMON + RECIPES[kind]).format(model=tiny_model, folder=tmp_path).strip() + "\n"
    assert len(text.splitlines()) < 25
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    closed = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert closed["train"]["total"]["rows_in"] == (30 if kind == "tutorial" else 40)
    assert ("eval" in closed) == (kind == "tutorial")
    assert closed["train"]["total"]["supervised_share"] < 0.95
    data, tokenizer = prepared(["--config", str(tmp_path / "recipe.yaml")])
    first = tokenizer.decode(data.train.unpacked[0]["input_ids"])
    system = "Be kind." if kind in ("roll", "sharegpt") else "You are Qwen"
    assert first.startswith(f"<|im_start|>system\n{system}") and f"user\n{pairs[0][0]}<|im_end|>" in first
