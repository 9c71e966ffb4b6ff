"""Recipe file + command line -> values for the three configs, each with where it came from.

Everything is checked against `schema.json`, so that `--help` and every mistake in a recipe come in a fraction of a
second: this module imports neither torch nor TRL. All mistakes of a recipe are reported at once.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from open_r1.errors import UserError
from open_r1.old_names import CLI, COLUMN_KEYS, GONE, RENAMED, modernise
from open_r1.schema import SCHEMA, Place, choices, fit, kind, looks_secret, meant, show


@dataclass
class Recipe:
    """A checked recipe: `values[key]` for every key said, `origin[key]` where, `notes` on old names that were read."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, config: str) -> dict[str, Any]:
        """The values that belong to one config class, e.g. `SFTConfig`."""
        return {key: value for key, value in self.values.items() if SCHEMA["properties"][key]["x-config"] == config}


def load_recipe(argv: list[str]) -> Recipe:
    """Read `--config FILE` and the overrides after it. Raises `UserError`; prints help and exits on `--help`.

    `--show_recipe` prints the settings that this comes to, each with where it is from, and exits.
    """
    problems: list[str] = []
    config, given = parse_command_line(argv, problems)
    wanted = given.pop("show_recipe", False)
    values, origin = read_yaml(config, problems) if config else ({}, {})
    recipe = Recipe()
    for source, places in ((values, origin), (given, dict.fromkeys(given, CLI))):
        add_layer(recipe, source, places, problems)
    problems += contradictions(recipe)
    if problems:
        raise UserError("\n".join(problems))
    if wanted:
        print(written_out(recipe), end="")
        raise SystemExit(0)
    return recipe


def set_environment(recipe: Recipe) -> None:
    """Set what `env` says, before anything that reads it is imported. What the environment says already stays."""
    for name, value in (recipe.values.get("env") or {}).items():
        if os.environ.setdefault(name, value) != value:
            recipe.notes.append(
                f"{recipe.origin['env']}: env.{name}: the environment says {os.environ[name]}, which holds"
            )


def written_out(recipe: Recipe) -> str:
    """The settings of a recipe as YAML, each with where it is from; what it leaves to defaults stands in comments.

    Read again, it is the same recipe.
    """
    lines = []
    for key, value in recipe.values.items():
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10**6).rstrip("\n")
        origin = f"# {recipe.origin.get(key, 'default')}"
        lines.append(f"{origin}\n{text}" if "\n" in text else f"{text}  {origin}")
    left = {key: spec.get("default") for key, spec in SCHEMA["properties"].items() if key not in recipe.values}
    lines += ["", "# Defaults", *(f"# {key}: {show(value)}" for key, value in left.items() if value is not None)]
    return "\n".join(lines) + "\n"


def add_layer(recipe: Recipe, values: dict[str, Any], places: dict[str, str], problems: list[str]) -> None:
    """Rename, check and lay one source of values (file, then command line) over what is there."""
    here = places.get("", CLI)
    for key, value in modernise(values, places, recipe.notes, problems).items():
        where = places.get(key, here)
        spec = SCHEMA["properties"].get(key)
        if spec is None:
            hint = meant(key, [*SCHEMA["properties"], *RENAMED]) or "; --help lists them all"
            problems.append(f"{where}: {key} is not a setting (found {show(value, key)}){hint}")
            continue
        recipe.values[key] = fit(value, spec, Place(key, where, places), problems)
        recipe.origin[key] = where


