"""Write the report of a run again from its files, or one page that compares several runs.

    python scripts/report.py RUN [RUN ...] [--out page.html]

RUN is an output directory, also of a run that is still going or was killed. Without --out the page is RUN/report.html,
of several runs comparison.html; where two runs part, step by step, says compare_runs.py. Exit code 2: a run cannot be
read, or the page not written.
"""

import argparse
import sys
from pathlib import Path

from open_r1.errors import UserError
from open_r1.report import write, write_comparison


def main(argv: list[str] | None = None) -> int:
    """Write the page that `argv` (default: the command line) asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output directory of a run")
    parser.add_argument("--out", type=Path, help="page to write")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) == 1:
            path = write(args.runs[0], args.out)
        else:
            path = write_comparison(args.runs, args.out or Path("comparison.html"))
    except (UserError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
