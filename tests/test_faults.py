"""Signals, numbers that are none, losses that jump, steps that do not end; in one process, `slow/` launches more."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import losses, settings, write_jsonl
from safetensors.torch import load_file

from open_r1 import faults, stopping
from open_r1.faults import Losses
from open_r1.run_state import read_state
from open_r1.sft import main
from open_r1.stopping import EXIT_CODE, Preempted, Stop, heeded
from open_r1.trainer import OrderedTrainer

TIMES = ("runtime", "seconds", "per_second", "tflops", "memory_bytes")


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A shell ignores SIGINT for what it starts in the background, and a run leaves it at that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def argv(tiny_model, chat_file, tmp_path):
    """The command line of a run of 26 rows, 4 a step, two epochs of 6 steps, in a directory of that name."""

    def argv(name, **values):
        common = {
            "model_name_or_path": tiny_model,
            "dataset_name": chat_file,
            "dataset_max_samples": 26,
            "output_dir": tmp_path / name,
            "max_steps": None,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "save_steps": 5,
        }
        return settings(**{**common, **values})

    return argv


@pytest.fixture
def at(monkeypatch):
    """Do something in the training step behind so many optimiser steps; None takes it back."""
    step = OrderedTrainer.training_step

    def at(number, do=None):
        def planted(self, *args, **kwargs):
            if self.state.global_step == number:
                do(self)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "training_step", step if number is None else planted)

    return at


def history(out):
    """What a run logged, but times."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if not any(name in key for name in TIMES)} for entry in entries
    ]


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


def final_files(out):
    return [
        path.name for path in out.iterdir() if path.suffix == ".safetensors" or path.name.endswith("_results.json")
    ]


EVALUATED = {"test_split_size": 6, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4}
SCHEDULES = {
    "steps": {},
    "evaluated by steps": EVALUATED,
    "by epochs": {
        "test_split_size": 6,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
    },
    "saved by steps, all else by epochs": {
        "test_split_size": 6,
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_steps": 5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "the best": {
        "test_split_size": 6,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.3,
        "warmup_steps": 4,
    },
    "packed": {"packing": True, "logging_steps": 3, "num_train_epochs": 5},
    # An evaluation draws random numbers, as training does with these.
    "dropout": {**EVALUATED, "use_peft": True, "lora_dropout": 0.5, "eval_on_start": True},
    "noise": {**EVALUATED, "neftune_noise_alpha": 5.0, "save_only_model": True},
    "only the best": {
        **EVALUATED,
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    },
}


@pytest.fixture(scope="module")
def references():
    """Directories of uninterrupted runs, by the names of their schedules."""
    return {}


@pytest.fixture
def whole(references, argv, tmp_path_factory):
    """Give the directory of the uninterrupted run of a schedule."""

    def whole(name):
        if name not in references:
            references[name] = tmp_path_factory.mktemp("whole") / "run"
            assert main(argv("", **SCHEDULES[name], output_dir=references[name])) == 0
        return references[name]

    return whole


