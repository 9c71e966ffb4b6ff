"""Check a saved model before it is handed over: files, weights, tokenizer, chat template, and where answers stop.

    python scripts/verify.py MODEL [--prompt TEXT ...] [--max_new_tokens 256]

MODEL is a directory with a full model or a LoRA adapter. Weights are read one piece at a time; only prompts, which are
answered greedily, load the model. Exit code 0: it can be served; 1: an error was found; 2: there is no model to check.
"""

import argparse
import sys

from open_r1.errors import UserError
from open_r1.findings import as_text, has_errors


def main(argv: list[str] | None = None) -> int:
    """Print what is found in the model of `argv` (default: the command line); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="directory of a saved model or adapter")
    parser.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="messages to answer")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="by which an answer has to stop (256)")
    parser.add_argument("--device", default="cpu", help="where prompts are answered (cpu)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    args = parser.parse_args(argv)

    from open_r1.handover import verify

    try:
        findings = verify(
            args.model,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    if findings:
        print(as_text(findings))
    if has_errors(findings):
        return 1
    print(f"{args.model} can be served")
    return 0


if __name__ == "__main__":
    sys.exit(main())
