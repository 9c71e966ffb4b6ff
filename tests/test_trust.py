"""What SECURITY.md promises: nothing that is read runs code, nothing secret is kept, nothing else leaves the machine.

Whatever would run code makes a directory, `marker`, which must not appear; beside it stands that the same thing does
appear where code is let in, so that each test can fail.
"""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, settings, write_jsonl
from huggingface_hub.utils import filter_repo_objects

from open_r1.errors import UserError
from open_r1.handover import load
from open_r1.model import require_safetensors
from open_r1.recipe import load_recipe
from open_r1.schema import SCHEMA
from open_r1.sft import main
from open_r1.tables import load_table

HF = "hf_" + "aB3dE5gH7j" * 4  # made up, like all below
OPENAI = "sk-proj-" + "aB3dE5gH7j" * 4
WANDB = "0123456789abcdef" * 2 + "76543210"
CANARIES = {
    "HF_TOKEN": HF,
    "HUGGING_FACE_HUB_TOKEN": HF.replace("aB3", "zY9"),
    "WANDB_API_KEY": WANDB,
    "OPENAI_API_KEY": OPENAI,
    "AWS_SECRET_ACCESS_KEY": "Zz9" + "yX8wV7uT6s" * 3,
}
# Variables that a recipe must not set, and files that must not be uploaded.
NOT_SET = """
    PATH LD_PRELOAD LD_LIBRARY_PATH PYTHONPATH PYTHONSTARTUP PYTHONHOME BASH_ENV CUDA_HOME HF_HOME HF_ENDPOINT HF_TOKEN
    HF_DATASETS_CACHE TRANSFORMERS_CACHE WANDB_API_KEY WANDB_BASE_URL WANDB_DIR WANDB_LOG_MODEL HTTPS_PROXY
    TENSORBOARD_LOGGING_DIR MLFLOW_TRACKING_URI NCCL_DEBUG_FILE NCCL_NET_PLUGIN
"""
STAYS = """
    training_args.bin optimizer.pt scheduler.pt rng_state_0.pth pytorch_model.bin adapter_model.bin trainer_state.json
    rejected.jsonl order.jsonl run_state.json recipe.yaml ledger.json all_results.json .env id_rsa runs/events.out
    checkpoint-2/model.safetensors global_step2/mp_rank_00_model_states.pt pytorch_model_fsdp_0/.metadata
    wandb/config.json
"""


class MakesMarker:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def evil(marker):
    """Bytes of a pickle that makes the marker."""
    data = pickle.dumps(MakesMarker(marker))
    pickle.loads(data)  # noqa: S301
    marker.rmdir()
    return data


