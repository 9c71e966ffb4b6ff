"""What a check finds: errors, warnings and notes, each with its remedy."""

from collections.abc import Sequence
from typing import NamedTuple

LEVELS = ("error", "warning", "note")


class Finding(NamedTuple):
    """`level` is error, warning or note; `text` says what was found and where, `remedy` how to mend it."""

    level: str
    text: str
    remedy: str = ""


def as_text(findings: Sequence[Finding]) -> str:
    """Findings for a terminal, one a paragraph, errors first."""
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return "\n".join(f"{each.level:7} {each.text}{'; ' + each.remedy if each.remedy else ''}" for each in ordered)


def has_errors(findings: Sequence[Finding]) -> bool:
    """Whether one of them is an error."""
    return any(finding.level == "error" for finding in findings)
