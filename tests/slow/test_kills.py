"""A small sample of the kill harness, with every kind of kill: the whole of it is in docs/kills.md."""

import os
import subprocess
import sys

from conftest import ROOT


def test_six_kills_lose_nothing(tmp_path):
    page = tmp_path / "kills.md"
    command = [sys.executable, "tests/slow/kill_harness.py", "--kills", "6", "--only", "one", "ddp"]
    command += ["--out", str(page), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + page.read_text()
    for kind in ("start-up", "preparing", "training", "mid-save", "final save"):
        assert f"| {kind} |" in page.read_text()
