"""Which checkpoint is gone on from, which are passed over and why, and what a save leaves behind."""

import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
from conftest import losses, settings

from open_r1 import checkpoints
from open_r1.checkpoints import checkpoint_to_resume, damage, files_of, read_seal, rotate, what_it_lacks
from open_r1.errors import Stopped, UserError
from open_r1.sft import main

FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress_0.json"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.bin"),
    *("chat_template.jinja", "checkpoint.json"),
)


def argv(tiny_model, chat_file, out, **values):
    return settings(
        **{
            "model_name_or_path": tiny_model,
            "dataset_name": chat_file,
            "output_dir": out,
            "max_steps": 6,
            "save_steps": 2,
            **values,
        }
    )


@pytest.fixture(scope="module")
def trained(tiny_model, chat_file, tmp_path_factory):
    """A finished run with checkpoints 2, 4 and 6."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(argv(tiny_model, chat_file, out)) == 0
    return out


@pytest.fixture
def torn(trained, tmp_path):
    """The same run as if it had been killed behind its last save."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    state = json.loads((out / "run_state.json").read_text())
    (out / "run_state.json").write_text(json.dumps({**state, "status": "running"}))
    for path in out.iterdir():
        if path.is_file() and path.name not in ("run_state.json", "order.jsonl"):
            path.unlink()
    return out