@pytest.fixture
def copy(tiny_model, tmp_path):
    """Makes a copy of the tiny model."""

    def copy(name="copy", without=()):
        path = tmp_path / name
        shutil.copytree(tiny_model, path)
        for each in without:
            (path / each).unlink()
        return path

    return copy


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """A LoRA adapter of the tiny model, as a run saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


def edit(path, **values):
    """Set values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestWeights:
    """Safetensors only."""

    REFUSED = r"these weights are a pickle, which can run code .* convert it"

    @pytest.fixture
    def pickled(self, copy, evil):
        path = copy("pickled", without=["model.safetensors"])
        (path / "pytorch_model.bin").write_bytes(evil)
        return path

    @pytest.fixture
    def pickled_adapter(self, adapter, evil):
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / "adapter_model.bin").write_bytes(evil)
        return adapter

    def test_a_run_refuses_a_model_of_pickles(self, pickled, chat_file, tmp_path, marker, capsys):
        argv = settings(model_name_or_path=pickled, dataset_name=chat_file, output_dir=tmp_path / "run")
        assert main(argv) == 2
        assert re.search(rf"pickled/pytorch_model\.bin: {self.REFUSED}", capsys.readouterr().err)
        assert not marker.exists() and not (tmp_path / "run").exists()

    def test_a_run_refuses_an_adapter_of_pickles(self, pickled_adapter, chat_file, tmp_path, marker, capsys):
        argv = settings(model_name_or_path=pickled_adapter, dataset_name=chat_file, output_dir=tmp_path / "run")
        assert main([*argv, "--use_peft"]) == 2
        assert re.search(rf"adapter/adapter_model\.bin: {self.REFUSED}", capsys.readouterr().err)
        assert not marker.exists()

    def test_scripts_refuse_them(self, pickled, pickled_adapter, tmp_path, marker, capsys):
        import chat
        import merge
        import verify

        for name, path in (("pytorch_model", pickled), ("adapter_model", pickled_adapter)):
            assert chat.main([str(path)]) == 2
            assert re.search(rf"{name}\.bin: {self.REFUSED}", capsys.readouterr().err)
            assert verify.main([str(path), "--prompt", "Hi"]) == 1
            assert re.search(rf"no {name.removeprefix('pytorch_')}\.safetensors; it has {name}\.bin", all_of(capsys))
        assert merge.main([str(pickled_adapter), str(tmp_path / "merged")]) == 2
        assert re.search(rf"adapter_model\.bin: {self.REFUSED}", capsys.readouterr().err)
        assert not marker.exists()

    def test_a_base_of_pickles_is_refused_under_an_adapter(self, adapter, pickled, tmp_path, marker, capsys):
        import merge

        edit(adapter / "adapter_config.json", base_model_name_or_path=str(pickled))
        with pytest.raises(UserError, match=rf"pytorch_model\.bin: {self.REFUSED}"):
            load(adapter)
        assert merge.main([str(adapter), str(tmp_path / "merged")]) == 2
        assert not marker.exists()

    def test_where_both_are_there_safetensors_are_read(self, copy, adapter, evil, marker):
        path = copy()
        (path / "pytorch_model.bin").write_bytes(evil)
        (adapter / "adapter_model.bin").write_bytes(evil)
        for each in (path, adapter):
            load(each)
        assert not marker.exists()

    def test_a_repository_of_pickles_is_refused(self, pickled, tmp_path, monkeypatch, marker):
        held = tmp_path / "hub" / "models--me--pickled"
        shutil.copytree(pickled, held / "snapshots" / ("0" * 40))
        (held / "refs").mkdir()
        (held / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(UserError, match="me/pickled: the model cannot be loaded: .*safetensors"):
            load("me/pickled")
        assert not marker.exists()

    def test_every_model_is_loaded_from_safetensors_alone(self):
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
            text = path.read_text()
            for call in re.findall(r"AutoModelForCausalLM\.from_pretrained\((?:[^()]|\([^()]*\))*\)", text):
                assert "use_safetensors=True" in call or "**kwargs" in call, (path.name, call)
            assert not re.search(r"torch\.load\(|pickle\.load|AutoPeftModel", text), path.name

    def test_the_recipe_cannot_turn_it_off(self, tmp_path):
        assert "model_init_kwargs.use_safetensors cannot be set" in refusal("model_init_kwargs: {use_safetensors: no}")
        assert "model_init_kwargs.adapter_kwargs cannot be set" in refusal("model_init_kwargs: {adapter_kwargs: {}}")

    def test_shards_count_and_training_arguments_do_not(self, tmp_path):
        (tmp_path / "training_args.bin").write_bytes(b"")
        require_safetensors(tmp_path)
        (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
        with pytest.raises(UserError, match="pytorch_model-00001-of-00002.bin"):
            require_safetensors(tmp_path)
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
        require_safetensors(tmp_path)

    def test_only_lora_adapters_are_read(self, adapter):
        edit(adapter / "adapter_config.json", peft_type="XLORA", adapters={"0": "elsewhere"})
        with pytest.raises(UserError, match="peft_type is XLORA; only LoRA adapters are read here"):
            load(adapter)


class TestRemoteCode:
    """Code of a model runs where the recipe says so, and that of no other model."""

    @pytest.fixture
    def coded(self, copy, marker):
        """Gives a copy of the tiny model code of its own for config, model, tokenizer and generation."""

        def coded(name, **config):
            path = copy(name)
            make = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
            kinds = "from transformers import Qwen3Config as C, Qwen3ForCausalLM as M, Qwen2TokenizerFast as T\n"
            (path / "modeling_own.py").write_text(make + kinds + "class M2(M): pass\nclass C2(C): pass\n")
            (path / "custom_generate").mkdir()
            (path / "custom_generate" / "generate.py").write_text(make + "def generate(*args, **kwargs): pass\n")
            auto = {"AutoConfig": "modeling_own.C2", "AutoModelForCausalLM": "modeling_own.M2"}
            edit(path / "config.json", auto_map=auto, **config)
            edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_own.T"]})
            return path

        return coded

    def run(self, model, chat_file, tmp_path, *more):
        argv = settings(model_name_or_path=model, dataset_name=chat_file, output_dir=tmp_path / "run", max_steps=1)
        return main([*argv, *more])

    def test_a_model_that_needs_it_is_refused_unasked(self, coded, chat_file, tmp_path, marker, capsys):
        assert self.run(coded("coded", model_type="own"), chat_file, tmp_path) == 2
        assert (
            "coded comes with code of its own, which runs with trust_remote_code: true alone"
            in capsys.readouterr().err
        )
        assert not marker.exists()

    def test_a_model_that_does_not_need_it_is_trained_without(self, coded, chat_file, tmp_path, marker):
        assert self.run(coded("coded"), chat_file, tmp_path) == 0
        assert not marker.exists()

    def test_it_runs_where_the_recipe_says_so(self, coded, chat_file, tmp_path, marker):
        self.run(coded("coded"), chat_file, tmp_path, "--trust_remote_code", "true", "--dry_run")
        assert marker.exists()

    def test_that_of_the_model_whose_template_is_taken_never_runs(
        self, coded, copy, chat_file, tmp_path, marker, capsys
    ):
        source = coded("source", model_type="own")
        argv = ("--trust_remote_code", "true", "--chat_template", str(source), "--dry_run")
        assert self.run(copy("plain"), chat_file, tmp_path, *argv) == 2
        assert "chat_template: " in capsys.readouterr().err
        assert not marker.exists()

    def test_saved_models_are_checked_and_loaded_without_it(self, coded, marker, capsys):
        import chat
        import verify

        path = coded("coded", model_type="own")
        assert verify.main([str(path), "--prompt", "Hi"]) == 2
        assert chat.main([str(path)]) == 2
        assert not marker.exists()

    def test_there_is_no_way_around_it(self):
        for name in ("trust_remote_code", "code_revision", "allow_all_kernels"):
            assert f"model_init_kwargs.{name} cannot be set" in refusal(f"model_init_kwargs: {{{name}: true}}")
        assert SCHEMA["properties"]["trust_remote_code"]["default"] is False


class TestRecipes:
    """A recipe holds plain values and templates, of which neither runs anything."""

    TAGS = {
        "run_name: !!python/object/apply:os.mkdir [MARKER]": "run_name: !!python/object/apply:os.mkdir builds an",
        "run_name: !!python/object/new:os.mkdir\n  args: [MARKER]": "r.yaml:3: run_name: !!python/object/new:os.mkdir",
        "run_name: !!python/name:os.system": "r.yaml:3: run_name: could not determine a constructor for the tag",
        "? !!python/name:os.system\n: 1": "r.yaml: a key is a word: could not determine a constructor",
        "lora_target_modules: !!set {a, b}": "r.yaml:3: lora_target_modules: !!set builds an object",
    }

    @pytest.mark.parametrize(("text", "said"), TAGS.items())
    def test_yaml_builds_no_objects(self, tmp_path, marker, text, said):
        assert said in refusal(text.replace("MARKER", str(marker)), tmp_path)
        assert not marker.exists()

    def test_nor_does_the_file_as_a_whole_or_a_value_of_the_command_line(self, tmp_path, marker):
        (tmp_path / "r.yaml").write_text(f"!!python/object/apply:os.mkdir\nargs: [{marker}]\n")
        with pytest.raises(UserError, match="a recipe is a YAML mapping of settings"):
            load_recipe(["--config", str(tmp_path / "r.yaml")])
        with pytest.raises(UserError, match="dataset_mapping is object or null; found '!!python"):
            load_recipe(["--dataset_mapping", f"!!python/object/apply:os.mkdir [{marker}]"])
        assert not marker.exists()

    BREAKOUT = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}"

    @pytest.mark.parametrize("where", ["recipe", "file", "tokenizer", "row"])
    def test_templates_cannot_leave_the_sandbox(self, copy, chat_file, tmp_path, marker, capsys, where):
        from open_r1.chat import CHATML

        model, breakout = copy(), self.BREAKOUT.replace("MARKER", str(marker))
        breakout = "{% if messages|length > 2 or messages[0].content|length > 9 %}" * (where == "row") + breakout
        template = CHATML + breakout + "{% endif %}" * (where == "row")
        argv = settings(model_name_or_path=model, dataset_name=chat_file, output_dir=tmp_path / "run")
        if where == "tokenizer":
            (model / "chat_template.jinja").write_text(template)
        elif where == "file":
            (tmp_path / "t.jinja").write_text(template)
            argv += ["--chat_template", str(tmp_path / "t.jinja")]
        else:
            argv += ["--chat_template", template]
        assert main(argv) == 2
        assert "access to attribute '__class__' of 'str' object is unsafe" in capsys.readouterr().err
        assert not marker.exists() and not (tmp_path / "run").exists()

    @pytest.mark.parametrize("name", NOT_SET.split())
    def test_the_environment_is_set_by_a_list_of_names(self, name):
        assert f"env.{name} is not a setting" in refusal(f"env: {{{name}: evil}}")
        assert name not in SCHEMA["properties"]["env"]["properties"]

    def test_no_name_of_that_list_can_hold_a_path_or_an_address(self):
        names = SCHEMA["properties"]["env"]["properties"]
        assert not [name for name in names if re.search(r"DIR|PATH|HOME|CACHE|URL|URI|PROXY|KEY|PRELOAD|PLUGIN", name)]


class TestSecrets:
    """Tokens and passwords are in nothing that is kept or shown."""

    @pytest.mark.parametrize("name", CANARIES)
    def test_one_in_a_recipe_is_refused_and_not_shown(self, monkeypatch, tmp_path, name):
        """Also where it looks like any other word and only the environment says what it is."""
        secret = CANARIES[name]
        monkeypatch.setenv(name, secret)
        for text in (
            f"run_name: my {secret}",
            f"max_steps: {secret}",
            f"{secret}: 1",
            f"env: {{{name}: {secret}}}",
            f"dataset_mixture: {{datasets: [{{id: a, columns: [{secret}]}}]}}",
        ):
            said = refusal(text, tmp_path)
            assert said and secret not in said
        with pytest.raises(UserError) as error:
            load_recipe(["--run_name", secret, f"--{secret}", secret])
        assert "run_name holds a token or a password" in str(error.value)
        assert secret not in str(error.value)

    def test_a_run_writes_them_nowhere(self, tiny_model, conversations, tmp_path):
        """Train, be killed, go on, evaluate, save, fail to push, and crash, all at log level debug."""
        rows = [*conversations[:60], {"messages": [{"role": "user", "content": "without an answer"}]}]
        out, cache = tmp_path / "run", tmp_path / "cache"
        argv = settings(
            model_name_or_path=tiny_model,
            dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows),
            output_dir=out,
            max_steps=4,
            save_steps=2,
            on_bad_row="drop",
            test_split_size=5,
            eval_strategy="steps",
            eval_steps=2,
            log_level="debug",
            callbacks="push_to_hub_revision",
            hub_model_id="me/m",
        )
        environment = os.environ | CANARIES | {"HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(ROOT / "src")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1"}

        def start(*argv, stop_at=0):
            code = f"""
                import logging, sys
                from transformers.trainer_callback import CallbackHandler
                from open_r1 import sft
                begin = CallbackHandler.on_step_begin
                def step(self, args, state, control):
                    if state.global_step == {stop_at or -1}:
                        raise KeyboardInterrupt
                    return begin(self, args, state, control)
                CallbackHandler.on_step_begin = step
                logging.basicConfig(level=logging.DEBUG)
                sys.exit(sft.main())
            """
            run = [sys.executable, "-c", textwrap.dedent(code), *argv]
            done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True)
            return done.returncode, done.stdout + done.stderr

        killed, first = start(*argv, stop_at=3)
        resumed, second = start(*argv)
        crashed, third = start(*argv, "--output_dir", f"{out}-2", "--optim", "adafactor", "--optim_args", "nonsense")
        assert (killed != 0, resumed, crashed) == (True, 0, 1), (first + second + third).decode()[-3000:]
        assert b"KeyboardInterrupt" in first and b"DEBUG" in second and b"resuming from" in second
        assert b"was not pushed to main-step-000000004" in second and b"Traceback" in second and b"Traceback" in third
        names = {path.name for path in out.iterdir()}
        assert {"rejected.jsonl", "manifest.json", "README.md", "recipe.yaml", "checkpoint-4"} <= names
        held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert any(path.is_relative_to(cache) for path in held)
        held |= {"killed": first, "resumed": second, "crashed": third}
        for name, secret in CANARIES.items():
            for form in (secret.encode(), secret[8:].encode(), secret.encode("utf-16-le")):
                assert not [where for where, data in held.items() if form in data], name


