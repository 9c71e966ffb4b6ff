"""What is saved can be handed over: a run verifies its model, damage of any kind is named, adapters merge exactly."""

import importlib.util
import io
import json
import shutil
from pathlib import Path

import chat
import merge
import pytest
import torch
import verify as script
from conftest import settings, write_jsonl
from make_docstrings import write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from open_r1.errors import UserError
from open_r1.findings import Finding, has_errors
from open_r1.finish import prompts_of
from open_r1.handover import load, parameters, verify
from open_r1.sft import main

QUESTION = "Are you there?"


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """Path of rows that teach to answer a question shortly."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Yes."}]
    return write_jsonl(tmp_path_factory.mktemp("ready") / "rows.jsonl", [{"messages": messages}] * 40)


@pytest.fixture(scope="module")
def saved(tiny_model, ready, tmp_path_factory):
    """A model that a run trained and saved; it has learnt the answer and its end."""
    out = tmp_path_factory.mktemp("saved") / "run"
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=ready,
        output_dir=out,
        max_steps=60,
        learning_rate=1e-2,
        save_strategy="no",
    )
    assert main(argv) == 0
    return out


@pytest.fixture(scope="module")
def adapter(tiny_model, ready, tmp_path_factory):
    """An adapter that a run trained and saved."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=ready,
        output_dir=out,
        max_steps=60,
        learning_rate=3e-2,
        use_peft=True,
        lora_target_modules="all-linear",
        save_strategy="no",
    )
    assert main(argv) == 0
    return out


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved model, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def errors(path, *args, **kwargs):
    return [finding for finding in verify(path, *args, **kwargs) if finding.level == "error"]


