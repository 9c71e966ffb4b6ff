"""Checkpoints that are complete or not there: how one is made, found, verified, and when it must go.

Upstream writes a checkpoint in place, file by file, takes the directory with the highest number and goes on with a
fresh optimizer where its state is missing (transformers 5.23). Here it is written to `.saving`, flushed, sealed with
`checkpoint.json` (step, processes, size and SHA-256 of every file) and moved to its name in one rename, as databases
do. Inside it is upstream's layout.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from open_r1.errors import Stopped, UserError

logger = logging.getLogger(__name__)
SAVING = ".saving"
SEAL = "checkpoint.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model_fsdp*",
    "latest",
)
LOADED = (".pt", ".pth", ".bin", ".safetensors", ".distcp")  # what upstream might take for state
# Plain, FSDP's two layouts, DeepSpeed's.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata", "*/*optim_states.pt")


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-<step>` directories, newest step first."""
    steps = {
        path: int(match.group(1))
        for path in output_dir.glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return sorted(steps, key=steps.__getitem__, reverse=True)


def checkpoint_to_resume(output_dir: str, resume: str, passed: dict[str, str] | None = None) -> str | None:
    """The checkpoint to go on from, None for a fresh start.

    `resume` is `auto` (the newest complete one, if there is any checkpoint), `must`, `never`, or a path; `passed` are
    those that turned out to be damaged, each with what is wrong. Digests are not looked at here (`damage` does).
    Raises `UserError` when what is asked for cannot be had.
    """
    passed = passed or {}
    found = checkpoints(Path(output_dir))
    if resume == "never":
        if found:
            raise UserError(
                f"resume: never, but {output_dir} holds {found[0].name} of an earlier run; choose another output_dir, "
                "or remove the old checkpoints"
            )
        return None
    if resume not in ("auto", "must"):
        named = Path(resume).resolve()
        whole = [path for path in found if not what_it_lacks(path)]
        mine = [path for path in whole if read_seal(path)["settings"].get("resume") == resume]
        if mine and named.parent != Path(output_dir).resolve():  # begun from there already
            resume = "auto"
        elif lacking := passed.get(resume) or what_it_lacks(named):
            raise UserError(f"resume: {resume} cannot be resumed from: {lacking}")
        else:
            newer = [path for path in whole if path.resolve() != named]
            if newer and (named.parent != Path(output_dir).resolve() or whole[0].resolve() != named):
                raise UserError(
                    f"resume: {resume} is followed by {newer[0]}, which saving would have to overwrite; choose "
                    f"another output_dir, or remove {newer[0].name} and what is newer"
                )
            return resume
    reasons = []
    for checkpoint in found:
        lacking = passed.get(str(checkpoint)) or what_it_lacks(checkpoint)
        if not lacking:
            for reason in reasons:
                logger.warning("passed over: %s", reason)
            return str(checkpoint)
        reasons.append(f"{checkpoint}: {lacking}")
    if found:
        raise UserError(
            f"{output_dir} holds no checkpoint that can be gone on from:\n  " + "\n  ".join(reasons) + "\n"
            "bring it back, or remove these directories (or choose another output_dir) to start over"
        )
    if resume == "must":
        raise UserError(f"resume: must, but {output_dir} holds no complete checkpoint")
    return None


def what_it_lacks(checkpoint: Path, resume: bool = True) -> str:
    """Why a directory is no whole checkpoint, as far as names and sizes tell; empty when they tell nothing.

    `resume`: to be gone on from. One that was saved without its optimizer is whole, but not for that.
    """
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        seal = read_seal(checkpoint)
        files, resumable = dict(seal["files"]), seal["resumable"]
        sizes = {name: int(size) for name, (size, _) in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        return f"{SEAL} is {'missing' if missing else 'broken'}, so it was not saved to its end by this program"
    if resume and not resumable:
        return "it has no optimizer state (saved with save_only_model)"
    for name, size in sizes.items():
        try:
            there = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if there != size:
            return f"{name} has {there:,} bytes, {size:,} were saved"
    for name in sorted(set(files_of(checkpoint)) - set(sizes)):
        if Path(name).suffix in LOADED:
            return f"{name} was not saved with it, and could be loaded; move it away"
    return ""


def damage(checkpoint: Path, share: Callable[[list[str]], list[str]], gather: Callable[[list[Any]], list[Any]]) -> str:
    """Which file of a checkpoint is not what was saved, empty when all are.

    `share` gives this process its part of the files, `gather` brings the findings of all together.
    """
    try:
        files = read_seal(checkpoint)["files"]
        wrong = [name for name in share(sorted(files)) if digest(checkpoint / name) != files[name][1]]
    except (OSError, ValueError):  # a process of another node, which does not see it
        wrong = [SEAL]
    return "; ".join(f"{name} is damaged: its digest is not the one saved" for name in sorted({*gather(wrong)}))


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json`. Raises `ValueError` when it is not as it was written."""
    told = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    if told.pop("digest", None) != digest_of(told):
        raise ValueError(f"{SEAL} has been changed")
    return told


def digest_of(facts: dict[str, Any]) -> str:
    """SHA-256 of what a seal says."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def files_of(checkpoint: Path) -> list[str]:
    """Its files, by their paths in it, without the seal."""
    paths = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in paths if name != SEAL)


def digest(path: Path) -> str:
    """SHA-256 of a file, empty when it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return ""


def sha256(path: Path) -> str:
    """SHA-256 of a file. Raises `OSError` when it cannot be read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def state_missing(checkpoint: Path, processes: int) -> str:
    """What a checkpoint that was just written lacks to be gone on from by so many processes."""
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for what, patterns in {
        "weights": WEIGHTS,
        "optimizer state": OPTIMIZERS,
        **{f"random state of process {rank}": [name] for rank, name in enumerate(states)},
        "scheduler state": ["scheduler.pt", "latest"],  # DeepSpeed keeps it in its own files
        "trainer state": ["trainer_state.json"],
    }.items():
        if not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return what
    sharded = checkpoint / "latest"
    if sharded.exists():
        parts = len(list((checkpoint / sharded.read_text().strip()).glob("*optim_states.pt")))
        if parts != processes:
            return f"optimizer state of {processes - parts} of {processes} processes"
    return ""


def flush(directory: Path) -> None:
    """Write all files of a directory to the disk, and give them the modes that the umask asks for.

    safetensors writes for the owner alone, whatever the umask.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if not path.is_dir():
            with contextlib.suppress(PermissionError):  # of another owner, or on a file system without modes
                path.chmod(0o666 & ~umask)
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Write a file or the entries of a directory to the disk, where its file system can be told to."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def seal(directory: Path, digests: dict[str, str], facts: dict[str, Any]) -> None:
    """Write `checkpoint.json` into a directory that is flushed: `facts`, and size and digest of every file."""
    files = {name: [(directory / name).stat().st_size, digests[name]] for name in files_of(directory)}
    told = json.loads(json.dumps({**facts, "files": files}, default=str))
    write_whole(directory / SEAL, json.dumps({**told, "digest": digest_of(told)}, indent=1) + "\n")


def write_whole(path: Path, text: str, durable: bool = True) -> None:
    """Write a file so that it has the old or the new text, whenever the process dies; `durable`, or the machine."""
    partial = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def publish(staged: Path, output_dir: Path) -> None:
    """Give a sealed checkpoint its name; one of that name was passed over, and is put aside."""
    named = output_dir / staged.name
    if named.exists():
        aside = output_dir / f"damaged-{named.name}"
        logger.warning("%s was passed over; it is now %s", named, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        named.rename(aside)
    staged.rename(named)
    sync(output_dir)


def rotate(output_dir: Path, limit: int | None, best: str | None, passed: Collection[str] = ()) -> None:
    """Let the oldest checkpoints go that are more than `limit`, never the newest and the best.

    Only whole ones count, none that was `passed` over: upstream counts directories, and could let the last whole one
    go.
    """
    found = [path for path in checkpoints(output_dir) if str(path) not in passed]
    whole = [path for path in found if not what_it_lacks(path, resume=False)]
    kept = whole[:1] + [path for path in whole[1:] if str(path) == best]
    for path in whole if limit else ():
        if path not in kept and len(kept) < limit:
            kept.append(path)
        elif path not in kept:  # out of sight first: it must not be found half removed
            (output_dir / SAVING).mkdir(exist_ok=True)
            gone = path.rename(output_dir / SAVING / path.name)
            shutil.rmtree(gone, ignore_errors=True)


def require_room(output_dir: Path, name: str) -> None:
    """Raise `Stopped` when the next checkpoint, as large as the last, does not fit on the disk."""
    needed = size_of_last(output_dir)
    if shutil.disk_usage(output_dir).free < needed:
        raise no_room(output_dir, name, needed)


def size_of_last(output_dir: Path) -> int:
    """Bytes of the newest checkpoint that is sealed, 0 when there is none."""
    for last in checkpoints(output_dir):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return sum(size for size, _ in read_seal(last)["files"].values())
    return 0


@contextlib.contextmanager
def room(output_dir: Path, name: str) -> Iterator[None]:
    """Tell a disk that is full from other failures, and give back what was taken of it in vain. Raises `Stopped`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(error, output_dir):
            raise
        shutil.rmtree(output_dir / SAVING, ignore_errors=True)
        needed = size_of_last(output_dir) if name.startswith("checkpoint-") else 0
        raise no_room(output_dir, name, needed) from error


def no_room(output_dir: Path, name: str, needed: int) -> Stopped:
    """The error for a disk that is full. What did not fit takes more than is free, whatever was needed before."""
    free = shutil.disk_usage(output_dir).free
    takes = f"it takes {'' if needed > free else 'more than '}{max(needed, free) / 1e6:,.1f} MB"
    older = next(
        (f"{path.name} is whole; " for path in checkpoints(output_dir) if not what_it_lacks(path, resume=False)), ""
    )
    return Stopped(
        f"{name} could not be saved: {takes}, and {free / 1e6:,.1f} MB are free in {output_dir}; {older}make room and "
        "start again with the same command"
    )


def is_full(error: BaseException | None, output_dir: Path) -> bool:
    """Whether an error, or what it came from, says that the disk is full. Some writers say it only in words."""
    while error is not None:
        words = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in words or "Disk quota" in words:
            return True
        if "PytorchStreamWriter" in words and shutil.disk_usage(output_dir).free < 1 << 20:  # it does not say why
            return True
        error = error.__cause__ or error.__context__
    return False
