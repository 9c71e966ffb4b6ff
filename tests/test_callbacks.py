"""Pushing checkpoints to branches, against a stand-in of the hub's client."""

from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerControl, TrainerState

from open_r1.callbacks import PushToHubRevision, get_callbacks, ready_branch
from open_r1.configs import SFTConfig
from open_r1.errors import UserError


class Hub:
    """What `HfApi` does here: repositories as {branch: [files]}."""

    def __init__(self, branches=(), private=None):
        self.branches, self.private = dict(branches), private
        self.uploads = []

    def create_repo(self, name, private=None, exist_ok=False):
        self.private = private if self.private is None else self.private
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def list_repo_refs(self, repo):
        return SimpleNamespace(branches=[SimpleNamespace(name=name) for name in self.branches])

    def list_repo_files(self, repo, revision):
        return self.branches[revision]

    def create_branch(self, repo, branch, exist_ok):
        self.branches.setdefault(branch, [".gitattributes"])

    def upload_folder(self, **kwargs):
        self.uploads.append(kwargs)


def arguments(tmp_path, **values):
    return SFTConfig(output_dir=str(tmp_path), use_cpu=True, hub_model_id="m", **values)


def save(hub, args, step=100, main=True):
    state = TrainerState(global_step=step, is_world_process_zero=main)
    PushToHubRevision(hub).on_save(args, state, TrainerControl())


def test_a_checkpoint_goes_to_its_own_branch_without_what_stays_at_home(tmp_path):
    hub = Hub()
    save(hub, arguments(tmp_path, hub_model_revision="v1"))
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/m"
    assert upload["revision"] == "v1-step-000000100"
    assert upload["folder_path"].endswith("checkpoint-100")
    files = ["model-00001-of-00002.safetensors", "config.json", "optimizer.pt", "training_args.bin", "rng_state.pth"]
    pushed = list(filter_repo_objects(files, allow_patterns=upload["allow_patterns"]))
    assert pushed == ["model-00001-of-00002.safetensors", "config.json"]
    assert hub.private is True


def test_what_is_pushed_is_private_unless_the_recipe_says_otherwise(tmp_path, caplog):
    public = Hub(private=False)
    save(public, arguments(tmp_path))
    assert public.uploads == []
    assert "me/m is public: make it private, or set hub_private_repo: false" in caplog.text
    with pytest.raises(UserError, match="me/m is public"):
        ready_branch(arguments(tmp_path, push_to_hub=True), public)
    save(public, arguments(tmp_path, hub_private_repo=False))
    assert len(public.uploads) == 1
    new = Hub()
    save(new, arguments(tmp_path, hub_private_repo=False))
    assert (new.private, len(new.uploads)) == (False, 1)


def test_only_the_main_process_pushes(tmp_path):
    hub = Hub()
    save(hub, arguments(tmp_path), main=False)
    assert hub.uploads == []


def test_a_failed_push_is_reported_and_training_goes_on(tmp_path, caplog):
    hub = Hub()
    hub.upload_folder = lambda **_: (_ for _ in ()).throw(ConnectionError("no hub"))
    save(hub, arguments(tmp_path))
    assert "was not pushed to main-step-000000100; training goes on" in caplog.text
    assert "no hub" in caplog.text


def test_a_branch_with_files_is_not_overwritten_unless_told(tmp_path, caplog):
    taken = {"main-step-000000100": [".gitattributes", "model.safetensors"]}
    hub = Hub(taken)
    save(hub, arguments(tmp_path))
    assert hub.uploads == []
    assert "set overwrite_hub_revision: true" in caplog.text
    save(hub, arguments(tmp_path, overwrite_hub_revision=True))
    assert len(hub.uploads) == 1


def test_the_final_branch_is_checked_before_training(tmp_path):
    hub = Hub({"v1": ["model.safetensors"]})
    ready_branch(arguments(tmp_path, hub_model_revision="v1"), hub)  # nothing is pushed: nothing to check
    with pytest.raises(UserError, match="me/m has files on branch v1 already"):
        ready_branch(arguments(tmp_path, hub_model_revision="v1", push_to_hub_revision=True), hub)
    ready_branch(arguments(tmp_path, hub_model_revision="v1", push_to_hub_revision=True), hub, resuming=True)
    ready_branch(arguments(tmp_path, hub_model_revision="v2", push_to_hub=True), hub)
    assert "v2" in hub.branches


def test_callbacks_by_name(tmp_path):
    assert get_callbacks(arguments(tmp_path)) == []
    assert isinstance(get_callbacks(arguments(tmp_path, callbacks=["push_to_hub_revision"]))[0], PushToHubRevision)
    with pytest.raises(UserError, match="push_to_hub_revision needs hub_model_id"):
        get_callbacks(SFTConfig(output_dir=str(tmp_path), use_cpu=True, callbacks=["push_to_hub_revision"]))
