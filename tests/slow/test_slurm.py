"""slurm/train.slurm on a cluster of two nodes, both on this machine, and its dry run without any cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, losses, settings

DEMO = ["--model", "demo", "--task", "sft", "--config", "arithmetic", "--accelerator", "ddp"]
HOSTILE = [
    "",
    " ",
    "two words",
    " padded\t",
    'double " quote',
    "single ' quote",
    "$HOME",
    "${HOME}",
    "$(id)",
    "`id`",
    "a; id",
    "a && id",
    "a | id",
    "> file",
    "*",
    "~",
    "back\\slash\\",
    "<|im_end|>",
    "two\nlines\n",
    "größe 模型 🙂",
    "!!",
    "#comment",
    "{a,b}",
    "--",
    "--machine_rank=7",
    "%s%n",
    '{"eos": "<|im_end|>", "x": [1]}',
]


def environment(**more):
    """Of a user outside any job, with this interpreter's programs on PATH."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OPEN_R1"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**outside, "PATH": path, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in more.items()}}


def dry_run(*argv, cwd=ROOT, **env):
    return subprocess.run(
        ["bash", "slurm/train.slurm", "--dry-run", *argv],
        cwd=cwd,
        env=environment(**{"OPEN_R1_ENTRY": "scripts/chat.py", **env}),  # another script is not checked
        capture_output=True,
        text=True,
    )


