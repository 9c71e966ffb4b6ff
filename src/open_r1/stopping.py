"""Signals: SIGTERM, SIGINT and SIGUSR1 stop a run so that the same command goes on with it.

Python's handler only sets down that one came. Before and after training that ends the run at once, nothing can be
lost there; while it trains, all processes agree on a step (`trainer.OrderedTrainer.agree`), save, and leave.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # "preempted, resumable": EX_TEMPFAIL of sysexits.h, the user is invited to try again
# Schedulers signal the launcher and its workers, and the launcher signals the workers again: that is one request.
SAME_REQUEST = 3.0  # seconds


class Preempted(BaseException):
    """The run was told to stop. No `Exception`, so that nothing between here and `main` takes it for a failure."""


class Stop:
    """Whether a signal came, its name, and when; and whether it waits for the end of a step."""

    def __init__(self) -> None:
        self.signal, self.at, self.waits, self.leaving = "", 0.0, False, False
        self.pid = os.getpid()

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self.pid:  # a forked worker: its parent decides what becomes of it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.leaving or (self.signal and time.monotonic() - self.at < SAME_REQUEST):
            return
        elif self.signal and self.waits:
            self.leaving = True
            raise Preempted(f"{self.signal}, and then {signal.Signals(number).name}: stopped at once, without saving")
        else:
            self.signal, self.at = signal.Signals(number).name, time.monotonic()
            if not self.waits:
                self.leaving = True
                raise Preempted(self.signal)
            logger.warning("%s: saving and stopping at the end of this step; again, it stops at once", self.signal)


@contextlib.contextmanager
def heeded() -> Iterator[Stop]:
    """Heed signals in this block. They are Python's main thread's business; elsewhere none is heeded."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_in_worker(worker: int) -> None:
    """For data loader workers: a signal to the whole job must not kill them under a step that is to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