def edit(path, **values):
    """Set keys of a JSON file; None removes one."""
    held = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def rewrite(path, change, name="model.safetensors"):
    """Change the tensors of a saved model in place."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})


def sharded(path):
    """Save the model of a directory again in several files; returns their index."""
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="40KB")
    return path / "model.safetensors.index.json"


def grow(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    tokenizer.save_pretrained(path)


def without(path, *names):
    for name in names:
        (path / name).unlink()


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def name_a_missing_shard(path):
    index = sharded(path)
    held = json.loads(index.read_text())
    held["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(held))


def lose_a_shard_entry(path):
    sharded(path)
    first = sorted(path.glob("model-*.safetensors"))[0]
    rewrite(path, lambda tensors: tensors.pop(min(tensors)), first.name)


def spoil(name, value):
    return lambda path: rewrite(path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def empty(path):
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.empty(0)}))


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
BROKEN = {
    "weights deleted": (lambda path: without(path, "model.safetensors"), "the weights are missing"),
    "weights truncated": (lambda path: cut(path / "model.safetensors"), "cannot be read, it is cut short or broken"),
    "a tensor missing": (
        lambda path: rewrite(path, lambda tensors: tensors.pop(NORM)),
        f"tensors that the architecture has are missing: {NORM}",
    ),
    "the tied embedding missing": (
        lambda path: rewrite(path, lambda tensors: tensors.pop(EMBEDDING)),
        "tensors that the architecture has are missing: lm_head.weight, model.embed_tokens.weight",
    ),
    "a tensor without elements": (empty, f"tensors without elements: {NORM}"),
    "a tensor of another shape": (
        lambda path: rewrite(path, lambda tensors: tensors.update({NORM: torch.ones(31)})),
        f"{NORM} is (31,), not (32,)",
    ),
    "NaN": (spoil(NORM, float("nan")), f"NaN or infinite values in {NORM}"),
    "infinity in the last row": (spoil(EMBEDDING, float("inf")), f"NaN or infinite values in {EMBEDDING}"),
    "only pickled weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "no model.safetensors; it has pytorch_model.bin",
    ),
    "a shard missing": (name_a_missing_shard, "names model-00009-of-00009.safetensors, which is missing"),
    "a tensor not in its shard": (lose_a_shard_entry, "are not in the files that it names"),
    "an index that is none": (
        lambda path: sharded(path).write_text('{"weight_map": 1}'),
        "this index cannot be read",
    ),
    "no chat template": (lambda path: without(path, "chat_template.jinja"), "the tokenizer has no chat template"),
    "a template that fails": (
        lambda path: (path / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        "the chat template cannot render",
    ),
    "a template that ends otherwise": (
        lambda path: (path / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_start|>' }}{% endfor %}"
        ),
        "ends a turn of the assistant with <|im_start|>, generation stops at",
    ),
    "generation stops elsewhere": (
        lambda path: edit(path / "generation_config.json", eos_token_id=0),
        "generation stops at <|endoftext|> (0) (generation_config.json), EOS is <|im_end|> (2)",
    ),
    "generation stops nowhere": (
        lambda path: edit(path / "generation_config.json", eos_token_id=None),
        "generation stops at nothing",
    ),
    "config.json has another EOS": (
        lambda path: edit(path / "config.json", eos_token_id=0),
        "config.json says that EOS is <|endoftext|> (0)",
    ),
    "temperature without sampling": (
        lambda path: edit(path / "generation_config.json", temperature=0.6),
        "generation_config.json is not valid: GenerationConfig is invalid: - `temperature`",
    ),
    "a generation config that is no JSON": (
        lambda path: (path / "generation_config.json").write_text("{"),
        "generation_config.json is not valid",
    ),
    "a tokenizer larger than the embedding": (grow, "the tokenizer has 602 tokens, the embedding 600"),
    "no tokenizer": (
        lambda path: without(path, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "the tokenizer",
    ),
    "no vocabulary": (lambda path: without(path, "tokenizer.json"), "the tokenizer"),
    "a broken tokenizer": (lambda path: cut(path / "tokenizer.json"), "the tokenizer cannot be loaded"),
    "no EOS": (lambda path: edit(path / "tokenizer_config.json", eos_token=None), "the tokenizer has no EOS"),
}


class TestVerify:
    def test_what_a_run_saves_can_be_served(self, saved):
        assert verify(saved) == []
        assert verify(saved, [QUESTION], max_new_tokens=20) == [
            Finding("note", f"{saved}: 1 of 1 answers stopped within 20 tokens")
        ]

    @pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
    def test_damage_is_named(self, copy, break_it, message):
        break_it(copy)
        found = errors(copy)
        assert len(found) == 1, found
        assert message in found[0].text
        assert found[0].remedy

    def test_sharded_weights_can_be_served(self, copy):
        index = sharded(copy)
        assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
        assert verify(copy) == []

    def test_experts_that_are_saved_one_by_one_are_known(self, copy):
        """transformers joins them when it loads, so names alone do not tell what is missing."""
        without(copy, "model.safetensors")
        config = Qwen3MoeConfig(
            vocab_size=600,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            eos_token_id=2,
        )
        Qwen3MoeForCausalLM(config).save_pretrained(copy)
        assert errors(copy) == []
        rewrite(copy, lambda tensors: tensors.pop("model.layers.0.mlp.experts.1.down_proj.weight"))
        assert "experts.down_proj is (3, 16, 8), not (4, 16, 8)" in errors(copy)[0].text

    def test_quantised_weights_are_read_and_not_compared(self, copy):
        edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert [finding.level for finding in verify(copy)] == ["note"]
        spoil(NORM, float("nan"))(copy)
        assert "NaN or infinite" in errors(copy)[0].text

    def test_what_is_odd_and_does_no_harm_is_a_warning(self, copy):
        rewrite(copy, lambda tensors: tensors.update({"_orig_mod.x": torch.ones(2)}))
        without(copy, "generation_config.json")
        (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        found = verify(copy)
        assert {finding.level for finding in found} == {"warning"}
        assert [text.partition(": ")[2][:30] for _, text, _ in found] == [
            "tensors that the architecture ",
            "generation_config.json is miss",
            "the chat template ends a turn ",
        ]

    def test_weights_are_not_loaded_unless_asked(self, saved, monkeypatch):
        monkeypatch.setattr(
            "open_r1.handover.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded")
        )
        monkeypatch.setattr("open_r1.handover.PIECE", 40)  # most tensors come in several pieces
        assert verify(saved) == []
        assert parameters(saved) == 43_968

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_pieces_leave_nothing_out(self, copy, monkeypatch, value):
        monkeypatch.setattr("open_r1.handover.PIECE", 100)
        spoil(EMBEDDING, value)(copy)
        assert "NaN or infinite" in errors(copy)[0].text

    @pytest.mark.parametrize(
        "tensor",
        [torch.tensor(float("nan")), torch.tensor([1.0, -float("inf")]).half(), torch.tensor([2.0, float("nan")])],
        ids=["scalar", "half", "float8"],
    )
    def test_values_of_any_kind_are_looked_at(self, copy, tensor, request):
        if request.node.callspec.id == "float8":
            tensor = tensor.to(torch.float8_e4m3fn)
        rewrite(copy, lambda tensors: tensors.update({"x.weight": tensor}))
        assert [finding.text for finding in errors(copy)] == [f"{copy}: NaN or infinite values in x.weight"]
        rewrite(copy, lambda tensors: tensors.update({"x.weight": torch.ones_like(tensor)}))
        assert errors(copy) == []

    def test_a_model_that_never_stops_is_reported(self, copy):
        def deafen(tensors):
            tensors[EMBEDDING][[0, 2]] = 0  # tied: the head's rows of both stop tokens too

        rewrite(copy, deafen)
        found = errors(copy, [QUESTION, "And you?"], max_new_tokens=12)
        assert [finding.text for finding in found] == [f"{copy}: 0 of 2 answers stopped within 12 tokens"]
        assert "train longer" in found[0].remedy

    def test_a_model_that_says_nothing_is_reported(self, copy):
        def silence(tensors):
            tensors[NORM].zero_()

        edit(copy / "generation_config.json", eos_token_id=[2, 0])
        rewrite(copy, silence)  # all logits are equal: greedy takes the first token, which is a stop token
        level, text, _ = verify(copy, [QUESTION], max_new_tokens=5)[0]
        assert level == "warning"
        assert "1 of 1 answers stopped within 5 tokens, all of them empty" in text

    def test_no_prompt_is_answered_by_a_broken_model(self, copy):
        spoil(NORM, float("nan"))(copy)
        assert verify(copy, [QUESTION])[-1].text == "no prompt was answered, because of the errors"

    def test_what_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no such directory"):
            verify(tmp_path / "nowhere")
        with pytest.raises(UserError, match="holds no model whose config can be read"):
            verify(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match="holds no model whose config can be read"):
            verify(tmp_path)


class TestAdapter:
    @pytest.fixture
    def copy(self, adapter, tmp_path):
        return Path(shutil.copytree(adapter, tmp_path / "copy"))

    def test_an_adapter_can_be_served_and_says_what_its_base_lacks(self, adapter, tiny_model):
        found = verify(adapter, [QUESTION], max_new_tokens=20)
        assert [finding.level for finding in found] == ["warning", "note"]
        assert f"the base {tiny_model} stops at <|endoftext|> (0), the adapter at <|im_end|> (2)" in found[0].text
        assert "1 of 1 answers stopped" in found[1].text

    BROKEN = {
        "weights deleted": (lambda path: without(path, "adapter_model.safetensors"), "no adapter_model.safetensors"),
        "weights truncated": (lambda path: cut(path / "adapter_model.safetensors"), "it is cut short or broken"),
        "a tensor missing": (
            lambda path: rewrite(path, lambda tensors: tensors.pop(min(tensors)), "adapter_model.safetensors"),
            "tensors that the architecture has are missing: base_model.model.model.layers.0.",
        ),
        "NaN": (
            lambda path: rewrite(
                path, lambda tensors: tensors[min(tensors)].fill_(float("nan")), "adapter_model.safetensors"
            ),
            "NaN or infinite values in base_model.model.model.layers.0.",
        ),
        "another rank": (lambda path: edit(path / "adapter_config.json", r=4), "have another shape than"),
        "no generation config": (
            lambda path: without(path, "generation_config.json"),
            "generation_config.json is missing; servers stop at <|endoftext|> (0)",
        ),
        "tokens without embeddings": (grow, "the tokenizer has 602 tokens, the embedding 600"),
        "no such module": (
            lambda path: edit(path / "adapter_config.json", target_modules=["nowhere"]),
            "the adapter does not fit its base",
        ),
    }

    @pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
    def test_damage_is_named(self, copy, break_it, message):
        break_it(copy)
        found = errors(copy)
        assert len(found) == 1, found
        assert message in found[0].text
        assert found[0].remedy

    @pytest.mark.parametrize("values", [{"init_lora_weights": "pissa"}, {"use_rslora": True}], ids=str)
    def test_ways_of_lora_do_not_matter(self, copy, values):
        edit(copy / "adapter_config.json", **values)
        assert errors(copy) == []

    def test_dora_is_known(self, copy):
        edit(copy / "adapter_config.json", use_dora=True)
        assert "lora_magnitude_vector" in errors(copy)[0].text  # which only the vectors of DoRA are missing for

    def test_a_broken_base_is_named(self, copy, tiny_model, tmp_path):
        base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
        edit(copy / "adapter_config.json", base_model_name_or_path=str(base))
        assert errors(copy) == []
        spoil(NORM, float("nan"))(base)
        assert str(base) in errors(copy)[0].text
        shutil.rmtree(base)
        with pytest.raises(UserError, match="base: holds no model"):
            verify(copy)


class TestRun:
    def argv(self, tiny_model, ready, out, **values):
        return settings(model_name_or_path=tiny_model, dataset_name=ready, output_dir=out, **values)

    def test_a_broken_save_fails_the_run_and_keeps_the_model(
        self, tiny_model, ready, tmp_path, monkeypatch, caplog, capsys
    ):
        import open_r1.finish

        def spoilt(out, **kwargs):
            edit(Path(out) / "generation_config.json", eos_token_id=0)
            return verify(out, **kwargs)

        monkeypatch.setattr(open_r1.finish, "verify", spoilt)
        out = tmp_path / "run"
        argv = self.argv(tiny_model, ready, out)
        assert main(argv) == 1
        assert "verification failed:\nerror " in caplog.text
        assert "generation stops at <|endoftext|> (0) (generation_config.json), EOS is <|im_end|> (2)" in caplog.text
        assert "Traceback" not in caplog.text
        assert "model       " in capsys.readouterr().out
        assert (out / "model.safetensors").is_file()
        assert json.loads((out / "run_state.json").read_text())["status"] == "failed"
        monkeypatch.undo()
        assert main(argv) == 0  # started again, it saves its last checkpoint
        assert errors(out) == []

    def test_answers_are_tried_and_told(self, tiny_model, ready, tmp_path, caplog, monkeypatch):
        caplog.set_level("INFO", "open_r1")
        assert main(self.argv(tiny_model, ready, tmp_path / "one", max_steps=60, learning_rate=1e-2)) == 0
        assert "2 of 2 answers stopped within 64 tokens" in caplog.text
        assert main(self.argv(tiny_model, ready, tmp_path / "two", use_peft=True)) == 0
        untaught = [record for record in caplog.records if "0 of 2 answers stopped" in record.message]
        assert [record.levelname for record in untaught] == ["WARNING"]
        assert (tmp_path / "two" / "generation_config.json").is_file()
        monkeypatch.setattr("open_r1.finish.ANSWERS", 43_968)
        monkeypatch.setattr("open_r1.finish.answers", lambda *_: pytest.fail("answered"))
        assert main(self.argv(tiny_model, ready, tmp_path / "three")) == 0
        assert "no prompt was answered: that is done below 0M parameters here" in caplog.text

    def test_prompts_are_what_inference_asks(self, tokenizer):
        from datasets import Dataset

        rows = [([1, 2, 3, 4], [-100, -100, 3, 4]), ([5, 6], [5, 6]), ([7] * 600, [-100] * 599 + [7])]
        rows += [([8, 9], [-100, 9]), ([10, 11], [-100, 11]), ([12], [-100])]
        rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])
        assert prompts_of(rows) == [[1, 2], [8]]
        assert prompts_of(rows.select([1, 2, 5])) == []

    @pytest.mark.parametrize("peft", [False, True])
    def test_sampling_settings_of_the_base_do_not_stop_the_save(self, tiny_model, ready, tmp_path, caplog, peft):
        base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
        edit(base / "generation_config.json", temperature=0.6, top_p=0.9)
        assert main(self.argv(base, ready, tmp_path / "run", use_peft=peft)) == 0
        assert "samples without do_sample" in caplog.text
        held = json.loads((tmp_path / "run" / "generation_config.json").read_text())
        assert (held["do_sample"], held["temperature"], held["top_p"]) == (True, 0.6, 0.9)
        assert errors(tmp_path / "run") == [] or peft

    def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(
        self, tiny_model, ready, tmp_path, capsys
    ):
        base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
        edit(base / "generation_config.json", return_dict_in_generate=False, output_scores=True)
        assert main(self.argv(base, ready, tmp_path / "run")) == 2
        assert "generation_config.json cannot be saved again" in capsys.readouterr().err


class TestScripts:
    def test_verify(self, saved, copy, tmp_path, capsys):
        assert script.main([str(saved)]) == 0
        assert capsys.readouterr().out == f"{saved} can be served\n"
        assert script.main([str(saved), "--prompt", QUESTION, "--max_new_tokens", "20"]) == 0
        assert "note    " in capsys.readouterr().out
        assert script.main([str(saved), "--prompt", QUESTION, QUESTION, "--max_new_tokens", "1"]) == 1
        assert "0 of 2 answers stopped within 1 tokens; train longer" in capsys.readouterr().out
        without(copy, "model.safetensors")
        assert script.main([str(copy)]) == 1
        assert capsys.readouterr().out.startswith(f"error   {copy}: the weights are missing")
        assert script.main([str(tmp_path / "nowhere")]) == 2
        assert capsys.readouterr().err == f"\n{tmp_path / 'nowhere'}: no such directory\n"

    def test_chat_answers_a_pipe_and_keeps_the_history(self, saved, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(chat, "answer", lambda model, tokenizer, ids, options: (asked.append(ids), ("A", True))[1])
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n/quit\nfour\n"))
        assert chat.main([str(saved), "--system", "S"]) == 0
        tokenizer = AutoTokenizer.from_pretrained(saved)
        start = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        again = "A<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        assert [tokenizer.decode(ids[0]) for ids in asked] == [
            start.format("one"),
            start.format("one") + again,
            start.format("three"),
        ]

    def test_chat_says_what_the_model_says(self, saved, adapter, monkeypatch, capsys):
        said = []
        for path in (saved, adapter):  # the base of the adapter would not stop there
            monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
            assert chat.main([str(path), "--temperature", "0"]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == "Yes.\n"
        assert said[1].strip() and "cut off" not in said[1]
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
        assert chat.main([str(saved), "--temperature", "0", "--max_new_tokens", "2"]) == 0
        assert "[cut off after 2 tokens" in capsys.readouterr().out

    def test_chat_samples_at_a_temperature(self, saved, monkeypatch, capsys):
        said = set()
        for seed in range(5):
            torch.manual_seed(seed)
            monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
            assert chat.main([str(saved), "--temperature", "50", "--max_new_tokens", "4"]) == 0
            said.add(capsys.readouterr().out)
        assert len(said) > 1

    def test_chat_refuses_what_cannot_chat(self, copy, tmp_path, monkeypatch, capsys):
        assert chat.main([str(tmp_path / "nowhere")]) == 2
        assert "cannot be loaded" in capsys.readouterr().err
        (copy / "chat_template.jinja").write_text("{{ raise_exception('no system, please') }}")
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        assert chat.main([str(copy)]) == 2
        assert "refuses this conversation: no system, please" in capsys.readouterr().err
        without(copy, "chat_template.jinja")
        assert chat.main([str(copy)]) == 2
        assert "it has no chat template" in capsys.readouterr().err


class TestMerge:
    def logits(self, path):
        model, tokenizer = load(path)
        with torch.inference_mode():
            return model(**tokenizer(QUESTION, return_tensors="pt")).logits

    def test_the_merged_model_is_the_adapter_on_its_base(self, adapter, tiny_model, tmp_path, capsys):
        out = tmp_path / "new" / "merged"
        assert merge.main([str(adapter), str(out)]) == 0
        assert "saved in float32: logits differ from the adapter's by" in capsys.readouterr().out
        assert torch.allclose(self.logits(out), self.logits(adapter), atol=1e-4)
        assert not torch.allclose(self.logits(out), self.logits(tiny_model), atol=1e-1)
        assert verify(out, [QUESTION], max_new_tokens=20) == [
            Finding("note", f"{out}: 1 of 1 answers stopped within 20 tokens")
        ]
        assert not (out / "adapter_config.json").exists()
        assert [path.name for path in out.parent.iterdir()] == ["merged"]
        assert merge.main([str(adapter), str(out)]) == 2
        assert f"{out}: exists already" in capsys.readouterr().err

    def test_a_dtype_can_be_chosen(self, adapter, tmp_path):
        assert merge.main([str(adapter), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
        assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {
            torch.bfloat16
        }
        assert verify(tmp_path / "merged") == []

    def test_embeddings_that_were_trained_apart_stay_apart(self, pairs, chat_file, tmp_path):
        texts = [text for pair in pairs[:50] for text in pair]
        write_model(tmp_path / "bare", texts, 400, 32, 1, special=["<|endoftext|>"])
        argv = settings(model_name_or_path=tmp_path / "bare", dataset_name=chat_file, output_dir=tmp_path / "run")
        assert main([*argv, "--use_peft", "--learning_rate", "0.01"]) == 0
        assert verify(tmp_path / "run")[0].level == "warning"
        assert merge.main([str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
        held = load_file(tmp_path / "merged" / "model.safetensors")
        assert not torch.equal(held["lm_head.weight"], held[EMBEDDING])
        assert torch.allclose(self.logits(tmp_path / "merged"), self.logits(tmp_path / "run"), atol=1e-4)
        assert verify(tmp_path / "merged") == []

    def test_it_refuses_a_merge_that_is_another_model(self, tiny_model, ready, tmp_path, capsys):
        """LoRA on a tied embedding: merged, it changes the head as well."""
        argv = settings(model_name_or_path=tiny_model, dataset_name=ready, output_dir=tmp_path / "run")
        argv += ["--use_peft", "--lora_target_modules", "embed_tokens", "--learning_rate", "0.01"]
        assert main(argv) == 0
        assert merge.main([str(tmp_path / "run"), str(tmp_path / "merged")]) == 1
        assert "this is another model; nothing was written" in capsys.readouterr().out
        assert not list(tmp_path.glob("*merged*"))

    def test_it_refuses_what_is_written_wrong(self, adapter, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(merge.TOLERANCE, "float16", 1e-9)
        assert merge.main([str(adapter), str(tmp_path / "merged"), "--dtype", "float16"]) == 1
        assert "saved in float16: logits differ" in capsys.readouterr().out
        assert not list(tmp_path.glob("*merged*"))

    def test_what_is_no_adapter_is_refused(self, saved, adapter, tmp_path, capsys):
        assert merge.main([str(saved), str(tmp_path / "merged")]) == 2
        assert "is no adapter" in capsys.readouterr().err
        lost = Path(shutil.copytree(adapter, tmp_path / "lost"))
        edit(lost / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
        assert merge.main([str(lost), str(tmp_path / "merged")]) == 2
        assert f"cannot be loaded on its base {tmp_path / 'gone'}" in capsys.readouterr().err

    def test_a_quantised_base_is_known_from_the_recipe(self, adapter, tmp_path, capsys):
        copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
        assert merge.quantization_of(copy) is None
        (copy / "recipe.yaml").write_text("load_in_4bit: true\n")
        if importlib.util.find_spec("bitsandbytes"):
            assert merge.quantization_of(copy).load_in_4bit
            return
        assert merge.main([str(copy), str(tmp_path / "merged")]) == 2
        assert "bitsandbytes" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()

    def test_a_quantised_base_is_dequantised(self, tiny_model, ready, tmp_path, capsys):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        from open_r1.handover import with_adapter

        run = tmp_path / "run"
        argv = settings(model_name_or_path=tiny_model, dataset_name=ready, output_dir=run, learning_rate=1e-2)
        assert main([*argv, "--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear"]) == 0
        assert merge.main([str(run), str(tmp_path / "merged")]) == 0
        assert "quantised as in training" in capsys.readouterr().out
        base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=merge.quantization_of(run))
        tokenizer = AutoTokenizer.from_pretrained(run)
        model = with_adapter(base, run, tokenizer).eval()
        for module in model.modules():  # its fast CPU path for inference takes no matrices as small as these
            module.training = isinstance(module, bitsandbytes.nn.Linear4bit)
        with torch.inference_mode():
            trained = model(**tokenizer(QUESTION, return_tensors="pt")).logits
        merged = self.logits(tmp_path / "merged")
        assert torch.allclose(merged, trained, atol=1e-3)
        assert not torch.allclose(merged, self.logits(run), atol=1e-3)  # on the base as it is in its files
        assert not has_errors(verify(tmp_path / "merged"))