def words(command):
    """The words of a printed command, as bash itself reads them."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


class TestDryRun:
    def test_prints_the_command_of_a_job(self):
        done = dry_run(*DEMO, "--args", "--learning_rate 1e-5", SLURM_NNODES=2)
        assert done.returncode == 0, done.stderr
        command = words(done.stdout)
        assert command[0] == "srun"
        assert "--nodes=2" in command
        launch = " ".join(command[command.index("launch") :])
        assert "--config_file recipes/accelerate_configs/ddp.yaml --num_machines 2 --num_processes 16" in launch
        assert launch.endswith("scripts/chat.py --config recipes/demo/sft/config_arithmetic.yaml --learning_rate 1e-5")

    def test_a_recipe_by_its_path_and_options_with_equals_signs(self):
        by_path = ["--recipe=recipes/demo/sft/config_arithmetic.yaml", "--accelerator=ddp"]
        assert dry_run(*by_path).stdout == dry_run(*DEMO).stdout != ""

    def test_hostile_arguments_are_printed_so_that_a_shell_reads_them_back(self):
        done = dry_run(*DEMO, "--args", shlex.join(HOSTILE), "--", *HOSTILE)
        assert words(done.stdout)[-2 * len(HOSTILE) :] == HOSTILE * 2

    def test_the_site_file_brings_the_environment(self, tmp_path):
        site = tmp_path / "site.sh"
        site.write_text("export PROCESSES_PER_NODE=3\nfalse\n")
        assert "--num_processes 3 " in dry_run(*DEMO, OPEN_R1_SITE=site).stdout
        done = dry_run(*DEMO, OPEN_R1_SITE=tmp_path / "none.sh")
        assert (done.returncode, done.stdout) == (2, "")
        assert "OPEN_R1_SITE: no such file" in done.stderr

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([*DEMO, "--learning_rate", "1"], "unknown option: --learning_rate"),
            ([*DEMO, "--args"], "--args needs a value"),
            ([*DEMO, "--args", "--a 'b"], "No closing quotation"),
            (DEMO[2:], "give --model and --config, or --recipe"),
            ([*DEMO, "--recipe", "x.yaml"], "not both"),
            (DEMO[:-2], "give --accelerator: ddp.yaml"),
            ([*DEMO[:-1], "zero9"], "no such file: recipes/accelerate_configs/zero9.yaml"),
            ([*DEMO, "--config", "none"], "no such file: recipes/demo/sft/config_none.yaml"),
            ([*DEMO, "--sbatch", "--nodes=2"], "--sbatch goes with --prepare"),
            ([*DEMO, "--prepare", "--sbatch", "--comment='"], "--sbatch  --comment=': No closing quotation"),
        ],
    )
    def test_mistakes_are_named(self, argv, message):
        done = dry_run(*argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr

    def test_outside_a_job_nothing_is_started(self):
        done = subprocess.run(
            ["bash", "slurm/train.slurm", *DEMO], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "submit this with sbatch" in done.stderr

    def test_preparing_first_is_two_jobs_that_say_the_same(self):
        both = ["--sbatch", "--nodes=2 --comment='a b'", "--sbatch-prepare=--partition=cpu", "--args", "--seed 7"]
        done = dry_run(*DEMO, "--prepare", *both, "--", *HOSTILE)
        assert done.returncode == 0, done.stderr
        prepare, train = done.stdout.split("\nsbatch ")
        asked = ["--task", "sft", "--recipe", "recipes/demo/sft/config_arithmetic.yaml", "--accelerator", "ddp"]
        asked += ["--args", " --seed 7", "--", *HOSTILE]
        assert words(prepare) == ["sbatch", "--parsable", "--partition=cpu", "slurm/prepare.slurm", *asked]
        options = ["--kill-on-invalid-dep=yes", "--nodes=2", "--comment=a b"]
        dependency = "--dependency=afterok:PREPARE_JOB"
        assert words(f"sbatch {train}") == ["sbatch", dependency, *options, "slurm/train.slurm", *asked]

    def test_what_the_run_comes_to_is_planned_for_all_processes(self, tiny_model, chat_file, tmp_path):
        argv = ["--recipe", tmp_path / "recipe.yaml", "--accelerator", "zero3", "--args", "--plan_gpu H100"]
        asked = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": str(tmp_path / "out")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**asked, "global_batch_size": 32, "max_length": 128}))
        env = {"OPEN_R1_ENTRY": "src/open_r1/sft.py", "SLURM_NNODES": 2}
        done = dry_run(*argv, **env, PROCESSES_PER_NODE=2)
        assert done.returncode == 0, done.stderr
        assert words(done.stdout)[0] == "srun"
        assert re.search(r"processes +4\b", done.stderr)
        assert not (tmp_path / "out").exists()
        done = dry_run(*argv, **env, PROCESSES_PER_NODE=3)  # 32 rows are not dealt out to 6
        assert (done.returncode, words(done.stdout)[0]) == (2, "srun")
        assert "global_batch_size: 32 rows cannot be dealt out to 6 processes" in done.stderr

    def test_a_container_is_put_before_every_command(self, tmp_path):
        site = tmp_path / "site.sh"
        site.write_text('RUN_IN=(run "in it")\nSRUN_OPTIONS=(--container-image="an image")\n')
        command = words(dry_run(*DEMO, OPEN_R1_SITE=site).stdout)
        assert command[0] == "srun"
        assert "--container-image=an image" in command[: command.index("bash")]
        launch = command.index("accelerate")
        assert command[launch - 2 : launch + 2] == ["run", "in it", "accelerate", "launch"]
        start = command.index("bash")
        count = int(command[start + 5])
        assert command[start + 6 + count] == "scripts/chat.py"  # the node's rank goes before it

    @pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
    def test_shellcheck(self):
        scripts = [
            *map(str, Path(ROOT / "slurm").glob("*.slurm")),
            "slurm/environment.sh",
            "tests/slow/slurm_cluster.sh",
        ]
        done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def root(tmp_path):
    """A root of the repository whose logs are the test's own."""
    for name in ("src", "recipes", "slurm", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "logs").mkdir()
    return tmp_path


