"""Two machines without a scheduler: two launchers that see each other over a network alone, and what becomes of one
when the other is late, wrong, killed, or never comes.

A machine is a network namespace with a host name of its own; where none can be made, a loopback address.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from conftest import ROOT, losses, settings
from kill_harness import TOKEN, processes
from transformers import AutoModelForCausalLM

PREPARED = "tokenised for the first time"
NAMES = ("node-a", "node-b")
FIRST, REST = "from open_r1 import processes, sft\n", "sft.leave(sft.main())\n"


@pytest.fixture(scope="module")
def machines():
    """What starts a command on each of two machines, the address of the first, and what cuts the wire between them."""
    suffix = uuid.uuid4().hex[:6]
    spaces, wires = [f"{name}-{suffix}" for name in NAMES], [f"w{n}{suffix}" for n in range(2)]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for number, (space, wire) in enumerate(zip(spaces, wires, strict=True)):
            ip("link", "set", wire, "netns", space)
            for words in (["addr", "add", f"10.77.0.{number + 1}/24", "dev", wire], ["link", "set", wire, "up"]):
                ip("netns", "exec", space, "ip", *words)
            ip("netns", "exec", space, "ip", "link", "set", "lo", "up")
        prefix = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']
        pairs = zip(spaces, NAMES, strict=True)
        prefixes = [["ip", "netns", "exec", space, *prefix, name] for space, name in pairs]
        yield prefixes, "10.77.0.1", lambda state: ip("netns", "exec", spaces[1], "ip", "link", "set", wires[1], state)
    except (OSError, subprocess.CalledProcessError):
        yield [[], []], "127.0.0.1", None
    finally:
        for space in spaces:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", space], capture_output=True)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """One machine's launcher, its output in a file, and all that it started."""

    def __init__(self, machines, number, config, argv, folder, script="src/open_r1/sft.py", environment=None):
        prefixes, address, _ = machines
        self.token, self.log = uuid.uuid4().hex, Path(folder) / f"{NAMES[number]}.log"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.environment |= {TOKEN: self.token, **(environment or {})}
        launch = ["accelerate", "launch", "--config_file", f"recipes/accelerate_configs/{config}.yaml"]
        launch += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(number)]
        launch += ["--main_process_ip", address, "--main_process_port", port_of(folder), str(script)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefixes[number], *launch, *map(str, argv)],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self):
        return self.log.read_text()

    def wait(self, seconds=180):
        """The exit code."""
        return self.process.wait(seconds)

    def until(self, text, seconds=120):
        """Wait for a text in the output."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < end, self.output[-3000:]
            time.sleep(0.05)

    def kill(self):
        """SIGKILL everything that runs on this machine."""
        while left := processes(self.token):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()


def port_of(folder):
    """A port of this test's own, the same for both machines."""
    return str(20000 + hash(str(folder)) % 9000)


@contextlib.contextmanager
def both(machines, config, argvs, folder, scripts=("src/open_r1/sft.py",) * 2, environments=({}, {})):
    """Launch on both machines; whatever is left of it is killed."""
    started = []
    try:
        for number in range(2):
            how = (config, argvs[number], folder, scripts[number], environments[number])
            started.append(Machine(machines, number, *how))
        yield started
    finally:
        for machine in started:
            machine.kill()


def caches(folder, shared):
    """Environments with homes and caches of their own, or with one cache."""
    names = ["shared"] * 2 if shared else ["a", "b"]
    found = []
    for number, name in enumerate(names):
        home = folder / f"home-{NAMES[number]}"
        (home / ".cache").mkdir(parents=True)
        built = Path.home() / ".cache" / "torch_extensions"  # a DeepSpeed op, which takes minutes
        built.mkdir(parents=True, exist_ok=True)
        (home / ".cache" / built.name).symlink_to(built)
        cache = {"HF_DATASETS_CACHE": str(folder / name / "datasets"), "HF_HOME": str(folder / name)}
        found.append({"HOME": str(home), **cache})
    return found


