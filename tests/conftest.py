"""Fixtures: a tiny model and real text, made on the spot. Nothing here reaches a hub."""

import csv
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
)
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
SHARES = (0.35, 0.25, 0.2, 0.15, 0.05)  # of the five sources

import pytest  # noqa: E402
from make_docstrings import docstrings as all_docstrings  # noqa: E402
from make_docstrings import write_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Prepared data of the tests stays out of the user's cache."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets-cache")
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # for processes that tests launch
    return cache


@pytest.fixture(autouse=True)
def no_stale_log_handler():
    """A run logs to the stderr it found; the next test has another."""
    yield
    logging.getLogger("open_r1").handlers.clear()


@pytest.fixture(scope="session")
def pairs():
    """600 (question, docstring) pairs of the standard library."""
    return list(itertools.islice(all_docstrings(), 600))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, pairs):
    """Path of a Qwen3 with about 30,000 parameters, without a chat template; ChatML tokens are in its vocabulary."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_model(path, itertools.chain.from_iterable(pairs), vocabulary=600, hidden=32, layers=2)
    return str(path)


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def conversations(pairs):
    """The pairs as conversations."""
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text[:400]}]}
        for question, text in pairs
    ]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory, conversations):
    """Path of the conversations as JSONL."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", conversations)


def tools_of(number):
    """A tool whose schema is another one in every third row."""
    fields = {0: {"a": {"type": "integer"}}, 1: {"text": {"type": "string", "enum": ["x"]}}, 2: {}}[number % 3]
    parameters = {"type": "object", "properties": fields}
    return [{"type": "function", "function": {"name": f"f{number % 3}", "parameters": parameters}}]


@pytest.fixture(scope="session")
def five(tmp_path_factory, pairs):
    """Sources: instruction CSV, ShareGPT JSONL, messages in parquet with tools, prompt/completion JSON, plain text."""
    folder = tmp_path_factory.mktemp("five")
    with (folder / "alpaca.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows(
            [question, "briefly" if n % 2 else "", text] for n, (question, text) in enumerate(pairs[:150])
        )
    shared = [
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": q},
                {"from": "gpt", "value": a},
            ]
        }
        for q, a in pairs[150:300]
    ]
    write_jsonl(folder / "sharegpt.jsonl", shared)
    called = [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
            "tools": tools_of(n),
        }
        for n, (q, a) in enumerate(pairs[300:400])
    ]
    from datasets import Dataset

    Dataset.from_list(called).to_parquet(folder / "tools.parquet")
    (folder / "completions.json").write_text(
        json.dumps([{"prompt": f"{q}\n", "completion": a} for q, a in pairs[400:500]])
    )
    write_jsonl(folder / "plain.jsonl", [{"text": a} for _, a in pairs[500:]])
    names = ("alpaca.csv", "sharegpt.jsonl", "tools.parquet", "completions.json", "plain.jsonl")
    return [{"id": str(folder / name), "name": name.partition(".")[0]} for name in names]


@pytest.fixture(scope="session")
def docstrings(tmp_path_factory):
    """The docstring recipe's own model and data, all rows."""
    out = tmp_path_factory.mktemp("docstrings")
    subprocess.run([sys.executable, "scripts/make_docstrings.py", str(out)], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Slurm with two nodes; gives the environment that finds it."""
    script, folder = ROOT / "tests/slow/slurm_cluster.sh", tmp_path_factory.mktemp("cluster")
    up = subprocess.run(["bash", script, "up", folder, "2"], capture_output=True, text=True)
    if up.returncode == 3:
        pytest.skip(up.stderr.strip())
    try:
        assert up.returncode == 0, up.stderr
        with socket.socket() as free:  # not that of a job of the same number in another cluster here
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield {"SLURM_CONF": folder / "slurm.conf", "MASTER_PORT": port}
    finally:
        subprocess.run(["bash", script, "down", folder], check=True)


@pytest.fixture
def stop_at(monkeypatch):
    """Make a run die behind the save of a step."""
    from transformers.trainer_callback import CallbackHandler

    on_step_begin = CallbackHandler.on_step_begin

    def arm(step):
        def die(self, args, state, control):
            if state.global_step == step:
                raise KeyboardInterrupt
            return on_step_begin(self, args, state, control)

        monkeypatch.setattr(CallbackHandler, "on_step_begin", die if step else on_step_begin)

    return arm


def write_jsonl(path, rows):
    """Write rows as JSON lines; returns the path as text."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(**values):
    """Command line of settings: short CPU training, overridden by `values`; None leaves a key out."""
    quick = {
        "use_cpu": True,
        "max_steps": 2,
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    argv = []
    for key, value in {**quick, **values}.items():
        if value is not None:
            argv += (
                [f"--{key}", *map(str, value)]
                if isinstance(value, (list, tuple))
                else [
                    f"--{key}",
                    json.dumps(value) if isinstance(value, dict) else str(value),
                ]
            )
    return argv


def losses(output_dir, key="loss"):
    """The logged losses of a run."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]