def sbatch(root, cluster, *argv, **env):
    """Submit train.slurm for two nodes and wait for the job's end; returns its exit code and its log."""
    done = subprocess.run(
        ["sbatch", "--wait", "--parsable", "--nodes=2", "slurm/train.slurm", *map(str, argv)],
        cwd=root,
        env=environment(**cluster, **env),
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = root / f"logs/open-r1-{done.stdout.strip()}.out"
    assert log.is_file(), done.stdout + done.stderr
    return done.returncode, log.read_text()


@pytest.mark.parametrize("launch", ["ddp", "zero3"])
def test_two_nodes_train_the_docstring_recipe_as_two_local_processes_do(launch, docstrings, cluster, root):
    """Bit for bit. The `#SBATCH` lines, with --gres=gpu:8 and --exclusive, are taken as they are."""
    argv = ["--use_cpu", "--disable_tqdm", "--per_device_train_batch_size", "4"]
    argv += ["--model_name_or_path", docstrings / "model", "--dataset_name", docstrings / "docstrings.jsonl"]
    asked = ["--model", "demo", "--task", "sft", "--config", "docstrings", "--accelerator", launch]
    code, log = sbatch(root, cluster, *asked, "--", *argv, "--output_dir", root / "two", PROCESSES_PER_NODE=1)
    assert code == 0, log
    assert "ended with exit code 0" in log
    command = ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{launch}.yaml"]
    command += ["--num_processes", 2, "--main_process_port", 0, "src/open_r1/sft.py"]
    command += ["--config", "recipes/demo/sft/config_docstrings.yaml", *argv, "--output_dir", root / "local"]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), check=True)
    assert losses(root / "two") == losses(root / "local")
    assert len(losses(root / "two")) == 50


SLURM = {  # what the job's shell asks of Slurm, by programs in its place
    "srun": """
        if [[ ${*: -1} == true ]]; then [[ ! ${NODE_LOST-} ]] || ! mkdir "$NODE_LOST" 2>/dev/null; exit; fi
        for word; do [[ $word != --gres* ]] || echo "$word" >>"$CALLS"; done
        exec bash -c "$RUN" """,
    "sleep": """
        exec /bin/sleep "${1/#10/0.1}" """,
    "squeue": """
        [[ $SLURM_TIME_FORMAT == standard ]] && echo "$END" || date "+%d %b" """,
    "scontrol": """
        case $1$2 in
        showhostnames) echo n1 ;;
        shownode) echo "   NodeAddr=10.0.0.1 NodeHostName=n1 Version=24.11" ;;
        showjob) echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}" ;;
        requeue*) echo "requeue $2" >>"$CALLS" && exit 1 ;;
        esac""",
}
HEEDING = "trap 'sleep 1; echo saved; exit 1' USR1 INT; touch \"$CALLS\"; for n in {1..100}; do sleep 0.1; done"


