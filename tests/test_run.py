"""The whole run, as a user starts it: trains, matches stock TRL, resumes, finishes once, refuses bad input early."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARES, losses, settings, write_jsonl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig as StockConfig
from trl import SFTTrainer

from open_r1.chat import CHATML
from open_r1.model import fused
from open_r1.sft import main
from open_r1.trainer import Order, OrderedTrainer, told_once


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").state_dict()


def same_weights(a, b):
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_trains_evaluates_and_saves_a_model_that_serves(tiny_model, chat_file, tmp_path, capsys):
    out = tmp_path / "run"
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        output_dir=out,
        max_steps=30,
        test_split_size=0.1,
        eval_strategy="steps",
        eval_steps=10,
        learning_rate=1e-2,
    )
    assert main(argv) == 0
    assert losses(out)[-1] < losses(out)[0] - 0.5
    assert len(losses(out, "eval_loss")) == 4  # three on the way, one at the end
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.use_cache is True
    assert {"README.md", "train_results.json", "eval_results.json", "run_state.json", "checkpoint-30"} <= {
        path.name for path in out.iterdir()
    }
    summary = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split("  ")[0] for line in summary] == ["trained", "train loss", "eval loss", "model", "beside it"]
    assert str(out) in summary[3]


class TestParityWithStockTrl:
    """The same rows in the same order give the same losses as TRL's own preparation and sampler."""

    def stock(self, tiny_model, rows, out, **values):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template, tokenizer.pad_token = CHATML, "<|endoftext|>"
        args = StockConfig(
            output_dir=str(out),
            use_cpu=True,
            bf16=False,
            max_steps=10,
            max_length=128,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
            eos_token="<|im_end|>",
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="sequential",
            **values,
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def ours(self, tiny_model, rows, tmp_path, **values):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        argv = settings(
            model_name_or_path=tiny_model,
            dataset_name=path,
            output_dir=tmp_path / "ours",
            max_steps=10,
            per_device_train_batch_size=4,
            **{"train_sampling_strategy": "sequential", **values},
        )
        assert main(argv) == 0
        return losses(tmp_path / "ours")

    def test_rows_laid_out_in_our_order(self, tiny_model, conversations, tmp_path):
        drawn = Order(np.ones(len(conversations)), 42, 4, "random", longest_first=False).rows(0, 40).tolist()
        assert drawn != sorted(drawn)
        rows = [conversations[row] for row in drawn]
        theirs = self.stock(tiny_model, rows, tmp_path, assistant_only_loss=True)
        ours = self.ours(
            tiny_model, conversations, tmp_path, train_sampling_strategy="random", longest_first=False, seed=42
        )
        assert len(ours) == len(theirs) == 10
        assert ours == pytest.approx(theirs, abs=1e-5)

    @pytest.mark.parametrize("packing", [False, True])
    def test_messages(self, tiny_model, conversations, tmp_path, packing):
        theirs = self.stock(tiny_model, conversations, tmp_path, assistant_only_loss=True, packing=packing)
        ours = self.ours(tiny_model, conversations, tmp_path, packing=packing)
        assert len(ours) == len(theirs) == 10
        assert ours == pytest.approx(theirs, abs=1e-5)

    def test_prompt_and_completion(self, tiny_model, pairs, tmp_path):
        rows = [{"prompt": f"{question}\n", "completion": text[:400]} for question, text in pairs]
        theirs = self.stock(tiny_model, rows, tmp_path)
        ours = self.ours(tiny_model, rows, tmp_path)
        assert len(ours) == len(theirs) == 10
        assert ours == pytest.approx(theirs, abs=1e-5)

    def test_prompt_and_completion_as_messages(self, tiny_model, conversations, tmp_path):
        rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in conversations]
        theirs = self.stock(tiny_model, rows, tmp_path, assistant_only_loss=True)
        assert self.ours(tiny_model, rows, tmp_path) == pytest.approx(theirs, abs=1e-5)

    def test_text(self, tiny_model, pairs, tmp_path):
        rows = [{"text": text[:400]} for _, text in pairs]
        theirs = self.stock(tiny_model, rows, tmp_path)
        assert self.ours(tiny_model, rows, tmp_path) == pytest.approx(theirs, abs=1e-5)


