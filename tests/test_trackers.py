"""One id for a run in its trackers: how long it lives, who is told of it, and that it gets there."""

import json
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
from conftest import settings
from transformers.integrations import TensorBoardCallback

from open_r1 import trackers
from open_r1.run_state import read_state, record, record_end
from open_r1.sft import main
from open_r1.trackers import name_run, purge_tensorboard, remember_mlflow

SETTINGS = {"learning_rate": 1e-4, "max_steps": 9, "report_to": ["wandb"]}
# What transformers asks of wandb, writing down what it was told. FAIL_AT breaks a run off at a step.
WANDB = """
import json, os, time
from types import SimpleNamespace

run, define_metric, config = None, None, {}
def note(**what):
    known = {name: os.environ.get(name) for name in ("RANK", "WANDB_RUN_ID", "WANDB_RESUME")}
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps({**known, **what}) + "\\n")
def init(**arguments):
    global run
    run = SimpleNamespace(_label=lambda **_: None, id=os.environ["WANDB_RUN_ID"], summary={})
    note(what="init")
class Config(dict):
    def update(self, values, allow_val_change): pass
config = Config()
def log(values):
    note(what="log", step=values["train/global_step"])
    time.sleep(float(os.environ.get("PACE", "0")))
    if str(values["train/global_step"]) == os.environ.get("FAIL_AT"):
        raise RuntimeError("broken off")
"""


def write_wandb(folder):
    """A stand-in for wandb in a folder to be put on the path of modules."""
    lib = folder / "wandb" / "sdk" / "lib"
    lib.mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(WANDB)
    for path in (lib.parent, lib):
        (path / "__init__.py").touch()
    told = 'from wandb import note\nnote(what="setup")\nclass ConfigError(Exception): pass\n'
    (lib / "config_util.py").write_text(told)  # which every process imports when training begins