def hurt(path, how):
    """Remove a file, or empty it, cut its end off, or flip a bit in its middle."""
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(b"" if how == "emptied" else data[: len(data) * 2 // 3])


def wrong(checkpoint):
    """What is found when a run is to go on from a checkpoint: names and sizes first, then digests."""
    return what_it_lacks(checkpoint) or damage(checkpoint, lambda names: names, lambda found: found)


class TestWhatCounts:
    def test_a_checkpoint_holds_what_a_run_goes_on_with_and_says_so(self, trained):
        newest = trained / "checkpoint-6"
        assert set(FILES) - {"checkpoint.json"} == set(files_of(newest))
        seal = read_seal(newest)
        assert (seal["step"], seal["processes"], seal["launch"], seal["rows_a_step"]) == (6, 1, "ddp", 2)
        assert set(seal["files"]) == set(files_of(newest))
        assert wrong(newest) == ""
        assert not (trained / ".saving").exists()

    @pytest.mark.parametrize("how", ["removed", "truncated", "emptied", "flipped"])
    @pytest.mark.parametrize("name", FILES)
    def test_any_file_hurt_in_any_way_is_found(self, torn, name, how):
        hurt(torn / "checkpoint-6" / name, how)
        assert name in wrong(torn / "checkpoint-6")

    def test_a_file_that_came_later_and_could_be_loaded_is_not_trusted(self, torn):
        (torn / "checkpoint-6" / "notes.txt").write_text("best so far")
        assert wrong(torn / "checkpoint-6") == ""
        (torn / "checkpoint-6" / "pytorch_model.bin").write_bytes(b"x")
        assert "pytorch_model.bin was not saved with it" in wrong(torn / "checkpoint-6")

    def test_the_newest_by_step_not_by_name(self, torn):
        for step, name in ((2, "checkpoint-9"), (4, "checkpoint-10")):
            (torn / f"checkpoint-{step}").rename(torn / name)
        assert checkpoint_to_resume(str(torn), "auto") == str(torn / "checkpoint-10")

    def test_modes_are_what_the_umask_asks_for(self, tiny_model, chat_file, tmp_path):
        before = os.umask(0o027)
        try:
            assert main(argv(tiny_model, chat_file, tmp_path / "run", max_steps=2)) == 0
        finally:
            os.umask(before)
        found = {
            path: stat.S_IMODE(path.stat().st_mode)
            for path in (tmp_path / "run").rglob("*")
            if path.is_file() and path.name != "events.out"
        }
        assert {oct(mode) for mode in found.values()} == {"0o640"}, found


class TestSealing:
    def test_a_file_that_cannot_be_read_again_is_never_sealed(self, tiny_model, chat_file, tmp_path, monkeypatch):
        out, digest = tmp_path / "run", checkpoints.digest

        def planted(path):
            return "" if path.name == "optimizer.pt" and "checkpoint-4" in str(path) else digest(path)

        monkeypatch.setattr(checkpoints, "digest", planted)
        assert main(argv(tiny_model, chat_file, out)) == 1
        assert "not every process sees the optimizer.pt" in json.loads((out / "run_state.json").read_text())["reason"]
        assert [path.name for path in checkpoints.checkpoints(out)] == ["checkpoint-2"]
        assert not wrong(out / "checkpoint-2")


class TestPolicy:
    def test_a_fresh_start(self, tmp_path):
        new = str(tmp_path / "new")
        assert checkpoint_to_resume(new, "auto") is None
        assert checkpoint_to_resume(new, "never") is None
        with pytest.raises(UserError, match="resume: must, but .* holds no complete checkpoint"):
            checkpoint_to_resume(new, "must")
        with pytest.raises(
            UserError, match="resume: .*checkpoint-7 cannot be resumed from: there is no such directory"
        ):
            checkpoint_to_resume(new, f"{new}/checkpoint-7")

    def test_never_where_there_are_checkpoints(self, torn):
        with pytest.raises(UserError, match="never, but .* holds checkpoint-6 of an earlier run"):
            checkpoint_to_resume(str(torn), "never")

    def test_an_older_one_by_its_path_would_be_written_over(self, torn, tmp_path):
        older = str(torn / "checkpoint-2")
        with pytest.raises(UserError, match="is followed by .*checkpoint-6, which saving would have to overwrite"):
            checkpoint_to_resume(str(torn), older)
        assert checkpoint_to_resume(str(tmp_path / "other"), older) == older
        assert checkpoint_to_resume(str(torn), str(torn / "checkpoint-6")) == str(torn / "checkpoint-6")

    def test_a_run_that_began_from_there_goes_on_with_its_own(
        self, torn, tmp_path, tiny_model, chat_file, monkeypatch
    ):
        from open_r1.trainer import OrderedTrainer

        step = OrderedTrainer.training_step

        def stop(self, *args, **kwargs):
            if self.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        start = argv(tiny_model, chat_file, tmp_path / "fork", resume=torn / "checkpoint-2")
        with monkeypatch.context() as patch:
            patch.setattr(OrderedTrainer, "training_step", stop)
            assert main(start) == 75
        assert (tmp_path / "fork" / "checkpoint-5").is_dir()
        assert main(start) == 0
        own = [path.name for path in (tmp_path / "fork").glob("checkpoint-*")]
        assert sorted(own) == [f"checkpoint-{n}" for n in (4, 5, 6)]

    def test_a_relative_and_an_absolute_path_are_one(self, torn, monkeypatch):
        monkeypatch.chdir(torn.parent)
        assert checkpoint_to_resume(torn.name, str(torn / "checkpoint-6")) == str(torn / "checkpoint-6")

    def test_where_none_is_whole_nothing_starts_over(self, torn, capsys, tiny_model, chat_file):
        for checkpoint in torn.glob("checkpoint-*"):
            (checkpoint / "optimizer.pt").unlink()
        assert main(argv(tiny_model, chat_file, torn)) == 2
        told = capsys.readouterr().err
        assert "holds no checkpoint that can be gone on from" in told
        assert told.count("optimizer.pt is missing") == 3
        assert sorted(path.name for path in torn.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]

    def test_upstreams_own_checkpoint_is_not_taken(self, torn):
        for checkpoint in torn.glob("checkpoint-*"):
            (checkpoint / "checkpoint.json").unlink()
        with pytest.raises(UserError, match="checkpoint.json is missing, so it was not saved to its end by this"):
            checkpoint_to_resume(str(torn), "auto")

    def test_one_saved_without_its_optimizer_is_none_to_go_on_from(self, tiny_model, chat_file, tmp_path, capsys):
        out = tmp_path / "run"
        assert main(argv(tiny_model, chat_file, out, max_steps=4, save_only_model=True)) == 0
        (out / "run_state.json").unlink()
        assert main(argv(tiny_model, chat_file, out, max_steps=4, save_only_model=True)) == 2
        assert "no optimizer state (saved with save_only_model)" in capsys.readouterr().err


class TestFallingBack:
    @pytest.mark.parametrize(
        ("name", "how"),
        [("optimizer.pt", "removed"), ("model.safetensors", "flipped"), ("rng_state.pth", "truncated")],
    )
    def test_the_run_goes_on_from_the_one_before_and_ends_the_same(
        self, torn, trained, tiny_model, chat_file, caplog, name, how
    ):
        hurt(torn / "checkpoint-6" / name, how)
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert "checkpoint-6" in caplog.text
        assert f"{name} " in caplog.text
        assert losses(torn) == losses(trained)
        assert (torn / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
        assert (torn / "damaged-checkpoint-6").is_dir()  # its bytes are not ours to throw away
        assert wrong(torn / "checkpoint-6") == ""

    def test_two_damaged_ones(self, torn, trained, tiny_model, chat_file):
        hurt(torn / "checkpoint-6" / "scheduler.pt", "flipped")
        hurt(torn / "checkpoint-4" / "trainer_state.json", "emptied")
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert losses(torn) == losses(trained)
        assert (torn / "order.jsonl").read_bytes() == (trained / "order.jsonl").read_bytes()

    def test_what_a_killed_save_left_is_gone_and_never_counted(self, torn, trained, tiny_model, chat_file):
        shutil.copytree(torn / "checkpoint-2", torn / ".saving" / "checkpoint-6")
        shutil.rmtree(torn / "checkpoint-6")
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert losses(torn) == losses(trained)
        assert not (torn / ".saving").exists()

    @pytest.mark.parametrize("text", [None, "", '{"step": 6}'])
    def test_the_newest_without_its_seal(self, torn, trained, tiny_model, chat_file, text):
        path = torn / "checkpoint-6" / "checkpoint.json"
        path.unlink() if text is None else path.write_text(text)
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert losses(torn) == losses(trained)

    @pytest.mark.parametrize("line", [b"\x00\x00\n", b"\xff\n", b"{}\n", b'{"step": 3}\n', b"[]\n"])
    def test_a_broken_line_of_the_order_is_written_again(self, torn, trained, tiny_model, chat_file, line):
        lines = (torn / "order.jsonl").read_bytes().splitlines(keepends=True)
        (torn / "order.jsonl").write_bytes(b"".join([*lines[:2], line, *lines[4:]]))
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert (torn / "order.jsonl").read_bytes() == (trained / "order.jsonl").read_bytes()

    def test_files_that_a_kill_left_half_written_are_gone(self, torn, tiny_model, chat_file):
        (torn / "run_state.json.0.1.partial").write_text("{")
        assert main(argv(tiny_model, chat_file, torn)) == 0
        assert not list(torn.glob("*.partial"))


class TestRotation:
    def test_one_that_was_passed_over_does_not_count(self, torn):
        rotate(torn, 2, None, [str(torn / "checkpoint-6")])
        assert sorted(path.name for path in torn.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]

    def test_complete_ones_are_counted_and_the_best_stays(self, torn):
        hurt(torn / "checkpoint-6" / "model.safetensors", "truncated")
        rotate(torn, 2, None)
        assert sorted(path.name for path in torn.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]
        shutil.rmtree(torn / "checkpoint-6")
        shutil.copytree(torn / "checkpoint-4", torn / "checkpoint-8")
        shutil.copytree(torn / "checkpoint-4", torn / "checkpoint-6")
        rotate(torn, 2, str(torn / "checkpoint-2"))
        assert sorted(path.name for path in torn.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]

    def test_fewer_than_two_are_never_kept(self, tiny_model, chat_file, tmp_path, caplog):
        assert main(argv(tiny_model, chat_file, tmp_path / "run", save_total_limit=1)) == 0
        assert "save_total_limit: 1 is raised to 2" in caplog.text
        assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
            "checkpoint-4",
            "checkpoint-6",
        ]

    def test_no_limit_keeps_all(self, trained):
        assert len(list(trained.glob("checkpoint-*"))) == 3


class TestDiskFull:
    """Writers that find no room; `tests/slow/test_faults.py` fills a real file system."""

    def test_a_checkpoint_that_does_not_fit_leaves_the_older_one_and_says_what_it_takes(
        self, tiny_model, chat_file, tmp_path, monkeypatch, capsys
    ):
        room = shutil.disk_usage(tmp_path)

        def usage(path):
            saved = Path(path, "checkpoint-2").exists()
            return room._replace(free=1000) if saved else room

        monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
        out = tmp_path / "run"
        assert main(argv(tiny_model, chat_file, out)) == 1
        told = capsys.readouterr().err
        assert "checkpoint-4 could not be saved: it takes " in told
        assert "checkpoint-2 is whole" in told
        assert wrong(out / "checkpoint-2") == ""
        state = json.loads((out / "run_state.json").read_text())
        assert (state["status"], state["global_step"]) == ("failed", 4)
        assert "could not be saved" in state["reason"]

    def test_other_failures_are_not_taken_for_it(self, tmp_path):
        with pytest.raises(OSError, match="something else"), checkpoints.room(tmp_path, "x"):
            raise OSError(5, "something else")
        with pytest.raises(Stopped, match="x could not be saved"), checkpoints.room(tmp_path, "x"):
            raise RuntimeError("while writing") from OSError(28, "No space left on device")
