"""What can happen to a job: signals, requeues, lost nodes, on a Slurm cluster of two nodes, both on this machine.

    python -m pytest -o addopts= tests/slow/test_preemption.py      writes the table to $EVENTS, where it is set

After each event the run ends bit for bit as one that two local processes made in one go, or it has stopped, and its
log says why; where it stopped, the same submission goes on with it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT, losses
from test_slurm import environment
from transformers import AutoModelForCausalLM

PLANTED = ROOT / "tests/slow/planted"
STEPS, SAVES = 40, 10
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")  # NODE_FAIL only passes


class Job:
    """A submitted job, its log and its output directory."""

    def __init__(self, root, cluster, launch, options=(), args=(), pace=0.05, out="out", **env):
        faults = [{"do": "slow step", "seconds": pace}]
        self.cluster, self.root, self.out, self.launch = cluster, root, root / out, launch
        self.env = environment(
            **cluster,
            **{
                "PROCESSES_PER_NODE": 1,
                "HF_DATASETS_CACHE": root / "cache",
                "FAULTS": json.dumps(faults),
                "PYTHONPATH": f"{PLANTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                **env,
            },
        )
        argv = ["--nodes=2", *options, "slurm/train.slurm", "--recipe", root / "recipe.yaml", "--accelerator", launch]
        self.submission = [*argv, "--", "--output_dir", self.out, *args]
        self.number = self.submit()

    def submit(self):
        return self.slurm("sbatch", "--parsable", *self.submission).strip()

    def slurm(self, *command, check=True):
        done = subprocess.run(
            list(map(str, command)), cwd=self.root, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    @property
    def log(self):
        path = self.root / f"logs/open-r1-{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def facts(self):
        """What Slurm says of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", self.number)))

    @property
    def state(self):
        return json.loads((self.out / "run_state.json").read_text())

    def until(self, moment, longest=240):
        """Wait for a moment of the run."""
        end = time.monotonic() + longest
        while not moment(self):
            assert time.monotonic() < end, self.log
            time.sleep(0.002)

    def end(self, longest=400):
        """Wait for its end; returns Slurm's word for it, and how often it was started again."""
        end = time.monotonic() + longest
        while (facts := self.facts)["JobState"] not in ENDS:
            assert time.monotonic() < end, self.log
            time.sleep(0.5)
        return facts["JobState"], int(facts["Restarts"])


@pytest.fixture
def place(tmp_path, docstrings):
    """A root of the repository with a recipe, and logs and caches of its own."""
    for name in ("src", "recipes", "slurm", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "logs").mkdir()
    write_recipe(tmp_path, docstrings)
    return tmp_path


def write_recipe(folder, docstrings):
    recipe = {
        "model_name_or_path": str(docstrings / "model"),
        "dataset_name": str(docstrings / "docstrings.jsonl"),
        "max_length": 128,
        "max_steps": STEPS,
        "save_steps": SAVES,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, docstrings):
    """Runs of two local processes that nothing happened to."""
    made = {}

    def of(launch):
        if launch not in made:
            folder = made[launch] = tmp_path_factory.mktemp(launch)
            write_recipe(folder, docstrings)
            command = ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{launch}.yaml"]
            command += ["--num_processes", "2", "--main_process_port", "0", "src/open_r1/sft.py"]
            command += ["--config", folder / "recipe.yaml", "--output_dir", folder / "out"]
            done = subprocess.run(
                list(map(str, command)),
                cwd=ROOT,
                env=environment(HF_DATASETS_CACHE=folder / "cache"),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert len(losses(folder / "out")) == STEPS
        return made[launch] / "out"

    return of


def assert_same(out, reference):
    """The run is the reference, bit for bit: losses, rows, weights."""
    assert losses(out) == losses(reference)
    assert (out / "order.jsonl").read_bytes() == (reference / "order.jsonl").read_bytes()
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (reference, out))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def table():
    """Rows of the table of events."""
    rows = []
    yield rows
    if "EVENTS" in os.environ:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed"))
        slurm = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout.strip()
        head = "| event | launch | starts | the job ended | the run |\n|---|---|---|---|---|\n"
        Path(os.environ["EVENTS"]).write_text(f"{ABOUT}\n\n{slurm}, {versions}:\n\n{head}" + "".join(rows))