@pytest.fixture(scope="module")
def argv(tiny_model, chat_file):
    def words(out, processes=2, **values):
        rows = {"per_device_train_batch_size": 8 // processes, "max_steps": 8, "save_steps": 4}
        return settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=out, **{**rows, **values})

    return words


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """The same run by one process on one machine."""
    out = tmp_path_factory.mktemp("alone")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "src/open_r1/sft.py", *argv(out, processes=1)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return out


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def script(folder, name, *lines):
    """`sft.py` with something planted into it."""
    path = folder / f"{name}.py"
    path.write_text(FIRST + "".join(f"{line}\n" for line in lines) + REST)
    return path


@pytest.mark.parametrize(("config", "shared"), [("ddp", False), ("ddp", True), ("zero3", False)])
def test_two_machines_train_as_one_process_does(config, shared, machines, argv, alone, tmp_path):
    out = tmp_path / "run"
    with both(machines, config, [argv(out)] * 2, tmp_path, environments=caches(tmp_path, shared)) as (a, b):
        assert (a.wait(), b.wait()) == (0, 0), a.output[-3000:] + b.output[-3000:]
        assert (a.output + b.output).count(PREPARED) == (1 if shared else 2)  # once a file system
    assert losses(out) == pytest.approx(losses(alone), abs=1e-4)
    one, two = weights(alone), weights(out)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert json.loads((out / "run_state.json").read_text())["status"] == "complete"


def test_a_machine_that_prepares_longer_than_a_collective_may_last(machines, argv, tmp_path):
    """Ten seconds are a collective's limit here, and the second machine prepares for twenty more."""
    short = (
        "import datetime, torch.distributed as dist",
        "made = dist.init_process_group",
        "dist.init_process_group = lambda *a, **k: made(*a, **{**k, 'timeout': datetime.timedelta(seconds=10)})",
        "processes.PATIENCE = 3",
    )
    slow = (
        "import time, open_r1.cache",
        "write = open_r1.cache.write",
        "open_r1.cache.write = lambda folder, key, make: (time.sleep(20 if 'tokenised' in str(key) else 0), "
        "write(folder, key, make))",
    )
    scripts = [script(tmp_path, "a", *short), script(tmp_path, "b", *short, *slow)]
    with both(machines, "ddp", [argv(tmp_path / "run")] * 2, tmp_path, scripts, caches(tmp_path, False)) as (a, b):
        assert (a.wait(), b.wait()) == (0, 0), a.output[-3000:] + b.output[-3000:]
        assert "the data: ready, and waiting since" in a.output
        assert f"for process 1 on {NAMES[1] if machines[0][0] else ''}" in a.output
    unguarded = [
        script(tmp_path, name, *lines, "processes.wait_for_all = sft.wait_for_all = lambda what: None")
        for name, lines in (("c", short), ("d", (*short, *slow)))
    ]
    (tmp_path / "again").mkdir()
    argvs, environments = [argv(tmp_path / "other", max_length=99)] * 2, caches(tmp_path / "again", False)
    with both(machines, "ddp", argvs, tmp_path / "again", unguarded, environments) as (a, b):
        assert (a.wait(), b.wait()) == (1, 1)  # what the wait is for
        assert "imed out" in a.output


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_recipe_on_one_machine_ends_both_soon(wrong, machines, argv, tmp_path):
    argvs = [argv(tmp_path / "run") for _ in range(2)]
    argvs[wrong] += ["--learning_rat", "1"]
    started = time.monotonic()
    with both(machines, "ddp", argvs, tmp_path, environments=caches(tmp_path, True)) as pair:
        assert [machine.wait(90) for machine in pair] == [1, 1]
        assert "learning_rate" in pair[wrong].output
        said = pair[1 - wrong].output
    told = "process 1 on" in said and "learning_rat" in said
    assert told or "the launcher of the first machine" in said, said[-2000:]
    assert time.monotonic() - started < 60


def test_killed_while_it_prepares_a_machine_is_missed(machines, argv, tmp_path):
    soon = "processes.SILENT, processes.PATIENCE = 8, 3"
    slow = "import time, open_r1.cache; open_r1.cache.write = lambda *args: time.sleep(600)"
    scripts = [script(tmp_path, "a", soon), script(tmp_path, "b", soon, slow)]
    with both(machines, "ddp", [argv(tmp_path / "run")] * 2, tmp_path, scripts, caches(tmp_path, False)) as (a, b):
        a.until("the data: ready, and waiting since")
        b.kill()
        killed = time.monotonic()
        assert a.wait(60) == 1
        assert time.monotonic() - killed < 40
        assert "has given no sign of life for 8 s" in a.output


