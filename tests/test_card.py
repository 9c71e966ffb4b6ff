"""The manifest holds what a run was, and the model card says it; neither holds what is secret."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import SHARES, losses, settings

from open_r1.sft import main


@pytest.fixture(scope="module")
def run(tiny_model, five, tmp_path_factory):
    """A run on a mixture of five sources, with evaluation and a token in the environment."""
    out = tmp_path_factory.mktemp("card") / "run"
    sources = [{**source, "proportion": share} for source, share in zip(five, SHARES, strict=True)]
    argv = settings(
        model_name_or_path=tiny_model,
        dataset_mixture={"datasets": sources, "test_split_size": 20},
        eval_strategy="epoch",
        output_dir=out,
        max_steps=3,
        learning_rate=2e-3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_canarycanarycanarycanarycanary0123")
        patch.setenv("WANDB_API_KEY", "canary0123456789")
        assert main(argv) == 0
    return out


def test_the_manifest_says_what_was_run(run, five):
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["recipe"]["learning_rate"] == {"value": 2e-3, "from": "command line"}
    assert manifest["versions"]["torch"] == version("torch")
    assert len(manifest["code"]["commit"]) == 40 and isinstance(manifest["code"]["changed"], bool)
    assert manifest["hardware"]["processes"] == 1
    ledger = json.loads((run / "ledger.json").read_text())
    for part in ("train", "eval"):
        said, counted = manifest["data"][part], ledger[part]["sources"]
        assert [source["supervised"] for source in said] == [source["supervised"] for source in counted]
        for source, named in zip(said, five, strict=True):
            digest = hashlib.sha256(Path(named["id"]).read_bytes()).hexdigest()
            assert source["contents"] == {named["id"]: digest}
    assert manifest["order"] == hashlib.sha256((run / "order.jsonl").read_bytes()).hexdigest()
    assert manifest["settings"]["global_batch_size"] == 2
    results = manifest["results"]
    assert (results["steps"], results["train_loss"]) == (3, losses(run)[-1])
    assert results["eval_loss"] == losses(run, "eval_loss")[-1]
    assert results["tokens"] > 0 and results["tokens_per_second"] == pytest.approx(
        results["tokens"] / results["seconds"], rel=0.2
    )


def test_the_card_says_it_to_people(run, tiny_model):
    text = (run / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "transformers" and "open-r1" in about["tags"]
    assert "base_model" not in about and "datasets" not in about  # they are on this disk, not on the hub
    manifest = json.loads((run / "manifest.json").read_text())
    for source in manifest["data"]["train"]:
        assert (
            f"| {source['source']} | {source['trained']:,} | {source['tokens']:,} | {source['supervised']:,} |" in body
        )
    assert f"- train loss: {manifest['results']['train_loss']}" in body
    assert f"- eval loss: {manifest['results']['eval_loss']}" in body
    assert "- learning_rate: 0.002" in body and f"- torch: {version('torch')}" in body


def test_no_secret_is_written(run):
    for path in run.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path


def test_equal_runs_have_equal_manifests(tiny_model, chat_file, tmp_path):
    kept = []
    for name in ("one", "two"):
        argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / name, max_steps=3)
        assert main(argv) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["recipe"].pop("output_dir")
        kept.append([manifest[part] for part in ("recipe", "versions", "hardware", "data", "order", "settings")])
    assert kept[0] == kept[1]
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
