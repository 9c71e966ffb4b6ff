"""Labels: exactly which ids are supervised, for every row format; what is cut is counted; bad rows are named."""

import numpy as np
import pytest
from conftest import write_jsonl
from datasets import Dataset
from trl import ModelConfig

from open_r1.chat import get_tokenizer
from open_r1.configs import ScriptArguments, SFTConfig
from open_r1.data import Source
from open_r1.errors import UserError
from open_r1.formats import row_function
from open_r1.preparation import prepare
from open_r1.tables import Table
from open_r1.tokenization import Supervision, encode_batch, tokenize_source

CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four. Émile says: 四."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def encode(tiny_model):
    """Tokenise rows under training arguments; returns the table and the tokenizer."""

    def encode(rows, **values):
        values.setdefault("max_length", None)
        arguments = SFTConfig(output_dir="unused", use_cpu=True, **values)
        tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
        table = Dataset.from_list(rows)
        to_row = row_function(table.column_names, "here", arguments.dataset_text_field)
        contents = {"here": table._fingerprint}
        source = Source("here", Table(table, contents), table.column_names, to_row, arguments.dataset_text_field)
        how = Supervision.of(arguments, arguments.packing)
        return tokenize_source(source, np.arange(len(rows)), tokenizer, how), tokenizer

    return encode


def supervised(row, tokenizer):
    """The supervised text of a row; checks on the way that labels are -100 or the id itself."""
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return tokenizer.decode([label for label in row["labels"] if label != -100])


ALL = (
    "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nFour. Émile says: 四.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
)
CASES = {
    "every assistant turn with its stop token": (
        {"messages": CHAT},
        {},
        "Four. Émile says: 四.<|im_end|>Yes.<|im_end|>",
    ),
    "the whole conversation when asked": ({"messages": CHAT}, {"assistant_only_loss": False}, ALL),
    "the completion's turns": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, "Yes.<|im_end|>"),
    "prompt and completion as messages, in full": (
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
        {"completion_only_loss": False},
        "Four. Émile says: 四.<|im_end|>Yes.<|im_end|>",
    ),
    "the completion": ({"prompt": "Two and two:\n", "completion": "four"}, {}, "four<|im_end|>"),
    "prompt and completion": (
        {"prompt": "Two and two:\n", "completion": "four"},
        {"completion_only_loss": False},
        "Two and two:\nfour<|im_end|>",
    ),
    "text in full": ({"text": "Some text."}, {}, "Some text.<|im_end|>"),
    "text that ends with EOS already": ({"text": "Some text.<|im_end|>"}, {}, "Some text.<|im_end|>"),
    "another text field": ({"body": "Some text."}, {"dataset_text_field": "body"}, "Some text.<|im_end|>"),
}


@pytest.mark.parametrize(("row", "values", "expected"), CASES.values(), ids=CASES)
def test_what_is_supervised(encode, row, values, expected):
    table, tokenizer = encode([row], **values)
    assert supervised(table[0], tokenizer) == expected
    assert table[0]["supervised"] == sum(label != -100 for label in table[0]["labels"][1:])


def test_ids_are_those_of_the_rendered_conversation(encode):
    table, tokenizer = encode([{"messages": CHAT}])
    assert table[0]["input_ids"] == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert tokenizer.decode(table[0]["input_ids"]) == ALL


