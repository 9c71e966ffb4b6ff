"""Which checkpoint is taken, which are passed over and why, and what counts as finished."""

import json

import pytest

from open_r1.checkpoints import at_last_step, checkpoint_to_resume, finished, publish, record
from open_r1.errors import UserError

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint as the trainer does, without some of its files."""

    def save(step, without=()):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in {*FILES} - {*without}:
            (folder / name).write_bytes(b"x")
        if "trainer_state.json" not in without:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        return str(folder)

    return save


def test_the_newest_by_step_not_by_name(save, tmp_path):
    save(9)
    newest = save(10)
    assert checkpoint_to_resume(str(tmp_path), None) == newest
    assert checkpoint_to_resume(str(tmp_path), True) == newest
    assert checkpoint_to_resume(str(tmp_path), "true") == newest


@pytest.mark.parametrize("lacking", [*FILES, "trainer_state.json"])
def test_an_incomplete_one_is_passed_over_with_the_reason(save, tmp_path, lacking, caplog):
    older = save(5)
    save(10, without=[lacking])
    assert checkpoint_to_resume(str(tmp_path), None) == older
    assert "checkpoint-10 is passed over: " in caplog.text


def test_a_half_written_state_is_incomplete(save, tmp_path):
    older, newer = save(5), save(10)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_st')
    assert checkpoint_to_resume(str(tmp_path), None) == older
    with pytest.raises(
        UserError, match="checkpoint-10 cannot be resumed from: trainer_state.json is missing or broken"
    ):
        checkpoint_to_resume(str(tmp_path), newer)


def test_deepspeed_and_adapter_checkpoints_count(save, tmp_path):
    deepspeed = save(5, without=["optimizer.pt", "scheduler.pt", "model.safetensors"])
    (tmp_path / "checkpoint-5" / "latest").write_text("global_step5")
    assert checkpoint_to_resume(str(tmp_path), None) == deepspeed
    adapter = save(6, without=["model.safetensors"])
    (tmp_path / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"x")
    assert checkpoint_to_resume(str(tmp_path), None) == adapter


def test_a_fresh_start(save, tmp_path):
    assert checkpoint_to_resume(str(tmp_path / "new"), None) is None
    assert checkpoint_to_resume(str(tmp_path), False) is None
    with pytest.raises(UserError, match="resume_from_checkpoint: true, but .* holds no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path), "true")
    save(5)
    with pytest.raises(UserError, match="false, but .* holds checkpoint-5 of an earlier run"):
        checkpoint_to_resume(str(tmp_path), "false")


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        checkpoint_to_resume(str(tmp_path), str(tmp_path / "checkpoint-7"))


def test_finished_with_the_same_settings_only(tmp_path):
    out = str(tmp_path)
    assert finished(out, {"max_steps": 5}) is None
    record(out, "complete", 5, {"max_steps": 5, "report_to": ["none"]}, "x")
    assert finished(out, {"max_steps": 5}) is None  # its model is gone
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert finished(out, {"max_steps": 5, "report_to": ["none"]}) == 5
    assert finished(out, {"max_steps": 5, "report_to": ["wandb"], "logging_steps": 3}) == 5  # these may change
    with pytest.raises(UserError, match=r"a run with other settings \(max_steps: 5 -> 6; seed: None -> 1\)"):
        finished(out, {"max_steps": 6, "report_to": ["none"], "seed": 1})


def test_a_run_is_not_gone_on_with_under_other_settings(save, tmp_path):
    record(str(tmp_path), "running", 0, {"learning_rate": 1.0}, "x")
    assert finished(str(tmp_path), {"learning_rate": 2.0}) is None  # nothing was saved yet: nothing to mix up
    save(5)
    with pytest.raises(UserError, match=r"a run with other settings \(learning_rate: 1.0 -> 2.0\)"):
        finished(str(tmp_path), {"learning_rate": 2.0})
    assert finished(str(tmp_path), {"learning_rate": 1.0}) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "complete"}', '{"status": "complete", "settings": 3}'])
def test_a_broken_state_file_counts_for_nothing(tmp_path, text):
    (tmp_path / "run_state.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert finished(str(tmp_path), {}) is None


def test_the_model_of_the_last_step_is_published_without_what_stays(save, tmp_path):
    last = save(9)
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "max_steps": 9}')
    (tmp_path / "checkpoint-9" / "tokenizer.json").write_text("{}")
    assert at_last_step(last)
    assert not at_last_step(None)
    (tmp_path / "out").mkdir()
    publish(last, str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "tokenizer.json"}