def parse_command_line(argv: list[str], problems: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Split argv into the recipe's path and the overrides, values still text. Abbreviations are refused.

    What is no setting is added to `problems`; raises `UserError` for what cannot be split.
    """
    parser = Parser(
        prog="sft.py",
        usage="sft.py --config RECIPE.yaml [--key value ...]",
        description="Supervised fine-tuning from a YAML recipe; any key can also be given here and then wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "--show_recipe", action="store_true", help="print all settings and where each is from, and exit"
    )
    groups = {
        name: parser.add_argument_group(name)
        for name in dict.fromkeys(s["x-config"] for s in SCHEMA["properties"].values())
    }
    for key, spec in SCHEMA["properties"].items():
        many = {"nargs": "+"} if "array" in spec["type"] else {}
        flag = {"nargs": "?", "const": "true"} if "boolean" in spec["type"] else {}
        default = spec.get("default")
        said = [f"one of {choices(spec)}"] if "enum" in spec else []
        said += [] if default is None else [f"default: {default}"]
        help_text = f"{spec.get('description', '')} {'(' + '; '.join(said) + ')' if said else ''}".replace("%", "%%")
        groups[spec["x-config"]].add_argument(f"--{key}", metavar=kind(spec), help=help_text, **many, **flag)
    for key in {**RENAMED, **COLUMN_KEYS, **GONE}:
        parser.add_argument(f"--{key}", help=argparse.SUPPRESS, nargs="?", const="true")
    known, unknown = parser.parse_known_args(argv)
    before = ""
    for word in unknown:
        key = word.partition("=")[0]
        if word.startswith("--"):
            hint = meant(key.removeprefix("--"), SCHEMA["properties"]) or "; --help lists them all"
            problems.append(f"{CLI}: {key} is not a setting{hint}")
        elif word.endswith((".yaml", ".yml")):
            problems.append(f"{CLI}: a recipe is given with --config; found {word}")
        elif not before.startswith("--"):
            problems.append(f"{CLI}: {show(word)} belongs to no setting")
        before = word
    given = vars(known)
    return given.pop("config", None), given


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{CLI}: {message}; --help lists all settings")


def read_yaml(path: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file as plain values, and `file:line` of each key path (`dataset_mixture.datasets.0.id`).

    Keys said twice are added to `problems`; raises `UserError` for a file that is no recipe.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this recipe: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a YAML mapping of settings (key: value); this file holds none")
    places = {"": path}
    try:
        values = plain_value(loader, root, "", path, places, problems)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) refers to itself; write the value out") from None
    return values, places


def plain_value(
    loader: yaml.SafeLoader, node: yaml.Node, at: str, path: str, places: dict[str, str], problems: list[str]
) -> Any:
    """Build a node's value, recording `file:line` of every key below `at` and reporting keys said twice."""
    inside = f"{at}." if at else ""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[f"{inside}{index}"] = f"{path}:{item.start_mark.line + 1}"
        return [
            plain_value(loader, item, f"{inside}{index}", path, places, problems)
            for index, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(f"{path}:{node.start_mark.line + 1}: {at}: {getattr(error, 'problem', None) or error}")
            return None
    values: dict[str, Any] = {}
    first_said: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{line}: a key is a word; found a {key.id}")
        if key.value in first_said:
            problems.append(f"{path}:{line}: {inside}{key.value} is said twice, first in line {first_said[key.value]}")
        first_said.setdefault(key.value, line)
    loader.flatten_mapping(node)
    for key, value in node.value:
        name = str(loader.construct_object(key, deep=True))
        places[f"{inside}{name}"] = f"{path}:{key.start_mark.line + 1}"
        values[name] = plain_value(loader, value, f"{inside}{name}", path, places, problems)
    return values


def texts_in(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value, with its key path."""
    if isinstance(value, str):
        yield key, value
    for name, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from texts_in(f"{key}.{name}", item)


def contradictions(recipe: Recipe) -> list[str]:
    """Settings that are each fine and cannot be meant together, or that are missing."""
    values, origin = recipe.values, recipe.origin
    found: list[str] = []
    name, mixture = values.get("dataset_name"), values.get("dataset_mixture")
    if name and mixture:
        found.append(
            f"{origin['dataset_mixture']}: dataset_name ({origin['dataset_name']}) is set too; keep one of them"
        )
    files = values.get("dataset_data_files")
    if files and mixture:
        found.append(
            f"{origin['dataset_data_files']}: each source of dataset_mixture has its own data_files; move them"
        )
    if not name and not mixture and not files:
        found.append("no dataset: set dataset_name (hub id, directory or file) or dataset_mixture")
    if not values.get("model_name_or_path"):
        found.append("no model: set model_name_or_path (hub id or directory)")
    if values.get("benchmarks"):
        found.append(
            f"{origin['benchmarks']}: benchmarks are not available yet; remove the key and evaluate the saved model"
        )
    for key, value in values.items():
        found += [
            f"{origin[key]}: {name} holds a token or a password, which would be saved with the run; take it out, and "
            "run `hf auth login` or set it in the environment (HF_TOKEN, WANDB_API_KEY)"
            for name, text in texts_in(key, value)
            if looks_secret(name, text)
        ]
    if values.get("dataset_streaming"):
        found.append(
            f"{origin['dataset_streaming']}: dataset_streaming cannot be resumed exactly and is not supported; "
            "leave it out, prepared data is memory-mapped and needs no memory either"
        )
    evaluated = values.get("do_eval") or values.get("eval_strategy", "no") != "no"
    if values.get("eval_dataset_name") and not evaluated:
        found.append(f"{origin['eval_dataset_name']}: nothing evaluates on it; set eval_strategy, or do_eval: true")
    if values.get("do_train") is False:
        found.append(f"{origin['do_train']}: do_train: false leaves nothing to do here; remove it")
    if values.get("ignore_bias_buffers"):
        found.append(f"{origin['ignore_bias_buffers']}: ignore_bias_buffers has no effect on supervised fine-tuning")
    inside = mixture.get("test_split_size") if isinstance(mixture, dict) else None
    if (values.get("test_split_size") or inside) and not evaluated:
        key = "dataset_mixture" if inside else "test_split_size"
        recipe.notes.append(
            f"{origin[key]}: test_split_size holds rows out that nothing evaluates on; set eval_strategy"
        )
    spread = values.get("packing") and values.get("packing_strategy", "bfd") != "bfd"
    for key in ("on_long_row", "max_truncated_answers"):
        if spread and values.get(key) is not None:
            found.append(
                f"{origin[key]}: {key} says nothing with packing_strategy {values['packing_strategy']}, which spreads "
                "a long row over packs; use bfd, or leave it out"
            )
    if mixture and values.get("test_split_size"):
        found.append(f"{origin['test_split_size']}: with a mixture, set test_split_size inside dataset_mixture")
    if values.get("fp16") and values.get("bf16"):
        found.append(f"{origin['fp16']}: fp16 and bf16 exclude each other; keep one")
    if (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        found.append(
            "a quantised model cannot be trained in full: set use_peft: true, or drop load_in_4bit/load_in_8bit"
        )
    adapter = next((key for key in values if key.startswith("lora_") or key == "use_rslora"), None)
    if adapter and "use_peft" not in values:
        found.append(f"{origin[adapter]}: {adapter} says nothing without an adapter: set use_peft: true, or remove it")
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        found.append(f"{origin['load_in_8bit']}: load_in_4bit and load_in_8bit exclude each other; keep one")
    schedule = values.get("lr_scheduler_type", "linear")
    allowed = SCHEMA["properties"]["lr_scheduler_kwargs"]["x-keys"].get(schedule)
    given = values.get("lr_scheduler_kwargs")
    for name in given if isinstance(given, dict) and allowed is not None else ():
        if name not in allowed:
            takes = ", ".join(allowed) or "none"
            where = origin["lr_scheduler_kwargs"]
            found.append(f"{where}: lr_scheduler_kwargs.{name} is no setting of {schedule}; it takes {takes}")
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in (given or {}):
        found.append(f"{origin['lr_scheduler_type']}: {schedule} needs lr_scheduler_kwargs: {{num_decay_steps: ...}}")
    saves, evaluates = values.get("save_strategy", "steps"), values.get("eval_strategy", "no")
    if values.get("load_best_model_at_end") and saves != "best" and saves != evaluates:
        found.append(
            f"{origin['load_best_model_at_end']}: load_best_model_at_end compares what was saved and evaluated: make "
            f"save_strategy ({saves}) and eval_strategy ({evaluates}) the same"
        )
    steps, warm = values.get("max_steps", -1), values.get("warmup_steps", 0)
    if all(isinstance(number, (int, float)) for number in (steps, warm)) and 0 < steps <= warm:
        recipe.notes.append(f"{origin['warmup_steps']}: all of max_steps {steps} is warm-up (warmup_steps {warm})")
    found += contradictions_of_batches(recipe)
    if values.get("packing") and values.get("max_length", 1) is None:
        found.append(f"{origin['max_length']}: packing needs max_length, the number of tokens in a packed row")
    if values.get("eval_packing") and not values.get("packing"):
        found.append(f"{origin['eval_packing']}: eval_packing without packing; set both, or neither")
    if values.get("assistant_only_loss") and values.get("supervision") == "full":
        found.append(f"{origin['assistant_only_loss']}: assistant_only_loss and supervision: full; keep supervision")
    if "push_to_hub_revision" in (values.get("callbacks") or []) and not values.get("hub_model_id"):
        found.append(f"{origin['callbacks']}: push_to_hub_revision needs hub_model_id, the repository to push to")
    return found


def contradictions_of_batches(recipe: Recipe) -> list[str]:
    """Settings of which rows make a step that are each fine and cannot be meant together, or not here."""
    values, origin = recipe.values, recipe.origin
    found: list[str] = []
    size, steps = values.get("global_batch_size"), values.get("gradient_accumulation_steps")
    each = values.get("per_device_train_batch_size", SCHEMA["properties"]["per_device_train_batch_size"]["default"])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if all(isinstance(number, int) for number in (size, steps, each)) and size != steps * each * processes:
        found.append(
            f"{origin['global_batch_size']}: global_batch_size {size} is not gradient_accumulation_steps {steps} "
            f"({origin['gradient_accumulation_steps']}) x per_device_train_batch_size {each} x {processes} processes; "
            "keep global_batch_size, from which gradient_accumulation_steps follows"
        )
    if size is not None and values.get("auto_find_batch_size"):
        found.append(f"{origin['auto_find_batch_size']}: auto_find_batch_size changes global_batch_size; keep one")
    if values.get("train_sampling_strategy") == "batch_rebalance":
        found.append(
            f"{origin['train_sampling_strategy']}: batch_rebalance makes the order of rows depend on the number of "
            "processes; use group_by_length"
        )
    shared = values.get("accelerator_config")
    if isinstance(shared, dict) and shared.get("split_batches"):
        found.append(
            f"{origin['accelerator_config']}: split_batches deals a batch out to all processes; leave it out and set "
            "global_batch_size"
        )
    return found