ABOUT = """\
# What can happen to a Slurm job

Written by `EVENTS=docs/slurm-events.md python -m pytest -o addopts= tests/slow/test_preemption.py` on a cluster of two
nodes, two `slurmd` on one machine. Each job trains 40 steps on docstrings, a process a node, and saves every 10.
Identical means, against a run of two local processes that nothing happened to: the logged losses equal as floats,
`order.jsonl` equal as bytes, all final weights equal bit for bit."""


# Moments


def started(job):
    return "start 1, on" in job.log


def preparing(job):
    return any((job.root / "cache/open_r1").glob("*.partial-*"))


def at(step):
    def moment(job):
        with contextlib.suppress(OSError, ValueError):
            return job.state["status"] == "running" and job.state["global_step"] >= step
        return False

    return moment


def saving(job):
    return (job.out / ".saving/checkpoint-20").exists()


def saving_the_model(job):
    return (job.out / "model.safetensors").exists()


# Events


def near_limit(job):
    """What `--signal` sends, by hand."""
    job.slurm("scancel", "--signal=USR1", "--batch", job.number)


def near_limit_twice(job):
    near_limit(job)
    near_limit(job)


def requeue(job):
    job.slurm("scontrol", "requeue", job.number)


def cancel(job):
    job.slurm("scancel", job.number)


def suspend(job):
    job.slurm("scontrol", "suspend", job.number)
    time.sleep(3)
    job.slurm("scontrol", "resume", job.number)


def preempt(job):
    """A job of more priority wants the nodes: this one has the partition's GraceTime to save."""
    more = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={job.root}/urgent.out"]
    job.slurm("sbatch", *more, "--wrap=sleep 5")


def nothing(job):
    pass


