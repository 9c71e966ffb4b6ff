"""Figures by section in a file of JSON that is written with every run, so that a benchmark goes on where it ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Results:
    """Sections by name: the facts that figures hold for, and `runs`."""

    path: Path
    sections: dict[str, dict[str, Any]]

    def begin(self, section: str, facts: dict[str, Any], again: bool) -> None:
        """Keep what a section has, unless it is to be measured again or was measured under other circumstances."""
        there = self.sections.get(section)
        others = [key for key, value in facts.items() if there and there.get(key) != value]
        if there and not again and not others:
            return
        if there:
            why = "" if again else f", since {' and '.join(others)} changed"
            print(f"{section}: measured anew{why}", flush=True)
        self.sections[section] = {**facts, "runs": []}

    def finish(self, section: str, repeats: int) -> None:
        """Note that all of a section has been measured so many times."""
        self.sections[section]["repeats"] = repeats
        self.write()

    def runs(self, section: str, **key: Any) -> list[dict[str, Any]]:
        """The runs of a section whose key holds `key`."""
        return [each for each in self.sections[section]["runs"] if key.items() <= each.items()]

    def add(self, section: str, made: dict[str, Any]) -> None:
        """Write one run more."""
        self.sections[section]["runs"].append(made)
        self.write()

    def write(self) -> None:
        """Write the file anew, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(as_text(self.sections))
        partial.replace(self.path)


def read_results(path: Path) -> Results:
    """What a file holds; nothing where there is none."""
    return Results(path, json.loads(path.read_text()) if path.exists() else {})


def as_text(sections: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for every fact and run."""
    parts = []
    for name, section in sections.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items() if key != "runs"]
        runs = ",\n".join(f"   {json.dumps(each)}" for each in section["runs"])
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join([*lines, f'  "runs": [\n{runs}\n  ]']) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