def test_rows_that_are_tokenised_already_stay_as_they_are(encode):
    table, _ = encode([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert (table[0]["input_ids"], table[0]["labels"]) == ([5, 6, 7], [-100, 6, 7])


def test_system_prompt_only_where_there_is_no_system_message(encode):
    own = [{"role": "system", "content": "Mine."}, *CHAT]
    table, tokenizer = encode([{"messages": CHAT}, {"messages": own}], system_prompt="Be kind.")
    first, second = (tokenizer.decode(row["input_ids"]) for row in table)
    assert first.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    assert second.startswith("<|im_start|>system\nMine.<|im_end|>\n<|im_start|>user")
    table, tokenizer = encode([{"prompt": CHAT[:3], "completion": CHAT[3:]}], system_prompt="Be kind.")
    assert supervised(table[0], tokenizer) == "Yes.<|im_end|>"


def test_tools_and_template_arguments_reach_the_template(encode):
    template = (
        "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}{{ mood }}{% for m in messages %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    row = {
        "messages": CHAT[:2],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
        "chat_template_kwargs": {"mood": "!"},
    }
    table, tokenizer = encode([row], chat_template=template, assistant_only_loss=False)
    assert tokenizer.decode(table[0]["input_ids"]).startswith("add!What is")


def test_a_row_of_which_every_turn_is_masked_is_dropped_and_counted(encode):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ 'gone' }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    table, _ = encode([{"messages": CHAT[:3]}], chat_template=template, on_rewritten_turn="mask")
    assert (table[0]["dropped"], table[0]["masked_turns"]) == ("every turn is rewritten by the template", 1)


def test_long_rows_are_cut_and_counted(encode):
    whole, _ = encode([{"messages": CHAT}])
    cut, _ = encode([{"messages": CHAT}], max_length=40)
    assert cut[0]["input_ids"] == whole[0]["input_ids"][:40]
    assert cut[0]["labels"] == whole[0]["labels"][:40]
    assert cut[0]["cut"] == len(whole[0]["input_ids"]) - 40
    assert (cut[0]["answers"], cut[0]["lost_end"]) == (2, 2)
    end, _ = encode([{"messages": CHAT}], max_length=40, truncation_mode="keep_end")
    assert end[0]["input_ids"] == whole[0]["input_ids"][-40:]
    spread, _ = encode([{"messages": CHAT}], max_length=20, packing=True, packing_strategy="bfd_split")
    assert spread[0]["input_ids"] == whole[0]["input_ids"]


BAD = {
    "null messages": [{"messages": CHAT}, {"messages": None}],
    "no assistant turn": [{"messages": CHAT}, {"messages": CHAT[:1]}],
    "a template that fails": [
        {"messages": CHAT},
        {"messages": [*CHAT[:1], {"role": "assistant", "tool_calls": [{"x": 1}]}]},
    ],
}


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_row_is_named(encode, rows, num_proc, tmp_path, tiny_model):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    arguments = SFTConfig(output_dir="unused", use_cpu=True, dataset_num_proc=num_proc)
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
    with pytest.raises(UserError, match=r"rows\.jsonl:train: row 1 \(counting from 0\), .*rows\.jsonl:2: "):
        prepare(ScriptArguments(dataset_name=path), arguments, tokenizer)


@pytest.mark.parametrize(("cores", "used"), [({3}, None), ({3, 5}, 2)])
def test_no_more_processes_than_cores_that_may_be_used(cores, used, tmp_path, tiny_model, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 4)
    arguments = SFTConfig(output_dir="unused", use_cpu=True, dataset_num_proc=12, max_length=60 + len(cores))
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
    seen, mapped = [], Dataset.map

    def spy(self, *args, **kwargs):
        seen.append(kwargs["num_proc"])
        return mapped(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", spy)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores, raising=False)
    prepare(ScriptArguments(dataset_name=path), arguments, tokenizer)
    assert seen == [used]


class TestPrepare:
    def arguments(self, **values):
        return SFTConfig(output_dir="unused", use_cpu=True, **{"max_length": 64, **values})

    def prepare(self, tiny_model, path, arguments, **more):
        tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
        return prepare(ScriptArguments(dataset_name=path, **more), arguments, tokenizer)

    def test_rows_with_nothing_to_learn_are_dropped_and_counted(self, tiny_model, tmp_path, caplog):
        long = [{"role": "user", "content": "why " * 200}, CHAT[1]]
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": long}, {"messages": CHAT}])
        caplog.set_level("INFO", "open_r1")
        train = self.prepare(tiny_model, path, self.arguments(max_length=150)).train.rows
        assert len(train) == 2
        assert "1 rows dropped: nothing supervised in it" in caplog.text

    def test_no_row_left_is_an_error(self, tiny_model, tmp_path):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
        with pytest.raises(UserError, match="can be trained on: 1 rows: nothing supervised"):
            self.prepare(tiny_model, path, self.arguments(max_length=5))

    def test_packing_keeps_every_token(self, tiny_model, chat_file):
        loose = self.prepare(tiny_model, chat_file, self.arguments(max_length=256)).train.rows
        prepared = self.prepare(
            tiny_model, chat_file, self.arguments(max_length=256, packing=True, do_eval=True), test_split_size=0.2
        )
        packed, held_out = prepared.train.rows, prepared.eval.rows
        assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths", "source", "row", "lengths"}
        assert sum(map(len, packed["input_ids"])) + sum(map(len, held_out["input_ids"])) == sum(
            map(len, loose["input_ids"])
        )
        assert sum(map(len, packed["seq_lengths"])) + sum(map(len, held_out["seq_lengths"])) == len(loose)
        unpacked = self.prepare(
            tiny_model,
            chat_file,
            self.arguments(max_length=256, packing=True, eval_packing=False, do_eval=True),
            test_split_size=0.2,
        ).eval.rows
        assert set(unpacked.column_names) == {"input_ids", "labels", "source", "row"}

    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    def test_source_and_row_survive_packing(self, tiny_model, tmp_path, conversations, strategy):
        paths = [
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
            for name, rows in (("a", conversations[:300]), ("b", conversations[300:]))
        ]
        mixture = {"datasets": [{"id": paths[0], "weight": 0.7}, {"id": paths[1], "weight": 3.5}]}
        part = self.prepare(
            tiny_model,
            None,
            self.arguments(max_length=100, packing=True, packing_strategy=strategy),
            dataset_mixture=mixture,
        ).train
        rows = {(row["source"], row["row"]): row for row in part.unpacked}
        drawn = [(row["source"], row["row"]) for row in part.unpacked]
        assert len(drawn) > 1000 and {source for source, _ in drawn} == {0, 1}
        assert max(row for source, row in drawn if source == 0) > 250  # numbered as in the source, not as drawn
        found, tokens = [], []
        for pack in part.rows:
            ids = list(zip(pack["source"], pack["row"], strict=True))
            found += ids
            tokens += pack["input_ids"]
            if strategy == "wrapped":
                continue
            bounds = np.cumsum([0, *pack["seq_lengths"]])
            assert pack["lengths"] == pack["seq_lengths"]
            for of, start, end in zip(ids, bounds, bounds[1:], strict=False):
                row, length = rows[of], end - start
                assert strategy == "bfd_split" or length == len(row["input_ids"])
                at = [n for n in range(0, len(row["input_ids"]), 100) if row["input_ids"][n : n + length]]
                got = pack["input_ids"][start:end], pack["labels"][start:end]
                assert got in [(row["input_ids"][n : n + length], row["labels"][n : n + length]) for n in at]
        if strategy == "wrapped":
            assert [of for n, of in enumerate(found) if n == 0 or of != found[n - 1]] == [
                of for n, of in enumerate(drawn) if n == 0 or of != drawn[n - 1]
            ]
            assert tokens == [token for row in part.unpacked for token in row["input_ids"]]
        if strategy == "bfd":
            assert sorted(found) == sorted(drawn)
        assert set(found) == set(drawn)

    def test_a_second_preparation_reads_no_row(self, tiny_model, chat_file, monkeypatch):
        first = self.prepare(tiny_model, chat_file, self.arguments(max_length=77)).train.rows
        monkeypatch.setattr("open_r1.tokenization.row_pieces", lambda *_: pytest.fail("a row was tokenised again"))
        second = self.prepare(tiny_model, chat_file, self.arguments(max_length=77)).train.rows
        assert first["input_ids"] == second["input_ids"]

    def test_shuffle_dataset_is_honoured(self, tiny_model, chat_file):
        plain = self.prepare(tiny_model, chat_file, self.arguments()).train.rows
        shuffled = self.prepare(tiny_model, chat_file, self.arguments(shuffle_dataset=True)).train.rows
        assert plain["input_ids"] != shuffled["input_ids"]
        assert sorted(plain["input_ids"]) == sorted(shuffled["input_ids"])

    def test_mixture_order_is_that_of_the_draw(self, tiny_model, tmp_path):
        paths = [
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {row}"} for row in range(50)]) for name in "ab"
        ]
        arguments = self.arguments()
        tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
        args = ScriptArguments(
            dataset_mixture={"datasets": [{"id": paths[0], "weight": 0.5}, {"id": paths[1], "weight": 1.5}], "seed": 3}
        )
        from open_r1.data import get_dataset

        train = prepare(args, arguments, tokenizer).train.rows
        raw = get_dataset(args)["train"]["text"]
        assert [tokenizer.decode(ids) for ids in train["input_ids"]] == [f"{text}<|im_end|>" for text in raw]
        assert len(train) == 100

    def test_unknown_dataset_kwargs_are_refused(self, tiny_model, chat_file):
        with pytest.raises(UserError, match="dataset_kwargs: shuffel is not known"):
            self.prepare(tiny_model, chat_file, self.arguments(dataset_kwargs={"shuffel": True}))


def test_the_last_turn_is_that_of_the_assistant(encode):
    table, tokenizer = encode([{"messages": [*CHAT, {"role": "user", "content": "Thanks."}]}], supervision="last_turn")
    assert supervised(table[0], tokenizer) == "Yes.<|im_end|>"


def test_a_turn_that_is_not_to_be_trained_is_context(encode):
    rows = [{"messages": [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]}]
    for values in ({}, {"system_prompt": "Be kind."}):
        table, tokenizer = encode(rows, **values)
        assert supervised(table[0], tokenizer) == "Yes.<|im_end|>"
    with pytest.raises(UserError, match="train: false, which supervision: full cannot heed"):
        encode(rows, supervision="full")


HALF = {"messages": CHAT[:2], "tools": '[{"type": "function", "function": {"name": "\\ud800"}}]'}


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_what_cannot_be_encoded_is_this_rows_fault_alone(encode, policy):
    rows = [{"messages": CHAT[:2], "tools": "[]"}, HALF, {"messages": CHAT[:2], "tools": "[]"}]
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    values = {"chat_template": template, "supervision": "full", "on_bad_row": policy}
    if policy == "error":
        with pytest.raises(UserError, match=r"row 1 \(counting from 0\)"):
            encode(rows, **values)
        return
    table, _ = encode(rows, **values)
    assert [row["dropped"] is None for row in table] == [True, False, True]


def test_long_rows_that_stand_together_are_read_few_at_once(monkeypatch, tmp_path, tiny_model):
    sizes = []
    original = encode_batch
    monkeypatch.setattr(
        "open_r1.tokenization.encode_batch",
        lambda batch, indices, **how: sizes.append(len(indices)) or original(batch, indices, **how),
    )
    rows = [{"text": "word " * (20_000 if n > 1950 else 4)} for n in range(2000)]
    arguments = SFTConfig(output_dir="unused", use_cpu=True, max_length=64)
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
    prepare(ScriptArguments(dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows)), arguments, tokenizer)
    assert sum(sizes) == 2000 and max(sizes) < 256


def test_supervision_by_markers_needs_markers(tiny_model, chat_file):
    arguments = SFTConfig(output_dir="unused", use_cpu=True, supervision="template", chat_template="qwen3")
    tokenizer = get_tokenizer(ModelConfig(model_name_or_path=tiny_model), arguments)
    with pytest.raises(UserError, match="supervision: template needs {% generation %} blocks"):
        prepare(ScriptArguments(dataset_name=chat_file), arguments, tokenizer)