def test_killed_in_training_a_machine_ends_the_other_and_both_go_on(machines, argv, tmp_path):
    many = {"max_steps": 30, "save_steps": 5}
    environments = caches(tmp_path, True)
    for name, dies in (("whole", None), ("torn", 1)):
        out = tmp_path / name
        with both(machines, "ddp", [argv(out, **many)] * 2, tmp_path, environments=environments) as pair:
            if dies is not None:
                end = time.monotonic() + 120
                while not (out / "checkpoint-10").exists():
                    assert time.monotonic() < end
                    time.sleep(0.01)
                pair[dies].kill()
                killed = time.monotonic()
                assert pair[1 - dies].wait(90) == 1
                assert time.monotonic() - killed < 60
                state = json.loads((out / "run_state.json").read_text())
                assert (state["status"], "process 0" in state["reason"]) == ("failed", True)
                continue
            assert [machine.wait() for machine in pair] == [0, 0]
    with both(machines, "ddp", [argv(tmp_path / "torn", **many)] * 2, tmp_path, environments=environments) as pair:
        assert [machine.wait() for machine in pair] == [0, 0], pair[0].output[-3000:]
        assert "resuming from" in pair[0].output
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "torn")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_to_one_launcher_saves_and_stops_both_at_one_step(machines, argv, tmp_path):
    words, environments = argv(tmp_path / "run", max_steps=3000, save_steps=1000), caches(tmp_path, True)
    with both(machines, "ddp", [words] * 2, tmp_path, environments=environments) as pair:
        pair[0].until("  loss ")
        pair[1].process.send_signal(signal.SIGTERM)
        assert all(machine.wait(60) for machine in pair)
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["status"], "saved as checkpoint-" in state["reason"]) == ("preempted", True)
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    assert {path.name for path in saved.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_signal_to_one_launcher_while_weights_are_loaded_ends_both(machines, argv, tmp_path):
    """All are ready, and none is at a step that it could agree on."""
    slow = "import time, open_r1.model\nopen_r1.model.get_model = lambda *args: (print('loading'), time.sleep(600))"
    scripts, environments = [script(tmp_path, name, slow) for name in "ab"], caches(tmp_path, True)
    unbuffered = [{**environment, "PYTHONUNBUFFERED": "1"} for environment in environments]
    with both(machines, "ddp", [argv(tmp_path / "run")] * 2, tmp_path, scripts, unbuffered) as pair:
        for machine in pair:
            machine.until("loading")
        pair[1].process.send_signal(signal.SIGTERM)
        assert all(machine.wait(30) for machine in pair)
        assert "process 1 on" in pair[0].output
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["status"], "SIGTERM" in state["reason"]) == ("preempted", True)


def test_cut_off_from_each_other_in_training_both_end(machines, argv, tmp_path):
    """Nothing closes a connection when a machine loses power or network: it is silent."""
    if machines[2] is None:
        pytest.skip("needs network namespaces, which cannot be made here")
    soon = "processes.ABSENT, processes.REACHED = 10, 5"
    scripts = [script(tmp_path, name, soon) for name in "ab"]
    argvs = [argv(tmp_path / "run", max_steps=3000, save_steps=1000)] * 2
    with both(machines, "ddp", argvs, tmp_path, scripts, caches(tmp_path, True)) as pair:
        pair[0].until("  loss ")
        machines[2]("down")
        cut = time.monotonic()
        try:
            assert [machine.wait(90) for machine in pair] == [1, 1]
        finally:
            machines[2]("up")
        assert time.monotonic() - cut < 60
        assert "has given no sign of life for 10 s" in pair[0].output
        assert "the launcher of the first machine" in pair[1].output
    reason = json.loads((tmp_path / "run" / "run_state.json").read_text())["reason"]
    assert "no sign of life" in reason or "the launcher of the first machine" in reason  # who misses the other first
