"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, cast

from largemerge.commands import COMMANDS, own_rank
from largemerge.errors import EXIT_CODE, INTERRUPTED, LargemergeError, ToldError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `largemerge` command and exits: 0 done, 2 a mistake of the user's, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    options.given, options.own_process = given, arguments is None
    with contextlib.redirect_stderr(_numbered(sys.stderr)):
        sys.exit(_run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        code = COMMANDS[options.command](options)
    except ToldError:
        code = EXIT_CODE
    except LargemergeError as error:
        print(f"largemerge: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        print("\nlargemerge: interrupted", file=sys.stderr)
        code = INTERRUPTED
    return code


class _Numbered(io.TextIOBase):
    """A stream whose lines begin with the rank: what several processes say goes to one terminal."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._prefix, self._begins = stream, f"[rank {rank}] ", True

    def write(self, text: str) -> int:
        """Writes it, each line with the prefix."""
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._begins else line)
            self._begins = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flushes the stream behind it."""
        self._stream.flush()

    def fileno(self) -> int:
        """Of the stream behind it."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Never: only the first rank draws."""
        return False


def _numbered(stream: TextIO) -> TextIO:
    """The stream itself on the first rank."""
    rank = own_rank()
    return cast(TextIO, _Numbered(stream, rank)) if rank else stream


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largemerge", description="Merge K fine-tuned checkpoints of one architecture, a block at a time."
    )
    # DeepSpeed's launcher gives it to every process; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="merge the models of a configuration")
    merge.add_argument("config", type=Path, help="a YAML file")
    merge.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    merge.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    merge.add_argument("--resume", action="store_true", help="go on with an interrupted merge")
    merge.add_argument("--force", action="store_true", help="replace what is in OUT, once the merge is finished")
    merge.add_argument(
        "--intermediate-dir",
        type=Path,
        metavar="FOLDER",
        help="of a file of several merges: keep there what the last one is made of",
    )
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of an output file (default: 5GB)")
    _add_memory_options(merge)
    merge.add_argument("--quiet", action="store_true", help="no progress, no closing table")
    plan = commands.add_parser("plan", help="show what a merge would do, without reading weights")
    plan.add_argument("config", type=Path, help="a YAML file")
    plan.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    _add_memory_options(plan)
    plan.add_argument("--no-probe", dest="probe", action="store_false", help="no time estimate, no seconds spent on it")
    plan.add_argument(
        "--num-ranks", type=int, default=1, metavar="N", help="what each of N processes would hold, move and compute"
    )
    plan.add_argument(
        "--from-config", action="store_true", help="look at config.json files alone: no weights, no calibration data"
    )
    elsewhere = plan.add_argument_group("machines that are not here, by their data sheets")
    elsewhere.add_argument("--num-nodes", type=int, metavar="N", help="plan for so many nodes (default: 1)")
    elsewhere.add_argument("--gpus-per-node", type=int, metavar="N", help="plan for so many GPUs in each (default: 8)")
    elsewhere.add_argument("--gpu", metavar="NAME", help="a100, h100 (default), h200, b200, l40s or rtx4090")
    elsewhere.add_argument("--interconnect", metavar="RATE", help="between nodes, each way (default: 400Gbit)")
    elsewhere.add_argument("--disk-rate", metavar="RATE", help="at which a node reads (default: 2GB/s)")
    elsewhere.add_argument("--node-memory", metavar="SIZE", help="host memory of a node (default: 1TiB)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    demo = commands.add_parser(
        "demo", help="train three tiny models, merge them, compare; offline, under a minute or two"
    )
    demo.add_argument("--out", type=Path, default=Path("largemerge-demo"), help="folder (default: largemerge-demo)")
    return parser


def _add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory-device", metavar="SIZE", help="most memory on the GPU (default: what is free)")
    parser.add_argument("--memory-host", metavar="SIZE", help="most memory of this process (default: what is free)")
    parser.add_argument(
        "--memory-disk", type=Path, metavar="FOLDER", help="for hidden states that do not fit (default: OUT)"
    )
