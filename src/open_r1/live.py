"""How far a run is, for people: a live panel on a terminal, else a line a log.

It takes the place of the trainer's progress bar and of its printed dictionaries, on the main process alone.
"""

import contextlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

if TYPE_CHECKING:
    from transformers import Trainer

    from open_r1.configs import SFTConfig

logger = logging.getLogger(__name__)
REDRAWN = 0.5  # seconds between two drawings
# What is shown of a log: key, format.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "evaluation loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3g}",
    "real_tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class Display(TrainerCallback):
    """Shows a run on stderr: a panel where that is a terminal and `disable_tqdm` is not set, else lines in the log."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self.handlers: list[tuple[logging.StreamHandler, Any]] = []
        self.logged: dict[str, float] = {}
        self.begun = self.drawn = 0.0
        self.first = 0
        self.evaluated, self.batches = 0, 0

    def on_train_begin(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the panel."""
        self.begun, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.open(state)

    def on_step_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the panel anew, when it is time."""
        self.draw(state)

    def on_prediction_step(
        self,
        args: "SFTConfig",
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Show how far an evaluation is."""
        self.evaluated += 1
        self.batches = len(eval_dataloader) if has_length(eval_dataloader) else 0
        self.draw(state)

    def on_evaluate(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation is over."""
        self.evaluated = self.batches = 0

    def on_log(
        self, args: "SFTConfig", state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Show what was logged: in the panel, and as a line where there is none, or of an evaluation."""
        if not state.is_world_process_zero:
            return
        self.logged |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if ("loss" in logs and self.live is None) or "eval_loss" in logs:
            logger.info("%s", self.line(state, logs))
        self.draw(state)

    def on_train_end(self, args: "SFTConfig", state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the panel."""
        self.close()

    def line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        """A log as a line."""
        total = f"{state.max_steps:,}"
        parts = [f"step {state.global_step:>{len(total)},}/{total}", *numbers(logs)]
        if "loss" in logs and self.begun:
            parts.append(self.clock(state))
        return "  ".join(parts)

    def clock(self, state: TrainerState) -> str:
        """The time that has passed since this start, and the time that is left at this pace."""
        passed, done = time.monotonic() - self.begun, state.global_step - self.first
        left = f", {clocked(passed / done * (state.max_steps - state.global_step))} left" if done else ""
        return f"{clocked(passed)} elapsed{left}"

    def open(self, state: TrainerState) -> None:
        """Open the panel, and have all that logs to this terminal write above it."""
        before, console = sys.stderr, Console(file=sys.stderr)
        self.live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )
        with self.as_long_as_it_is_there():
            self.live.start()
            console.show_cursor(True)  # a process that is killed must not leave a terminal without one
        for handler in handlers_to(before):
            self.handlers.append((handler, handler.setStream(sys.stderr)))
        self.draw(state)

    def close(self) -> None:
        """Close the panel and leave the terminal as it was; of no effect without one."""
        live, self.live = self.live, None
        for handler, stream in self.handlers:
            handler.setStream(stream)
        self.handlers.clear()
        if live is not None:
            with self.as_long_as_it_is_there():
                live.stop()

    def draw(self, state: TrainerState) -> None:
        """Draw the panel, at most twice a second."""
        if self.live is not None and time.monotonic() - self.drawn > REDRAWN:
            self.drawn = time.monotonic()
            with self.as_long_as_it_is_there():
                self.live.update(self.panel(state), refresh=True)

    @contextlib.contextmanager
    def as_long_as_it_is_there(self) -> Iterator[None]:
        """A terminal that goes (a window is closed, a connection breaks) takes the panel with it, and not the run."""
        try:
            yield
        except OSError:
            leave_terminals_that_are_gone()
            self.close()

    def panel(self, state: TrainerState) -> Group:
        """Two lines: how far it is, and the last numbers that were logged."""
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(1, state.max_steps), completed=state.global_step, width=24, complete_style="cyan")
        grid.add_row(f"step {state.global_step:,}/{state.max_steps:,}", bar, self.clock(state))
        said = numbers(self.logged)
        if self.evaluated:
            said.append(f"evaluating {self.evaluated:,}{f'/{self.batches:,}' if self.batches else ''}")
        return Group(grid, Text("  ".join(said), no_wrap=True, overflow="ellipsis", style="dim"))


def leave_terminals_that_are_gone() -> None:
    """Let what is said to them go nowhere: each line of it, and the last flush of all, would fail the run."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed by whoever started this
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def numbers(logs: dict[str, Any]) -> list[str]:
    """What is shown of a log, in words."""
    said = [words.format(logs[key]) for key, words in SHOWN.items() if isinstance(logs.get(key), (int, float))]
    if isinstance(peak := logs.get("peak_memory_bytes"), (int, float)):
        said.append(f"{peak / 2**30:,.2f} GiB")
    return said


def clocked(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def handlers_to(stream: Any) -> list[logging.StreamHandler]:
    """All log handlers that write to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = (handler for each in loggers for handler in getattr(each, "handlers", ()))
    return [handler for handler in found if getattr(handler, "stream", None) is stream]


def shown(trainer: "Trainer") -> Display:
    """Have a run shown by a `Display` instead of what the trainer brings for it."""
    for callback in (PrinterCallback, ProgressCallback):
        while trainer.pop_callback(callback) is not None:
            pass
    display = Display()
    trainer.add_callback(display)
    return display
