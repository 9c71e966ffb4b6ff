"""Processes of several machines: who fails tells the others, who waits says for whom, who is silent is missed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError, HashStore, TCPStore

from open_r1 import processes
from open_r1.errors import Stopped, UserError
from open_r1.run_state import read_state, record
from open_r1.stopping import Preempted, Stop


@pytest.fixture
def two_machines(monkeypatch):
    """This process is the first of the second of two machines; returns their launchers' store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    facts = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    facts |= {
        "GROUP_RANK": 1,
        "GROUP_WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "RANK": 2,
        "WORLD_SIZE": 4,
    }
    for name, value in facts.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(processes, "POLL", 0.02)
    monkeypatch.setattr(processes, "AT_ONCE", 0.05)
    monkeypatch.setattr(processes, "together", threading.Event())
    monkeypatch.setattr(processes, "hosts", {})
    return store


class Left(BaseException):
    """`os._exit` was called."""


def listened(stop, monkeypatch, caplog, output_dir, task=processes.listen):
    """The exit code that a task ends the process with, None where it returns; and what it logs."""

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    try:
        task(processes.meet(), Counter(), stop, str(output_dir))
    except Left as left:
        return left.args[0], caplog.text
    return None, caplog.text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("r.yaml:3: learning_rat is not a setting"), "failed\n{}: r.yaml:3: learning_rat is not a setting"),
        (RuntimeError("out of memory"), "failed\n{}: RuntimeError: out of memory"),
        (Preempted("SIGTERM"), "preempted\n{}: SIGTERM"),
    ],
)
def test_who_fails_tells_the_others_which_end(error, text, two_machines, monkeypatch, caplog, tmp_path):
    with pytest.raises(type(error)), processes.others_told(Stop()):
        raise error
    who = f"process 2 on {os.uname().nodename}"
    assert two_machines.get(processes.FAILED).decode() == text.format(who)
    with pytest.raises(ValueError), processes.others_told(Stop()):
        raise ValueError("a later one, because of the first")
    code, said = listened(Stop(), monkeypatch, caplog, tmp_path)
    assert code == (75 if isinstance(error, Preempted) else 1)
    assert text.format(who).partition("\n")[2] in said
    assert "a later one" not in said


def test_who_ends_by_itself_is_not_ended(two_machines, monkeypatch, caplog, tmp_path):
    two_machines.set(processes.FAILED, "failed\nanother")
    stop = Stop()
    monkeypatch.setattr(processes, "AT_ONCE", 0.3)
    threading.Timer(0.1, setattr, (stop, "ended", True)).start()
    assert listened(stop, monkeypatch, caplog, tmp_path) == (None, "")


@pytest.mark.parametrize("agreed", [True, False])
def test_a_stop_that_all_agreed_on_is_no_news(agreed, two_machines):
    """Also when all are ready to train: a signal while the model is loaded, or behind training, is one machine's."""
    processes.together.set()
    stop = Stop()
    with pytest.raises(Preempted), processes.others_told(stop):
        raise (processes.Agreed if agreed else Preempted)("SIGTERM, saved as checkpoint-3")
    assert two_machines.check([processes.FAILED]) is not agreed
    assert stop.ended is not agreed


