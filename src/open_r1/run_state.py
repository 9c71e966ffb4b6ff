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


def record_end(output_dir: str, status: str, reason: str) -> None:
    """Say how a run ended. Of several processes the first has the word: others fail because it did."""
    if read_state(output_dir).get("status") == "running":
        rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        of = f"process {rank}: " if processes != "1" and status == "failed" else ""
        with contextlib.suppress(OSError):  # what failed is about to be raised
            try:
                record(output_dir, status=status, reason=f"{of}{reason}")
            except OSError:  # a full disk
                os.truncate(Path(output_dir) / LOCK, 0)
                record(output_dir, status=status, reason=f"{of}{reason}")


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
    if not output_dir or Path(output_dir).is_file():
        raise UserError(f"output_dir: {output_dir!r} is no directory that can be written to")
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    new = not Path(output_dir).exists()
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = os.open(Path(output_dir) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written to: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            who = os.pread(file, 1000, 0).decode(errors="replace").strip()
            raise UserError(
                f"{output_dir} is in use by another run ({who or 'which has not said who it is'}); wait for it, or "
                "choose another output_dir"
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that no other run uses it", output_dir, error.strerror)
        with room(Path(output_dir), "the run"):
            who = ", ".join(f"{key} {value}" for key, value in holder().items())
            os.pwrite(file, f"{who}\n".encode().ljust(RESERVE), 0)
            before = read_state(output_dir)
            if before.get("status") == "running":
                record(output_dir, status="failed", reason="ended without a word: killed, or its machine went down")
        yield
    finally:
        if new:  # nothing came of it: leave no trace
            with contextlib.suppress(OSError):
                if [path.name for path in Path(output_dir).iterdir()] == [LOCK]:
                    (Path(output_dir) / LOCK).unlink()
                    Path(output_dir).rmdir()
        os.close(file)