def notes(path, what):
    return [note for note in map(json.loads, path.read_text().splitlines()) if note["what"] == what]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """The environment as if no tracker had been told of a run, before and after."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SWANLAB_", "COMET_", "MLFLOW_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    monkeypatch.setattr(trackers, "SET", {})
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def start(tmp_path):
    """One start of a run as far as trackers go; returns what it left in run_state.json."""
    out = tmp_path / "run"
    out.mkdir()

    def start(earlier=None, data="rows", trackers=("wandb",), **changes):
        args = SimpleNamespace(output_dir=str(out), report_to=list(trackers), process_index=0, run_name=None)
        facts = {"settings": {**SETTINGS, **changes}, "data": data}
        record(str(out), status="running", **name_run(args, facts, earlier or {}), **facts)
        return SimpleNamespace(**read_state(str(out)), args=args)

    start.out = out
    return start


class TestTheIdOfARun:
    def test_it_is_made_when_a_run_begins(self, start, tmp_path):
        first = start()
        assert len(first.run_id) == 32
        assert first.run_id.isalnum()  # what Comet asks for
        (start.out / "run_state.json").unlink()
        assert start().run_id != first.run_id

    def test_the_same_run_keeps_it_without_a_checkpoint(self, start):
        first = start()
        record_end(str(start.out), "failed", "killed")
        assert start().run_id == first.run_id
        assert start(logging_steps=3, wandb_project="another").run_id == first.run_id

    def test_so_does_one_that_was_preempted_in_preparation(self, start):
        first = start()
        record_end(str(start.out), "preempted", "SIGTERM", begun=False)
        assert start().run_id == first.run_id

    def test_one_that_goes_on_from_its_checkpoint_keeps_it_whatever_changed(self, start):
        first = start()
        record(str(start.out), status="complete")
        mine = {"checkpoint": str(start.out / "checkpoint-4"), "step": 4}
        assert start(mine, data="others", learning_rate=1e-3).run_id == first.run_id

    @pytest.mark.parametrize(
        ("status", "changes"),
        [
            ("failed", {"learning_rate": 1e-3}),
            ("failed", {"lora_r": 8}),
            ("failed", {"data": "others"}),
            ("failed", {"resume": "elsewhere/checkpoint-4"}),
            ("complete", {}),
        ],
    )
    def test_one_that_begins_anew_gets_another(self, start, status, changes):
        first = start()
        record(str(start.out), status=status, mlflow_run_id="theirs")
        earlier = {"checkpoint": changes["resume"], "step": 4} if "resume" in changes else None
        second = start(earlier, **changes)
        assert second.run_id != first.run_id
        assert second.mlflow_run_id is None


class TestWhatTrackersAreTold:
    def test_those_of_report_to_in_the_environment(self, start):
        run = start(trackers=("wandb", "swanlab", "comet_ml", "tensorboard", "mlflow")).run_id
        told = {name: value for name, value in os.environ.items() if name in trackers.SET}
        assert told == {
            "WANDB_RUN_ID": run,
            "WANDB_RESUME": "allow",
            "SWANLAB_RUN_ID": run,
            "SWANLAB_RESUME": "allow",
            "COMET_EXPERIMENT_KEY": run,
            "TENSORBOARD_LOGGING_DIR": str(start.out / "runs" / run),
        }

    def test_no_others(self, start):
        before = dict(os.environ)
        assert start(trackers=("clearml",)).run_id
        assert dict(os.environ) == before

    @pytest.mark.parametrize("said", [("WANDB_RUN_ID", "mine"), ("WANDB_RESUME", "never")])
    def test_what_the_user_says_stays(self, start, monkeypatch, said):
        monkeypatch.setenv(*said)
        start()
        assert {name: value for name, value in os.environ.items() if name.startswith("WANDB_")} == dict([said])

    def test_comet_is_left_alone_when_it_is_to_make_a_new_experiment(self, start, monkeypatch):
        monkeypatch.setenv("COMET_START_MODE", "create")
        start(trackers=("comet_ml",))
        assert "COMET_EXPERIMENT_KEY" not in os.environ

    def test_a_second_run_of_a_process_is_told_apart(self, start):
        first = start()
        assert os.environ["WANDB_RUN_ID"] == first.run_id
        (start.out / "run_state.json").unlink()
        second = start()
        assert os.environ["WANDB_RUN_ID"] == second.run_id != first.run_id

    def test_trackio_goes_on_by_name(self, start):
        first = start(trackers=("trackio",))
        assert first.args.run_name == f"run-{first.run_id[:8]}"
        assert start(trackers=("wandb",)).args.run_name is None


class TestMLflow:
    """Which goes on only with runs that it has made itself."""

    @pytest.fixture
    def runs(self, monkeypatch):
        mlflow = ModuleType("mlflow")
        runs = {"made": SimpleNamespace(run_id="made", experiment_id="0", lifecycle_stage="active")}

        class MlflowException(Exception):
            pass

        class MlflowClient:
            def get_run(self, run):
                if run not in runs:
                    raise MlflowException("no such run")
                return SimpleNamespace(info=runs[run])

            def get_experiment(self, number):
                return SimpleNamespace(name="Default")

        mlflow.MlflowClient, mlflow.exceptions = MlflowClient, SimpleNamespace(MlflowException=MlflowException)
        mlflow.active_run = lambda: SimpleNamespace(info=runs["made"])
        monkeypatch.setitem(sys.modules, "mlflow", mlflow)
        return runs

    @pytest.fixture
    def again(self, start, runs):
        """A start behind one in which MLflow had a run."""
        first = start(trackers=("mlflow",))
        assert "MLFLOW_RUN_ID" not in os.environ
        remember_mlflow(first.args)
        return partial(start, trackers=("mlflow",))

    def test_its_run_goes_on(self, again):
        assert again().mlflow_run_id == "made"
        assert os.environ["MLFLOW_RUN_ID"] == "made"

    @pytest.mark.parametrize("why", ["deleted", "gone", "elsewhere"])
    def test_one_that_cannot_is_begun_again(self, again, runs, why, monkeypatch, caplog):
        if why == "deleted":
            runs["made"].lifecycle_stage = "deleted"
        elif why == "gone":
            runs.clear()
        else:
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
        assert again().mlflow_run_id is None
        assert "MLFLOW_RUN_ID" not in os.environ
        assert "MLflow has no run made that could go on" in caplog.text


class TestTensorBoard:
    @pytest.fixture
    def opened(self, tmp_path):
        """What TensorBoard's writer is opened with, in a directory, at a step."""

        def opened(folder, step):
            callback = object.__new__(TensorBoardCallback)
            callback.logging_dir, callback._SummaryWriter = folder and str(folder), dict
            purge_tensorboard([callback], str(tmp_path), step)
            callback._init_summary_writer(None)
            return callback.tb_writer

        return opened

    def test_what_is_logged_again_replaces_what_was(self, opened, tmp_path):
        assert opened(tmp_path / "runs" / "id", 40)["purge_step"] == 41

    def test_not_in_a_directory_of_the_user(self, opened, tmp_path):
        assert opened(tmp_path / "shared", 40)["purge_step"] is None
        assert opened(None, 40)["purge_step"] is None

    def test_it_reads_each_step_once(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        for first, last in ((1, 7), (5, 9)):
            callback = object.__new__(TensorBoardCallback)
            callback.logging_dir, callback._SummaryWriter = str(tmp_path / "runs" / "id"), SummaryWriter
            purge_tensorboard([callback], str(tmp_path), first - 1)
            callback._init_summary_writer(None)
            for step in range(first, last + 1):
                callback.tb_writer.add_scalar("loss", first, step)
            callback.tb_writer.close()
        read = EventAccumulator(str(tmp_path / "runs" / "id"))
        read.Reload()
        assert [(each.step, each.value) for each in read.Scalars("loss")] == [
            *((step, 1) for step in range(1, 5)),
            *((step, 5) for step in range(5, 10)),
        ]


def test_a_run_that_was_broken_off_is_one_run_in_wandb(tiny_model, chat_file, tmp_path, monkeypatch):
    write_wandb(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAIL_AT", "3")
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_name=chat_file,
        dataset_max_samples=40,
        output_dir=tmp_path / "run",
        max_steps=4,
        save_steps=2,
        report_to="wandb",
    )
    try:
        with pytest.raises(RuntimeError, match="broken off"):
            main(argv)
        monkeypatch.delenv("FAIL_AT")
        sys.modules["wandb"].run = None
        assert main(argv) == 0
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
    begun = notes(tmp_path / "notes", "init")
    assert len(begun) == 2
    assert begun[0] == begun[1]
    assert begun[0]["WANDB_RUN_ID"] == read_state(str(tmp_path / "run"))["run_id"]
    assert begun[0]["WANDB_RESUME"] == "allow"
    assert [note["step"] for note in notes(tmp_path / "notes", "log")] == [1, 2, 3, 3, 4, 4]
