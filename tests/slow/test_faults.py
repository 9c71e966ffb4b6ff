"""What breaks runs, done to real launches: signals, dead processes, full disks, damaged files, numbers that are none.

Every run that is to go on must end with the log, the rows and the weights of one that nothing happened to, bit for
bit. Faults inside a run are planted by `planted/sitecustomize.py`. Full disks need the right to mount a tmpfs.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT, losses, settings, write_jsonl
from kill_harness import TOKEN, copy_extensions, differences, kill, processes, stamp, steps, write_inputs
from test_checkpoints import hurt, wrong

from open_r1.checkpoints import checkpoints, damage, files_of, read_seal, what_it_lacks

SHARDED = ("zero2", "zero3")
SEVERAL = ("ddp", *SHARDED)
LAUNCHES = ("one", *SEVERAL)
TOTAL, SAVE = 24, 6  # steps of a run, and between two checkpoints
PACE = 0.12  # seconds that a step takes at least where it must be hit
GONE = 60  # seconds within which nothing of a failed run may be left
RAISED_HERE = re.compile(r'File ".*/src/open_r1/')  # a launcher that fails has a traceback of its own
FIRST = 600  # seconds of a start that compiles a DeepSpeed op


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    copy_extensions(folder / "extensions")
    return folder


class Job:
    """One start of a run, with faults planted in it."""

    def __init__(self, inputs, launch, out, *faults, count=2, **values):
        self.out, self.launch, self.token = Path(out), launch, uuid.uuid4().hex
        self.log = inputs / f"{self.token}.log"
        self.before = stamp(self.out / "order.jsonl")
        argv = settings(
            **{
                "model_name_or_path": inputs / "model",
                "dataset_name": inputs / "chat.jsonl",
                "eval_dataset_name": inputs / "eval.jsonl",
                "output_dir": out,
                "report_to": "none",
                "max_steps": TOTAL,
                "save_steps": SAVE,
                "logging_steps": 5,
                "eval_strategy": "steps",
                "eval_steps": 7,
                "global_batch_size": 4,
                "dataloader_num_workers": 1,
                **values,
            }
        )
        command = [sys.executable, "src/open_r1/sft.py", *argv]
        if launch != "one":
            config = f"recipes/accelerate_configs/{launch}.yaml"
            command = ["accelerate", "launch", "--config_file", config, "--num_processes", str(count)]
            command += ["--main_process_port", "0", "src/open_r1/sft.py", *argv]
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).with_name("planted")),
            "PYTHONUNBUFFERED": "1",
            "TORCH_EXTENSIONS_DIR": str(inputs / "extensions"),
            "FAULTS": json.dumps(faults),
            TOKEN: self.token,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def state(self):
        return json.loads((self.out / "run_state.json").read_text())

    def until(self, condition, within=FIRST):
        """Wait for something while it runs."""
        end = time.monotonic() + within
        while not condition():
            assert self.process.poll() is None, self.text[-6000:]
            if time.monotonic() > end:
                kill(self.token, [])
                raise AssertionError(f"waited {within} s in vain\n{self.text[-6000:]}")
            time.sleep(0.005)
        return self

    def at(self, step):
        """Wait until it has done a step. It cuts back what others have written down before it begins."""
        return self.until(lambda: stamp(self.out / "order.jsonl") != self.before and steps(self.out) >= step)

    def pid(self, rank):
        """The process of a rank: the first that had it in its environment; data loader workers came later."""
        mark = f"\0RANK={rank}\0".encode()
        found = [pid for pid in processes(self.token) if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
        return min(found)

    def signal(self, number, whom):
        """Signal `rank 0`, `rank 1`, the `launcher`, or `all` processes of the run."""
        if whom == "all":
            pids = processes(self.token)
        elif whom == "launcher" or self.launch == "one":
            pids = [self.process.pid]
        else:
            pids = [self.pid(int(whom[-1]))]
        for pid in pids:
            os.kill(pid, number)
        return self

    def end(self, within=FIRST):
        """Wait until nothing of it is left, and return the exit code of the launcher."""
        end = time.monotonic() + within
        while self.process.poll() is None or processes(self.token):
            if time.monotonic() > end:
                left = len(processes(self.token))
                kill(self.token, [])
                self.process.wait()
                raise AssertionError(f"{left} processes are left after {within} s\n{self.text[-8000:]}")
            time.sleep(0.05)
        return self.process.returncode


@pytest.fixture(scope="module")
def start(inputs):
    """Starts runs; whatever of them is left is killed in the end."""
    jobs = []

    def begin(launch, out, *faults, **values):
        jobs.append(Job(inputs, launch, out, *faults, **values))
        return jobs[-1]

    yield begin
    for job in jobs:
        kill(job.token, [])


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """A run of a launch that nothing happened to: once for each."""
    known = {}

    def run(launch):
        if launch not in known:
            known[launch] = tmp_path_factory.mktemp("whole") / launch
            job = start(launch, known[launch])
            assert job.end() == 0, job.text[-6000:]
        return known[launch]

    return run


def torn(whole, out, step):
    """A run as it was when it had saved at a step and was killed."""
    out.mkdir(parents=True)
    for path in whole.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) <= step:
            shutil.copytree(path, out / path.name)
    (out / "order.jsonl").write_text("".join((whole / "order.jsonl").read_text().splitlines(keepends=True)[:step]))
    state = json.loads((whole / "run_state.json").read_text())
    (out / "run_state.json").write_text(json.dumps({**state, "status": "running", "global_step": step}))
    return out


def require_sound(checkpoint):
    """A checkpoint has all files, each as it was saved, and finite weights."""
    from safetensors.torch import load_file

    assert what_it_lacks(checkpoint) == ""
    assert damage(checkpoint, lambda names: names, lambda found: found) == ""
    if (checkpoint / "model.safetensors").exists():
        assert all(values.isfinite().all() for values in load_file(checkpoint / "model.safetensors").values())


def newest(out):
    return checkpoints(out)[0]


def go_on(job, whole, resumed=True):
    """Let a start run to its end, which must be that of the whole run."""
    code = job.end()
    assert code == 0, job.text[-6000:]
    assert ("resuming from" in job.text) == resumed
    assert job.state["status"] == "complete"
    assert differences(whole, job.out, stock=False) == []
    assert not (job.out / ".saving").exists()


def require_no_model(out):
    assert not list(out.glob("model*.safetensors"))
    assert not (out / "train_results.json").exists()


def slow(seconds=PACE, **where):
    return {"do": "slow step", "seconds": seconds, **where}


class TestSignals:
    # Each to one process, as a person would, to the launcher, and to all, as Slurm does.
    STOPS = {
        "one": [("SIGTERM", "rank 0"), ("SIGUSR1", "rank 0"), ("SIGINT", "rank 0"), ("SIGUSR1", "all")],
        "ddp": [("SIGTERM", "rank 1"), ("SIGINT", "rank 0"), ("SIGINT", "launcher"), ("SIGUSR1", "all")],
        "zero2": [("SIGUSR1", "rank 1"), ("SIGTERM", "launcher"), ("SIGTERM", "all"), ("SIGUSR1", "rank 0")],
        "zero3": [("SIGINT", "all"), ("SIGINT", "rank 1"), ("SIGTERM", "rank 0"), ("SIGTERM", "launcher")],
    }

    @pytest.mark.parametrize("launch", LAUNCHES)
    def test_a_run_stopped_four_times_is_the_run_that_was_not(self, launch, reference, start, tmp_path):
        out, draw = tmp_path / "run", random.Random(launch)
        for number, (name, whom) in enumerate(self.STOPS[launch]):
            step = 5 * number + draw.randint(1, 4)
            job = start(launch, out, slow()).at(step).signal(signal.Signals[name], whom)
            code, about = job.end(GONE), f"{name} to {whom} at step {step}\n{job.text[-6000:]}"
            assert (code == 75) if launch == "one" else code, about
            assert job.state["status"] == "preempted", about
            last, saved = steps(out), newest(out)
            assert step <= last <= step + 3, about
            assert job.state["global_step"] == last, about
            assert job.state["reason"] == f"{name}, saved as checkpoint-{last}", about
            assert saved.name == f"checkpoint-{last}", about
            require_sound(saved)
            assert read_seal(saved)["step"] == last
            assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == last
            if launch in SHARDED:
                assert (saved / "latest").read_text().strip() == f"global_step{last}"
                assert (saved / f"global_step{last}").is_dir()
            require_no_model(out)
            assert "DataLoader worker" not in job.text, about
        go_on(start(launch, out), reference(launch))

    @pytest.mark.parametrize("launch", ["one", "ddp"])
    def test_in_an_evaluation(self, launch, reference, start, tmp_path):
        """To all processes: those that read its rows, too."""
        out, mark = tmp_path / "run", tmp_path / "mark"
        slowly = {"do": "slow evaluation", "step": 14, "seconds": 1, "mark": str(mark)}
        job = start(launch, out, slowly).until(mark.exists).signal(signal.SIGTERM, "all")
        code = job.end(GONE)
        assert (code == 75) if launch == "one" else code, job.text[-6000:]
        assert job.state["reason"].startswith("SIGTERM, saved as checkpoint-1"), job.text[-6000:]
        assert "DataLoader worker" not in job.text
        go_on(start(launch, out), reference(launch))

    @pytest.mark.parametrize("stuck", ["in Python", "in C"])
    def test_a_second_one_does_not_wait_for_a_step(self, stuck, reference, start, tmp_path):
        """Of two processes; where one sleeps, the other waits in a collective, which no Python handler interrupts."""
        out, mark = tmp_path / "run", tmp_path / "mark"
        job = start("ddp", out, slow(50, rank=1, step=8, mark=str(mark))).until(mark.exists)
        whom = "rank 1" if stuck == "in Python" else "rank 0"
        job.signal(signal.SIGUSR1, whom)
        time.sleep(2)
        job.signal(signal.SIGUSR1, whom)  # the same request
        time.sleep(1.5)
        assert job.process.poll() is None
        assert job.state["status"] == "running"
        job.signal(signal.SIGTERM, whom)
        assert job.end(40) != 0
        assert job.state["status"] == "preempted"
        assert "SIGUSR1, and then SIGTERM: stopped at once, without saving" in job.state["reason"]
        assert newest(out).name == f"checkpoint-{SAVE}"
        if stuck == "in Python":
            go_on(start("ddp", out), reference("ddp"))

    @pytest.mark.parametrize("launch", ["one", "zero3"])
    def test_while_starting_up_nothing_is_lost(self, launch, reference, start, tmp_path):
        out, mark = torn(reference(launch), tmp_path / "run", SAVE), tmp_path / "mark"
        moment = {"do": "slow start", "seconds": 20, "mark": str(mark)}
        job = start(launch, out, moment).until(mark.exists).signal(signal.SIGTERM, "rank 0")
        began = time.monotonic()
        code = job.end(GONE)
        assert (code == 75) if launch == "one" else code, job.text[-6000:]
        if launch == "one":
            assert time.monotonic() - began < 5
        assert not RAISED_HERE.search(job.text), job.text[-6000:]
        require_sound(newest(out))
        go_on(start(launch, out), reference(launch))

    def test_at_a_random_moment_of_a_first_start_nothing_is_left(self, start, tmp_path):
        draw = random.Random(0)
        for number in range(3):
            out = tmp_path / str(number)
            job = start("one", out).until((out / ".lock").exists)
            time.sleep(draw.uniform(0, 1.5))
            began = time.monotonic()
            assert job.signal(signal.SIGINT, "rank 0").end(GONE) == 75, job.text[-6000:]
            assert time.monotonic() - began < 5
            assert "Traceback" not in job.text
            assert not out.exists() or job.state["status"] == "preempted"


class TestDeaths:
    @pytest.mark.parametrize("launch", SEVERAL)
    def test_a_process_that_is_killed(self, launch, reference, start, tmp_path):
        out, draw = torn(reference(launch), tmp_path / "run", SAVE), random.Random(launch)
        step, whom = draw.randint(SAVE + 2, 20), f"rank {draw.randint(0, 1)}"
        job = start(launch, out, slow()).at(step).signal(signal.SIGKILL, whom)
        assert job.end(GONE) != 0
        assert job.state["status"] == "failed", job.text[-6000:]
        other = 1 - int(whom[-1])
        assert job.state["reason"].startswith(f"process {other}: "), job.state["reason"]
        go_on(start(launch, out), reference(launch))

    @pytest.mark.parametrize("launch", SEVERAL)
    def test_a_process_that_raises(self, launch, reference, start, tmp_path):
        out = torn(reference(launch), tmp_path / "run", SAVE)
        job = start(launch, out, {"do": "raise", "rank": 1, "step": 9})
        began = time.monotonic()
        job.until(lambda: "planted in a step" in job.text or job.process.poll() is not None)
        assert job.end(GONE) != 0
        assert time.monotonic() - began < 2 * GONE
        assert job.state["status"] == "failed"
        assert job.state["reason"] == "process 1: RuntimeError: planted in a step"
        raised = re.findall(r"^(?:\[rank\d\]: ?)?(\w+(?:Error|Exception)\b.*)$", job.text, re.MULTILINE)
        assert raised[0] == "RuntimeError: planted in a step", job.text[-6000:]
        go_on(start(launch, out), reference(launch))


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def taken(paths):
    """Bytes that files take of a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in paths)