class TestShellOfTheJob:
    """What it does with what Slurm says, without a Slurm."""

    def start(self, root, *argv, **env):
        (root / "bin").mkdir(exist_ok=True)
        for name, does in SLURM.items():
            (root / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
            (root / "bin" / name).chmod(0o755)
        job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NAME": "a job", "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "n1"}
        known = environment(**job, **{"SLURM_GPUS_ON_NODE": 2, "CALLS": root / "calls", "RUN": "exit 1", **env})
        (root / "site.sh").write_text(f'PATH="{root}/bin:{known["PATH"]}"\n{known.get("SITE", "")}\n')
        known["OPEN_R1_SITE"] = str(root / "site.sh")
        return subprocess.Popen(
            ["bash", "slurm/train.slurm", *map(str, argv or DEMO)],
            cwd=root,
            env=known,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, root, *argv, send=None, **env):
        """Its exit code, its log, and what it asked for."""
        job = self.start(root, *argv, **env)
        if send is not None:
            while not (root / "calls").exists():
                time.sleep(0.05)
            time.sleep(0.5)
            job.send_signal(send)
        log, _ = job.communicate(timeout=60)
        calls = (root / "calls").read_text().splitlines() if (root / "calls").exists() else []
        return job.returncode, log, calls

    def test_a_failure_is_not_put_back(self, root):
        code, log, calls = self.end(root, RUN="exit 3")
        assert (code, calls) == (3, ["--gres=gpu:2"]), (
            log
        )  # a step would get what sbatch asked for, a node may have more

    def test_preempted_with_time_to_save_it_is_put_back(self, root):
        """Slurm signals the processes alone, and takes the job away later: by then it had failed."""
        code, log, calls = self.end(root, PREEMPTED="2026-01-01T00:00:00")
        assert (code, calls[1:]) == (75, ["requeue 7"]), log

    def test_of_an_array_one_task_is_put_back(self, root):
        env = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 2}
        assert self.end(root, NODE_LOST=root / "lost", **env)[2][1:] == ["requeue 7_2"]

    @pytest.mark.parametrize("end", ["", "NONE", "2099-01-01T00:00:00"])
    def test_time_left_to_save_is_left(self, root, end):
        code, log, calls = self.end(root, RUN=HEEDING, send=signal.SIGUSR1, END=end, SLURM_TIME_FORMAT="%d %b")
        assert "saved\n" in log
        assert "not saved in time" not in log
        assert (code, calls[1:]) == (75, ["requeue 7"])

    def test_no_time_left_to_save(self, root):
        log = self.end(root, RUN=HEEDING, send=signal.SIGUSR1, END="2026-01-01T00:00:00")[1]
        assert "not saved in time" in log

    def test_a_site_file_that_wants_no_failures(self, root):
        code, log, calls = self.end(root, RUN=HEEDING, send=signal.SIGUSR1, SITE="set -euo pipefail")
        assert "ended with exit code 1" in log
        assert (code, calls[1:]) == (75, ["requeue 7"])

    def test_in_a_terminal_ctrl_c_saves_and_ends_it(self, root):
        code, log, calls = self.end(root, RUN=HEEDING, send=signal.SIGINT)
        assert "saved\n" in log
        assert (code, calls[1:]) == (1, [])

    @pytest.mark.parametrize("prepare", ["", "yes"])
    def test_no_end_of_starts_that_come_to_nothing(self, root, prepare):
        """Nor where nothing tells of progress: data that is prepared, a recipe that cannot be read."""
        argv = [*DEMO, "--", "--learning_rte", "1"]
        put_back = []
        for count in range(5):
            (root / "calls").unlink(missing_ok=True)
            env = {"NODE_LOST": root / f"lost{count}", "SLURM_RESTART_COUNT": count, "PREPARE_ONLY": prepare}
            _, log, calls = self.end(root, *argv, **env)
            put_back.append("requeue 7" in calls)
        assert put_back == [True, True, True, False, False], log

    def test_slurm_may_log_elsewhere(self, root):
        (root / "logs").rmdir()
        assert self.end(root, RUN="exit 0")[0] == 0
        assert (root / "logs/a job-7.starts").exists()

    def test_the_package_is_found_where_it_is_not_installed(self, root):
        assert f"{root}/src\n" in self.end(root, RUN="echo ${PYTHONPATH%%:*}")[1]


STAND_IN = """
import json, os, sys

names = ["RANK", "WORLD_SIZE", "GROUP_RANK", "SLURM_PROCID", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT"]
seen = {"argv": sys.argv[1:], **{name: os.environ[name] for name in names}}
with open(os.path.join(os.environ["SEEN"], os.environ["RANK"]), "w") as file:
    json.dump(seen, file)
"""


def test_hostile_arguments_reach_every_process_unchanged(cluster, root):
    (root / "stand_in.py").write_text(STAND_IN)
    (root / "seen").mkdir()
    code, log = sbatch(
        *(root, cluster, *DEMO, "--args", shlex.join(HOSTILE), "--", *HOSTILE),
        PROCESSES_PER_NODE=2,
        OPEN_R1_ENTRY="stand_in.py",
        SEEN=root / "seen",
    )
    assert code == 0, log
    seen = [json.loads((root / "seen" / str(rank)).read_text()) for rank in range(4)]
    for process in seen:
        assert process["argv"] == ["--config", "recipes/demo/sft/config_arithmetic.yaml", *HOSTILE, *HOSTILE]
        assert process["WORLD_SIZE"] == "4"
        assert process["MASTER_ADDR"] == "127.0.0.1"  # the node's address: n1 is no name that resolves
        assert process["GROUP_RANK"] == process["SLURM_PROCID"]
    assert [process["SLURMD_NODENAME"] for process in seen] == ["n1", "n1", "n2", "n2"]
    assert len({process["MASTER_PORT"] for process in seen}) == 1