class TestResume:
    def argv(self, tiny_model, chat_file, out, **values):
        return settings(
            **{
                "model_name_or_path": tiny_model,
                "dataset_name": chat_file,
                "output_dir": out,
                "max_steps": 9,
                "save_steps": 2,
                **values,
            }
        )

    @pytest.fixture
    def stop_at(self, monkeypatch):
        """Make training die at the end of a step, as if it had been killed there."""
        from transformers.trainer_callback import CallbackHandler

        on_step_end = CallbackHandler.on_step_end

        def arm(step):
            def die(self, args, state, control):
                if state.global_step == step:
                    raise KeyboardInterrupt
                return on_step_end(self, args, state, control)

            monkeypatch.setattr(CallbackHandler, "on_step_end", die if step else on_step_end)

        return arm

    @pytest.mark.parametrize("step", [1, 5, 8])
    @pytest.mark.parametrize("values", [{}, {"packing": True}, {"use_peft": True}], ids=["full", "packed", "lora"])
    def test_interrupted_anywhere_it_goes_on_from_the_last_checkpoint(
        self, tiny_model, chat_file, tmp_path, stop_at, caplog, step, values
    ):
        caplog.set_level("INFO", "open_r1")
        whole, torn = tmp_path / "whole", tmp_path / "torn"
        assert main(self.argv(tiny_model, chat_file, whole, **values)) == 0
        stop_at(step)
        with pytest.raises(KeyboardInterrupt):
            main(self.argv(tiny_model, chat_file, torn, **values))
        stop_at(None)
        assert main(self.argv(tiny_model, chat_file, torn, **values)) == 0
        saved = (step - 1) // 2 * 2
        assert ("resuming from" in caplog.text) == bool(saved)
        if saved:
            assert f"checkpoint-{saved}" in caplog.text
        assert losses(torn) == losses(whole)
        assert len(losses(torn)) == 9
        assert same_weights(whole, torn)

    def test_a_mixture_is_split_and_goes_on_as_before(self, tiny_model, five, tmp_path, stop_at):
        whole, torn = (self.argv(tiny_model, None, tmp_path / name, **mixture_of(five)) for name in ("whole", "torn"))
        assert main(whole) == 0
        stop_at(7)
        with pytest.raises(KeyboardInterrupt):
            main(torn)
        stop_at(None)
        assert main(torn) == 0
        for key, count in (("loss", 9), ("eval_loss", 4)):  # one more behind the save
            assert losses(tmp_path / "torn", key) == losses(tmp_path / "whole", key)
            assert len(losses(tmp_path / "whole", key)) == count
        assert same_weights(tmp_path / "whole", tmp_path / "torn")

    def test_a_finished_run_started_again_says_so_and_touches_nothing(self, tiny_model, chat_file, tmp_path, caplog):
        caplog.set_level("INFO", "open_r1")
        argv = self.argv(tiny_model, chat_file, tmp_path / "run", max_steps=2)
        assert main(argv) == 0
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        assert main(argv) == 0
        assert "this run finished at step 2" in caplog.text
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before

    def test_it_does_not_go_on_with_other_rows(self, tiny_model, chat_file, tmp_path, stop_at, capsys):
        path = tmp_path / "rows.jsonl"
        shutil.copy(chat_file, path)
        argv = self.argv(tiny_model, path, tmp_path / "run")
        stop_at(5)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
        stop_at(None)
        ledger = (tmp_path / "run" / "ledger.json").read_text()
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[::-1]))
        assert main(argv) == 2
        assert "checkpoint-4 was trained on other rows" in capsys.readouterr().err
        assert (tmp_path / "run" / "ledger.json").read_text() == ledger
        path.write_text("".join(lines))
        assert main(argv) == 0

    def test_the_recipe_it_writes_is_the_same_run(self, tiny_model, chat_file, tmp_path, caplog):
        caplog.set_level("INFO", "open_r1")
        argv = self.argv(tiny_model, chat_file, tmp_path / "run", max_steps=3, packing=True)
        assert main(argv) == 0
        written = str(tmp_path / "run" / "recipe.yaml")
        assert main(["--config", written]) == 0
        assert "this run finished at step 3" in caplog.text
        assert main(["--config", written, "--output_dir", str(tmp_path / "again")]) == 0
        assert losses(tmp_path / "again") == losses(tmp_path / "run")
        assert same_weights(tmp_path / "again", tmp_path / "run")

    def test_a_finished_run_is_not_passed_off_as_one_with_other_settings(
        self, tiny_model, chat_file, tmp_path, capsys
    ):
        assert main(self.argv(tiny_model, chat_file, tmp_path / "run", max_steps=2)) == 0
        assert main(self.argv(tiny_model, chat_file, tmp_path / "run", max_steps=3)) == 2
        assert "holds a run with other settings (max_steps: 2 -> 3)" in capsys.readouterr().err

    @pytest.mark.parametrize("values", [{}, {"use_peft": True}], ids=["full", "lora"])
    def test_killed_after_the_last_step_it_saves_without_training_again(
        self, tiny_model, chat_file, tmp_path, monkeypatch, values
    ):
        out = tmp_path / "run"
        more = {"max_steps": 4, "lr_scheduler_type": "constant", "do_eval": True, "test_split_size": 9, **values}
        argv = self.argv(tiny_model, chat_file, out, **more)
        assert main(argv) == 0
        whole, logged, evaluated = weights(out), losses(out), losses(out, "eval_loss")
        for path in out.iterdir():
            if path.is_file() and path.name != "run_state.json":
                path.unlink()
        monkeypatch.setattr(SFTTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
        assert main(argv) == 0
        assert all(torch.equal(value, whole[name]) for name, value in weights(out).items())
        assert losses(out) == logged
        assert losses(out, "eval_loss") == pytest.approx(evaluated)
        assert json.loads((out / "run_state.json").read_text())["global_step"] == 4
        assert main(argv) == 0  # and is finished now

    def test_other_settings_are_refused_and_logging_is_free(self, tiny_model, chat_file, tmp_path, stop_at, capsys):
        out = tmp_path / "run"
        stop_at(5)
        with pytest.raises(KeyboardInterrupt):
            main(self.argv(tiny_model, chat_file, out))
        stop_at(None)
        assert main(self.argv(tiny_model, chat_file, out, learning_rate=5e-4)) == 2
        assert "holds a run with other settings (learning_rate: 0.001 -> 0.0005)" in capsys.readouterr().err
        assert main(self.argv(tiny_model, chat_file, out, logging_steps=2)) == 0


def test_training_goes_on_from_an_existing_adapter(tiny_model, chat_file, tmp_path, capsys):
    from safetensors.torch import load_file

    common = {"dataset_name": chat_file, "use_peft": True}
    assert main(settings(model_name_or_path=tiny_model, output_dir=tmp_path / "first", max_steps=5, **common)) == 0
    first = tmp_path / "first"
    assert main(settings(model_name_or_path=first, output_dir=tmp_path / "second", max_steps=5, **common)) == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert losses(tmp_path / "second")[0] < losses(first)[0]
    argv = settings(model_name_or_path=first, output_dir=tmp_path / "third", dataset_name=chat_file)
    assert main(argv) == 2
    assert "is a LoRA adapter of" in capsys.readouterr().err


def test_added_chat_tokens_are_trained_and_saved(tmp_path, pairs, chat_file):
    from make_docstrings import write_model

    write_model(
        tmp_path / "bare", [text for pair in pairs[:50] for text in pair], 400, 32, 1, special=["<|endoftext|>"]
    )
    argv = settings(model_name_or_path=tmp_path / "bare", dataset_name=chat_file, output_dir=tmp_path / "run")
    assert main([*argv, "--learning_rate", "0.01"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    embeddings = weights(tmp_path / "run")["model.embed_tokens.weight"]
    assert len(tokenizer) == len(embeddings) == 402
    assert tokenizer.eos_token == "<|im_end|>"


def test_what_follows_the_save_cannot_lose_the_model(tiny_model, chat_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(SFTTrainer, "evaluate", lambda self: 1 / 0)
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        output_dir=tmp_path / "run",
        do_eval=True,
        test_split_size=9,
    )
    assert main(argv) == 1
    assert "evaluation failed; the trained model is safe in" in caplog.text
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "README.md").is_file()  # what comes after the failure is still done
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["status"] == "failed"


def test_an_adapter_with_added_chat_tokens_can_be_trained_on(tmp_path, pairs, chat_file):
    from make_docstrings import write_model

    write_model(
        tmp_path / "bare", [text for pair in pairs[:50] for text in pair], 400, 32, 1, special=["<|endoftext|>"]
    )
    common = {"dataset_name": chat_file, "use_peft": True, "lora_target_modules": "all-linear"}
    assert main(settings(model_name_or_path=tmp_path / "bare", output_dir=tmp_path / "one", **common)) == 0
    assert main(settings(model_name_or_path=tmp_path / "one", output_dir=tmp_path / "two", **common)) == 0
    assert losses(tmp_path / "two")


def test_a_dry_run_checks_everything_but_the_weights(tiny_model, chat_file, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", "open_r1")
    monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run", dry_run=True)
    assert main(argv) == 0
    assert "this recipe can be run" in capsys.readouterr().out
    assert "train, rows" in caplog.text
    assert not (tmp_path / "run").exists()


ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
REFUSED = {
    "unknown key": ({"learning_rte": "1"}, "--learning_rte is not a setting; did you mean learning_rate?"),
    "unknown dtype": ({"dtype": "bf16x"}, "dtype is one of auto, bfloat16, float16, float32; found 'bf16x'"),
    "unknown attention": ({"attn_implementation": "flash"}, "attn_implementation is one of auto, varlen, eager"),
    "attention that is not installed": (
        {"attn_implementation": "flash_attention_3"},
        "is not installed or finds no GPU",
    ),
    "unknown file": ({"dataset_name": "/no/where.jsonl"}, "/no/where.jsonl: no such file or directory"),
    "empty file": ({"dataset_name": b""}, "rows.jsonl: this file is empty"),
    "broken line": ({"dataset_name": b'{"text": "a"}\n{"te\n'}, "rows.jsonl:2: not valid JSON"),
    "missing split": ({"dataset_train_split": "train_sft"}, "no split train_sft; it has train"),
    "missing evaluation split": ({"eval_strategy": "epoch"}, "evaluation is asked for"),
    "no dataset": ({"dataset_name": None}, "no dataset: set dataset_name"),
    "both kinds of dataset": ({"dataset_mixture": {"datasets": [{"id": "a"}]}}, "is set too; keep one of them"),
    "wrong weight": (
        {"dataset_name": None, "dataset_mixture": {"datasets": [{"id": "a", "weight": -2}]}},
        "dataset_mixture.datasets.0.weight must be above 0; found -2",
    ),
    "columns of no format": ({"dataset_name": b'{"a": 1}\n'}, "no known format in its columns a"),
    "null messages": (
        {"dataset_name": json.dumps(ROW).encode() + b'\n{"messages": null}\n'},
        "row 1 (counting from 0)",
    ),
    "image rows": ({"dataset_name": b'{"messages": [], "images": ["x"]}\n'}, "column images holds images"),
    "no model": ({"model_name_or_path": None}, "no model: set model_name_or_path"),
    "unknown model": ({"model_name_or_path": "./nowhere"}, "no such directory: ./nowhere"),
    "no tokenizer": ({"model_name_or_path": "BARE"}, "its tokenizer cannot be loaded"),
    "no batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; found 0"),
    "negative length": ({"max_length": -5}, "max_length must be at least 1; found -5"),
    "tokens outside the vocabulary": (
        {"dataset_name": b'{"input_ids": [1, 99999]}\n'},
        "outside the vocabulary of 600",
    ),
    "evaluation data for nothing": ({"eval_dataset_name": "x.jsonl"}, "nothing evaluates on it"),
    "packed evaluation alone": ({"eval_packing": "true"}, "eval_packing without packing"),
    "nowhere to write": ({"output_dir": "FILE"}, "is no directory that can be written to"),
    "a broken adapter": ({"model_name_or_path": "ADAPTER", "use_peft": "true"}, "names no base model"),
    "packing without a length": ({"packing": "true", "max_length": "none"}, "packing needs max_length"),
    "best without evaluation": (
        {"load_best_model_at_end": "true"},
        "make save_strategy (steps) and eval_strategy (no)",
    ),
    "contradiction of the trainer": (
        {"eval_strategy": "steps", "eval_steps": "0", "logging_steps": "0"},
        "cannot be run",
    ),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_weights_are_loaded(tiny_model, tmp_path, monkeypatch, capsys, values, message):
    monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    values = {"model_name_or_path": tiny_model, "dataset_name": write_jsonl(tmp_path / "ok.jsonl", [ROW]), **values}
    if isinstance(values["dataset_name"], bytes):
        (tmp_path / "rows.jsonl").write_bytes(values["dataset_name"])
        values["dataset_name"] = tmp_path / "rows.jsonl"
    if values["model_name_or_path"] == "ADAPTER":
        values["model_name_or_path"] = tmp_path / "adapter"
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    if values["model_name_or_path"] == "BARE":
        values["model_name_or_path"] = tmp_path / "bare"
        (tmp_path / "bare").mkdir()
        shutil.copy(Path(tiny_model) / "config.json", tmp_path / "bare")
    if values.get("output_dir") == "FILE":
        values["output_dir"] = values["dataset_name"]
    assert main(settings(**{"output_dir": tmp_path / "run", **values})) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def launch(*argv, **more):
    """Run a command from the root of the repository; returns its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **more},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def mixture_of(five):
    """Five sources of five formats in proportion, 20 rows of them held out."""
    sources = [{**source, "proportion": share} for source, share in zip(five, SHARES, strict=True)]
    mixture = {"datasets": sources, "stopping_strategy": "all_exhausted", "test_split_size": 20}
    return {"dataset_mixture": mixture, "eval_strategy": "steps", "eval_steps": 3}


def test_two_processes_train_on_a_mixture_as_one_does(tiny_model, five, tmp_path):
    common = {"model_name_or_path": tiny_model, "max_steps": 6, "per_device_eval_batch_size": 1, **mixture_of(five)}
    launch(
        *("accelerate", "launch", "--config_file", "recipes/accelerate_configs/ddp.yaml"),
        *("--num_processes", 2, "--main_process_port", 0, "src/open_r1/sft.py"),
        *settings(**common, per_device_train_batch_size=2, output_dir=tmp_path / "two"),
    )
    launch(
        *(sys.executable, "-m", "open_r1.sft"),
        *settings(**common, per_device_train_batch_size=4, output_dir=tmp_path / "one"),
    )
    two, one = ((tmp_path / name / "ledger.json").read_text() for name in ("two", "one"))
    assert json.loads(two)["eval"] == json.loads(one)["eval"]
    assert json.loads(one)["eval"]["total"]["trained"] == 20
    for key, count in (("loss", 6), ("eval_loss", 3)):  # one more behind the save
        assert len(losses(tmp_path / "two", key)) == count
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), abs=1e-4)
    two, one = ((tmp_path / name / "order.jsonl").read_text() for name in ("two", "one"))
    assert two == one
    assert [json.loads(line)["step"] for line in two.splitlines()] == [1, 2, 3, 4, 5, 6]


def test_help_is_five_times_faster_than_that_of_trl():
    def seconds(*argv):
        started = time.perf_counter()
        assert "--learning_rate" in launch(*argv)
        return time.perf_counter() - started

    ours = min(seconds(sys.executable, "src/open_r1/sft.py", "--help") for _ in range(3))
    assert seconds("trl", "sft", "--help") > 5 * ours


class TestHowBatchesAreTrained:
    @pytest.fixture
    def modes(self, monkeypatch):
        """Of each batch that was trained or evaluated: whether all, some or none of the model's parts trained."""
        found = {True: [], False: []}
        compute = SFTTrainer.compute_loss

        def noted(self, model, *args, **kwargs):
            parts = [part.training for part in self.model.modules()]
            found[torch.is_grad_enabled()].append("all" if all(parts) else "some" if any(parts) else "none")
            return compute(self, model, *args, **kwargs)

        monkeypatch.setattr(SFTTrainer, "compute_loss", noted)
        return found

    @pytest.mark.parametrize("lora", [False, True])
    def test_all_of_a_model_trains_also_behind_evaluations(self, tiny_model, chat_file, tmp_path, modes, lora):
        argv = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path, "max_steps": 4}
        argv |= {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
        argv |= {"use_peft": lora, "sample_prompts": ["What is a list?"], "sample_steps": 1}
        assert main(settings(**argv)) == 0
        assert modes[True] == ["all"] * 8
        assert modes[False] and set(modes[False]) == {"none"}

    def test_a_model_inside_another_is_told_when_it_does_not_train(self):
        outer, inner = torch.nn.Sequential(torch.nn.Linear(1, 1)).train(), torch.nn.Dropout().eval()
        outer.append(inner)
        with told_once([*outer.modules()]):
            outer.train()
        assert inner.training
        told = []
        inner.train = told.append
        with told_once([*outer.modules()]):
            assert outer.train() is outer and told == []
            outer.eval()
            assert not outer.training and told == [False]
        assert "train" not in vars(outer)

    @pytest.mark.parametrize("lora", [False, True])
    def test_operations_are_counted_as_upstream_does(self, tiny_model, chat_file, tmp_path, monkeypatch, lora):
        argv = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "max_steps": 3, "use_peft": lora}
        assert main(settings(**argv, output_dir=tmp_path / "ours")) == 0
        monkeypatch.delattr(OrderedTrainer, "floating_point_ops")
        assert main(settings(**argv, output_dir=tmp_path / "upstream")) == 0
        states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("ours", "upstream")]
        assert states[0]["total_flos"] == states[1]["total_flos"] > 0

    def test_adapters_are_fused_while_it_trains_and_not_behind_it(self, tiny_model, chat_file, tmp_path, monkeypatch):
        seen, step = [], OrderedTrainer.training_step

        def noted(self, model, *args, **kwargs):
            seen.append([layer for layer in self.model.modules() if hasattr(layer, "lora_A")])
            assert all(layer.forward.func is fused for layer in seen[-1])
            return step(self, model, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "training_step", noted)
        argv = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "use_peft": True}
        assert main(settings(**argv, output_dir=tmp_path)) == 0
        assert len(seen) == 2 and seen[0] and not any("forward" in vars(layer) for layer in seen[0])
