"""What the processes of a run tell each other outside of collectives: who is ready, who failed, what each would train.

A launcher ends the processes of its own machine when one of them fails, with a signal that is no reason. Those of
other machines would wait for them, in the rendezvous or in a collective, as long as `ddp_timeout` says. So who fails
says so in the launchers' store, to which all of them are connected (`MASTER_ADDR`); the first process of each machine
reads it there and ends its machine.
"""

import contextlib
import datetime
import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_r1.errors import Stopped, UserError
from open_r1.run_state import record_end
from open_r1.stopping import AT_ONCE, EXIT_CODE, Preempted, Stop

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # what is said here is said on the first process of every machine
PREFIX = f"open_r1/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
FAILED, ALIVE = f"{PREFIX}/failed", f"{PREFIX}/alive"
POLL = 1.0  # seconds between two looks at the store
REACHED = 15.0  # seconds within which the store answers: it was there before this process
SILENT, ABSENT = 600.0, 1800.0  # seconds without a sign of life of a machine: while data is prepared; at other times
FIRST = 20.0  # seconds that the first process of a machine has for saying what all of it find, before the next says it
PATIENCE, AGAIN = 10.0, 300.0  # seconds of waiting until a process says so, and says so again
SEEN_WITHIN = 60.0  # seconds until a file made on one machine is seen on another: as long as NFS caches a folder
# Of the facts of a run (`resuming.facts_of`), what all processes must have, beside settings and our own code.
COMPARED = ("data", "evaluated", "order", "rows_a_step", "launch", "precision", "base", "config_files", "versions")
together = threading.Event()  # set when all processes are known to be ready to train
hosts: dict[int, str] = {}  # of the other machines, by their rank


class Agreed(Preempted):
    """The run was told to stop, and all processes have agreed on a step and saved it: no other needs to be told."""


def several_machines() -> bool:
    """Whether launchers of torchrun's kind started this run on more than one machine."""
    return (
        int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )


def can_speak() -> bool:
    """Whether others are to be told: other machines always, other processes of this one when they have met.

    Before, they find what this one finds, and none of them needs torch to say so.
    """
    met = (torch := sys.modules.get("torch.distributed")) and torch.is_available() and torch.is_initialized()
    return several_machines() or bool(met and os.environ.get("WORLD_SIZE", "1") != "1")


def meet() -> "TCPStore":
    """A connection of its own to the launchers' store: one that waits in C keeps others waiting. Raises `Stopped`.

    Processes that no launcher has started have a store at the same address, which goes with the first of them.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), REACHED).close()  # C would try for long, and print its stack
        timeout = datetime.timedelta(seconds=REACHED)
        return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise Stopped(gone()) from error


def gone() -> str:
    """What is known when the launchers' store does not answer."""
    return (
        f"the launcher of the first machine ({os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}) has ended "
        "or cannot be reached; its output says why. Start all machines again"
    )


@contextlib.contextmanager
def others_told(stop: Stop) -> Iterator[None]:
    """Tell the other processes of an error that ends this one, whatever it is and however early.

    Raises `Stopped` in place of `Preempted` where the signal was a launcher's, to those that are left by a failure.
    """
    try:
        yield
    except Agreed:
        raise
    except (Exception, Preempted) as error:
        stop.ended = stop.leaving = True  # no signal cuts short what is said now
        status, reason = how(error)
        if status == "preempted" and (said := said_by_others())[0] == "failed":
            raise Stopped(said[1]) from None
        if several_machines() and type(error).__name__ in ("DistNetworkError", "DistStoreError"):
            raise Stopped(said_by_others()[1] or gone()) from error  # the store went, with the launcher that kept it
        if can_speak():
            with contextlib.suppress(Stopped, RuntimeError):  # then they find out by themselves
                who = f"process {os.environ['RANK']} on {platform.node()}"
                meet().compare_set(FAILED, "", f"{status}\n{who}: {reason}")
                if several_machines():
                    time.sleep(2 * POLL)  # the store goes with its launcher, which goes with this process
        raise


def how(error: BaseException) -> tuple[str, str]:
    """How an error ends the run, `failed` or `preempted`, and why."""
    if isinstance(error, Preempted):
        return "preempted", str(error)
    return "failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def said_in(store: "TCPStore") -> tuple[str, str]:
    """How another process has ended the run, `failed` or `preempted`, and why; empty where none has said so."""
    status, _, reason = store.get(FAILED).decode().partition("\n") if store.check([FAILED]) else ("", "", "")
    return status, reason


def said_by_others() -> tuple[str, str]:
    """`said_in` the store, where there is one that answers."""
    with contextlib.suppress(Stopped, RuntimeError):
        if can_speak():
            return said_in(meet())
    return "", ""