def test_a_dry_run_in_a_job_shows_what_its_allocation_gives(cluster, root):
    code, log = sbatch(root, cluster, "--dry-run", *DEMO, OPEN_R1_ENTRY="scripts/chat.py")  # which is not planned
    assert code == 0, log
    assert "--num_machines 2" in log
    assert "--num_processes 16" in log  # 2 nodes of 8 GPUs, as the #SBATCH lines ask
    assert "--main_process_ip 127.0.0.1" in log


def test_a_run_that_fails_fails_the_job(tiny_model, chat_file, cluster, root):
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tiny_model}\ndataset_name: {chat_file}\nlearning_rte: 1.0e-5\n")
    code, log = sbatch(
        root, cluster, "--recipe", recipe, "--accelerator", "ddp", "--args", "--use_cpu", PROCESSES_PER_NODE=1
    )
    assert code != 0
    assert "learning_rte is not a setting" in log
    assert f"ended with exit code {code}" in log


def by_number(root, cluster, command, *argv, **env):
    done = subprocess.run(
        [command, *map(str, argv)], cwd=root, env=environment(**cluster, **env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(root, cluster, number):
    """Slurm's word for the end of a job."""
    for _ in range(600):
        state = by_number(root, cluster, "scontrol", "show", "job", number).partition("JobState=")[2].split()[0]
        if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state
        time.sleep(0.5)
    raise AssertionError("it does not end")


def prepared_first(root, cluster, recipe, *argv):
    """Submit both jobs; returns their numbers."""
    options = ["--sbatch", "--nodes=2", "--sbatch-prepare", "--cpus-per-task=1"]
    common = ["--recipe", recipe, "--accelerator", "ddp", "--args", shlex.join(settings(max_steps=2))]
    env = {"PROCESSES_PER_NODE": 1, "HF_DATASETS_CACHE": root / "cache"}
    said = by_number(root, cluster, "bash", "slurm/train.slurm", "--prepare", *options, *common, *argv, **env)
    return re.findall(r"Submitted batch job (\d+)", said)


def test_data_is_prepared_by_a_job_of_its_own_and_found(tiny_model, chat_file, cluster, root):
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tiny_model}\ndataset_name: {chat_file}\noutput_dir: {root / 'out'}\n")
    first, second = prepared_first(root, cluster, recipe)
    assert ended(root, cluster, second) == "COMPLETED"
    log, then = (root / f"logs/open-r1{name}.out" for name in (f"-prepare-{first}", f"-{second}"))
    assert "tokenised for the first time" in log.read_text()
    assert "tokenised for the first time" not in then.read_text()
    assert "train, rows" in then.read_text()  # of the first node
    assert "train, rows" not in (root / f"logs/open-r1-{second}-node1.out").read_text()
    state = subprocess.run(
        [sys.executable, "scripts/run_state.py", "--config", recipe], cwd=ROOT, capture_output=True, text=True
    )
    assert state.stdout.splitlines()[1:] == [
        "status: complete",
        "reason: ",
        f"checkpoint: {root / 'out/checkpoint-2'}",
        "step: 2",
    ]


def test_training_is_withdrawn_when_its_data_cannot_be_prepared(tiny_model, cluster, root):
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tiny_model}\ndataset_name: {root / 'none.jsonl'}\n")
    first, second = prepared_first(root, cluster, recipe)
    assert (ended(root, cluster, first), ended(root, cluster, second)) == ("FAILED", "CANCELLED")
    assert "none.jsonl" in (root / f"logs/open-r1-prepare-{first}.out").read_text()
    assert not (root / f"logs/open-r1-{second}.out").exists()
