"""What a value in a recipe may be: every key against `schema.json`, with the nearest spelling of what was meant.

Nothing here imports torch or TRL.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from open_r1.old_names import CLI

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "schema.json").read_text())
# Tokens of the hub, OpenAI, GitHub, AWS and Google as they are handed out; names of files and datasets are none.
SECRET = re.compile(
    r"(?<![\w/.-])(hf_[A-Za-z0-9]{30,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{32,}|gh[opsur]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35})(?![\w/])"
)
SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|(api|access|private)[_-]?key|credentials?)$", re.IGNORECASE
)
NOT_SECRET = {"eos_token", "pad_token"}


class Place(NamedTuple):
    """Where a value stands: its key path, `file:line`, and the places of what is inside it by key path."""

    key: str
    where: str
    places: dict[str, str]

    def inside(self, name: str | int) -> "Place":
        """The place of a member."""
        key = f"{self.key}.{name}"
        return Place(key, self.places.get(key, self.where), self.places)


def fit(value: Any, spec: dict[str, Any], at: Place, problems: list[str]) -> Any:
    """`value` as the type that `spec` asks for; reports a wrong type, choice or range in `problems`."""
    types = types_of(spec)
    value = as_meant(value, spec, types, at.where)
    if isinstance(value, list) and "array" in types:
        items = spec.get("items", {"type": ["string"]})
        return [fit(item, items, at.inside(number), problems) for number, item in enumerate(value)]
    if isinstance(value, dict) and "object" in types:
        return fit_object(value, spec, at, problems) if "properties" in spec else value
    shown, number = show(value, at.key), isinstance(value, (int, float)) and not isinstance(value, bool)
    if json_type(value) not in types and not ("number" in types and json_type(value) == "integer"):
        problems.append(f"{at.where}: {at.key} is {kind(spec)}; found {shown}")
    elif value is not None and "enum" in spec and value not in spec["enum"]:
        problems.append(f"{at.where}: {at.key} is one of {choices(spec)}; found {shown}{meant(value, spec['enum'])}")
    elif isinstance(value, str) and "pattern" in spec and not re.fullmatch(spec["pattern"], value):
        known = spec["examples"]
        problems.append(f"{at.where}: {at.key} is one of {', '.join(known)}; found {shown}{meant(value, known)}")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{at.where}: {at.key} must be a finite number; found {shown}")
    elif number and value < spec.get("minimum", value):
        problems.append(f"{at.where}: {at.key} must be at least {spec['minimum']}; found {shown}")
    elif number and value > spec.get("maximum", value):
        problems.append(f"{at.where}: {at.key} must be at most {spec['maximum']}; found {shown}")
    elif number and value <= spec.get("exclusiveMinimum", float("-inf")):
        problems.append(f"{at.where}: {at.key} must be above {spec['exclusiveMinimum']}; found {shown}")
    return value


def fit_object(value: dict[str, Any], spec: dict[str, Any], at: Place, problems: list[str]) -> dict[str, Any]:
    """Check a nested mapping: closed, and with everything that is required."""
    fitted: dict[str, Any] = {}
    for name, item in value.items():
        inner = at.inside(name)
        if name not in spec["properties"]:
            known = spec["properties"]
            hint = meant(name, known) or f"; known here: {', '.join(known)}"
            problems.append(f"{inner.where}: {inner.key} is not a setting (found {show(item, name)}){hint}")
        else:
            fitted[name] = fit(item, spec["properties"][name], inner, problems)
    for name in spec.get("required", ()):
        if name not in value:
            problems.append(f"{at.where}: {at.key} lacks {name} ({spec['properties'][name]['description']})")
    return fitted


def as_meant(value: Any, spec: dict[str, Any], types: list[str], where: str) -> Any:
    """What people mean by a value that YAML or a command line gives another type."""
    if isinstance(value, str) and ("string" not in types or ("object" in types and value.startswith("{"))):
        value = parse_text(value, types)
    elif isinstance(value, str) and value.lower() in ("true", "false") and True in spec.get("enum", []):
        value = value.lower() == "true"
    elif where == CLI and "null" in types and value in ("none", "null") and "enum" not in spec:
        value = None  # a command line has no other way to unset a text
    elif value is False and "no" in spec.get("enum", []) and False not in spec["enum"]:
        value = "no"  # unquoted `eval_strategy: no` is a YAML boolean
    elif "number" in types and "integer" not in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    elif types == ["string"] or types == ["string", "null"]:
        value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    return [value] if "array" in types and not isinstance(value, list) and value is not None else value


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


def meant(word: Any, known: Any) -> str:
    """`; did you mean A or B?`: those of `known` that a word is most like, begins, ends or lists; else empty."""
    lower, names = str(word).lower(), {str(name).lower(): str(name) for name in known if isinstance(name, str)}
    parts = [part for part in re.split(r"[,\s]+", lower) if part]
    if len(parts) > 1 and all(part in names for part in parts):
        return f"; did you mean [{', '.join(parts)}]?"
    likeness = {name: difflib.SequenceMatcher(None, lower, name).ratio() for name in names}
    best = max(likeness.values(), default=0.0)
    found = [name for name in names if likeness[name] > best - 0.03] if best >= 0.75 else []
    for fits in (str.startswith, str.endswith, str.__contains__):
        found = found or [name for name in names if len(lower) > 3 and fits(name, lower)][:1]
    found = found or [name for name in names if likeness[name] > best - 0.01 and best >= 0.6]
    return f"; did you mean {' or '.join(names[name] for name in found[:3])}?" if found else ""


def show(value: Any, key: str = "") -> str:
    """A value for a message: short, and without what looks like a secret."""
    if looks_secret(key, value):
        return "a secret, not shown"
    text = masked(repr(value))
    return text if len(text) <= 100 else text[:97] + "..."


def looks_secret(key: str, value: Any) -> bool:
    """Whether a value under a key is a token, a password or the like."""
    name = key.rpartition(".")[2]
    named = bool(SECRET_NAME.search(name)) and name not in NOT_SECRET
    return isinstance(value, str) and bool(value) and (named or masked(value) != value)


def held_secrets() -> list[str]:
    """The secrets that this process's environment holds.

    Those of W&B and of many others look like any other word, so that only the environment tells them.
    """
    return [secret for name, secret in os.environ.items() if SECRET_NAME.search(name) and len(secret) >= 16]


def masked(text: str, held: list[str] | None = None) -> str:
    """A text without what looks like a token, and without secrets: those `held`, which are looked for when None."""
    for secret in held_secrets() if held is None else held:
        text = text.replace(secret, "***")
    return SECRET.sub("***", text)


def texts_in(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value, with its key path."""
    if isinstance(value, str):
        yield key, value
    for name, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from texts_in(f"{key}.{name}", item)


def types_of(spec: dict[str, Any]) -> list[str]:
    """The JSON types that a value may have."""
    return [spec["type"]] if isinstance(spec["type"], str) else spec["type"]


def json_type(value: Any) -> str:
    """The JSON schema name of a value's type."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def kind(spec: dict[str, Any]) -> str:
    """A type in words: `number or null`."""
    return " or ".join(types_of(spec))


def choices(spec: dict[str, Any]) -> str:
    """The allowed values in words, empty when any will do."""
    return ", ".join(str(choice) for choice in spec.get("enum", []))
