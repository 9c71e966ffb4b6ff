"""`report.html`: a run as people look at it, in one file that needs no other, from what the run has measured."""

import json
import logging
import secrets
from pathlib import Path
from typing import Any

from open_r1.checkpoints import write_whole
from open_r1.errors import UserError
from open_r1.figures import COLORS, compared, figures_of, histogram, labels
from open_r1.run_files import Run, cleaned, read_run
from open_r1.run_tables import (
    Table,
    Value,
    about,
    differing,
    events,
    generations,
    headlines,
    ledger_tables,
    names_of,
    recipe_table,
    results,
    setting,
    totals,
)

logger = logging.getLogger(__name__)
REPORT = "report.html"


def sections_of(run: Run) -> list[dict[str, Any]]:
    """What the page of one run shows: titled sections of figures, tables and texts."""
    parts = {part: run.ledger[part] for part in ("train", "eval") if part in run.ledger}
    lengths = [
        histogram(ledger, part)
        for part, ledger in parts.items()
        if all("histogram" in entry for entry in ledger["sources"])
    ]
    tables = [table for part, ledger in parts.items() for table in ledger_tables(ledger, part)]
    left = [[Value(key), Value(setting(key, said))] for key, said in run.recipe[2].items()]
    sections = [
        {"title": "Course", "figures": figures_of(run.metrics, names_of(run)), "tables": totals(run)},
        {"title": "What the model says", "generations": generations(run)},
        {"title": "Data", "tables": tables, "figures": [each for each in lengths if each.series]},
        {"title": "What is learnt", "rows": run.rows},
        {"title": "What was noticed", "tables": events(run)},
        {"title": "Recipe", "tables": [recipe_table(run)] if run.recipe[0] else []},
        {
            "title": "Defaults",
            "tables": [Table("Defaults", "recipe.yaml", ["setting", "value"], left, True)] if left else [],
            "folded": True,
        },
        {"title": "Where it ran", "tables": about(run)},
    ]
    return [each for each in sections if any(each.get(key) for key in ("figures", "tables", "generations", "rows"))]


def sections_of_several(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """What the page of several runs shows."""
    sections = [
        {"title": "Results", "tables": [results(runs)]},
        {"title": "Differences", "tables": differing(runs)},
        {"title": "Course", "figures": compared({name: run.metrics for name, run in runs.items()})},
    ]
    return [each for each in sections if each.get("figures") or each.get("tables")]


def page(title: str, lead: dict[str, Value], note: str, sections: list[dict[str, Any]]) -> str:
    """The HTML document; whatever comes from files is escaped, and no script runs in it but those that are ours."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    figures = [figure for section in sections for figure in section.get("figures", ())]
    said = [
        {
            **figure._asdict(),
            "series": [
                {**series._asdict(), "label": label, "dash": series.dash, "texture": series.texture}
                for series, label in zip(figure.series, labels([each.name for each in figure.series]), strict=True)
            ],
        }
        for figure in figures
    ]
    environment = Environment(
        loader=PackageLoader("open_r1", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        lead=lead,
        note=note,
        sections=sections,
        colors=COLORS,
        figures=Markup(json.dumps(said).replace("<", "\\u003c")),  # noqa: S704  no tag can begin in it
        plotly=Markup(get_plotlyjs()) if figures else "",  # noqa: S704
        nonce=secrets.token_urlsafe(16),
    )


def write(output_dir: str | Path, out: Path | None = None) -> Path:
    """Write the report of a run into its output_dir, or to `out`; returns where. Raises `UserError` and `OSError`."""
    run = read_run(Path(output_dir))
    reason = run.state.get("reason")
    note = f"as of {run.state.get('updated', 'unknown')}{f': {reason}' if reason else ''}"
    return put(out or Path(output_dir) / REPORT, page(run.name, headlines(run), note, sections_of(run)))


def write_comparison(paths: list[Path], out: Path) -> Path:
    """Write one page that compares several runs; returns where. Raises `UserError` and `OSError`."""
    runs = {name: read_run(path) for name, path in zip(told_apart(paths), paths, strict=True)}
    note = "; ".join(f"{name}: {cleaned(str(path))}" for name, path in zip(runs, paths, strict=True))
    return put(out, page(f"{len(runs)} runs", {}, note, sections_of_several(runs)))


def put(path: Path, text: str) -> Path:
    """Write a page whole; returns where. Raises `UserError` without its folder, and `OSError` with its own name."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another page with --out")
    try:
        write_whole(path, text, durable=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return path


def told_apart(paths: list[Path]) -> list[str]:
    """A name for each of several directories: its last parts, as many as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return [cleaned(name) for name in names]
    raise UserError(f"{paths[0]}: is named more than once")


def try_to_write(output_dir: str) -> None:
    """Write a run's report, and say where that fails: a page never stops what it is about."""
    try:
        write(output_dir)
    except (OSError, UserError) as error:
        logger.warning("%s was not written: %s", REPORT, error)
    except Exception:
        logger.exception("%s was not written", REPORT)