@pytest.mark.parametrize("when", ["never seen", "seen", "in training", "after"])
def test_a_machine_that_is_not_heard_of_is_missed(when, two_machines, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(processes, "SILENT", 0.5)
    monkeypatch.setattr(processes, "ABSENT", 0.9)
    stop = Stop()
    if when != "never seen":
        for number in range(5):
            threading.Timer(number / 10, two_machines.set, (f"{processes.ALIVE}/0", f"node-a {number}")).start()
    if when in ("in training", "after"):
        processes.together.set()
        stop.waits = True
    if when == "after":
        threading.Timer(0.5, setattr, (stop, "waits", False)).start()
        threading.Timer(2.0, setattr, (stop, "ended", True)).start()
    begun = time.monotonic()
    code, said = listened(stop, monkeypatch, caplog, tmp_path)
    taken = time.monotonic() - begun
    if when == "after":
        assert (code, said) == (None, "")
        return
    who = "machine 0" if when == "never seen" else "machine 0 (node-a)"
    assert (code, f"{who} has given no sign of life for" in said) == (1, True)
    least = {"never seen": 0.9, "seen": 0.9, "in training": 1.3}[when]
    assert least <= taken < 3 * least


@pytest.mark.parametrize("when", ["before", "in training", "after"])
def test_without_the_first_launcher_nothing_goes_on_but_saving(when, two_machines, monkeypatch, caplog, tmp_path):
    class Gone:
        looks = 0

        def check(self, names):
            self.looks += 1
            if self.looks < 3 and when != "before":
                return False
            stop.waits = when == "in training"
            raise RuntimeError("connection closed")

        def set(self, name, value):
            pass

    stop = Stop()
    stop.waits = when != "before"
    if when != "before":
        processes.together.set()
    monkeypatch.setattr(processes, "meet", Gone)
    code, said = listened(stop, monkeypatch, caplog, tmp_path)
    assert (code, "the launcher of the first machine" in said) == ((None, False) if when == "after" else (1, True))


@pytest.mark.parametrize("hangs", [True, False])
def test_a_look_that_hangs_is_a_machine_that_is_gone(hangs, two_machines, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(processes, "ABSENT", 0.5)
    stop = Stop()

    def overlook(store, looks, *args):
        if not hangs:
            for number in range(15):
                threading.Timer(number / 10, looks.update, (["done"],)).start()
            threading.Timer(1.4, setattr, (stop, "ended", True)).start()
        processes.overlook(store, looks, *args)

    code, said = listened(stop, monkeypatch, caplog, tmp_path, overlook)
    assert (code, "the launcher of the first machine" in said) == ((1, True) if hangs else (None, False))


def test_a_store_that_does_not_answer_is_an_error_at_once(two_machines, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    begun = time.monotonic()
    with pytest.raises(Stopped, match=r"launcher of the first machine \(127.0.0.1, port \d+\) has ended or cannot"):
        processes.heed_others(Stop(), "out")
    assert time.monotonic() - begun < 2


def test_who_waits_says_for_whom(two_machines, monkeypatch, caplog):
    """Three of four are there; the fourth comes."""
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: two_machines)
    key = f"{processes.PREFIX}/the data"
    for rank in (0, 3):
        two_machines.append(f"{key}/ready", f"{rank} ")
        two_machines.add(key, 1)
    processes.hosts[0] = "node-a"
    threading.Timer(0.8, two_machines.add, (key, 1)).start()
    begun = time.monotonic()
    processes.wait_for_all("the data")
    assert time.monotonic() - begun > 0.7
    assert "the data: ready, and waiting since 0 s for process 1 on node-a" in caplog.text
    assert processes.together.is_set()


class Counted:
    """A store that counts what it is asked."""

    def __init__(self):
        self.store, self.asked = HashStore(), Counter()

    def __getattr__(self, name):
        self.asked[name] += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_thousand_that_wait_do_not_ask_for_a_thousand_each(local_rank, monkeypatch, caplog):
    for name, value in {"WORLD_SIZE": 1000, "RANK": local_rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    monkeypatch.setattr(processes, "together", threading.Event())
    store = Counted()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    threading.Timer(0.6, store.store.add, (f"{processes.PREFIX}/the data", 999)).start()
    processes.wait_for_all("the data")
    assert ("and waiting since" in caplog.text) is (local_rank == 0)
    assert sum(store.asked.values()) < 20


def test_who_waits_without_a_launcher_hears_of_failures_too(two_machines, monkeypatch):
    """srun or a platform that says RANK, LOCAL_RANK and MASTER_ADDR itself: the first process keeps the store."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: two_machines)
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    with pytest.raises(UserError), processes.others_told(Stop()):
        raise UserError("no room on this disk")
    assert [processes.has_the_word(), processes.has_the_word()] == [True, False]
    with pytest.raises(Stopped, match="process 2 on .*: no room on this disk"):
        processes.wait_for_all("the data")


STORE = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
store.set("key", "value")
print(store.port, flush=True)
time.sleep(60)
"""


def test_a_launcher_that_was_stopped_for_a_while_is_none_that_is_gone(two_machines, monkeypatch):
    """A scheduler suspends jobs, for longer than a store has to answer at first."""
    launcher = subprocess.Popen([sys.executable, "-c", STORE], stdout=subprocess.PIPE, text=True)
    try:
        monkeypatch.setenv("MASTER_PORT", launcher.stdout.readline().strip())
        monkeypatch.setattr(processes, "REACHED", 1.0)
        stores = []
        monkeypatch.setattr(processes, "listen", lambda store, *others: stores.append(store))
        stop = Stop()
        stop.ended = True
        processes.heed_others(stop, "out")
        launcher.send_signal(signal.SIGSTOP)
        threading.Timer(2.0, launcher.send_signal, (signal.SIGCONT,)).start()
        assert stores[0].get("key") == b"value"
    finally:
        launcher.kill()
        launcher.wait()


def test_one_machine_needs_none_of_it(monkeypatch):
    for name in ("GROUP_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    processes.wait_for_all("the data")
    processes.heed_others(Stop(), "out")
    with pytest.raises(UserError), processes.others_told(Stop()):
        raise UserError("as ever")


def test_the_interface_towards_the_first_machine(two_machines, monkeypatch):
    assert processes.interface_to("127.0.0.1") == "lo"
    assert processes.interface_to("no such host") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    stop = Stop()
    processes.heed_others(stop, "out")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    stop.ended = True
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("LOCAL_RANK", "1")
    processes.heed_others(Stop(), "out")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_the_first_to_know_has_the_word_on_its_machine(two_machines, monkeypatch):
    said = []
    for rank, machine in ((0, 0), (1, 0), (2, 1), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("GROUP_RANK", str(machine))
        said.append(processes.has_the_word())
    assert said == [True, False, True, False]


def test_without_a_store_the_first_of_a_machine_has_the_word(monkeypatch):
    for name in ("GROUP_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert processes.has_the_word()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not processes.has_the_word()  # it was said before
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "FIRST", 0.3)
    begun = time.monotonic()
    assert processes.has_the_word()  # which its launcher would have ended meanwhile, had the first found the same
    assert time.monotonic() - begun > 0.3
    assert processes.said_by_others() == ("", "")


@pytest.mark.parametrize("machines", [1, 2])
def test_a_launcher_that_ends_those_that_are_left_is_no_preemption(machines, two_machines, monkeypatch, tmp_path):
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    record(str(tmp_path), status="running")
    with pytest.raises(UserError), processes.others_told(Stop()):
        raise UserError("row 7 is broken")
    processes.record_how(str(tmp_path), Preempted("SIGTERM"), begun=True)
    state = read_state(str(tmp_path))
    assert state["status"] == "failed"
    assert state["reason"] == f"process 2 on {os.uname().nodename}: row 7 is broken"
    with pytest.raises(Stopped, match="row 7 is broken"), processes.others_told(Stop()):
        raise Preempted("SIGTERM")


def test_a_store_that_went_says_what_was_said_in_it(two_machines):
    with pytest.raises(Stopped, match="the launcher of the first machine"), processes.others_told(Stop()):
        raise DistNetworkError("Failed to recv, got 0 bytes")
    two_machines.set(processes.FAILED, "failed\nprocess 0 on node-a: no such recipe")
    with pytest.raises(Stopped, match="process 0 on node-a: no such recipe"), processes.others_told(Stop()):
        raise DistNetworkError("Failed to recv, got 0 bytes")


def test_one_that_was_told_to_stop_is_no_failure(two_machines, tmp_path):
    record(str(tmp_path), status="running")
    with pytest.raises(Preempted), processes.others_told(Stop()):
        raise Preempted("SIGTERM")
    assert processes.said_by_others()[0] == "preempted"
    processes.record_how(str(tmp_path), Preempted("SIGTERM"), begun=True)
    assert (read_state(str(tmp_path))["status"], read_state(str(tmp_path))["reason"]) == ("preempted", "SIGTERM")


FACTS = {
    **dict.fromkeys(("evaluated", "base"), None),
    "data": "d1",
    "order": {"seed": 1},
    "rows_a_step": 8,
    "launch": "ddp",
    "precision": "no",
    "config_files": {},
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "settings": {"learning_rate": 1e-5, "output_dir": "out"},
    "code": {"digest": "c1", "commit": "abc"},
}


@pytest.fixture
def meet(monkeypatch, tmp_path):
    """Have some processes meet, each with its facts and folder; returns what each was told, None where all is well."""
    monkeypatch.setattr(processes, "SEEN_WITHIN", 0.1)
    kept = HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: kept)
    monkeypatch.setattr(processes.platform, "node", lambda: threading.current_thread().name)

    def start(*those):
        told = {}

        def one(rank, facts, folder):
            about = SimpleNamespace(process_index=rank, world_size=len(those), output_dir=str(folder))
            try:
                told[rank] = processes.require_one_run({**FACTS, **facts}, about)
            except UserError as error:
                told[rank] = str(error)

        threads = []
        for rank, process in enumerate(those):
            host, facts, folder = process
            (tmp_path / folder).mkdir(exist_ok=True)
            thread = threading.Thread(target=one, args=(rank, facts, tmp_path / folder), name=host)
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        return told

    return start


def test_processes_that_train_the_same(meet, tmp_path):
    other_commit = {"code": {"digest": "c1", "commit": "def"}}
    assert meet(("a", {}, "out"), ("a", {}, "out"), ("b", other_commit, "out")) == {0: None, 1: None, 2: None}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (
            {"settings": {"learning_rate": 2e-5, "output_dir": "out"}},
            "learning_rate: 1e-05 on a (process 0, 1); 2e-05",
        ),
        ({"settings": {**FACTS["settings"], "seed": 1}}, "seed: nothing on a (process 0, 1); 1 on b (process 2, 3)"),
        ({"versions": {**FACTS["versions"], "trl": "1.15.0"}}, 'versions: trl: "1.16.0" on a'),
        ({"code": {"digest": "c2"}}, 'code of open_r1: "c1" on a'),
        ({"data": "d2"}, 'data: "d1" on a (process 0, 1); "d2" on b (process 2, 3)'),
        ({"precision": "bf16"}, 'precision: "no" on a'),
        ({"base": "b2"}, "base: null on a"),
    ],
)
def test_processes_that_would_train_different_things(meet, tmp_path, facts, says):
    told = meet(*[("a", {}, "out")] * 2, *[("b", facts, "out")] * 2)
    assert len(set(told.values())) == 1
    assert says in told[0]
    assert told[0].count("\n  ") == 1
    assert not list((tmp_path / "out").iterdir())


def test_output_directories_that_are_not_one(meet):
    told = meet(("a", {}, "out"), ("a", {}, "out"), ("b", {}, "another"))
    assert len(set(told.values())) == 1
    assert "out on b (process 2) is not the directory of that name on a" in told[0]
    assert "a file system that all machines share" in told[0]


def test_an_error_because_another_was_told_to_stop_is_no_failure(two_machines, tmp_path):
    record(str(tmp_path), status="running")
    with pytest.raises(Preempted), processes.others_told(Stop()):
        raise Preempted("SIGTERM")
    processes.record_how(str(tmp_path), RuntimeError("Connection closed by peer"), begun=True)
    state = read_state(str(tmp_path))
    assert (state["status"], state["reason"]) == ("preempted", f"process 2 on {os.uname().nodename}: SIGTERM")