def has_the_word() -> bool:
    """Whether it is this process that says on its machine why the run cannot go on: the first to know."""
    with contextlib.suppress(Stopped, RuntimeError):
        if can_speak():
            machine = os.environ.get("GROUP_RANK", platform.node())
            return meet().add(f"{PREFIX}/said on {machine}", 1) == 1
    if (
        os.environ.get("LOCAL_RANK", "0") != "0"
    ):  # its end would have the launcher end the first before that has spoken
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which slurm/train.slurm has ignored
        time.sleep(FIRST)
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def record_how(output_dir: str, error: BaseException, begun: bool) -> None:
    """`record_end`, by who ended first: a signal may only be a launcher's, to those that are left by a failure, and an
    error may only be that a process is gone which was told to stop.
    """
    status, reason = how(error)
    first, why = said_by_others()
    if first not in ("", status):
        status, reason = first, why
    record_end(output_dir, status, reason, begun)


def heed_others(stop: Stop, output_dir: str) -> None:
    """End this process when another machine's ends, from now on. Raises `Stopped` when the first machine's has.

    To be called before the process group is made, which waits for all processes too.
    """
    if not several_machines():
        return
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo takes the one that the machine's own name stands for
    if os.environ["LOCAL_RANK"] == "0":  # the launcher ends the others with it
        store, looks = meet(), Counter()
        store.set_timeout(datetime.timedelta(seconds=ABSENT))  # a launcher that was stopped goes on: see `overlook`
        for task in (listen, overlook):
            threading.Thread(target=task, args=(store, looks, stop, output_dir), daemon=True, name="others").start()


def listen(store: "TCPStore", looks: Counter, stop: Stop, output_dir: str) -> None:
    """Show that this machine is there, and look for those that failed or, until the run is trained, are not heard of.

    Whatever holds Python's lock for long silences a machine, so patience is long. Looks are counted, not seconds: a
    job that was stopped for a while and goes on has missed nothing.
    """
    me, machines = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    # The first looks for all others and tells them, the others look for the first: not each for each.
    signs, trained = {other: ("", 0) for other in range(machines) if (other == 0) != (me == 0)}, False
    while not stop.ended:
        status = reason = ""
        try:
            status, reason = said_in(store)
            if not reason and (not trained or stop.waits):
                store.set(f"{ALIVE}/{me}", f"{platform.node()} {looks['done']}")
                for other, (before, seen) in signs.items():
                    sign = store.get(f"{ALIVE}/{other}").decode() if store.check([f"{ALIVE}/{other}"]) else ""
                    patience = SILENT if sign and not together.is_set() else ABSENT
                    if sign != before:
                        signs[other], hosts[other] = (sign, looks["done"]), sign.split()[0]
                    elif (looks["done"] - seen) * POLL > patience:
                        name = f"machine {other}{f' ({hosts[other]})' if sign else ''}"
                        reason = f"{name} has given no sign of life for {patience:.0f} s"
                        store.compare_set(FAILED, "", f"failed\n{reason}")
        except RuntimeError:
            if trained and not stop.waits:  # the first machine's launcher may end before others' have saved
                return
            reason = gone()
        if reason:
            leave(stop, output_dir, status or "failed", reason)
        trained = trained or stop.waits
        looks["done"] += 1
        time.sleep(POLL)


def overlook(store: "TCPStore", looks: Counter, stop: Stop, output_dir: str) -> None:
    """See that `listen` goes on: C waits a quarter of an hour and longer for a machine that is cut off."""
    begun, done = False, -1
    while not stop.ended and (stop.waits or not begun):
        begun = begun or stop.waits
        looks["hung"] = looks["hung"] + 1 if looks["done"] == done else 0
        done = looks["done"]
        if looks["hung"] * POLL > ABSENT:
            leave(stop, output_dir, "failed", gone())
        time.sleep(POLL)


def leave(stop: Stop, output_dir: str, status: str, reason: str) -> None:
    """End this process, unless it is about to end and says itself why."""
    time.sleep(AT_ONCE)
    if not stop.ended:
        logger.error("%s", reason)
        record_end(output_dir, status, reason, stop.begun)
        os._exit(EXIT_CODE if status == "preempted" else 1)


def wait_for_all(what: str) -> None:
    """Wait until all processes have come here, however long that takes, and say for whom.

    Machines with file systems of their own prepare `what` for themselves, one perhaps for hours longer than another:
    in a collective that would be an error. Raises `Stopped` when the first machine's launcher ends meanwhile, or when
    another process says that it has ended.
    """
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if processes == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, key = _get_default_store(), f"{PREFIX}/{what}"
    since, patience = time.monotonic(), PATIENCE
    try:
        store.append(f"{key}/ready", f"{rank} ")  # one value, not one each: a thousand processes ask for it at once
        store.add(key, 1)
        while store.add(key, 0) < processes:
            waited = time.monotonic() - since
            time.sleep(0.1 if waited < PATIENCE else POLL)
            if waited > patience and os.environ.get("LOCAL_RANK", "0") == "0":
                patience += AGAIN
                if why := said_by_others()[1]:  # without launchers nothing else says so
                    raise Stopped(why)
                ready = set(store.get(f"{key}/ready").decode().split())
                if missing := [other for other in range(processes) if str(other) not in ready]:
                    logger.info("%s: ready, and waiting since %d s for %s", what, waited, named(missing))
    except RuntimeError as error:
        raise Stopped(gone()) from error
    together.set()


