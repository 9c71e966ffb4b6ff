"""What may change between two starts of a run, what is refused, and that what is let through takes effect."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, losses, settings, write_jsonl
from safetensors.torch import load_file, save_file

from open_r1.errors import UserError
from open_r1.resuming import BATCH, FIXED, FREE, changed, compare, kind_of, launch_of, require_same_run
from open_r1.run_state import held, read_state, record, record_end
from open_r1.schema import SCHEMA
from open_r1.sft import main

KEYS = sorted(SCHEMA["properties"])


def argv(tiny_model, chat_file, out, **values):
    return settings(
        **{
            "model_name_or_path": tiny_model,
            "dataset_name": chat_file,
            "dataset_max_samples": 60,
            "output_dir": out,
            "max_steps": 8,
            "save_steps": 4,
            "warmup_steps": 2,
            **values,
        }
    )


@pytest.fixture(scope="module")
def whole(tiny_model, chat_file, tmp_path_factory):
    """A finished run of 8 steps with checkpoints 4 and 8."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(argv(tiny_model, chat_file, out)) == 0
    return out


@pytest.fixture
def half(whole, tmp_path):
    """The same run as if it had been killed in step 5."""
    out = tmp_path / "run"
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoint-8", "*.safetensors.bak"))
    for path in out.iterdir():
        if path.is_file() and path.name not in ("run_state.json", "order.jsonl"):
            path.unlink()
    record(str(out), status="running", global_step=4)
    return out


@pytest.fixture
def again(tiny_model, chat_file, half):
    """Start the killed run again with other settings; returns the exit code."""

    def start(**values):
        return main(argv(tiny_model, chat_file, half, **values))

    return start


def logged(out, key):
    return losses(out, key)


