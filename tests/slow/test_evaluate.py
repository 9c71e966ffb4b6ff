"""slurm/evaluate.slurm with a program in lighteval's place: by hand, in a job, and submitted by a training job."""

import json
import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
import test_slurm
import yaml
from conftest import ROOT, settings
from test_slurm import HOSTILE, environment, words

from open_r1.benchmarks import submit

root = test_slurm.root
NAMES = ["--benchmarks", "aime24", "gsm8k|5"]
TASKS = "aime24|0,gsm8k|5"
STAND_IN = """#!/bin/bash
printf '%s\\0' "$@" >"$SEEN/argv"
env -0 >"$SEEN/environment"
cp "$SEEN/../run/run_state.json" "$SEEN/state" 2>/dev/null
exit "${CODE:-0}"
"""


@pytest.fixture
def seen(tmp_path):
    """Where the stand-in writes down what it was called with."""
    (tmp_path / "lighteval").write_text(STAND_IN)
    (tmp_path / "lighteval").chmod(0o755)
    (tmp_path / "seen").mkdir()
    return tmp_path / "seen"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A saved model in a folder with a name that no shell and no list of settings likes."""
    folder = tmp_path / "it's a=1, $HOME {b}"
    shutil.copytree(tiny_model, folder)
    return folder


def evaluate(*argv, **env):
    command = ["bash", "slurm/evaluate.slurm", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment(**env), capture_output=True, text=True)


def read(path):
    return path.read_text().split("\0")[:-1]


def told(model):
    return json.loads((model / "evaluation" / "lighteval.yaml").read_text())["model_parameters"]


class TestByHand:
    def test_lighteval_is_called_and_its_exit_code_is_that_of_the_job(self, model, seen):
        known = {"LIGHTEVAL": seen.parent / "lighteval", "SEEN": seen, "GPUS": 2}
        left = {"RANK": 0, "WORLD_SIZE": 16, "MASTER_ADDR": "n1", "ACCELERATE_USE_DEEPSPEED": "true"}
        done = evaluate("--model", model, *NAMES, "--", *HOSTILE, **known, **left, CODE=7)
        assert done.returncode == 7, done.stderr
        out = ["--output-dir", f"{model}/evaluation", "--save-details"]
        assert read(seen / "argv") == ["vllm", f"{model}/evaluation/lighteval.yaml", TASKS, *out, *HOSTILE]
        assert (told(model)["model_name"], told(model)["tensor_parallel_size"]) == (str(model), 2)
        names = {word.partition("=")[0] for word in read(seen / "environment")}
        assert "VLLM_WORKER_MULTIPROC_METHOD" in names
        assert not names & left.keys()

    def test_a_dry_run_prints_that_command_and_does_nothing(self, model, seen):
        done = evaluate("--dry-run", "--model", model, *NAMES, "--", *HOSTILE, LIGHTEVAL=seen.parent / "lighteval")
        assert done.returncode == 0, done.stderr
        called = [str(seen.parent / "lighteval"), "vllm", f"{model}/evaluation/lighteval.yaml", TASKS]
        assert words(done.stdout) == [*called, "--output-dir", f"{model}/evaluation", "--save-details", *HOSTILE]
        assert '"tensor_parallel_size"' in done.stderr
        assert not (seen / "argv").exists()
        assert not (model / "evaluation").exists()

    def test_all_are_those_of_open_r1(self, model):
        done = evaluate("--dry-run", "--model", model, "--benchmarks", "all")
        tasks = "math_500|0,aime24|0,aime25|0,gpqa:diamond|0,lcb:codegeneration|0,lcb:codegeneration_v4|0"
        assert tasks in words(done.stdout)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--benchmarks", "aime24"], "give --model and --benchmarks"),
            (["--model", "MODEL"], "give --model and --benchmarks"),
            (["--model"], "--model needs a value"),
            (["--dry-run", "--model", "MODEL", "--benchmarks", "aim24"], "unknown benchmark: aim24; known: math_500"),
            (["--model", "nowhere", "--benchmarks", "aime24"], "nowhere/config.json is not there"),
            (["--modell", "MODEL"], "unknown option: --modell"),
            (["--model", "MODEL", *NAMES], "no GPUs here"),
        ],
    )
    def test_mistakes_are_named(self, argv, message, model, seen):
        known = {"LIGHTEVAL": seen.parent / "lighteval", "SEEN": seen, "GPUS": 0}
        done = evaluate(*(str(model) if word == "MODEL" else word for word in argv), **known)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert not (seen / "argv").exists()

    def test_an_adapter_is_refused(self, model):
        (model / "adapter_config.json").touch()
        done = evaluate("--dry-run", "--model", model, *NAMES)
        assert done.returncode == 2
        assert "is an adapter; merge it" in done.stderr

    def test_lighteval_that_is_not_there(self, model):
        done = evaluate("--model", model, *NAMES, LIGHTEVAL="no-such-program")
        assert done.returncode == 2
        assert "no-such-program is not there; slurm/README.md says how to install it" in done.stderr

    @pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
    def test_shellcheck(self):
        done = subprocess.run(
            ["shellcheck", "slurm/evaluate.slurm", "slurm/environment.sh"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def jobs(cluster):
    """The jobs that are waiting or running."""
    done = subprocess.run(["squeue", "-h", "-o", "%j"], env=environment(**cluster), capture_output=True, text=True)
    return done.stdout.split()


def wait(cluster):
    """Until no job is left."""
    end = time.monotonic() + 120
    while jobs(cluster):
        assert time.monotonic() < end, jobs(cluster)
        time.sleep(0.2)


def train(root, cluster, tiny_model, chat_file, **values):
    """A training job with benchmarks, until it and what it submitted have ended."""
    recipe = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": str(root / "run")}
    (root / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "benchmarks": ["aime24", "gsm8k|5"]}))
    argv = ["--recipe", root / "recipe.yaml", "--accelerator", "ddp", "--", *settings(max_steps=2, **values)]
    known = {"PROCESSES_PER_NODE": 1, "LIGHTEVAL": root / "lighteval", "SEEN": root / "seen"}
    code, log = test_slurm.sbatch(root, cluster, *argv, **known)
    wait(cluster)
    return code, log


def test_a_training_job_is_evaluated_behind_it(tiny_model, chat_file, cluster, root, seen):
    code, log = train(root, cluster, tiny_model, chat_file)
    assert code == 0, log
    assert "Submitted batch job" in log
    assert read(seen / "argv")[:3] == ["vllm", f"{root}/run/evaluation/lighteval.yaml", TASKS]
    assert '"status": "complete"' in (seen / "state").read_text()
    environment = dict(word.partition("=")[::2] for word in read(seen / "environment"))
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"}
    assert environment["SLURM_JOB_NUM_NODES"] == "1"
    assert environment["SLURM_GPUS_ON_NODE"] == "8"
    assert told(root / "run")["tensor_parallel_size"] in (1, 2, 4, 8)
    [written] = (root / "run" / "evaluation").glob("*.out")
    assert "lighteval.yaml" in written.read_text()


@pytest.mark.parametrize("code", [0, 1])
def test_only_a_job_that_ends_well_is(code, model, cluster, seen, monkeypatch):
    known = {**cluster, "LIGHTEVAL": seen.parent / "lighteval", "SEEN": seen}
    command = ["sbatch", "--parsable", "--output=/dev/null", f"--wrap=sleep 3; exit {code}"]
    done = subprocess.run(command, env=environment(**cluster), capture_output=True, text=True, check=True)
    for name, value in {**known, "SLURM_JOB_ID": done.stdout.strip()}.items():
        monkeypatch.setenv(name, str(value))
    submit(SimpleNamespace(output_dir=str(model), benchmarks=["aime24"], trust_remote_code=False))
    assert "open-r1-evaluate" in jobs(cluster)
    wait(cluster)
    assert (seen / "argv").exists() == (code == 0)