class TestFullDisk:
    """What is free is seeded, so that each file of a save is the one that does not fit; and made room for again."""

    TOLD = re.compile(r"(\S+|the run|the final model) could not be saved: it takes [^;]*?([\d.]+) MB, and ([\d.]+) MB")

    def require_told(self, job, code, what, before=False):
        """One message, also in run_state.json unless it is full `before` that is begun, and nothing left behind."""
        about = job.text[-6000:]
        assert code == 1, about
        found = self.TOLD.findall(job.text)
        assert len(found) == 1, about
        [(name, needed, free)] = found
        assert name in what, about
        assert float(needed) >= float(free), about
        assert job.state["status"] == "failed", about
        assert before or f"{name} could not be saved" in job.state["reason"], about
        assert not (job.out / ".saving").exists(), about
        assert not list(job.out.glob("*.partial")), about
        for checkpoint in checkpoints(job.out):
            require_sound(checkpoint)
        if job.launch == "one":
            assert "Traceback" not in about
        (job.out / "filler").unlink(missing_ok=True)

    @pytest.mark.parametrize("launch", ["one", "ddp", "zero2"])
    def test_every_save_says_so_and_goes_on_when_there_is_room(self, launch, reference, start, disk):
        whole, draw = reference(launch), random.Random(launch)
        like = whole / f"checkpoint-{2 * SAVE}"
        files, seal = taken(like / name for name in files_of(like)), taken([like / "checkpoint.json"])
        out = torn(whole, disk / "run", SAVE)
        frees = [4096, draw.randrange(files // 2), draw.randrange(files // 2, files), files]
        for free in frees if launch == "one" else frees[1:3]:
            job = start(launch, out, {"do": "full at save", "free": free})
            self.require_told(job, job.end(GONE), [f"checkpoint-{2 * SAVE}"])
            assert newest(out).name == f"checkpoint-{SAVE}"
        job = start(launch, out, slow(), {"do": "full at save", "free": draw.randrange(files)})
        job.at(SAVE + 2).signal(signal.SIGTERM, "rank 0")
        self.require_told(job, job.end(GONE), [f"checkpoint-{step}" for step in range(SAVE + 2, 2 * SAVE)])
        assert newest(out).name == f"checkpoint-{SAVE}"
        if launch == "one":  # run_state.json and order.jsonl: while it trains, and behind a save
            job = start(launch, out, {"do": "full at step", "step": SAVE + 2, "free": 0})
            self.require_told(job, job.end(GONE), ["the run"])
            job = start(launch, out, {"do": "full at save", "free": files + seal})
            self.require_told(job, job.end(GONE), ["the run", f"checkpoint-{2 * SAVE}"])
            (out / "filler").write_bytes(bytes(shutil.disk_usage(out).free))
            job = start(launch, out)
            self.require_told(job, job.end(GONE), ["the run"], before=True)
        job = start(launch, out, {"do": "full at end", "free": draw.randrange(taken([like / "model.safetensors"]))})
        self.require_told(job, job.end(FIRST), ["the final model"])
        require_no_model(out)
        go_on(start(launch, out), whole)


class TestDamage:
    @pytest.mark.parametrize("launch", SHARDED)
    def test_every_file_hurt_in_every_way_is_found(self, launch, reference, tmp_path):
        checkpoint = torn(reference(launch), tmp_path / "run", SAVE) / f"checkpoint-{SAVE}"
        names = [*files_of(checkpoint), "checkpoint.json"]
        assert sum(name.startswith(f"global_step{SAVE}/") for name in names) >= 3
        for name in names:
            data = (checkpoint / name).read_bytes()
            assert data
            for how in ("removed", "truncated", "emptied", "flipped"):
                hurt(checkpoint / name, how)
                assert name in wrong(checkpoint), (name, how)
                (checkpoint / name).write_bytes(data)
            assert wrong(checkpoint) == ""

    @pytest.mark.parametrize(
        ("launch", "pattern", "how"),
        [
            ("zero2", "*/*rank_1*optim_states.pt", "flipped"),
            ("zero3", "*/zero_pp_rank_0_*model_states.pt", "removed"),
            ("zero3", "latest", "emptied"),
        ],
    )
    def test_the_one_before_leads_to_the_same_end(self, launch, pattern, how, reference, start, tmp_path):
        out = torn(reference(launch), tmp_path / "run", 2 * SAVE)
        [path] = newest(out).glob(pattern)
        hurt(path, how)
        job = start(launch, out)
        go_on(job, reference(launch))
        assert path.name in job.text
        assert f"resuming from {out}/checkpoint-{SAVE}" in job.text
        require_sound(out / f"checkpoint-{2 * SAVE}")
        assert (out / f"damaged-checkpoint-{2 * SAVE}").is_dir()


class TestOtherProcesses:
    @pytest.mark.parametrize(("before", "after"), [("ddp", "one"), ("one", "ddp")])
    def test_the_same_rows_a_step_go_on(self, before, after, reference, start, tmp_path):
        out = torn(reference(before), tmp_path / "run", 2 * SAVE)
        job = start(after, out)
        assert job.end() == 0, job.text[-6000:]
        assert (out / "order.jsonl").read_bytes() == (reference(before) / "order.jsonl").read_bytes()
        for key in ("loss", "eval_loss"):
            assert losses(out, key) == pytest.approx(losses(reference(before), key), abs=1e-4)

    @pytest.mark.parametrize(
        ("before", "after", "count"), [("zero2", "zero2", 1), ("zero3", "zero3", 1), ("zero2", "ddp", 2)]
    )
    def test_what_was_cut_up_otherwise_is_refused(self, before, after, count, reference, start, tmp_path):
        out, mark = torn(reference(before), tmp_path / "run", SAVE), tmp_path / "mark"
        job = start(after, out, {"do": "slow load", "seconds": 0, "mark": str(mark)}, count=count)
        assert job.end(GONE) != 0
        assert not mark.exists()
        told = f"was saved by 2 processes under {before}, these are {count} under {after}"
        assert told in job.text, job.text[-6000:]
        assert "launch it as before, or train on from its weights in another output_dir: --model_name" in job.text
        assert not RAISED_HERE.search(job.text), job.text[-6000:]
        require_sound(newest(out))

    def test_other_rows_a_step_are_refused(self, reference, start, tmp_path):
        out, mark = torn(reference("ddp"), tmp_path / "run", SAVE), tmp_path / "mark"
        load = {"do": "slow load", "seconds": 0, "mark": str(mark)}
        job = start("one", out, load, global_batch_size=None)
        assert job.end(GONE) == 2
        assert not mark.exists()
        assert "was trained with 4 rows a step, and a step would now take 2 (1 processes, before 2)" in job.text
        assert "set global_batch_size: 4" in job.text


def test_a_second_job_in_one_directory_is_refused_and_harms_nothing(reference, start, tmp_path):
    first = start("one", tmp_path / "run", slow()).at(2)
    second = start("one", tmp_path / "run")
    assert second.end(GONE) == 2
    assert f"is in use by another run (host {os.uname().nodename}, pid {first.process.pid}, " in second.text
    assert "Traceback" not in second.text
    go_on(first, reference("one"), resumed=False)


class TestNoNumbers:
    @pytest.mark.parametrize("launch", SEVERAL)
    def test_a_loss(self, launch, inputs, start, tmp_path):
        from transformers import AutoTokenizer

        tokenizer, bad = AutoTokenizer.from_pretrained(inputs / "model"), 33
        rows = [json.loads(line) for line in (inputs / "chat.jsonl").read_text().splitlines()]
        rows[bad]["messages"][0]["content"] = "\u2603 " + rows[bad]["messages"][0]["content"]
        others = {token for number, row in enumerate(rows) if number != bad for token in tokens_of(tokenizer, row)}
        token = next(token for token in tokens_of(tokenizer, rows[bad]) if token not in others)
        data = write_jsonl(tmp_path / "chat.jsonl", rows)
        job = start(launch, tmp_path / "run", {"do": "nan token", "token": token}, dataset_name=data, save_steps=1)
        assert job.end(FIRST) != 0
        found = self.rows(job, "loss is not finite")
        assert bad in [row["row"] for row in found]
        assert len(found) == (1 if launch == "ddp" else 2)
        assert found[0]["step"] > 2

    @pytest.mark.parametrize("launch", SEVERAL)
    def test_a_gradient(self, launch, reference, start, tmp_path):
        out = torn(reference(launch), tmp_path / "run", SAVE)
        job = start(launch, out, {"do": "nan gradient", "rank": 1, "step": 9}, save_steps=1)
        assert job.end(GONE) != 0
        found = self.rows(job, "the gradients are not finite")
        assert {row["step"] for row in found} == {9}
        assert len(found) == 4
        go_on(start(launch, out), reference(launch))

    def rows(self, job, what):
        """The rows of bad_batch.jsonl, behind a sound checkpoint that is the last."""
        assert job.state["status"] == "failed", job.text[-6000:]
        assert what in job.state["reason"], job.text[-6000:]
        rows = [json.loads(line) for line in (job.out / "bad_batch.jsonl").read_text().splitlines()]
        assert newest(job.out).name == f"checkpoint-{rows[0]['step'] - 1}"
        require_sound(newest(job.out))
        require_no_model(job.out)
        assert processes(job.token) == []
        return rows


def tokens_of(tokenizer, row):
    return [token for message in row["messages"] for token in tokenizer(message["content"])["input_ids"]]


@pytest.mark.parametrize("launch", ["one", *SHARDED])
def test_another_learning_rate_takes_effect(launch, reference, start, tmp_path):
    whole, out = reference(launch), torn(reference(launch), tmp_path / "run", 2 * SAVE)
    job = start(launch, out, learning_rate=5e-4, allow_changes=["learning_rate"])
    assert job.end() == 0, job.text[-6000:]
    assert "learning_rate: 0.001 -> 0.0005 from here on" in job.text
    before, after = losses(whole, "learning_rate"), losses(out, "learning_rate")
    assert after == pytest.approx([*before[:2], *(rate / 2 for rate in before[2:])], rel=1e-9)
    assert losses(out)[:2] == losses(whole)[:2]
    assert {"weights", "loss from step 15"} <= set(differences(whole, out, stock=False))