def processes_of(node, cluster):
    """The processes of a node: of its jobs, of what runs those, and its slurmd. Other clusters have an n2, too."""
    marks = {f"SLURMD_NODENAME={node}", f"CLUSTER_NODE={node}"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            if marks & said and f"SLURM_CONF={cluster['SLURM_CONF']}" in said:
                yield int(folder.name)
                parent = int((folder / "status").read_text().partition("PPid:")[2].split()[0])
                if is_daemon(parent):  # what runs a job has none of its environment
                    yield parent


def kill_all_of(node, cluster):
    """As when the power goes: all stopped first, and what could tell of another's end killed last."""
    found = set()
    while left := set(processes_of(node, cluster)) - found:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        found |= left
    for pid in sorted(found, key=is_daemon):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_daemon(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("slurm")
    return False


def kill_node(node):
    def act(job):
        kill_all_of(node, job.cluster)
        end = time.monotonic() + 120
        while not job.slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%t").startswith("down"):
            assert time.monotonic() < end
            time.sleep(0.5)
        start_node(job, node)

    return act


def kill_processes(job, also=()):
    """All processes of the job on a node, as when its memory is out."""
    for pid in processes_of("n2", job.cluster):
        with contextlib.suppress(OSError):
            if not is_daemon(pid) or Path(f"/proc/{pid}/comm").read_text().strip() in also:
                os.kill(pid, signal.SIGKILL)


def kill_processes_and_slurmd(job):
    """And it comes back before Slurm takes the node for dead."""
    kill_processes(job, also=("slurmd",))
    job.until(lambda job: "does not answer" in job.log)
    start_node(job, "n2")


def start_node(job, node):
    subprocess.run(["slurmd", "-N", node], env={**job.env, "CLUSTER_NODE": node}, check=True)


def drop_node(job):
    job.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(3)
    job.slurm("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may have come back by itself


class Event(NamedTuple):
    """`ends`: Slurm's word for the job's end. `restarts`: at least so many. `says`: what its log must have."""

    text: str
    moment: Callable
    act: Callable
    launch: str = "ddp"
    ends: str = "COMPLETED"
    restarts: int = 1
    says: str = "back into the queue"
    options: tuple = ()
    pace: float = 0.05


EVENTS = [
    Event("time limit, `--signal=B:USR1@60`", nothing, nothing, options=("--time=2", "--signal=B:USR1@60"), pace=3),
    Event("signal while starting up", started, near_limit),
    Event("signal while data is prepared", preparing, near_limit),
    Event("signal in training", at(5), near_limit),
    Event("signal in training", at(5), near_limit, "zero3"),
    Event("signal, and again", at(5), near_limit_twice),
    Event("signal while a checkpoint is saved", saving, near_limit),
    Event("signal while a checkpoint is saved", saving, near_limit, "zero3"),
    Event("signal while the final model is saved", saving_the_model, near_limit, restarts=0, says=""),
    Event("`scontrol requeue` in training", at(15), requeue, says="DUE TO JOB REQUEUE"),
    Event("`scontrol requeue` in training", at(15), requeue, "zero3", says="DUE TO JOB REQUEUE"),
    Event("`scontrol requeue` while data is prepared", preparing, requeue, says="DUE TO JOB REQUEUE"),
    Event("`scontrol requeue` while a checkpoint is saved", saving, requeue, says="DUE TO JOB REQUEUE"),
    Event("preempted by a job of more priority, with `GraceTime`", at(15), preempt, says="preempted"),
    Event("second node killed", at(15), kill_node("n2"), "zero3", says="DUE TO NODE FAILURE"),
    Event("a node's processes and `slurmd` killed, which is back soon", at(15), kill_processes_and_slurmd),
    Event("first node killed", at(15), kill_node("n1"), says=""),
    Event("second node set down by an administrator", at(15), drop_node, says="DUE TO NODE FAILURE"),
    Event("`scontrol suspend`, then `resume`", at(5), suspend, restarts=0, says=""),
    Event("`scancel` in training", at(5), cancel, ends="CANCELLED", restarts=0, says="saved as checkpoint-"),
    Event("`scancel` while data is prepared", preparing, cancel, ends="CANCELLED", restarts=0, says="CANCELLED"),
    Event("a node's processes killed", at(15), kill_processes, ends="FAILED", restarts=0, says="ended with exit code"),
    Event(
        "signal, and `--no-requeue`",
        *(at(5), near_limit),
        ends="FAILED",
        restarts=0,
        says="it was not put back: submit the same again",
        options=("--no-requeue",),
    ),
    Event(
        "time limit without a signal before it",
        *(nothing, nothing),
        ends="TIMEOUT",
        restarts=0,
        says="saved as checkpoint-",
        options=("--time=1", "--signal=B:CONT@1"),
        pace=3,
    ),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event.text}, {event.launch}".replace("`", ""))
def test_event(event, place, cluster, reference, table):
    same = reference(event.launch)
    job = Job(place, cluster, event.launch, event.options, pace=event.pace)
    if event.moment is not nothing:
        job.until(event.moment)
    event.act(job)
    ended, restarts = job.end()
    assert (ended, event.says in job.log) == (event.ends, True), job.log
    assert restarts >= event.restarts, job.log
    then = ""
    if ended != "COMPLETED":
        assert not (job.out / "model.safetensors").exists()
        reason = job.state["reason"].partition("\n")[0][:80]
        time.sleep(8)
        assert job.facts["JobState"] == ended  # nobody put it back
        job.submission = [word for word in job.submission if word not in event.options]
        job.number = job.submit()
        assert job.end()[0] == "COMPLETED", job.log
        then = f"{reason}; submitted again: "
    assert_same(job.out, same)
    assert job.state["status"] == "complete"
    row = f"| {event.text} | {event.launch} | {restarts + 1} | {ended} | {then}identical |\n"
    table.append(row)


def test_a_job_that_gets_nowhere_is_given_up(place, cluster, table):
    slow = json.dumps([{"do": "slow load", "seconds": 200}])
    job = Job(place, cluster, "ddp", ("--signal=B:USR1@300", "--time=1"), FAULTS=slow)
    ended, restarts = job.end()
    assert (ended, restarts) == ("FAILED", 3), job.log
    assert "given up: three starts in a row found no newer checkpoint than that of step 0" in job.log
    table.append(f"| time limit shorter than its signal's | ddp | {restarts + 1} | {ended} (given up) | not begun |\n")


def test_what_is_not_saved_in_time_is_left(place, cluster, reference, table):
    """A step that takes longer than Slurm leaves: the job is put back before it is killed for good."""
    slow = {"do": "slow step", "seconds": 200, "step": 25, "rank": 0, "mark": str(place / "mark"), "once": True}
    job = Job(place, cluster, "ddp", ("--time=2", "--signal=B:USR1@60"), FAULTS=json.dumps([slow]))
    ended, restarts = job.end()
    assert (ended, restarts) == ("COMPLETED", 1), job.log
    assert "not saved in time" in job.log
    assert "from step 20" in job.log
    assert_same(job.out, reference("ddp"))
    table.append(f"| a step longer than what the signal leaves | ddp | {restarts + 1} | {ended} | identical |\n")
