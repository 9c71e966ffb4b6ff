"""Say what became of a run, by the command line that started it.

    python scripts/run_state.py --config recipe.yaml [--key value ...]

Prints `output_dir`, `status` (none, running, preempted, failed, complete), `reason`, and `checkpoint` and its `step`:
the newest that the next start can go on from, as far as names and sizes tell.
"""

import os
import sys
from pathlib import Path

from open_r1.checkpoints import checkpoints, what_it_lacks
from open_r1.errors import UserError
from open_r1.recipe import load_recipe
from open_r1.run_state import read_state


def main(argv: list[str] | None = None) -> int:
    """Print it; returns the exit code (2: the command line needs mending)."""
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    output_dir = os.path.expanduser(recipe.values.get("output_dir", "data/sft"))
    state = read_state(output_dir)
    found = next((path for path in checkpoints(Path(output_dir)) if not what_it_lacks(path)), None)
    print(f"output_dir: {output_dir}")
    print(f"status: {state.get('status', 'none')}")
    print(f"reason: {state.get('reason', '')}")
    print(f"checkpoint: {found or ''}")
    print(f"step: {found.name.rpartition('-')[2] if found else 0}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