class Hub:
    """What is made of `HfApi`, and the files that each upload takes."""

    def __init__(self, out=None):
        self.out, self.uploads, self.private, self.pickled = out, [], [], []

    def create_repo(self, name, private=None, **_):
        self.private.append(private)
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private[0])

    def create_branch(self, *_, **__):
        pass

    def list_repo_refs(self, _):
        return SimpleNamespace(branches=[])

    def upload_folder(self, folder_path, allow_patterns=None, ignore_patterns=None, **_):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        taken = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        beside = {path.name for path in self.out.iterdir()}
        self.uploads.append((Path(folder_path).name, set(taken), beside))


class TestUploads:
    """What serving needs, the card and the manifest leave the machine, into private repositories."""

    MODEL = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    MODEL |= {"chat_template.jinja"}
    ADAPTER = {"adapter_model.safetensors", "adapter_config.json", *MODEL} - {"model.safetensors", "config.json"}

    @pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
    def test_checkpoints_and_the_final_model(self, tiny_model, conversations, tmp_path, monkeypatch, use_peft):
        out = tmp_path / "run"
        hub = Hub(out)
        for name in ("open_r1.trainer.HfApi", "open_r1.callbacks.HfApi", "transformers.trainer.hf_api"):
            monkeypatch.setattr(name, lambda *_, **__: hub)
        rows = [*conversations[:40], {"messages": [{"role": "user", "content": "without an answer"}]}]
        argv = settings(
            model_name_or_path=tiny_model,
            dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows),
            output_dir=out,
            save_steps=1,
            on_bad_row="drop",
            push_to_hub=True,
            hub_strategy="every_save",
            hub_model_id="m",
            callbacks="push_to_hub_revision",
            use_peft=use_peft,
        )
        assert main(argv) == 0
        model = self.ADAPTER if use_peft else self.MODEL
        both = ["checkpoint-1"] * 2 + ["checkpoint-2"] * 2
        assert [folder for folder, _, _ in hub.uploads] == [*both, "run"]  # by trainer and callback, and at the end
        for folder, files, beside in hub.uploads:
            more = {"README.md", "manifest.json"} if folder == "run" else set()
            # PEFT writes a card into a checkpoint, and no generation config.
            may, must = ({"README.md"}, model - {"generation_config.json"}) if use_peft else (set(), model)
            assert must | more <= files <= model | more | may
            if folder != "run":
                assert not beside & {"model.safetensors", "adapter_model.safetensors", "training_args.bin"}
        assert {"training_args.bin", "rejected.jsonl", "order.jsonl", "ledger.json"} <= {p.name for p in out.iterdir()}
        assert set(hub.private) == {True}

    def test_a_failed_upload_does_not_stop_training(self, tiny_model, chat_file, tmp_path, monkeypatch, caplog):
        hub = Hub(tmp_path / "run")
        for name in ("open_r1.trainer.HfApi", "open_r1.callbacks.HfApi", "transformers.trainer.hf_api"):
            monkeypatch.setattr(name, lambda *_, **__: hub)
        hub.upload_folder = lambda **_: (_ for _ in ()).throw(ConnectionError("no hub"))
        argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir=tmp_path / "run")
        assert main([*argv, "--push_to_hub", "--hub_model_id", "m", "--save_steps", "1"]) == 1
        assert "checkpoint-1 was not pushed to me/m; training goes on" in caplog.text
        assert (tmp_path / "run" / "model.safetensors").exists()

    def test_nothing_else_is_on_the_list(self):
        from open_r1.callbacks import PUSHED

        assert list(filter_repo_objects(STAYS.split(), allow_patterns=PUSHED)) == []

    def test_strategies_that_upload_state_are_refused(self):
        for strategy in ("checkpoint", "all_checkpoints"):
            assert f"{strategy} would upload the optimizer's state" in refusal(f"hub_strategy: {strategy}")