class TestEveryKey:
    """None of the settings may change in silence."""

    @pytest.mark.parametrize("key", KEYS)
    def test_it_is_noted_or_refused_and_named(self, key):
        kind = kind_of(key)
        after = {"max_steps": 9, key: ["another"] if key == "allow_changes" else "another"}
        if kind == "free":
            notes = compare({"max_steps": 9}, after, "out")
            assert len(notes) == 1
            assert key in notes[0]
        elif kind != "batch":
            with pytest.raises(UserError, match=rf"out holds a run with other settings \(.*\b{key}: .*another"):
                compare({"max_steps": 9}, after, "out")

    @pytest.mark.parametrize("key", [key for key in KEYS if kind_of(key) == "decisive"])
    def test_what_changes_the_run_is_let_through_by_name(self, key):
        with pytest.raises(UserError, match=rf"say allow_changes: \[{key}\] to go on under them"):
            compare({}, {key: "another"}, "out")
        assert any(key in note for note in compare({}, {key: "another", "allow_changes": [key]}, "out"))

    @pytest.mark.parametrize("key", [key for key in KEYS if kind_of(key) == "fixed"])
    def test_what_the_state_is_made_for_never_is(self, key):
        with pytest.raises(UserError, match=f"its optimizer or weights fit no other {key}"):
            compare({}, {key: "another", "allow_changes": [key]}, "out")

    def test_the_kinds_name_keys_that_there_are(self):
        gone = ("log", "overwrite_", "gradient_checkpointing")  # also older names
        for prefix in (*FREE, *FIXED):
            assert any(key.startswith(prefix) for key in KEYS) or prefix in gone, prefix
        assert set(BATCH) <= set(KEYS)

    def test_the_documentation_lists_what_is_free_and_fixed(self):
        lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
        for kind, told in (
            ("free", "take effect, with a note"),
            ("fixed", "refused: the state"),
            ("batch", "as many"),
        ):
            [row, *_] = [line for line in lines if line.startswith("| `") and told in line]
            named = re.findall(r"`([a-z_0-9]+)(\*?)`", row.split("|")[1])
            keys = {key for key in KEYS if kind_of(key) == kind}
            found = {key for key in KEYS if any(key == name or star and key.startswith(name) for name, star in named)}
            assert found == keys, found ^ keys

    def test_what_is_learnt_is_never_free(self):
        for key in (
            *("learning_rate", "num_train_epochs", "max_steps", "seed", "data_seed", "max_length", "packing", "optim"),
            *("dataset_name", "dataset_mixture", "supervision", "chat_template", "weight_decay", "warmup_steps"),
            *("lr_scheduler_type", "max_grad_norm", "bf16", "dtype", "lora_r", "model_name_or_path", "longest_first"),
            *("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience", "eval_dataset_name"),
        ):
            assert kind_of(key) in ("decisive", "fixed"), key

    def test_a_default_that_is_written_out_is_no_change(self):
        assert changed({}, {"learning_rate": 2e-05, "packing": False, "save_steps": 500}) == {}
        assert changed({"warmup_steps": 3}, {}) == {"warmup_steps": (3, 0)}


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"learning_rate": 5e-3}, "learning_rate: 0.001 -> 0.005"),
            ({"max_steps": 12}, "max_steps: 8 -> 12"),
            ({"seed": 3}, "seed: 42 -> 3"),
            ({"max_length": 100}, "max_length: 128 -> 100"),
            ({"packing": True}, "packing: False -> True"),
            ({"dataset_max_samples": 50}, "dataset_max_samples: 60 -> 50"),
            ({"optim": "sgd"}, "optim: 'adamw_torch_fused' -> 'sgd'"),
            ({"use_peft": True}, "use_peft: False -> True"),
            ({"learning_rate": 5e-3, "seed": 3}, "learning_rate: 0.001 -> 0.005; seed: 42 -> 3"),
        ],
    )
    def test_before_weights_are_loaded(self, again, half, monkeypatch, capsys, values, named):
        monkeypatch.setattr("open_r1.model.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("load"))
        before = read_state(str(half))
        assert again(**values) == 2
        told = capsys.readouterr().err
        assert named in told
        state = read_state(str(half))
        assert state["settings"] == before["settings"]
        assert (state["status"], named in state["reason"]) == ("failed", True)

    def test_other_rows_a_step(self, again, capsys):
        assert again(per_device_train_batch_size=4) == 2
        told = capsys.readouterr().err
        assert "was trained with 2 rows a step, and a step would now take 4" in told
        assert "set global_batch_size: 2, or say allow_changes: [global_batch_size]" in told

    def test_other_rows_under_the_leave_for_something_else(self, tiny_model, chat_file, tmp_path, capsys):
        path, out = tmp_path / "rows.jsonl", tmp_path / "run"
        rows = Path(chat_file).read_text().splitlines(keepends=True)[:60]
        path.write_text("".join(rows))
        assert main(argv(tiny_model, path, out)) == 0
        shutil.rmtree(out / "checkpoint-8")
        record(str(out), status="running")
        path.write_text("".join(rows[::-1]))
        assert main(argv(tiny_model, path, out, learning_rate=5e-3, allow_changes=["learning_rate"])) == 2
        assert "checkpoint-4 was trained on other rows" in capsys.readouterr().err

    @pytest.mark.parametrize("what", ["base", "precision", "evaluated", "config file"])
    def test_what_no_setting_says(self, tiny_model, chat_file, conversations, tmp_path, capsys, monkeypatch, what):
        model, tests, config = tmp_path / "model", tmp_path / "tests.jsonl", tmp_path / "accelerate.json"
        shutil.copytree(tiny_model, model)
        write_jsonl(tests, conversations[100:110])
        config.write_text('{"even_batches": true}')
        values = {"eval_dataset_name": tests, "do_eval": True, "accelerator_config": config, "save_steps": 4}
        values |= {"use_peft": True} if what == "base" else {}
        out = tmp_path / "run"
        assert main(argv(model, chat_file, out, **values)) == 0
        shutil.rmtree(out / "checkpoint-8")
        record(str(out), status="running")
        if what == "base":
            other = {name: tensor * 1.5 for name, tensor in load_file(model / "model.safetensors").items()}
            save_file(other, model / "model.safetensors", metadata={"format": "pt"})
        elif what == "precision":
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        elif what == "evaluated":
            write_jsonl(tests, conversations[110:120])
        else:
            config.write_text('{"even_batches": false}')
        capsys.readouterr()
        assert main(argv(model, chat_file, out, **values)) == 2
        said = {
            "base": "is an adapter of other weights",
            "precision": "was trained in no, this would be bf16",
            "evaluated": "was evaluated on other rows",
            "config file": "accelerator_config: what the file says has changed",
        }
        assert said[what] in capsys.readouterr().err

    def test_a_refused_start_leaves_no_state_that_a_wrapper_would_start_again(self, again, half, capsys):
        record(str(half), status="preempted", reason="SIGTERM, saved as checkpoint-4")
        assert again(learning_rate=5e-3) == 2
        state = read_state(str(half))
        assert (state["status"], "learning_rate" in state["reason"]) == ("failed", True)
        assert again() == 0

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"auto_find_batch_size": True}, "auto_find_batch_size changes the rows of a step"),
            ({"ignore_data_skip": True}, "would read rows again"),
            ({"save_on_each_node": True}, "leaves each node with a part of a checkpoint"),
            (
                {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "test_split_size": 6},
                "make eval_steps (2) and save_steps (4) the same",
            ),
        ],
    )
    def test_settings_that_cannot_be_gone_on_with_exactly(self, again, capsys, values, told):
        assert again(**values) == 2
        assert told in capsys.readouterr().err

    def test_the_directory_of_the_model(self, tiny_model, chat_file, tmp_path, capsys):
        shutil.copytree(tiny_model, tmp_path / "model")
        assert main(argv(tmp_path / "model", chat_file, tmp_path / "." / "model")) == 2
        assert "output_dir is the model's directory" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("before", "after", "named"),
        [
            ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, {"max_steps": 9}, "max_steps"),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"eval_steps": 9}, "eval_steps"),
            ({"load_best_model_at_end": True}, {"eval_steps": 9}, "eval_steps"),
        ],
    )
    def test_what_depends_on_other_settings(self, before, after, named):
        with pytest.raises(UserError, match=rf"other settings \({named}: "):
            compare(before, {**before, **after}, "out")

    def test_a_key_that_there_is_not(self, again, capsys):
        assert again(allow_changes=["learning_rat"]) == 2
        assert "'learning_rat' is none; did you mean learning_rate" in capsys.readouterr().err

    def test_an_end_before_the_checkpoint(self, again, capsys):
        assert again(max_steps=3, warmup_steps=2, allow_changes=["max_steps"]) == 2
        assert "checkpoint-4 is of step 4, and the run is to end at step 3" in capsys.readouterr().err

    def test_a_finished_run_under_another_rate(self, tiny_model, chat_file, whole, capsys):
        values = {"learning_rate": 5e-3, "allow_changes": ["learning_rate"]}
        assert main(argv(tiny_model, chat_file, whole, **values)) == 2
        assert "finished at step 8: no step is left to go on under learning_rate" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"per_device_train_batch_size": 4}, "no step is left to go on under per_device_train_batch_size: 2 -> 4"),
            ({"resume": "never"}, "resume: never, but"),
        ],
    )
    def test_a_finished_run_is_not_passed_off_as_another(self, tiny_model, chat_file, whole, capsys, values, told):
        assert main(argv(tiny_model, chat_file, whole, **values)) == 2
        assert told in capsys.readouterr().err
        assert read_state(str(whole))["status"] == "complete"

    def test_what_changes_nothing_in_a_finished_run_is_said(self, tiny_model, chat_file, whole, caplog):
        assert main(argv(tiny_model, chat_file, whole, logging_steps=2)) == 0
        assert "the run is finished, so this changes nothing: logging_steps: 1.0 -> 2.0" in caplog.text

    def test_other_versions_are_noted(self, again, half, caplog):
        from open_r1 import checkpoints

        seal = checkpoints.read_seal(half / "checkpoint-4")
        seal["versions"]["torch"] = "1.0"
        files = seal.pop("files")
        checkpoints.seal(half / "checkpoint-4", {name: digest for name, (_, digest) in files.items()}, seal)
        assert again() == 0
        assert "since checkpoint-4: torch: '1.0' -> " in caplog.text

    def test_what_had_a_default_once_and_is_settled_now(self, again, half, caplog):
        from open_r1 import checkpoints

        seal = checkpoints.read_seal(half / "checkpoint-4")
        seal["defaults"] |= {"use_liger_kernel": False}
        del seal["settled"]["use_liger_kernel"]
        files = seal.pop("files")
        checkpoints.seal(half / "checkpoint-4", {name: digest for name, (_, digest) in files.items()}, seal)
        assert again() == 0
        assert "use_liger_kernel" not in caplog.text  # neither as changed nor as settled otherwise

    def test_a_checkpoint_of_an_earlier_version(self, half):
        path = sorted(half.glob("checkpoint-*"))[-1] / "progress_0.json"
        progress = json.loads(path.read_text())
        del progress["meter"]
        path.write_text(json.dumps(progress))
        with pytest.raises(UserError, match=f"{path.parent} was written by an earlier version"):
            require_same_run(str(path.parent), {})


