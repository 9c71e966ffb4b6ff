"""What a run shows on a terminal and in a log: never both torn, never from the wrong process, nothing left behind."""

import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, settings
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from open_r1 import live
from open_r1.live import Display, clocked, numbers, shown
from open_r1.sft import main

CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def state(step=0, total=100, first=True):
    return SimpleNamespace(global_step=step, max_steps=total, is_world_process_zero=first)


def lines_of(text):
    """The lines of what was written to a terminal, without its codes."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", CODES.sub("", text)) if line.strip()]


ARGS, QUIET = SimpleNamespace(disable_tqdm=False), SimpleNamespace(disable_tqdm=True)


@pytest.fixture
def on_terminal(monkeypatch):
    """Make stderr a terminal that the package's logger writes to; pytest sets its own before each test begins."""

    def on_terminal():
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(levelname)-7s %(message)s"))
        logger.handlers, logger.level = [handler], logging.INFO
        return stream

    logger = logging.getLogger("open_r1")
    monkeypatch.setattr(Console, "_environ", os.environ)  # datasets' `map` puts a copy in its place
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return on_terminal


class TestOnATerminal:
    def test_step_loss_speed_memory_and_time(self, on_terminal, monkeypatch):
        terminal = on_terminal()
        clock = [100.0]
        monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
        display = Display()
        display.on_train_begin(ARGS, state(10), None)
        clock[0] += 60
        logs = {"loss": 1.5, "learning_rate": 2e-3, "real_tokens_per_second": 12345.6, "peak_memory_bytes": 3 * 2**29}
        display.on_log(ARGS, state(40), None, logs={**logs, "grad_norm": 0.51, "mfu": None})
        display.close()
        last = lines_of(terminal.getvalue())[-2:]
        assert last[0].startswith("step 40/100 ━") and last[0].endswith("━ 1:00 elapsed, 2:00 left")
        assert last[1] == "loss 1.5000  lr 2.00e-03  grad 0.51  12,346 tokens/s  1.50 GiB"

    def test_it_is_drawn_at_most_twice_a_second(self, on_terminal, monkeypatch):
        on_terminal()
        clock = [100.0]
        monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        drawn = []
        monkeypatch.setattr(display, "panel", lambda state: drawn.append(clock[0]) or "")
        for step in range(1000):
            clock[0] += 0.01
            display.on_step_end(ARGS, state(step), None)
        display.close()
        assert 18 <= len(drawn) <= 20

    def test_logging_stands_above_it_untorn(self, on_terminal, monkeypatch):
        terminal = on_terminal()
        monkeypatch.setattr(live, "REDRAWN", 0.0)
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        for step in range(50):
            display.on_step_end(ARGS, state(step), None)
            logging.getLogger("open_r1").warning("this is line %d of the log", step)
            print(f"and {step} said by print", file=sys.stderr)
        display.close()
        logging.getLogger("open_r1").warning("and this behind it")
        lines = lines_of(terminal.getvalue())
        for step in range(50):
            assert lines.count(f"WARNING this is line {step} of the log") == 1
            assert lines.count(f"and {step} said by print") == 1
        assert lines[-1] == "WARNING and this behind it"

    def test_all_is_as_it_was_behind_it(self, on_terminal):
        terminal = on_terminal()
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        assert sys.stderr is not terminal and logging.getLogger("open_r1").handlers[0].stream is sys.stderr
        display.on_train_end(ARGS, state(), None)
        display.close()
        assert sys.stderr is terminal and logging.getLogger("open_r1").handlers[0].stream is terminal
        said = terminal.getvalue()
        assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")

    def test_the_cursor_is_never_away(self, on_terminal):
        terminal = on_terminal()
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        said = terminal.getvalue()  # a process that is killed now leaves it so
        display.close()
        assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l") >= 0

    def test_an_evaluation_shows_how_far_it_is_and_leaves_a_line(self, on_terminal, monkeypatch):
        terminal = on_terminal()
        monkeypatch.setattr(live, "REDRAWN", 0.0)
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        for _ in range(3):
            display.on_prediction_step(ARGS, state(7), None, eval_dataloader=[1, 2, 3, 4])
        assert lines_of(terminal.getvalue())[-1].endswith("evaluating 3/4")
        display.on_log(ARGS, state(7), None, logs={"eval_loss": 2.25})
        display.on_evaluate(ARGS, state(7), None)
        display.on_step_end(ARGS, state(8), None)
        display.close()
        lines = lines_of(terminal.getvalue())
        assert "INFO    step   7/100  evaluation loss 2.2500" in lines and lines[-1] == "evaluation loss 2.2500"

    def test_a_narrow_terminal(self, on_terminal, monkeypatch):
        terminal = on_terminal()
        monkeypatch.setenv("COLUMNS", "40")
        display = Display()
        display.on_train_begin(ARGS, state(), None)
        display.logged = {"loss": 1.5, "eval_loss": 1.25, "learning_rate": 1e-3, "grad_norm": 1.0}
        display.drawn = 0.0
        display.draw(state(5))
        display.close()
        assert max(map(len, lines_of(terminal.getvalue()))) <= 40


