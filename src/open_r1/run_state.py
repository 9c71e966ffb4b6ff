"""What a run says of itself in `run_state.json`, and the lock that keeps two runs out of one output directory.

Launchers turn every exit code into 1, so a wrapper reads the outcome there: `status` is `running`, `preempted` (saved,
the same command goes on), `failed` or `complete`; `reason` says why, `global_step` how far it was.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_r1.checkpoints import room, write_whole
from open_r1.errors import UserError

logger = logging.getLogger(__name__)
RUN_STATE = "run_state.json"
LOCK = ".lock"
RESERVE = 1 << 16  # bytes of it that are given back where nothing else is free, for how the run ended
JOB = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


def read_state(output_dir: str) -> dict[str, Any]:
    """`run_state.json`, empty when there is none that can be read."""
    try:
        state = json.loads((Path(output_dir) / RUN_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def record(output_dir: str, durable: bool = True, **facts: Any) -> None:
    """Write facts into `run_state.json`, beside those that are there; `durable`, they outlive the machine."""
    state = {**read_state(output_dir), **facts, "updated": now()}
    write_whole(Path(output_dir) / RUN_STATE, json.dumps(state, indent=1, default=str) + "\n", durable)


def record_end(output_dir: str, status: str, reason: str, begun: bool = True) -> None:
    """Say how a start ended.

    Of several processes the first has the word: others fail because it did.

    One that ended before it had `begun` to train speaks of a run that is not finished, whose state says how the start
    before it ended; a wrapper that goes by that would start it for ever.
    """
    before = read_state(output_dir).get("status")
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if begun and before != "running":
        return
    if not begun and (rank != "0" or before == "complete" or (before is None and status != "preempted")):
        return
    another = reason.startswith("process ")  # which has said so (`processes.others_told`)
    of = f"process {rank}: " if begun and processes != "1" and status == "failed" and not another else ""
    facts = {"status": status, "reason": f"{of}{reason}", **({} if begun else holder())}
    with contextlib.suppress(OSError):  # what failed is about to be raised
        try:
            record(output_dir, **facts)
        except OSError:  # a full disk
            os.truncate(Path(output_dir) / LOCK, 0)
            record(output_dir, **facts)


def holder() -> dict[str, str | int]:
    """Who this process is: `host`, `pid`, `job` where a scheduler gave a number, `started`."""
    job = next((os.environ[name] for name in JOB if os.environ.get(name)), None)
    return {"host": platform.node(), "pid": os.getpid(), **({"job": job} if job else {}), "started": now()}


def now() -> str:
    """The time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def held(output_dir: str) -> Iterator[None]:
    """Hold an output directory for this run, on its first process. Raises `UserError` when another run has it.

    A POSIX record lock: the kernel drops it with the process, however that ends, forked workers do not inherit it, and
    NFS knows it. A run that is said to be running in a directory that can be locked was killed, which is put down.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        if not output_dir or Path(output_dir).is_file():
            raise UserError(f"output_dir: {output_dir!r} is no directory that can be written to")
        new = not Path(output_dir).exists()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = os.open(Path(output_dir) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written to: {error.strerror}") from error
    try:
        locked = lock(file, output_dir)
        state = read_state(output_dir)
        if state.get("status") != "complete":  # of a finished run nothing is touched
            with room(Path(output_dir), "the run"):
                os.pwrite(file, f"{words(holder())}\n".encode().ljust(RESERVE), 0)
                if locked and state.get("status") == "running":
                    record(
                        output_dir, status="failed", reason="ended without a word: killed, or its machine went down"
                    )
            for left in Path(output_dir).glob("*.partial"):
                left.unlink(missing_ok=True)
        yield
    finally:
        if new:  # nothing came of it: leave no trace
            with contextlib.suppress(OSError):
                if [path.name for path in Path(output_dir).iterdir()] == [LOCK]:
                    (Path(output_dir) / LOCK).unlink()
                    Path(output_dir).rmdir()
        os.close(file)


def lock(file: int, output_dir: str) -> bool:
    """Lock an open file; returns whether its file system can. Raises `UserError` when another process has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        known = {
            key: value for key, value in read_state(output_dir).items() if key in ("host", "pid", "job", "started")
        }
        who = os.pread(file, 1000, 0).decode(errors="replace").strip() or words(known)
        raise UserError(
            f"{output_dir} is in use by another run ({who or 'which has not said who it is'}); wait for it, or choose "
            "another output_dir"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that no other run uses it", output_dir, error.strerror)
        return False
    return True


def words(facts: dict[str, Any]) -> str:
    """Facts in a line."""
    return ", ".join(f"{key} {value}" for key, value in facts.items())