class TestTakesEffect:
    def test_nothing_changed_is_the_same_run(self, again, half, whole):
        assert again() == 0
        for key in ("loss", "learning_rate", "grad_norm", "num_tokens", "mean_token_accuracy", "train_loss"):
            assert logged(half, key) == logged(whole, key)
        assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def test_saying_what_was_settled_is_the_same_run(self, again, half, whole, tiny_model, chat_file, capsys):
        settled = json.loads((half / "run_state.json").read_text())["settled"]
        assert settled == {"padding_free": True, "attn_implementation": "varlen", "use_liger_kernel": False}
        assert main(argv(tiny_model, chat_file, whole, **settled)) == 0  # which is finished
        assert again(**{**settled, "padding_free": False}) == 2
        assert "other settings (padding_free: True -> False)" in capsys.readouterr().err
        assert again(**settled) == 0
        assert losses(half) == losses(whole)

    def test_settling_otherwise_is_told(self, again, half, monkeypatch, caplog):
        monkeypatch.setattr("open_r1.defaults.padding_free", lambda *_: (False, "as on another machine"))
        assert again() == 0
        assert "since checkpoint-4: padding_free: True -> False: losses may differ" in caplog.text

    def test_the_learning_rate(self, again, half, whole):
        assert again(learning_rate=5e-3, allow_changes=["learning_rate"]) == 0
        before, after = logged(whole, "learning_rate"), logged(half, "learning_rate")
        assert after[:4] == before[:4]
        assert after[4:] == pytest.approx([5 * rate for rate in before[4:]])
        assert logged(half, "loss")[:5] == logged(whole, "loss")[:5]
        assert logged(half, "loss")[5:] != logged(whole, "loss")[5:]

    @pytest.mark.parametrize("values", [{"weight_decay": 0.5}, {"adam_beta2": 0.5}, {"adam_epsilon": 1e-2}])
    def test_what_the_optimizer_keeps(self, again, half, whole, values):
        assert again(**values, allow_changes=[*values]) == 0
        assert logged(half, "loss")[:5] == logged(whole, "loss")[:5]
        assert logged(half, "loss")[6:] != logged(whole, "loss")[6:]
        assert logged(half, "learning_rate") == logged(whole, "learning_rate")

    def test_back_to_the_settings_of_the_checkpoint(self, again, half, whole, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("open_r1.trainer.OrderedTrainer.training_step", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                again(learning_rate=5e-3, allow_changes=["learning_rate"])
        assert again() == 0
        assert losses(half) == losses(whole)

    def test_another_batch_begins_with_the_next_unread_row(self, again, half, caplog, monkeypatch):
        from open_r1.order import Order

        taken, of_step = [], Order.of_step
        monkeypatch.setattr(Order, "of_step", lambda self, step: taken.append((self, step)) or of_step(self, step))
        assert again(per_device_train_batch_size=4, allow_changes=["global_batch_size"]) == 0
        assert "2 rows a step -> 4, beginning with the next unread row" in caplog.text
        order = taken[-1][0]
        assert of_step(order, 5).tolist() == order.rows(8, 12).tolist()
        assert of_step(order, 8).tolist() == order.rows(20, 24).tolist()

    def test_the_schedule(self, again, half):
        values = {"lr_scheduler_type": "constant_with_warmup", "allow_changes": ["lr_scheduler_type"]}
        assert again(**values) == 0
        assert logged(half, "learning_rate")[4:] == [1e-3] * 4

    def test_a_killed_run_that_is_to_be_longer(self, again, half, whole):
        assert again(max_steps=12, allow_changes=["max_steps"]) == 0
        rates = logged(half, "learning_rate")
        assert rates[:4] == logged(whole, "learning_rate")[:4]
        assert rates[4:] == pytest.approx([1e-3 * (12 - step) / 10 for step in range(4, 12)])

    def test_a_finished_run_is_opened_again_for_more_steps(self, tiny_model, chat_file, whole, tmp_path):
        out = tmp_path / "longer"
        shutil.copytree(whole, out)
        assert main(argv(tiny_model, chat_file, out, max_steps=12, allow_changes=["max_steps"])) == 0
        assert losses(out)[:8] == losses(whole)
        assert len(losses(out)) == 12
        assert (out / "order.jsonl").read_text().startswith((whole / "order.jsonl").read_text())
        state = read_state(str(out))
        assert (state["status"], state["global_step"]) == ("complete", 12)

    def test_more_epochs_under_a_constant_rate_need_no_leave(self, tiny_model, chat_file, tmp_path):
        def start(out, epochs):
            values = {"max_steps": None, "num_train_epochs": epochs, "lr_scheduler_type": "constant"}
            return main(argv(tiny_model, chat_file, out, dataset_max_samples=9, warmup_steps=None, **values))

        assert start(tmp_path / "three", 3) == 0
        assert start(tmp_path / "two", 2) == 0
        assert start(tmp_path / "two", 3) == 0
        assert losses(tmp_path / "two") == losses(tmp_path / "three")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "three")]
        assert weights[0] == weights[1]

    def test_where_and_when_to_log_save_and_evaluate(self, again, half, whole, caplog):
        assert again(logging_steps=2, save_steps=3, run_name="other") == 0
        steps = [entry["step"] for entry in json.loads((half / "trainer_state.json").read_text())["log_history"]]
        assert steps == [1, 2, 3, 4, 6, 8, 8]
        assert sorted(path.name for path in half.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (4, 6, 8)]
        assert "since checkpoint-4: logging_steps: 1.0 -> 2.0 from here on" in caplog.text
        assert "since checkpoint-4: save_steps: 4.0 -> 3.0 from here on" in caplog.text
        assert logged(half, "loss")[-1] == pytest.approx(sum(losses(whole)[6:]) / 2)

    def test_data(self, again, half, tiny_model, chat_file, tmp_path, capsys):
        rows = Path(chat_file).read_text().splitlines(keepends=True)[:60]
        other = tmp_path / "rows.jsonl"
        other.write_text("".join(rows[::-1]))
        assert again(dataset_name=other, allow_changes=["dataset_name"]) == 0
        lines = [json.loads(line)["data"] for line in (half / "order.jsonl").read_text().splitlines()]
        assert len(set(lines[:4])) == len(set(lines[4:])) == 1
        assert lines[3] != lines[4]

    def test_data_under_the_same_name(self, tiny_model, chat_file, tmp_path, whole, capsys):
        path, out = tmp_path / "rows.jsonl", tmp_path / "run"
        rows = Path(chat_file).read_text().splitlines(keepends=True)[:60]
        path.write_text("".join(rows))
        assert main(argv(tiny_model, path, out, save_steps=4)) == 0
        shutil.rmtree(out / "checkpoint-8")
        record(str(out), status="running")
        path.write_text("".join(rows[::-1]))
        assert main(argv(tiny_model, path, out)) == 2
        assert "checkpoint-4 was trained on other rows" in capsys.readouterr().err
        assert main(argv(tiny_model, path, out, allow_changes=["data"])) == 0

    def test_from_a_checkpoint_of_another_directory(self, tiny_model, chat_file, whole, tmp_path):
        out = tmp_path / "fork"
        assert main(argv(tiny_model, chat_file, out, resume=whole / "checkpoint-4")) == 0
        assert losses(out) == losses(whole)
        assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class TestMetrics:
    def test_they_are_of_the_whole_run_however_it_is_logged(self, tiny_model, chat_file, tmp_path, monkeypatch):
        from open_r1.trainer import OrderedTrainer

        def start(out):
            return main(argv(tiny_model, chat_file, out, logging_steps=3, save_steps=4))

        assert start(tmp_path / "whole") == 0
        step = OrderedTrainer.training_step

        def die(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise RuntimeError("planted")
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(OrderedTrainer, "training_step", die)
            with pytest.raises(RuntimeError, match="planted"):
                start(tmp_path / "torn")
        state = read_state(str(tmp_path / "torn"))
        assert (state["status"], state["reason"]) == ("failed", "RuntimeError: planted")
        assert start(tmp_path / "torn") == 0
        histories = [
            json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            for name in ("whole", "torn")
        ]
        for entry in (entry for history in histories for entry in history):
            for key in [key for key in entry if re.search("runtime|second|tflops|memory_bytes", key)]:
                del entry[key]
        assert histories[0] == histories[1]
        results = [json.loads((tmp_path / name / "train_results.json").read_text()) for name in ("whole", "torn")]
        assert results[0]["train_loss"] == results[1]["train_loss"]
        assert results[1]["train_runtime"] > 0


class TestState:
    def test_a_run_says_how_it_ended(self, whole):
        state = read_state(str(whole))
        assert (state["status"], state["reason"], state["global_step"]) == ("complete", "", 8)
        assert state["pid"] == os.getpid()
        assert {"host", "started", "updated", "settings", "data", "processes", "launch", "versions", "code"} <= {
            *state
        }

    def test_the_first_word_stands(self, tmp_path):
        record(str(tmp_path), status="running")
        record_end(str(tmp_path), "failed", "the cause")
        record_end(str(tmp_path), "failed", "what came of it")
        assert read_state(str(tmp_path))["reason"] == "the cause"

    def test_one_that_was_killed_is_put_down(self, tmp_path):
        record(str(tmp_path), status="running", global_step=5)
        with held(str(tmp_path)):
            state = read_state(str(tmp_path))
        assert (state["status"], state["global_step"]) == ("failed", 5)
        assert "ended without a word" in state["reason"]

    def test_another_run_in_the_directory_is_refused_with_who_it_is(self, tmp_path, tiny_model, chat_file, capsys):
        out = tmp_path / "run"
        code = f"""if True:
            import time
            from open_r1.run_state import held
            with held({str(out)!r}):
                print(1, flush=True)
                time.sleep(99)"""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "SLURM_JOB_ID": "4711"}
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as other:
            assert other.stdout.readline() == b"1\n"
            assert main(argv(tiny_model, chat_file, out)) == 2
            told = capsys.readouterr().err
            assert "is in use by another run (host " in told
            assert f"pid {other.pid}, job 4711" in told
            assert not (out / "run_state.json").exists()
            other.kill()
        for _ in range(50):  # the kernel drops the lock with the process
            try:
                with held(str(out)):
                    break
            except UserError:
                time.sleep(0.1)
        else:
            pytest.fail("the lock of a killed process holds")

    def test_a_home_directory_is_one_place(self, tiny_model, chat_file, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert main(argv(tiny_model, chat_file, "~/run", max_steps=2, warmup_steps=None)) == 0
        assert not (tmp_path / "~").exists()
        assert read_state(str(tmp_path / "run"))["status"] == "complete"

    def test_a_run_that_is_refused_leaves_nothing(self, tiny_model, tmp_path):
        assert main(argv(tiny_model, tmp_path / "no.jsonl", tmp_path / "new" / "run")) == 2
        assert not (tmp_path / "new" / "run").exists()


@pytest.mark.parametrize(
    ("processes", "sharded", "launch"), [(2, "true", "fsdp"), (1, "true", "ddp"), (2, None, "ddp")]
)
def test_fsdp_is_known_before_there_is_a_trainer(monkeypatch, processes, sharded, launch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if sharded:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    assert launch_of(SimpleNamespace(deepspeed_plugin=None, world_size=processes)) == launch
