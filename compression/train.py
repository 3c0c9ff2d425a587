"""Makes the student, a small mixture-of-experts model to try compression on. Three commands, in this order:

python -m compression.train corpus --corpus DIR          # Debian packages -> text and tokenizer (needs apt-get)
python -m compression.train run --corpus DIR --run RUN   # --minutes in all; after a break the same command goes on
python -m compression.train export --corpus DIR --run RUN --out FOLDER   # int8, served by slimserve
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from compression.errors import CompressionError
from compression.student import corpus, tokens
from compression.student.checkpoint import load_checkpoint
from compression.student.folder import write_folder
from compression.student.shape import SMOKE, Shape
from compression.student.tokenizer import TOKENIZER, train_tokenizer
from compression.student.training import Schedule, train

NAME = "moe-student"
"""By which the server finds the shipped one."""
VALIDATION_WINDOWS = 64
TOKENIZER_SAMPLE = 8
"""The tokenizer learns from one document in so many."""
SMOKE_SCHEDULE = Schedule(
    steps=300, sequences=16, length=128, parts=1, peak=4e-3, warmup=20, rewarm=10, log_every=20, validate_every=100
)
CPU_SCHEDULE = Schedule(sequences=8, length=512, parts=1, warmup=50, rewarm=20, log_every=20, validate_every=100)
"""A core does 2,600 tokens a second: enough to try everything, not to learn much."""
SMOKE_PACKAGES = ("debian-policy", "git-doc", "harden-doc")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compression.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    for name, action in (("corpus", _corpus), ("run", _run), ("export", _export)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("--corpus", type=Path, required=True, help="folder of texts and tokenizer")
        if name == "corpus":
            command.add_argument("--packages", type=Path, help="folder of the .deb files; default: CORPUS/packages")
        else:
            command.add_argument("--run", type=Path, required=True, help="folder of checkpoint and log")
        if name == "run":
            command.add_argument("--minutes", type=float, default=7.0, help="of training, all calls together")
            command.add_argument("--slice", type=float, help="stop after so many minutes of this call; default: never")
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if name == "export":
            command.add_argument("--out", type=Path, required=True)
        else:
            command.add_argument("--smoke", action="store_true", help="a tiny model and vocabulary, to try the chain")
    chosen = parser.parse_args(arguments)
    try:
        chosen.action(chosen)
    except CompressionError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _shape(chosen: argparse.Namespace) -> Shape:
    return SMOKE if chosen.smoke else Shape()


def _corpus(chosen: argparse.Namespace) -> None:
    packages = corpus.pinned_packages()
    if chosen.smoke:
        packages = [package for package in packages if package.package in SMOKE_PACKAGES]
    debs = corpus.fetch(packages, chosen.packages or chosen.corpus / "packages", _say)
    corpus.build(packages, debs, chosen.corpus, _say)
    _say("learning the tokenizer")
    sample = islice(corpus.texts_of(chosen.corpus, corpus.TRAIN), None, None, TOKENIZER_SAMPLE)
    train_tokenizer(sample, _shape(chosen).vocab, chosen.corpus)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    if not path.is_file():
        raise CompressionError(
            f"there is no {TOKENIZER} in {folder.name}; make it with: python -m compression.train corpus"
        )
    return Tokenizer.from_file(str(path))


def _run(chosen: argparse.Namespace) -> None:
    shape, device = _shape(chosen), torch.device(chosen.device)
    schedule = SMOKE_SCHEDULE if chosen.smoke else CPU_SCHEDULE if device.type == "cpu" else Schedule()
    schedule = replace(schedule, seconds=chosen.minutes * 60)
    ids, validation = (_ids(chosen.corpus, part) for part in (corpus.TRAIN, corpus.VALID))
    windows = tokens.windows_of(validation, schedule.length, VALIDATION_WINDOWS)
    _say(f"{len(ids):,} tokens to train on, at most {schedule.steps} steps of {schedule.sequences * schedule.length:,}")
    batches = tokens.Batches(ids, schedule.sequences, schedule.length, schedule.seed, device)
    seconds = math.inf if chosen.slice is None else chosen.slice * 60
    outcome = train(chosen.run, shape, schedule, batches, windows, device, seconds, time.monotonic, _say)
    done = f"step {outcome.progress.step} after {outcome.progress.seconds:.0f} s"
    _say(f"finished: {done}" if outcome.finished else f"{done}; the same command goes on")


def _ids(folder: Path, part: str) -> tokens.Ids:
    """Where they were encoded before, the texts need not be there."""
    return tokens.cached_ids(folder / f"{part}.npy", corpus.texts_of(folder, part), _tokenizer(folder))


def _export(chosen: argparse.Namespace) -> None:
    from compression.compress import Job, compress
    from compression.recipe import load_recipe

    loaded = load_checkpoint(chosen.run, torch.device("cpu"))
    if loaded is None:
        raise CompressionError(f"there is no checkpoint in {chosen.run.name}; train first")
    with tempfile.TemporaryDirectory(prefix="slimserve-student-") as scratch:
        plain = Path(scratch) / NAME
        write_folder(loaded[0], chosen.corpus, plain)
        compress(Job(plain, NAME, load_recipe("int8"), chosen.out), lambda progress: None, time.monotonic)
    size = sum(path.stat().st_size for path in chosen.out.glob("*.safetensors"))
    _say(f"{chosen.out}: {size / 2**20:.2f} MiB of weights")


if __name__ == "__main__":
    sys.exit(main())
