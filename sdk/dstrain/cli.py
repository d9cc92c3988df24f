"""The `dstrain` command, also `kubectl dstrain`.

Each verb imports what it needs when it is called: `dstrain --help` must be there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

OK, FAILED, USAGE = 0, 1, 2
RUNS = Path("runs")
_OURS = ("dstrain", "dstrain_api", "deepseek_operator", "deepseek_trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 0 done, 1 failed, 2 the input has to be changed."""
    asked = _parser().parse_args(arguments)
    try:
        return int(asked.do(asked))
    except ValueError as error:  # a user's mistake: the text says what to change
        for line in _problems(error):
            print(f"error: {line}", file=sys.stderr)
        return USAGE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        print(
            f"error: this command needs the package {error.name}; "
            "pip install 'dstrain[operator,trainer]'",
            file=sys.stderr,
        )
        return USAGE
    except KeyboardInterrupt:
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dstrain", description="Train DeepSeek-style models, here or on Kubernetes."
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    run = verbs.add_parser("run", help="train on this machine, as a cluster would")
    run.add_argument("file", type=Path, metavar="FILE.yaml", help="a DeepSeekTraining")
    run.add_argument(
        "--dir",
        type=Path,
        help="folder of the run; the same again goes on (default: runs/NAME)",
    )
    run.add_argument("--follow", action="store_true", help="also print what the workers write")
    run.set_defaults(do=_run)

    validate = verbs.add_parser("validate", help="check files without running them")
    validate.add_argument("files", type=Path, nargs="+", metavar="FILE.yaml")
    validate.set_defaults(do=_validate)

    logs = verbs.add_parser("logs", help="print what a worker of a local run has written")
    logs.add_argument("worker", nargs="?", default="0", help="its number or its pod (default: 0)")
    logs.add_argument("--dir", type=Path, help="folder of the run (default: the newest in runs/)")
    logs.set_defaults(do=_logs)

    data = verbs.add_parser("data", help="prepare text for training")
    data_verbs = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = data_verbs.add_parser("prepare", help="turn text files into a corpus of tokens")
    prepare.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help=".txt, .md, .jsonl or a folder of them",
    )
    prepare.add_argument("--output", type=Path, required=True, help="folder to make")
    prepare.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json (default: one is trained on the inputs)"
    )
    prepare.add_argument(
        "--vocabulary", type=int, default=32_768, help="entries of a tokenizer that is trained"
    )
    prepare.set_defaults(do=_prepare)

    version = verbs.add_parser("version", help="print the version")
    version.set_defaults(do=_version)
    return parser


def _run(asked: argparse.Namespace) -> int:
    from dstrain.manifest import checked_training

    training = checked_training(asked.file)
    from dstrain.local.run import run

    return run(training, asked.dir or RUNS / training["metadata"]["name"], follow=asked.follow)


def _validate(asked: argparse.Namespace) -> int:
    from dstrain.manifest import checked_training

    code = OK
    for file in asked.files:
        try:
            training = checked_training(file)
        except ValueError as error:
            code = USAGE
            for line in _problems(error):
                prefix = "" if line.startswith(str(file)) else f"{file}: "
                print(f"{prefix}{line}", file=sys.stderr)
        else:
            print(f"{file}: {training['kind']} {training['metadata']['name']} is valid")
    return code


def _logs(asked: argparse.Namespace) -> int:
    from dstrain.local.logs import find_log, newest_run

    log = find_log(asked.dir or newest_run(RUNS), asked.worker)
    with log.open("rb") as written:
        while chunk := written.read(1 << 16):
            sys.stdout.buffer.write(chunk)
    return OK


def _prepare(asked: argparse.Namespace) -> int:
    from deepseek_trainer.data.prepare import prepare

    manifest = prepare(
        asked.inputs, asked.output, tokenizer=asked.tokenizer, vocabulary=asked.vocabulary
    )
    print(f"{asked.output}: {manifest.tokens:,} tokens, vocabulary {manifest.vocabulary:,}")
    return OK


def _version(_: argparse.Namespace) -> int:
    from importlib.metadata import version

    print(f"dstrain {version('dstrain')}")
    return OK


def _problems(error: ValueError) -> Sequence[str]:
    return getattr(error, "problems", None) or [str(error)]
