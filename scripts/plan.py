"""What a run comes to under a launch config: its dry run, planned for all its processes, in this one.

    python scripts/plan.py --config_file recipes/accelerate_configs/zero3.yaml --num_processes 16 \\
        src/open_r1/sft.py --config recipe.yaml [--key value ...]

Takes what `accelerate launch` takes. Nothing is launched, and no GPU is needed: what the launcher would tell its
processes in the environment is told to this one. Exit codes are those of `sft.py --dry_run`.
"""

import os
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from open_r1.sft import main as sft


def main(argv: list[str] | None = None) -> int:
    """Plan, and return the exit code."""
    try:
        args, defaults, precision_said = _validate_launch_command(launch_command_parser().parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"the launch config cannot be read: {error}", file=sys.stderr)
        return 2
    processes = str(args.num_processes)
    if not processes.isdigit():
        print(f"num_processes: {processes} says nothing of other machines; add --num_processes N", file=sys.stderr)
        return 2
    args.num_machines, args.main_process_port = 1, 0  # none is started, no port is taken
    if args.use_deepspeed:
        said = [*(defaults.deepspeed_config if defaults else ()), *(["mixed_precision"] if precision_said else ())]
        args.deepspeed_fields_from_accelerate_config = ",".join(said)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    os.environ.update(environment)
    return sft(["--dry_run", "--plan_processes", processes, *args.training_script_args])


if __name__ == "__main__":
    sys.exit(main())