def require_one_run(facts: dict[str, Any], args: "SFTConfig") -> None:
    """Compare what all processes are about to train, and see that they share an output directory.

    To be called behind `wait_for_all`. Raises `UserError` on all of them, with what differs and on which machines.
    """
    rank, world = args.process_index, args.world_size
    if world == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, folder = _get_default_store(), Path(args.output_dir)
    with left_in(folder) if rank == 0 else contextlib.nullcontext() as token:
        if rank == 0:
            store.set(f"{PREFIX}/token", token)
        token = store.get(f"{PREFIX}/token").decode()
        said = {"host": platform.node(), "sees": seen(folder / token), "facts": settled(facts)}
        store.set(f"{PREFIX}/facts/{rank}", json.dumps(said))
        if rank == 0:
            told = [json.loads(store.get(f"{PREFIX}/facts/{number}")) for number in range(world)]
            store.set(f"{PREFIX}/verdict", differences(told) or unseen(told, args.output_dir))
        verdict = store.get(f"{PREFIX}/verdict").decode()
    if verdict:
        raise UserError(verdict)


@contextlib.contextmanager
def left_in(folder: Path) -> Iterator[str]:
    """A file of a name that nobody can have guessed or cached; gives the name."""
    token = folder / f"{uuid.uuid4().hex}.partial"  # which the next start removes, should this one be killed
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


def seen(path: Path) -> bool:
    """Whether a file of another machine shows up here."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def settled(facts: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all processes, each with its value as text."""
    compared = {key: facts[key] for key in COMPARED if not isinstance(facts[key], dict)}
    for key in COMPARED:
        if isinstance(facts[key], dict):
            compared |= {f"{key}: {name}": value for name, value in facts[key].items()}
    compared |= facts["settings"] | {"code of open_r1": facts["code"]["digest"]}
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in compared.items()}


def differences(told: list[dict[str, Any]]) -> str:
    """What processes would train differently, for a message; empty when nothing. `told[rank]` is what each said."""
    lines = []
    for key in sorted({key for each in told for key in each["facts"]}):
        of = defaultdict(list)
        for rank, each in enumerate(told):
            of[each["facts"].get(key, "nothing")].append(rank)
        if len(of) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{shortened(value)} on {places(of[value], told)}" for value in of))
    if not lines:
        return ""
    return "\n".join(
        [
            "the processes of this run would train different things:",
            *lines,
            "bring recipes, packages and data to the same state on all machines (data: the rows that preparation "
            "comes to), then start it again",
        ]
    )


def unseen(told: list[dict[str, Any]], output_dir: str) -> str:
    """Which machines do not see the first process's output directory, for a message; empty when all do."""
    blind = [rank for rank, each in enumerate(told) if not each["sees"]]
    if not blind:
        return ""
    return (
        f"output_dir: {output_dir} on {places(blind, told)} is not the directory of that name on {told[0]['host']}, "
        "where the run is saved; put output_dir on a file system that all machines share"
    )


def places(ranks: list[int], told: list[dict[str, Any]]) -> str:
    """Machines with the processes on them, for a message."""
    hosts = defaultdict(list)
    for rank in ranks:
        hosts[told[rank]["host"]].append(str(rank))
    few = [f"{host} (process {', '.join(on[:8])}{' ...' if len(on) > 8 else ''})" for host, on in hosts.items()]
    return ", ".join(few[:4]) + (f" and {len(few) - 4} more machines" if len(few) > 4 else "")


def shortened(value: str) -> str:
    """A value as JSON, for a message."""
    return value if len(value) <= 100 else value[:97] + "..."


def named(ranks: list[int], most: int = 8) -> str:
    """Processes by their ranks and, where known, machines."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = list(dict.fromkeys(hosts.get(rank // local, f"machine {rank // local}") for rank in ranks))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"process {', '.join(map(str, ranks[:most]))}{more} on {', '.join(there[:most])}"


def interface_to(address: str) -> str | None:
    """The network interface with the IPv4 address that this machine has towards `address`; None if none is found."""
    import psutil

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        mine = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if mine in (each.address for each in addresses):
                return name
    return None


def cores_here() -> set[int]:
    """The cores that this process may use: a launcher or a scheduler may have given it some."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
