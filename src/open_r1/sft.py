"""Supervised fine-tuning from a YAML recipe, on one CPU, one GPU, a node or a cluster.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml src/open_r1/sft.py --config recipe.yaml

Any key of the recipe can be overridden behind it (`--learning_rate 1e-5`); `--help` lists them all. Started again, a
run goes on from the last complete checkpoint in its output_dir. Exit code 0: trained, saved and verified; 1: something
failed; 2: the recipe, the data or the model needs mending, the message says how; 75: told to stop by a signal, saved,
and to be started again. Launchers turn all of them into 1: `run_state.json` in output_dir says what became of a run.
"""

import atexit
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: what stands beside it must not hide other packages' modules
    sys.path[0] = str(Path(__file__).parents[1])

from open_r1.checkpoints import room
from open_r1.errors import Stopped, UserError
from open_r1.launch import require_launched, require_world
from open_r1.processes import has_the_word, heed_others, others_told, record_how, require_one_run, wait_for_all
from open_r1.recipe import Recipe, load_recipe, set_environment, written_out
from open_r1.resuming import checkpoint_of, earlier_run, facts_of, finished
from open_r1.run_state import held, holder, read_state, record, record_end
from open_r1.stopping import EXIT_CODE, Preempted, Stop, heeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from open_r1.configs import ModelConfig, ScriptArguments, SFTConfig
    from open_r1.preparation import Prepared

logger = logging.getLogger("open_r1")


