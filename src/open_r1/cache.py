"""Prepared tables on disk, found by content: same key, same bytes; on a miss, which part of the key is new.

A table is a directory named by the digest of its key: the key's parts in `key.json`, and arrow files beside it, which
are memory-mapped, with their sizes. It is written under another name and renamed when whole, so a process that is
killed half-way leaves nothing that could be taken for a table. One process makes it, whoever else on whatever machine
waits for it; who finds it whole needs neither a lock nor leave to write.
"""

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from filelock import SoftFileLease, Timeout

from open_r1.checkpoints import sha256
from open_r1.errors import UserError

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # what one process does for all others it says, whichever it is
Key = dict[str, Any]
SIZES, COST = "sizes.json", "cost.json"  # of the arrow files, by name; of making them
TORN = ".partial-"
LEASE, BEAT = 60.0, 10.0  # seconds without a sign of life until a lock of another machine is taken over; between signs
PATIENCE, AGAIN = 10.0, 300.0  # seconds of waiting until a process says so, and says so again
ABANDONED = 3600.0  # seconds since the last sign of life of who was making a table that nobody asks for any more


def root() -> Path:
    """Where prepared tables live: beside the cache of the `datasets` library, shared by all ranks of a file system.

    Raises `UserError` when it is not there and cannot be made.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "open_r1"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"prepared data cannot be kept in {folder}: {error.strerror}; set HF_DATASETS_CACHE"
        ) from error
    return folder


@contextlib.contextmanager
def one_at_a_time(lock: Path, what: str) -> Iterator[None]:
    """Hold `lock`, waiting for who has it on whatever machine and saying so. Raises `OSError` where none can be made.

    A lease: a file that names its holder, who touches it as long as it lives. Unlike the kernel's locks it holds on
    every file system and between machines. A holder that is dead is followed at once on its own machine and after
    `LEASE` seconds on others; one that was only stopped that long works on beside its heir, which hurts nobody.
    """
    lease = SoftFileLease(lock, lease_duration=LEASE, heartbeat_interval=BEAT)
    since, patience = time.monotonic(), PATIENCE
    while True:
        try:
            lease.acquire(timeout=patience, poll_interval=0.1)
            break
        except Timeout:
            patience = AGAIN
            holder = lease.owner
            if holder and os.environ.get("LOCAL_RANK", "0") == "0":
                who = f"process {holder.pid} on {holder.hostname.partition('?')[0]}"
                logger.info("waiting for %s, since %d s: %s (%s)", who, time.monotonic() - since, what, lock)
    try:
        yield
    finally:
        lease.release()


def digest(value: Any) -> str:
    """Name of a key or of a part of one: 32 hexadecimal digits of what it holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_digest(path: str) -> str:
    """Digest of a file's bytes, remembered by path, size and times so that a big file is read once.

    Copying tools can set the time of modification; that of the last change of any kind they cannot.
    """
    stat = os.stat(path)
    known = root() / "digests" / digest([os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    if known.exists():
        return known.read_text()
    try:
        known.parent.mkdir(exist_ok=True)
        with one_at_a_time(known.with_suffix(".lock"), f"it reads {path}"):
            if not known.exists():
                partial = known.with_suffix(f".{uuid.uuid4().hex}")
                partial.write_text(sha256(Path(path)))
                partial.replace(known)
        return known.read_text()
    except OSError:  # a cache that is full or can only be read: each process for itself
        return sha256(Path(path))


def prepared_table(key: Key, make: Callable[[str], Any]) -> Dataset:
    """The table of `key`, made by `make(path of an arrow file to write)` when it is not there yet.

    `key["what"]` says in words what the table holds, and names nothing; other parts are compared when it is not found,
    unless it is derived from the table `key["of"]` and nothing else. Raises `UserError` when it cannot be written.
    """
    folder = folder_of(key)
    if (table := read(folder)) is not None:
        return table
    try:
        with one_at_a_time(folder.with_suffix(".lock"), f"it prepares {key.get('what', key.get('part'))}"):
            if (table := read(folder, mend=True)) is None:
                if "of" not in key:
                    explain_miss(key)
                remove_torn(folder.name)
                write(folder, key, make)
                table = read(folder)
    except OSError as error:
        raise UserError(f"{root()}: prepared data cannot be kept there: {error}; set HF_DATASETS_CACHE") from error
    return table


def folder_of(key: Key) -> Path:
    """Where the table of a key is."""
    return root() / digest({part: value for part, value in key.items() if part != "what"})


def read(folder: Path, mend: bool = False) -> Dataset | None:
    """The table in a folder, memory-mapped; None when there is none, or none that can be read: `mend` removes it."""
    if not (folder / "key.json").exists():
        return None
    try:
        # The library may put results computed from a table beside it, as cache-*.arrow.
        sizes = json.loads((folder / SIZES).read_text())
        if cut := [name for name, size in sizes.items() if (folder / name).stat().st_size != size]:
            raise ValueError(f"{cut[0]} is not as it was written")
        parts = [Dataset.from_file(str(folder / name)) for name in sorted(sizes)]
        table = concatenate_datasets(parts)
    except (ValueError, OSError, pa.ArrowException) as error:
        if mend:
            logger.warning("%s is damaged (%s) and prepared again", folder, error)
            shutil.rmtree(folder)
        return None
    return Dataset(table.data, info=table.info, fingerprint=folder.name)


def write(folder: Path, key: Key, make: Callable[[str], Any]) -> None:
    """Make a table beside its folder and rename it when it is whole."""
    partial = root() / f"{folder.name}{TORN}{uuid.uuid4().hex[:8]}"
    partial.mkdir()  # other users read it, if the umask lets them
    try:
        timed(make, partial)
        sizes = {path.name: path.stat().st_size for path in partial.glob("data*.arrow")}
        (partial / SIZES).write_text(json.dumps(sizes))
        (partial / "key.json").write_text(json.dumps(key, indent=1, default=str))
        sync(partial)
        partial.rename(folder)
    except OSError:
        if not (folder / "key.json").exists():  # else another process made the same table meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def timed(make: Callable[[str], Any], folder: Path) -> None:
    """Make a table in a folder, and write down what that cost: seconds, and the most that a process has held."""
    started = time.perf_counter()
    make(str(folder / "data.arrow"))
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    resident = max(peaks) * (1 if sys.platform == "darwin" else 1024)  # mapped files included
    made = {"seconds": round(time.perf_counter() - started, 3), "resident_bytes": resident}
    (folder / COST).write_text(json.dumps(made))


def cost_of(tables: Iterable[Dataset]) -> dict[str, float]:
    """What prepared tables cost when they were made: `seconds` in all, `resident_bytes` at most; `bytes` on disk."""
    files = {Path(file["filename"]) for table in tables for file in table.cache_files}
    kept = [path for path in files if path.is_relative_to(root())]
    costs = [path / COST for path in {path.parent for path in kept}]
    made = [json.loads(path.read_text()) for path in costs if path.exists()]
    return {
        "seconds": sum(each["seconds"] for each in made),
        "resident_bytes": max((each["resident_bytes"] for each in made), default=0),
        "bytes": sum(path.stat().st_size for path in kept),
    }


def remove_torn(mine: str) -> None:
    """Remove what makers that were killed have left: of the table whose lock is held, and what nobody works on."""
    for partial in root().glob(f"*{TORN}*"):
        lock = root() / f"{partial.name.partition(TORN)[0]}.lock"
        with contextlib.suppress(OSError):
            if lock.stem != mine:
                sign = lock if lock.exists() else partial
                if time.time() - sign.stat().st_mtime < ABANDONED:
                    continue
                lock.unlink(missing_ok=True)
            shutil.rmtree(partial)


def sync(folder: Path) -> None:
    """Flush every file of a directory to disk, so that the rename after it never precedes them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def explain_miss(key: Key) -> None:
    """Log what is new about `key` against the nearest table that is there."""
    nearest: list[str] | None = None
    for path in root().glob("*/key.json"):
        try:
            other = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        now = json.loads(json.dumps(key, default=str))
        if other.get("what") != now.get("what"):
            continue
        new = [part for part in {**now, **other} if now.get(part) != other.get(part)]
        nearest = new if nearest is None or len(new) < len(nearest) else nearest
    if nearest is None:
        logger.info("preparing %s for the first time", key["what"])
    else:
        logger.info("preparing %s again: %s changed", key["what"], ", ".join(nearest))
