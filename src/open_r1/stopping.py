"""Signals: SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop a run so that the same command goes on with it.

SIGUSR1 is a scheduler's: sent again it asks for the same. Any other one that comes again stops at once.

Python's handler only sets down that one came. Before and after training that ends the run at once, nothing can be
lost there; while it trains, all processes agree on a step (`trainer.OrderedTrainer.agree`), save, and leave. Python
runs handlers between two of its own instructions: where the main thread waits in C for another process that is gone,
stopped or slow, a thread ends the process instead (`Stop.watch`).
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75  # "preempted, resumable": EX_TEMPFAIL of sysexits.h, the user is invited to try again
# Schedulers signal the launcher and its workers, and the launcher signals the workers again: that is one request.
SAME_REQUEST = 3.0  # seconds
AT_ONCE = 5.0  # seconds that the main thread has for leaving at once


class Preempted(BaseException):
    """The run was told to stop. No `Exception`, so that nothing between here and `main` takes it for a failure."""


class Stop:
    """Whether a signal came, its name, and when; and whether it waits for the end of a step."""

    def __init__(self) -> None:
        self.signal, self.at, self.waits, self.leaving = "", 0.0, False, False
        self.begun = False  # the run: from here on it speaks for all processes
        self.ended = False  # the main thread is on its way out
        self.last_words: Callable[[str], None] = logger.warning  # what is to be done with the reason
        self.pid = os.getpid()

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        if os.getpid() != self.pid:  # a forked worker: its parent decides what becomes of it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.leaving or (self.signal and self.is_same(number, self.at)):
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

    @staticmethod
    def is_same(number: int, since: float) -> bool:
        """Whether a signal says what one at `since` has said already."""
        return number == signal.SIGUSR1 or time.monotonic() - since < SAME_REQUEST

    def watch(self, pipe: int) -> None:
        """End the process where a signal should have ended it and the main thread does not come to it.

        `pipe` is where C's handler writes the numbers of signals, whatever the main thread does meanwhile.
        """
        first = None
        while number := os.read(pipe, 1):
            if self.ended or number[0] not in SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            waits = self.waits if first is None else self.is_same(number[0], first[1])
            first = first or (name, now)
            if waits:
                continue
            time.sleep(AT_ONCE)
            if not self.ended:
                then = f"{first[0]}, and then {name}" if first[1] < now else name
                self.last_words(f"{then}: stopped at once, without saving")
                os._exit(EXIT_CODE)
        os.close(pipe)


@contextlib.contextmanager
def heeded() -> Iterator[Stop]:
    """Heed signals in this block. They are Python's main thread's business; elsewhere none is heeded."""
    global heeding
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heeding = stop
    # Not what nohup and shells ignore for what runs behind them. SIGTERM and SIGUSR1 are only ignored on behalf of a
    # launcher, which would die of them before its processes have saved (slurm/train.slurm).
    ignored = {number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_IGN}
    heard = [number for number in SIGNALS if number not in ignored]
    before = {number: signal.signal(number, stop) for number in heard}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=stop.watch, args=(reading,), daemon=True, name="signals").start()
    try:
        yield stop
    finally:
        stop.ended, heeding = True, None
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


def in_training() -> bool:
    """Whether a signal waits for the end of a step, and it can be told whom one is from (not on macOS)."""
    return heeding is not None and heeding.waits and hasattr(signal, "sigwaitinfo")


def before_fork() -> None:
    """A child has its parent's mask from the first moment on: what comes before it can see to itself is not lost."""
    if in_training():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def after_fork_in_parent() -> None:
    """Heed signals again."""
    if in_training():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def after_fork_in_child() -> None:
    """A signal to the whole job must not kill a data loader worker under a step that is to end.

    Its parent's must: when Python ends over an error it terminates its children and waits for them without end.
    """
    with contextlib.suppress(ValueError):  # its signals are none of its parent's; it has no main thread of Python's
        signal.set_wakeup_fd(-1)
    if in_training():
        threading.Thread(target=heed_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def shield(worker: int, then: Callable[[int], None] | None = None) -> None:
    """The same for data loader workers that were not forked but spawned."""
    if hasattr(signal, "sigwaitinfo") and "signals" not in {thread.name for thread in threading.enumerate()}:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=heed_parent, args=(os.getppid(),), daemon=True, name="signals").start()
    if then is not None:
        then(worker)


def heed_parent(parent: int) -> None:
    """End this process on a signal of its parent's."""
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


heeding: Stop | None = None
os.register_at_fork(before=before_fork, after_in_parent=after_fork_in_parent, after_in_child=after_fork_in_child)