class TestSignals:
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("step", [0, 4, 5, 9])
    def test_stopped_anywhere_it_goes_on_as_if_nothing_had_been(self, argv, at, tmp_path, whole, name, step, caplog):
        values, whole = SCHEDULES[name], whole(name)
        at(step, send(signal.SIGTERM))
        assert main(argv("torn", **values)) == EXIT_CODE
        at(None)
        torn = tmp_path / "torn"
        state = read_state(str(torn))
        assert (state["status"], state["global_step"]) == ("preempted", step + 1)
        assert state["reason"] == f"SIGTERM, saved as checkpoint-{step + 1}"
        assert final_files(torn) == []
        assert len((torn / "order.jsonl").read_text().splitlines()) == step + 1
        assert main(argv("torn", **values)) == 0
        assert f"resuming from {torn / f'checkpoint-{step + 1}'}" in caplog.text
        assert history(torn) == history(whole)
        assert (torn / "order.jsonl").read_bytes() == (whole / "order.jsonl").read_bytes()
        for path in whole.glob("*model*.safetensors"):
            assert (torn / path.name).read_bytes() == path.read_bytes()

    def test_killed_between_a_save_and_the_evaluation_of_its_step(self, argv, tmp_path, monkeypatch):
        values = {**SCHEDULES["dropout"], "eval_strategy": "epoch", "eval_steps": None, "save_steps": 5}
        assert main(argv("whole", **values)) == 0
        evaluate = OrderedTrainer.evaluate

        def die(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return evaluate(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(OrderedTrainer, "evaluate", die)
            with pytest.raises(KeyboardInterrupt):
                main(argv("torn", **values))
        assert (tmp_path / "torn" / "checkpoint-5").exists()
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(tmp_path / "whole")

    def test_in_the_last_evaluation_what_follows_is_left_to_the_next_start(self, argv, tmp_path, monkeypatch, whole):
        values, whole = SCHEDULES["evaluated by steps"], whole("evaluated by steps")
        last = len((whole / "order.jsonl").read_text().splitlines())
        evaluate = OrderedTrainer.evaluate

        def planted(self, *args, **kwargs):
            if self.state.global_step == last and self.is_in_train:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(OrderedTrainer, "evaluate", planted)
            assert main(argv("torn", **values)) == EXIT_CODE
        state = read_state(str(tmp_path / "torn"))
        assert (state["status"], "what follows is left" in state["reason"]) == ("preempted", True)
        assert not (tmp_path / "torn" / "manifest.json").exists()
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(whole)

    def test_in_the_last_step_the_next_start_only_ends_it(self, argv, at, tmp_path, whole):
        values, whole = SCHEDULES["evaluated by steps"], whole("evaluated by steps")
        last = len((whole / "order.jsonl").read_text().splitlines())
        at(last - 1, send(signal.SIGINT))
        assert main(argv("torn", **values)) == EXIT_CODE
        assert final_files(tmp_path / "torn") == []
        at(last, lambda trainer: pytest.fail("trained again"))
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(whole)

    def test_several_stops_one_after_another(self, argv, at, tmp_path, whole):
        values, whole = SCHEDULES["evaluated by steps"], whole("evaluated by steps")
        for step in (1, 3, 4, 8):
            at(step, send(signal.SIGUSR1))
            assert main(argv("torn", **values)) == EXIT_CODE
        at(None)
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(whole)

    def test_before_training_it_ends_at_once_and_harms_nothing(self, argv, tmp_path, monkeypatch):
        from open_r1 import preflight

        check = preflight.check

        def planted(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return check(*args)

        with monkeypatch.context() as patch:
            patch.setattr(preflight, "check", planted)
            assert main(argv("run")) == EXIT_CODE
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        state = read_state(str(tmp_path / "run"))
        assert (state["status"], state["reason"]) == ("preempted", "SIGTERM")
        assert main(argv("run")) == 0

    def test_after_training_the_next_start_finishes(self, argv, tmp_path, monkeypatch, whole):
        values, whole = SCHEDULES["evaluated by steps"], whole("evaluated by steps")
        with monkeypatch.context() as patch:
            patch.setattr("open_r1.finish.write_manifest", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            assert main(argv("torn", **values)) == EXIT_CODE
        assert read_state(str(tmp_path / "torn"))["status"] == "preempted"
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(whole)
        assert read_state(str(tmp_path / "torn"))["status"] == "complete"

    def test_a_second_one_stops_at_once(self, argv, at, tmp_path, monkeypatch):
        monkeypatch.setattr(stopping, "SAME_REQUEST", 0.0)

        def twice(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

        at(7, twice)
        assert main(argv("run")) == EXIT_CODE
        state = read_state(str(tmp_path / "run"))
        assert state["status"] == "preempted"
        assert state["reason"] == "SIGTERM, and then SIGINT: stopped at once, without saving"
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
        at(None)
        assert main(argv("run")) == 0
        assert len(losses(tmp_path / "run")) == 12

    def test_two_in_a_breath_are_one(self):
        stop = Stop()
        stop.waits = True
        stop(signal.SIGTERM)
        stop(signal.SIGTERM)
        stop(signal.SIGINT)
        assert stop.signal == "SIGTERM"
        stop.at -= stopping.SAME_REQUEST
        with pytest.raises(Preempted):
            stop(signal.SIGTERM)

    def test_a_scheduler_that_asks_again_asks_for_the_same(self, argv, at, tmp_path, monkeypatch, whole):
        monkeypatch.setattr(stopping, "SAME_REQUEST", 0.0)
        values, whole = SCHEDULES["evaluated by steps"], whole("evaluated by steps")

        def again_and_again(trainer):
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)

        at(4, again_and_again)
        assert main(argv("torn", **values)) == EXIT_CODE
        assert read_state(str(tmp_path / "torn"))["reason"] == "SIGUSR1, saved as checkpoint-5"
        at(None)
        assert main(argv("torn", **values)) == 0
        assert history(tmp_path / "torn") == history(whole)

    def test_handlers_are_as_before_behind_it_and_other_threads_do_without(self):
        before = [signal.getsignal(number) for number in stopping.SIGNALS]
        with heeded():
            assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
        assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
        seen = []

        def elsewhere():
            with heeded() as stop:
                seen.append(stop.signal)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [""]

    def test_what_is_ignored_stays_so(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with heeded() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) is stop
        assert stop.signal == ""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_what_a_launcher_must_not_die_of_is_heeded(self, number):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with heeded() as stop:
                stop.waits = True
                os.kill(os.getpid(), number)
                assert stop.signal == number.name
            assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)

    def test_a_forked_worker_dies_of_it_as_it_would_without_us(self):
        with heeded():
            if (child := os.fork()) == 0:
                time.sleep(30)
                os._exit(0)
            time.sleep(0.2)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    def test_one_forked_in_training_heeds_its_parent_alone_from_its_first_moment_on(self):
        with heeded() as stop:
            stop.waits = True
            if (child := os.fork()) == 0:
                time.sleep(30)
                os._exit(1)
            subprocess.run(["kill", "-TERM", str(child)], check=True)
            time.sleep(0.3)
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    @pytest.mark.parametrize("context", [None, "spawn"])
    def test_workers_that_read_for_an_evaluation_outlive_it(self, argv, tmp_path, monkeypatch, context):
        step, workers = OrderedTrainer.prediction_step, []

        def planted(self, *args, **kwargs):
            if self.state.global_step == 2 and not workers:
                workers.extend(multiprocessing.active_children())
                pids = [str(child.pid) for child in workers]  # as launchers do: to the whole group
                subprocess.run(["kill", "-TERM", *pids, str(os.getpid())], check=True)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(OrderedTrainer, "prediction_step", planted)
        values = {"test_split_size": 12, "eval_strategy": "steps", "eval_steps": 2, "dataset_max_samples": 36}
        values |= {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": context}
        assert main(argv("run", per_device_eval_batch_size=1, **values)) == EXIT_CODE
        assert workers
        state = read_state(str(tmp_path / "run"))
        assert (state["status"], state["global_step"]) == ("preempted", 3)

    def test_a_checkpoint_now(self, argv, at, tmp_path):
        at(6, lambda trainer: (Path(trainer.args.output_dir) / "CHECKPOINT_NOW").touch())
        assert main(argv("run")) == 0
        assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
            f"checkpoint-{step}" for step in (10, 12, 5, 7)
        ]
        assert not (tmp_path / "run" / "CHECKPOINT_NOW").exists()
        at(None)
        assert main(argv("whole")) == 0
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.fixture
def broken_row(tmp_path, conversations, monkeypatch):
    """Rows of which number 17 alone has a snowman; the model gives no number where it stands."""
    from transformers import Qwen3Model

    from open_r1 import chat

    rows = [json.loads(json.dumps(row)) for row in conversations[:26]]
    rows[17]["messages"][1]["content"] = "\u2603 " + rows[17]["messages"][1]["content"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    forward, get_tokenizer, snow = Qwen3Model.forward, chat.get_tokenizer, []

    def spy(*args):
        tokenizer = get_tokenizer(*args)
        snow.append(tokenizer("\u2603")["input_ids"][-1])
        return tokenizer

    def planted(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        hit = (input_ids == snow[-1]).any(dim=1)[:, None, None]
        out.last_hidden_state = torch.where(hit, torch.nan, out.last_hidden_state)
        return out

    monkeypatch.setattr(chat, "get_tokenizer", spy)
    monkeypatch.setattr(Qwen3Model, "forward", planted)
    return path


def is_finite(path):
    return all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


class TestNoNumbers:
    @pytest.mark.parametrize("values", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
    def test_a_loss_that_is_none_stops_the_run_before_it_is_learnt_and_names_the_row(
        self, argv, broken_row, tmp_path, capsys, values
    ):
        assert main(argv("run", dataset_name=broken_row, save_steps=1, save_total_limit=2, **values)) == 1
        out = tmp_path / "run"
        told = capsys.readouterr().err
        assert "loss is not finite, and was not learnt from: " in told
        assert "row 17 (counting from 0)" in told
        assert "rows.jsonl:18" in told
        [row] = [json.loads(line) for line in (out / "bad_batch.jsonl").read_text().splitlines()]
        assert (row["row"], row["what"]) == (17, "loss is not finite")
        assert "\\u2603" in row["excerpt"] or "\u2603" in row["excerpt"]
        step = row["step"]
        state = read_state(str(out))
        assert (state["status"], state["global_step"]) == ("failed", step - 1)
        assert "loss is not finite" in state["reason"]
        saved = sorted(out.glob("checkpoint-*"))
        assert {path.name for path in saved} <= {f"checkpoint-{step - 1}", f"checkpoint-{step - 2}"}
        assert all(is_finite(path / "model.safetensors") for path in saved)
        assert final_files(out) == []

    def test_of_a_pack_every_document_is_named(self, argv, broken_row, tmp_path):
        assert main(argv("run", dataset_name=broken_row, packing=True, per_device_train_batch_size=1)) == 1
        rows = [json.loads(line) for line in (tmp_path / "run" / "bad_batch.jsonl").read_text().splitlines()]
        assert 17 in [row["row"] for row in rows]
        assert len({row["position"] for row in rows}) == 1

    def test_gradients_that_are_none_stop_it_before_the_step(self, argv, at, tmp_path, capsys):
        def plant(trainer):
            weight = trainer.model.model.norm.weight
            weight.register_hook(lambda gradient: gradient * torch.nan)

        at(6, plant)
        assert main(argv("run")) == 1
        assert "step 7: the gradients are not finite (their norm is nan)" in capsys.readouterr().err
        rows = [json.loads(line) for line in (tmp_path / "run" / "bad_batch.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        at(None)
        assert main(argv("run")) == 0  # from checkpoint-5, which is sound
        assert is_finite(tmp_path / "run" / "model.safetensors")
        assert main(argv("whole")) == 0
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def test_an_evaluation_without_a_number_is_no_reason_to_stop(self, argv, broken_row, chat_file, tmp_path):
        values = {"eval_dataset_name": broken_row, "eval_strategy": "steps", "eval_steps": 6}
        assert main(argv("run", **values)) == 0
        assert not (tmp_path / "run" / "bad_batch.jsonl").exists()


class TestSpikes:
    def test_the_median_of_the_last_fifty(self):
        seen = Losses(3.0)
        assert [seen.spike(2.0) for _ in range(20)] == [None] * 20
        assert seen.spike(5.9) is None
        assert seen.spike(6.1) == 2.0
        assert Losses(None).spike(9.0) is None
        early = Losses(3.0)
        early.spike(1.0)
        assert early.spike(100.0) is None  # nothing to measure by yet

    def test_of_losses_of_nothing_none_is_one(self):
        seen = Losses(3.0)
        assert [seen.spike(loss) for loss in [0.0] * 20 + [1e-9]] == [None] * 21

    def test_a_resumed_run_reports_none_twice(self, argv, at, tmp_path):
        values = {"num_train_epochs": 5, "loss_spike": 1.001, "learning_rate": 1e-5}
        assert main(argv("whole", **values)) == 0
        at(27, lambda trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(argv("torn", **values))
        at(None)
        assert main(argv("torn", **values)) == 0
        found = [(tmp_path / name / "loss_spikes.jsonl").read_bytes() for name in ("whole", "torn")]
        assert found[0] == found[1]

    def test_it_is_reported_with_its_rows(self, argv, tmp_path, caplog):
        values = {"num_train_epochs": 5, "loss_spike": 1.001, "learning_rate": 1e-5}
        assert main(argv("run", **values)) == 0
        found = [json.loads(line) for line in (tmp_path / "run" / "loss_spikes.jsonl").read_text().splitlines()]
        lost, expected = losses(tmp_path / "run"), Losses(1.001)
        steps = [step for step, loss in enumerate(lost, 1) if expected.spike(loss) is not None]
        assert steps
        assert [row["step"] for row in found] == [step for step in steps for _ in range(4)]
        assert f"step {steps[0]}: the loss is {lost[steps[0] - 1]:.4f}, the median of those before is" in caplog.text
        assert {"source", "row", "place", "excerpt", "position", "median", "loss"} <= set(found[0])


class TestStalls:
    def test_stacks_are_shown_when_no_step_ends(self, argv, at, capfd, tmp_path):
        at(3, lambda trainer: time.sleep(1.2))
        assert main(argv("run", stall_timeout=0.5)) == 0
        told = capfd.readouterr().err
        assert told.count("Timeout (0:00:00.500000)!") == 2
        assert "in _run_epoch" in told
        assert "in <lambda>" in told

    def test_nothing_is_shown_of_a_run_that_goes_on(self, argv, capfd):
        values = {"stall_timeout": 1.0, "test_split_size": 6, "eval_strategy": "steps", "eval_steps": 2}
        assert main(argv("run", **values)) == 0
        time.sleep(1.2)
        assert "Timeout (" not in capfd.readouterr().err
        faults.watch(None)


class TestEarlyStopping:
    VALUES = {
        "test_split_size": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
        "num_train_epochs": 9,
        "learning_rate": 0.2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "early_stopping_patience": 3,
    }

    def test_it_stops_and_ends_with_the_best(self, argv, tmp_path):
        assert main(argv("run", **self.VALUES)) == 0
        out = tmp_path / "run"
        evaluated = losses(out, "eval_loss")[:-1]  # the last is of the best model
        best = min(range(len(evaluated)), key=evaluated.__getitem__)
        assert len(evaluated) == best + 4 < 54
        assert losses(out, "eval_loss")[-1] == pytest.approx(evaluated[best], rel=1e-4)
        state = json.loads((out / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best + 1}")
        assert sorted(path.name for path in out.glob("checkpoint-*")) == sorted(
            [f"checkpoint-{best + 1}", f"checkpoint-{best + 4}"]
        )
        assert main(argv("run", **self.VALUES)) == 0  # finished

    @pytest.mark.parametrize("behind", [1, 2, 3])
    def test_its_patience_outlives_a_stop(self, argv, at, tmp_path, behind):
        assert main(argv("whole", **self.VALUES)) == 0
        steps = len((tmp_path / "whole" / "order.jsonl").read_text().splitlines())
        at(steps - behind, send(signal.SIGTERM))
        assert main(argv("torn", **self.VALUES)) == EXIT_CODE
        at(None)
        assert main(argv("torn", **self.VALUES)) == 0
        assert history(tmp_path / "torn") == history(tmp_path / "whole")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("torn", "whole")]
        assert weights[0] == weights[1]

    def test_a_best_checkpoint_that_is_damaged_is_not_taken(self, argv, tmp_path, monkeypatch, capsys):
        from open_r1 import trainer as module

        final = module.OrderedTrainer._load_best_model

        def hurt(self):
            path = Path(self.state.best_model_checkpoint) / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
            final(self)

        monkeypatch.setattr(module.OrderedTrainer, "_load_best_model", hurt)
        assert main(argv("run", **self.VALUES)) == 1
        told = capsys.readouterr().err
        assert "the best checkpoint, cannot be loaded: model.safetensors is damaged" in told
        assert "set load_best_model_at_end: false and allow_changes: [load_best_model_at_end]" in told

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            (
                {"metric_for_best_model": None},
                "early_stopping_patience needs early_stopping_patience (evaluations) and",
            ),
            ({"eval_strategy": "no", "load_best_model_at_end": False}, "says nothing without evaluations"),
            ({"early_stopping_patience": 0}, "early_stopping_patience must be"),
        ],
    )
    def test_what_it_needs(self, argv, capsys, values, told):
        assert main(argv("run", **{**self.VALUES, **values})) == 2
        assert told in capsys.readouterr().err
