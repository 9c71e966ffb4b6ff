"""Recipe file + command line -> values for the three configs, each with where it came from.

Everything is checked against `schema.json`, so that `--help` and every mistake in a recipe come in a fraction of a
second: this module imports neither torch nor TRL. All mistakes of a recipe are reported at once.
"""

import argparse
import ast
import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from open_r1.contradictions import contradictions
from open_r1.errors import UserError
from open_r1.old_names import CLI, COLUMN_KEYS, GONE, RENAMED, modernise
from open_r1.schema import SCHEMA, Place, choices, fit, kind, masked, meant, show

PLAIN = (yaml.SafeLoader.DEFAULT_MAPPING_TAG, yaml.SafeLoader.DEFAULT_SEQUENCE_TAG)


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
        raise UserError(masked("\n".join(problems)))
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


def read_back(text: str) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """What `written_out` wrote: values, where each is from, and the defaults that were left, long ones as text."""
    said, _, left = text.partition("\n# Defaults\n")
    origin, before = {}, ""
    for line in said.splitlines():
        if key := re.match(r"(\w+):", line):
            origin[key[1]] = before[2:] if before.startswith("# ") else line.rpartition("  # ")[2]
        before = line
    defaults: dict[str, Any] = dict(line[2:].split(": ", 1) for line in left.splitlines() if ": " in line)
    for key, shown in defaults.items():
        with contextlib.suppress(ValueError, SyntaxError):  # cut short
            defaults[key] = ast.literal_eval(shown)
    return yaml.safe_load(said) or {}, origin, defaults


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
    if not isinstance(root, yaml.MappingNode) or root.tag not in PLAIN:
        raise UserError(f"{path}: a recipe is a YAML mapping of settings (key: value); this file holds none")
    places = {"": path}
    try:
        values = plain_value(loader, root, "", path, places, problems)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) refers to itself; write the value out") from None
    except (yaml.YAMLError, ValueError) as error:  # of a key: those of values are collected
        raise UserError(f"{path}: a key is a word: {getattr(error, 'problem', None) or error}") from None
    return values, places


def plain_value(
    loader: yaml.SafeLoader, node: yaml.Node, at: str, path: str, places: dict[str, str], problems: list[str]
) -> Any:
    """Build a node's value, recording `file:line` of every key below `at` and reporting keys said twice."""
    inside = f"{at}." if at else ""
    if isinstance(node, yaml.CollectionNode) and node.tag not in PLAIN:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        problems.append(f"{path}:{node.start_mark.line + 1}: {at}: {tag} builds an object; write a plain value")
        return None
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
