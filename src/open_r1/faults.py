"""What goes wrong while a run trains: numbers that are none, losses that jump, steps that do not end."""

import contextlib
import faulthandler
import fcntl
import json
import logging
import math
import os
import sys
from collections import deque
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from open_r1.data import excerpt_of, places_of

if TYPE_CHECKING:
    from open_r1.preparation import Part

logger = logging.getLogger(__name__)
BEFORE, AT_LEAST = 50, 10  # losses that a jump is measured by, and how many there must be


class Losses:
    """The last losses, each of an optimiser step."""

    def __init__(self, factor: float | None) -> None:
        self.factor, self.last = factor, deque(maxlen=BEFORE)

    def spike(self, loss: float) -> float | None:
        """The median of the last losses, when this one is more than `factor` times that; remembers it."""
        usual = median(self.last) if self.factor and len(self.last) >= AT_LEAST else math.inf
        self.last.append(loss)
        return usual if usual > 0 and loss > (self.factor or 0) * usual else None


def watch(seconds: float | None) -> None:
    """Dump the stacks of all threads every so many seconds, unless called again before; None stops it.

    A thread of C does it, which needs no lock of Python's: it speaks where the interpreter hangs itself. The log shows
    "Timeout" and the stacks.
    """
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__)


def free_builds() -> None:
    """Remove the locks that killed processes left on builds of PyTorch's extensions, which DeepSpeed needs.

    PyTorch waits for such a lock without end (`FileBaton`, torch 2.13). Every run holds a shared lock of the kernel's
    on the folder while it is alive, so who gets an exclusive one knows that no run is building.
    """
    from torch.utils.cpp_extension import get_default_build_root  # brings in setuptools

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".open_r1", os.O_RDWR | os.O_CREAT, 0o666)  # held until this process ends
    except OSError:  # read-only: with ops that came built
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # another process of this run was first, or another run may be building
    else:
        for lock in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
            logger.warning("%s was left by a process that was killed; it is removed", lock)
            lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a file system without locks (ENOSYS, ENOLCK)
        fcntl.flock(file, fcntl.LOCK_SH)


def named(part: "Part", numbers: np.ndarray) -> list[dict[str, Any]]:
    """Where rows of the prepared data are from: `position`, and of each document source, row, place and excerpt."""
    found = []
    columns = part.rows.select_columns(["source", "row"])[numbers.tolist()]
    for position, sources, rows in zip(numbers.tolist(), columns["source"], columns["row"], strict=True):
        pairs = zip(sources, rows, strict=True) if isinstance(rows, list) else [(sources, rows)]
        for number, row in pairs:
            source = part.tables[number].source
            about = {"position": position, "source": source.name, "row": row, "place": places_of(source, [row])[0]}
            found.append({**about, "excerpt": excerpt_of(source, row)})
    return found


def in_words(rows: list[dict[str, Any]], most: int = 4) -> str:
    """The places of rows for a message."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return "; ".join(row["place"] for row in rows[:most]) + more


def write_rows(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Append rows to a file of JSON lines, each with what it is about."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
