"""Supervised fine-tuning from a YAML recipe, on one CPU, one GPU, a node or a cluster.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml src/open_r1/sft.py --config recipe.yaml

Any key of the recipe can be overridden behind it (`--learning_rate 1e-5`); `--help` lists them all. Started again, a
run goes on from the last complete checkpoint in its output_dir. Exit code 0: trained, saved and verified; 1: something
failed; 2: the recipe, the data or the model needs mending, the message says how.
"""

import atexit
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: what stands beside it must not hide other packages' modules
    sys.path[0] = str(Path(__file__).parents[1])

from open_r1.checkpoints import at_last_step, checkpoint_to_resume, finished, record, require_same_data
from open_r1.errors import UserError
from open_r1.recipe import Recipe, load_recipe, set_environment, written_out

if TYPE_CHECKING:
    from open_r1.configs import ModelConfig, ScriptArguments, SFTConfig

logger = logging.getLogger("open_r1")


def main(argv: list[str] | None = None) -> int:
    """Run `argv` (default: the command line) and return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-7s %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        return run(recipe)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{error}", file=sys.stderr)
        return 2


def run(recipe: Recipe) -> int:
    """Train what the recipe says; returns the exit code. Heavy imports come after all that can fail without them."""
    set_environment(recipe)
    for note in recipe.notes:
        logger.warning(note)
    output_dir, settings = recipe.values.setdefault("output_dir", "data/sft"), recipe.values
    dry = settings.get("dry_run") not in (None, False)
    if not dry and (step := finished(output_dir, settings)) is not None:
        logger.info("this run finished at step %d and its model is in %s: nothing to do", step, output_dir)
        return 0
    checkpoint = checkpoint_to_resume(output_dir, recipe.values.get("resume_from_checkpoint"))

    from transformers import set_seed

    from open_r1 import ledger, preflight
    from open_r1.callbacks import get_callbacks, ready_branch
    from open_r1.chat import get_tokenizer
    from open_r1.model import adapter_config, check_model, get_model
    from open_r1.preparation import prepare
    from open_r1.report import after_saving, end, restore, summarize, train
    from open_r1.trainer import OrderedTrainer, order_of, tell_libraries, trainer_arguments

    script_args, training_args, model_args = build_configs(recipe)
    tell_libraries(training_args)
    set_seed(training_args.seed)
    check_model(model_args, training_args)
    callbacks = get_callbacks(training_args)

    tokenizer = get_tokenizer(model_args, training_args)
    prepared = prepare(script_args, training_args, tokenizer)
    order = order_of(prepared.train, training_args)

    findings, plan = preflight.check(training_args, model_args, tokenizer, prepared)
    if training_args.dry_run:
        return preflight.report(
            findings, plan, training_args.dry_run == "json", shown=training_args.process_index == 0
        )
    preflight.require(findings)
    require_same_data(output_dir, checkpoint, prepared.train.key)
    if training_args.process_index == 0:
        ready_branch(training_args, resuming=checkpoint is not None)
        record(output_dir, "running", 0, settings, prepared.train.key)
        Path(output_dir, "recipe.yaml").write_text(written_out(recipe), encoding="utf-8")
        ledger.write(output_dir, {name: part.ledger for name, part in prepared.parts.items()})
    trained = at_last_step(checkpoint)
    model = get_model(model_args, training_args, tokenizer, weights=checkpoint if trained else None)
    trainer = OrderedTrainer(
        order=order,
        data=prepared.train.key,
        model=model,
        args=trainer_arguments(training_args),
        train_dataset=prepared.train.rows,
        eval_dataset=prepared.eval and prepared.eval.rows,
        processing_class=tokenizer,
        peft_config=adapter_config(model_args, model, tokenizer),
        callbacks=callbacks,
    )
    if trained:  # a run that was stopped after its last step: its checkpoint is the model
        restore(trainer, checkpoint)
    else:
        train(trainer, checkpoint)
    failed = after_saving(trainer, recipe, prepared)
    if trainer.is_world_process_zero():
        if not failed:
            record(output_dir, "complete", trainer.state.global_step, settings, prepared.train.key)
        summarize(trainer)
    end(trainer)
    return 1 if failed else 0


def build_configs(recipe: Recipe) -> "tuple[ScriptArguments, SFTConfig, ModelConfig]":
    """The recipe as the three configs. Raises `UserError` for what only the whole of them can tell is wrong."""
    from open_r1.configs import ModelConfig, ScriptArguments, SFTConfig

    try:
        script_args, training_args, model_args = (
            config(**recipe.of(config.__name__)) for config in (ScriptArguments, SFTConfig, ModelConfig)
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"this recipe cannot be run: {error}") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if training_args.world_size != launched:
        raise UserError(
            f"{launched} processes were launched, but each would train alone: no GPU is found for them; on a machine "
            "without GPUs add --use_cpu, else check the driver and CUDA_VISIBLE_DEVICES"
        )
    return script_args, training_args, model_args


def leave(code: int) -> None:
    """End this process with an exit code.

    Of several processes each ends at once when Python has: torn down by the interpreter, gloo's threads now and then
    abort a process whose run is saved ("terminate called without an active exception", torch 2.13).
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