def main(argv: list[str] | None = None) -> int:
    """Run `argv` (default: the command line) and return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-7s %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        with heeded() as stop, others_told(stop):
            recipe = load_recipe(sys.argv[1:] if argv is None else argv)
            dry_run = recipe.values.get("dry_run") not in (None, False)
            require_launched(dry_run)
            output_dir = recipe.values["output_dir"] = os.path.expanduser(recipe.values.get("output_dir", "data/sft"))
            if dry_run:
                return run(recipe, stop)
            with held(output_dir):
                return begun(recipe, stop)
    except UserError as error:
        if has_the_word():
            print(f"\n{error}", file=sys.stderr)
        return 1 if isinstance(error, Stopped) else 2
    except Preempted as signal:
        logger.warning("stopped: %s; the same command goes on", signal)
        return EXIT_CODE


def begun(recipe: Recipe, stop: Stop) -> int:
    """Run it, and see to it that `run_state.json` says how it ended, whatever ends it."""
    output_dir = recipe.values["output_dir"]
    stop.last_words = lambda reason: record_how(output_dir, Preempted(reason), stop.begun)
    try:
        if (step := finished(output_dir, recipe.values)) is not None:
            logger.info("this run finished at step %d, its model is in %s: nothing to do", step, output_dir)
            return 0
        return run(recipe, stop)
    except BaseException as error:
        stop.ended = stop.leaving = True  # the launcher's signals to those that are left must not cut this short
        record_how(output_dir, error, stop.begun)
        if stop.begun and os.environ.get("RANK", "0") == "0":
            from open_r1.report import try_to_write

            try_to_write(output_dir)
        raise


def run(recipe: Recipe, stop: Stop) -> int:
    """Train what the recipe says; returns the exit code. Heavy imports come after all that can fail without them."""
    set_environment(recipe)
    for note in recipe.notes:
        logger.warning(note)
    output_dir, settings = recipe.values["output_dir"], recipe.values
    checkpoint = checkpoint_of(output_dir, settings)

    with kept_for_good():
        from transformers import set_seed

        from open_r1 import preflight
        from open_r1.attention import settle_attention
        from open_r1.callbacks import followed, get_callbacks, ready_branch
        from open_r1.chat import get_tokenizer
        from open_r1.defaults import settle
        from open_r1.faults import free_builds
        from open_r1.finish import after_saving, does_not_fit, end, explained_when_full, summarize, train
        from open_r1.generations import prompts_of
        from open_r1.model import adapter_config, check_model, get_model
        from open_r1.order import order_of
        from open_r1.preparation import prepare
        from open_r1.report import try_to_write
        from open_r1.trackers import name_run
        from open_r1.trainer import OrderedTrainer, tell_libraries, trainer_arguments

    heed_others(stop, output_dir)
    script_args, training_args, model_args = build_configs(recipe)
    tell_libraries(training_args)
    if training_args.deepspeed_plugin is not None:
        free_builds()
    set_seed(training_args.seed)
    config = check_model(model_args, training_args)
    attention = settle_attention(model_args, training_args, config)
    callbacks = get_callbacks(training_args)

    tokenizer = get_tokenizer(model_args, training_args)
    prompts = prompts_of(training_args, tokenizer)
    prepared = prepare(script_args, training_args, tokenizer)
    wait_for_all("the data")
    settle(training_args, model_args, config, prepared.train, len(tokenizer), attention.why_not)
    order = order_of(prepared.train, training_args)

    findings, plan = preflight.check(training_args, model_args, config, tokenizer, prepared)
    if training_args.dry_run:
        return preflight.report(
            findings, plan, training_args.dry_run == "json", shown=training_args.process_index == 0
        )
    preflight.require(findings)
    facts = facts_of(settings, prepared, order, training_args, model_args)
    require_one_run(facts, training_args)
    earlier = earlier_run(checkpoint, facts, order, training_args)
    tracked = name_run(training_args, facts, earlier)
    if training_args.process_index == 0:
        ready_branch(training_args, resuming=bool(earlier))
        put_down(recipe, training_args, prepared, tokenizer, {**tracked, **facts}, earlier.get("step", 0))
    stop.begun = True
    with explained_when_full(does_not_fit):
        model = get_model(model_args, training_args, tokenizer)
        trainer = OrderedTrainer(
            order=order,
            part=prepared.train,
            tested=prepared.eval,
            facts=facts,
            earlier=earlier,
            stop=stop,
            limit=training_args.save_total_limit,
            model=model,
            args=trainer_arguments(training_args),
            train_dataset=prepared.train.rows,
            processing_class=tokenizer,
            peft_config=adapter_config(model_args, model, tokenizer),
            callbacks=callbacks,
        )
    with followed(trainer, prompts):
        train(trainer)
        failed = after_saving(trainer, recipe, prepared)
    if trainer.is_world_process_zero():
        if failed:
            record_end(output_dir, "failed", f"the model is saved, but failed: {', '.join(failed)}")
        else:
            record(output_dir, status="complete", global_step=trainer.state.global_step)
        try_to_write(output_dir)
        summarize(trainer)
    end(trainer)
    return 1 if failed else 0


def put_down(
    recipe: Recipe,
    args: "SFTConfig",
    prepared: "Prepared",
    tokenizer: "PreTrainedTokenizerBase",
    facts: dict[str, Any],
    step: int,
) -> None:
    """Put down in output_dir what is known before the first step, from which a run can be told and its report written.

    `facts` go into `run_state.json`; `step` is the one that the run goes on from.
    """
    from open_r1 import ledger
    from open_r1.card import hardware
    from open_r1.views import write_samples

    out = args.output_dir
    with room(Path(out), "the run"):
        begins = {"status": "running", "reason": "", "global_step": step, **holder()}
        spent = {} if read_state(out).get("run_id") == facts["run_id"] else {"device_seconds": {}}
        record(out, **begins, **facts, **spent, hardware=hardware(args.world_size))
        Path(out, "recipe.yaml").write_text(written_out(recipe), encoding="utf-8")
        ledger.write(out, {name: part.ledger for name, part in prepared.parts.items()})
        write_samples(out, prepared.train, tokenizer)


@contextlib.contextmanager
def kept_for_good() -> Iterator[None]:
    """Import without garbage collection, and take what was imported out of every later one.

    torch, transformers and trl define 700,000 objects, none of which is ever garbage. Walking them again and again is
    a quarter of the time that their import takes, and costs a quarter of a second at each full collection after it.
    """
    if "trl" in sys.modules:  # nothing is left to import, and there may be garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def build_configs(recipe: Recipe) -> "tuple[ScriptArguments, SFTConfig, ModelConfig]":
    """The recipe as the three configs. Raises `UserError` for what only the whole of them can tell is wrong."""
    from open_r1.configs import ModelConfig, ScriptArguments, SFTConfig

    try:
        script_args, training_args, model_args = (
            config(**recipe.of(config.__name__)) for config in (ScriptArguments, SFTConfig, ModelConfig)
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"this recipe cannot be run: {error}") from error
    require_world(training_args)
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