class TestPaths:
    """A recipe writes into output_dir."""

    @pytest.mark.parametrize(
        ("text", "config"),
        [
            ("deepspeed: {tensorboard: {enabled: true, output_path: /tmp/x}}", "zero3"),
            ("deepspeed: eyJ6ZXJvX29wdGltaXphdGlvbiI6IHt9fQ==", "zero3"),  # DeepSpeed takes it for one in base64
            ("fsdp: full_shard", "fsdp2"),
            ("fsdp_config: {version: 2}", "fsdp2"),
        ],
    )
    def test_what_deepspeed_and_fsdp_do_is_not_the_recipe_s_to_say(self, text, config):
        found = refusal(text)
        assert f"{text.partition(':')[0]}: how a run is spread over devices is said in the launch config" in found
        assert f"recipes/accelerate_configs/{config}.yaml" in found

    @pytest.mark.parametrize("name", ["tp_plan", "tp_size", "distributed_config"])
    def test_nor_how_processes_share_rows(self, name):
        assert f"model_init_kwargs.{name} cannot be set" in refusal(f"model_init_kwargs: {{{name}: auto}}")

    @pytest.mark.parametrize("name", ["cache_dir", "offload_folder"])
    def test_nor_can_what_loads_the_model(self, name):
        assert f"model_init_kwargs.{name} cannot be set" in refusal(f"model_init_kwargs: {{{name}: /tmp/x}}")

    def test_no_other_setting_is_the_name_of_a_place_that_is_written(self):
        named = {
            key
            for key in SCHEMA["properties"]
            if re.search(r"(^|_)(dir|path|file|folder|files)($|_)", key) and not key.startswith("dataset_")
        }
        assert named == {"output_dir", "model_name_or_path", "chat_template_path"}

    def test_a_run_writes_into_output_dir_and_the_cache(self, tiny_model, chat_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = ["--run_name", "../../evil", "--project", "../evil", "--wandb_project", "../evil"]
        argv = settings(model_name_or_path=tiny_model, dataset_name=chat_file, output_dir="run", max_steps=1)
        assert main([*argv, *name]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class TestDatasets:
    """Data are read, never run."""

    def test_a_script_in_a_dataset_does_not_run(self, tmp_path, marker, conversations):
        folder = tmp_path / "data"
        folder.mkdir()
        code = f"import os, datasets\nos.mkdir({str(marker)!r})\nclass D(datasets.GeneratorBasedBuilder): pass\n"
        for name in ("data.py", "conftest.py", "__init__.py", "sitecustomize.py"):
            (folder / name).write_text(code)
        with pytest.raises(UserError):
            load_table(str(folder), None, "train")
        with pytest.raises(UserError, match="unknown kind of data file"):
            load_table(str(folder / "data.py"), None, "train")
        write_jsonl(folder / "train.jsonl", conversations[:3])
        with pytest.raises(UserError, match="Dataset scripts are no longer supported, but found data.py"):
            load_table(str(folder), None, "train")
        (folder / "data.py").rename(folder / "loader.py")
        assert len(load_table(str(folder), None, "train").rows) == 3
        assert not marker.exists()

    def test_pickles_are_no_data(self, tmp_path, marker, evil):
        (tmp_path / "rows.pkl").write_bytes(evil)
        for name, files in (("pandas", ["rows.pkl"]), ("rows.pkl", None), ("generator", ["rows.pkl"])):
            with pytest.raises(UserError):
                load_table(
                    str(tmp_path / name) if name.endswith("pkl") else name,
                    None,
                    "train",
                    files and [str(tmp_path / file) for file in files],
                )
        assert not marker.exists()

    @pytest.mark.parametrize("suffix", ["pickle", "pyd", "pkl", "npy", "npz", "pth"])
    def test_pickles_in_an_archive_stay_bytes_or_are_refused(self, tmp_path, marker, evil, suffix):
        array, members = np.empty(1, dtype=object), {}
        array[0] = MakesMarker(marker)
        for kind, save in (("npy", np.save), ("npz", np.savez)):
            save(stream := io.BytesIO(), array)
            members[kind] = stream.getvalue()
        torch.save(MakesMarker(marker), stream := io.BytesIO())
        members["pth"] = stream.getvalue()
        folder = tmp_path / "data"
        folder.mkdir()
        with tarfile.open(folder / "train.tar", "w") as tar:
            for number in range(2):
                for name, data in (("txt", b"text"), (suffix, members.get(suffix, evil))):
                    entry = tarfile.TarInfo(f"{number}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        try:
            rows = load_table(str(folder), None, "train").rows
        except UserError as error:
            assert suffix in ("npy", "npz", "pth"), error
        else:
            assert rows[0]["txt"] == "text" and isinstance(rows[0][suffix], bytes)
        assert not marker.exists()

    def test_what_save_to_disk_wrote_names_no_code(self, tmp_path, marker):
        from datasets import Dataset

        path = tmp_path / "saved"
        Dataset.from_list([{"text": "a"}]).save_to_disk(path)
        edit(path / "dataset_info.json", features={"text": {"_type": "os.mkdir", "path": str(marker)}})
        with pytest.raises(UserError, match="saved:train: cannot be loaded"):
            load_table(str(path), None, "train")
        assert not marker.exists()


def test_every_line_of_the_promise_names_tests_that_are_there():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert {name for _, name in named if name} >= {name for name in globals() if name.startswith("Test")}
    for file, name in named:
        assert f"class {name}" in (ROOT / file).read_text() or f"def {name}" in (ROOT / file).read_text()


def refusal(text, tmp_path=None):
    """What is said of a recipe that holds these lines beside a model and a dataset."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(tmp_path or folder) / "r.yaml"
        data = "" if "dataset_mixture" in text else "dataset_name: d"
        path.write_text(f"model_name_or_path: m\n{data}\n{text}\n")
        try:
            load_recipe(["--config", str(path)])
        except UserError as error:
            return str(error).replace(f"{path.parent}/", "")
    return ""


def all_of(capsys):
    """What was printed, on one line."""
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())
