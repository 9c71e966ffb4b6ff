"""Recipe file + command line -> values for the three configs, each with where it came from.

Everything is checked against `schema.json`, so that `--help` and every mistake in a recipe come in a fraction of a
second: this module imports neither torch nor TRL. All mistakes of a recipe are reported at once.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from open_r1.errors import UserError
from open_r1.old_names import CLI, COLUMN_KEYS, GONE, RENAMED, modernise

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "schema.json").read_text())


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
    """Read `--config FILE` and the overrides after it. Raises `UserError`; prints help and exits on `--help`."""
    config, given = parse_command_line(argv)
    values, origin = read_yaml(config) if config else ({}, {})
    problems: list[str] = []
    recipe = Recipe()
    for source, places in ((values, origin), (given, dict.fromkeys(given, CLI))):
        add_layer(recipe, source, places, problems)
    problems += contradictions(recipe)
    if problems:
        raise UserError("\n".join(problems))
    return recipe


def add_layer(recipe: Recipe, values: dict[str, Any], places: dict[str, str], problems: list[str]) -> None:
    """Rename, check and lay one source of values (file, then command line) over what is there."""
    here = places.get("", CLI)
    for key, value in modernise(values, places, recipe.notes, problems).items():
        where = places.get(key, here)
        spec = SCHEMA["properties"].get(key)
        if spec is None:
            problems.append(f"{where}: {key} is not a setting (found {value!r}); --help lists them all")
            continue
        recipe.values[key] = fit(value, spec, key, where, places, problems)
        recipe.origin[key] = where


def parse_command_line(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """Split argv into the recipe's path and the overrides, values still text. Abbreviations are refused."""
    parser = Parser(
        prog="sft.py",
        usage="sft.py --config RECIPE.yaml [--key value ...]",
        description="Supervised fine-tuning from a YAML recipe; any key can also be given here and then wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="the recipe")
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
    given = vars(parser.parse_args(argv))
    return given.pop("config", None), given


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        hint = "a recipe is given with --config" if ".yaml" in message else "--help lists all settings"
        raise UserError(f"{CLI}: {message}; {hint}")


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file as plain values, and `file:line` of each key path (`dataset_mixture.datasets.0.id`)."""
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
    problems: list[str] = []
    try:
        values = plain_value(loader, root, "", path, places, problems)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) refers to itself; write the value out") from None
    if problems:
        raise UserError("\n".join(problems))
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


def fit(value: Any, spec: dict[str, Any], key: str, where: str, places: dict[str, str], problems: list[str]) -> Any:
    """`value` as the type that `spec` asks for; reports a wrong type, choice or range in `problems`."""
    types = spec["type"]
    if isinstance(types, str):
        types = [types]
    if isinstance(value, str) and ("string" not in types or ("object" in types and value.startswith("{"))):
        value = parse_text(value, types)
    elif where == CLI and "null" in types and value in ("none", "null") and "enum" not in spec:
        value = None  # a command line has no other way to unset a text
    elif value is False and "no" in spec.get("enum", []) and False not in spec["enum"]:
        value = "no"  # unquoted `eval_strategy: no` is a YAML boolean
    elif "number" in types and "integer" not in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    elif types == ["string"] or types == ["string", "null"]:
        value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if "array" in types and not isinstance(value, list) and value is not None:
        value = [value]
    if isinstance(value, list) and "array" in types:
        items = spec.get("items", {"type": ["string"]})
        return [
            fit(item, items, f"{key}.{i}", places.get(f"{key}.{i}", where), places, problems)
            for i, item in enumerate(value)
        ]
    if isinstance(value, dict) and "object" in types:
        return fit_object(value, spec, key, where, places, problems) if "properties" in spec else value
    if json_type(value) not in types and not ("number" in types and json_type(value) == "integer"):
        problems.append(f"{where}: {key} is {kind(spec)}; found {value!r}")
    elif value is not None and "enum" in spec and value not in spec["enum"]:
        problems.append(f"{where}: {key} is one of {choices(spec)}; found {value!r}")
    elif isinstance(value, str) and "pattern" in spec and not re.fullmatch(spec["pattern"], value):
        problems.append(f"{where}: {key} is one of {', '.join(spec['examples'])}; found {value!r}")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where}: {key} must be a finite number; found {value!r}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < spec.get("minimum", value):
        problems.append(f"{where}: {key} must be at least {spec['minimum']}; found {value!r}")
    elif isinstance(value, (int, float)) and value <= spec.get("exclusiveMinimum", float("-inf")):
        problems.append(f"{where}: {key} must be above {spec['exclusiveMinimum']}; found {value!r}")
    return value


def fit_object(
    value: dict[str, Any], spec: dict[str, Any], key: str, where: str, places: dict[str, str], problems: list[str]
) -> dict[str, Any]:
    """Check a nested mapping: closed, and with everything that is required."""
    fitted: dict[str, Any] = {}
    for name, item in value.items():
        at = places.get(f"{key}.{name}", where)
        if name not in spec["properties"]:
            problems.append(f"{at}: {key}.{name} is not a setting; known here: {', '.join(spec['properties'])}")
        else:
            fitted[name] = fit(item, spec["properties"][name], f"{key}.{name}", at, places, problems)
    for name in spec["required"]:
        if name not in value:
            problems.append(f"{where}: {key} lacks {name} ({spec['properties'][name]['description']})")
    return fitted


def parse_text(text: str, types: list[str]) -> Any:
    """Text (from the command line, or a number that YAML 1.1 reads as text, like 1e-5) as one of `types`."""
    readings = {"integer": int, "number": float}
    for name, read in readings.items():
        if name in types:
            try:
                return read(text)
            except ValueError:
                pass
    if "boolean" in types and text.lower() in ("true", "yes", "1", "false", "no", "0"):
        return text.lower() in ("true", "yes", "1")
    if "null" in types and text.lower() in ("none", "null"):
        return None
    if "object" in types:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


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
    if values.get("hub_token"):
        found.append(
            f"{origin['hub_token']}: a token does not belong in a recipe; run `hf auth login` or set HF_TOKEN"
        )
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
    if mixture and values.get("test_split_size"):
        found.append(f"{origin['test_split_size']}: with a mixture, set test_split_size inside dataset_mixture")
    if values.get("fp16") and values.get("bf16"):
        found.append(f"{origin['fp16']}: fp16 and bf16 exclude each other; keep one")
    if (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        found.append(
            "a quantised model cannot be trained in full: set use_peft: true, or drop load_in_4bit/load_in_8bit"
        )
    return found


def json_type(value: Any) -> str:
    """The JSON schema name of a value's type."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def kind(spec: dict[str, Any]) -> str:
    """A type in words: `number or null`."""
    types = [spec["type"]] if isinstance(spec["type"], str) else spec["type"]
    return " or ".join(types)


def choices(spec: dict[str, Any]) -> str:
    """The allowed values in words, empty when any will do."""
    return ", ".join(str(choice) for choice in spec.get("enum", []))