class TestElsewhere:
    @pytest.fixture
    def said(self, caplog):
        caplog.set_level("INFO", "open_r1")
        return lambda: [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize("args", [ARGS, QUIET])
    def test_a_line_a_log(self, said, args, monkeypatch):
        monkeypatch.setattr(sys, "stderr", io.StringIO() if args is ARGS else Terminal())
        display = Display()
        display.on_train_begin(args, state(), None)
        display.on_log(args, state(5), None, logs={"loss": 2.5, "learning_rate": 1e-4, "total_flos": 1e9})
        display.on_log(args, state(100), None, logs={"eval_loss": 2.0, "eval_runtime": 3})
        display.on_log(args, state(100), None, logs={"train_runtime": 12, "train_loss": 2.0})
        display.on_train_end(args, state(100), None)
        assert said()[0].startswith("step   5/100  loss 2.5000  lr 1.00e-04  0:00 elapsed, 0:00 left")
        assert said()[1:] == ["step 100/100  evaluation loss 2.0000"]
        assert sys.stderr.getvalue() == ""

    def test_nothing_of_other_processes(self, said, on_terminal):
        terminal = on_terminal()
        display = Display()
        display.on_train_begin(ARGS, state(first=False), None)
        display.on_step_end(ARGS, state(3, first=False), None)
        display.on_log(ARGS, state(5, first=False), None, logs={"loss": 2.5})
        display.close()
        assert said() == [] and terminal.getvalue() == ""


def test_it_takes_the_place_of_upstreams():
    class Trainer:
        def __init__(self):
            self.callbacks = [PrinterCallback(), ProgressCallback(), PrinterCallback(), "another"]

        def pop_callback(self, kind):
            found = next((each for each in self.callbacks if isinstance(each, kind)), None)
            if found is not None:
                self.callbacks.remove(found)
            return found

        def add_callback(self, callback):
            self.callbacks.append(callback)

    trainer = Trainer()
    display = shown(trainer)
    assert trainer.callbacks == ["another", display]


def test_what_is_no_number_is_not_shown():
    assert numbers({"loss": None, "mfu": None, "eval_loss": "x", "grad_norm": float("nan")}) == ["grad nan"]
    assert clocked(59.6) == "1:00" and clocked(3600) == "1:00:00" and clocked(61) == "1:01"


def test_a_run_without_a_terminal_prints_no_dictionaries(tiny_model, chat_file, tmp_path, capfd):
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path, disable_tqdm=None)
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^INFO    step 1/2  loss \d\.\d{4}  lr \S+  grad \S+", err, re.MULTILINE)
    assert (
        "{'" not in out + err
        and "\x1b" not in err
        and "it/s]" not in err.partition("step 1/2")[2].partition("step 2/2")[0]
    )


def test_a_run_that_fails_leaves_the_terminal_as_it_was(tiny_model, chat_file, tmp_path, on_terminal, monkeypatch):
    terminal = on_terminal()
    from open_r1.trainer import OrderedTrainer

    monkeypatch.setattr(OrderedTrainer, "training_step", lambda *args, **kwargs: 1 / 0)
    argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path, disable_tqdm=False)
    with pytest.raises(ZeroDivisionError):
        main(argv)
    assert sys.stderr is terminal
    said = terminal.getvalue()
    assert "step 0/2" in said and said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l")


@pytest.fixture
def in_terminal(tiny_model, chat_file, tmp_path):
    """Start a run in a terminal of its own, which it does not control; returns the process and both ends of that."""
    started = []

    def in_terminal(**values):
        common = {"model_name_or_path": tiny_model, "dataset_name": chat_file, "output_dir": tmp_path / "run"}
        argv = settings(**common, disable_tqdm=None, **values)
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "src/open_r1/sft.py", *argv],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "PYTHONPATH": f"{ROOT}/src"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
        )
        started.append(process)
        return process, ours, theirs

    yield in_terminal
    for process in started:
        process.kill()
        process.wait()


def read_until(process, ours, *said, seconds=300):
    """What a terminal shows until all of `said` stands there, or the process has ended."""
    shown, until = b"", time.monotonic() + seconds
    while time.monotonic() < until and not (said and all(each in shown for each in said)):
        if select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 65536)
        elif process.poll() is not None:
            break
    return shown.decode()


def test_ctrl_c_in_a_real_terminal(in_terminal, tmp_path):
    """One saves and stops the run; what follows it stands on lines of its own, and the terminal is as it was."""
    process, ours, theirs = in_terminal(max_steps=100_000, logging_steps=100)
    before = termios.tcgetattr(theirs)
    text = read_until(process, ours, b"loss ", b" left")
    process.send_signal(signal.SIGINT)
    text += read_until(process, ours)
    assert process.returncode == 75, text[-2000:]
    assert termios.tcgetattr(theirs) == before
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    lines = lines_of(text)
    assert any(
        line == "WARNING SIGINT: saving and stopping at the end of this step; again, it stops at once"
        for line in lines
    )
    assert any(
        re.fullmatch(r"WARNING stopped: SIGINT, saved as checkpoint-\d+; the same command goes on", line)
        for line in lines
    )
    assert json.loads((tmp_path / "run" / "run_state.json").read_text())["status"] == "preempted"
    assert "preempted" in (tmp_path / "run" / "report.html").read_text().partition("<main>")[0]
    os.close(ours)
    os.close(theirs)


def test_a_terminal_that_goes_leaves_the_run_alone(in_terminal, tmp_path):
    """As where a connection breaks: the run trains on, saves its model, and ends as any other."""
    process, ours, theirs = in_terminal(max_steps=200, logging_steps=10)
    read_until(process, ours, b"loss ", b" left")
    assert process.poll() is None
    os.close(theirs)
    os.close(ours)
    assert process.wait(300) == 0
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["status"], state["global_step"]) == ("complete", 200)
    assert (tmp_path / "run" / "model.safetensors").exists()
