"""The command line: parse, call the public API, print.

    arguments ──► options ──► _merge, _plan: api.read_config ──► api.merge, api.plan ──► report or plan, printed
                          └─► _demo

It knows neither kind of merge: `api` looks at the method, and plans and reports print themselves. torch and the like
are imported only once the configuration is known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from largemerge import __version__
from largemerge.errors import EXIT_CODE, INTERRUPTED, ConfigError, LargemergeError, RankAborted

if TYPE_CHECKING:
    from largemerge.api import Cluster, Config, Memory, Plan, Report


def own_rank() -> int:
    """Number of this process, as its launcher says: torchrun, Accelerate, DeepSpeed, or MPI."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def _size(text: str, option: str) -> int:
    from largemerge.config_file import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from None


@contextmanager
def _importing(options: argparse.Namespace) -> Iterator[None]:
    """Keeps the garbage collector away from what is imported inside, in a process of our own.

    torch and the like make very many objects that stay to the end. Never to look at them saves a command some tenths
    of a second.
    """
    if not options.own_process:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _memory(options: argparse.Namespace) -> Memory:
    """Reads the limits of memory among the options."""
    from largemerge.api import Memory

    sizes = {
        key: _size(text, f"--memory-{key}")
        for key in ("host", "device")
        if (text := getattr(options, f"memory_{key}")) is not None
    }
    return Memory(**sizes, disk=options.memory_disk)


def _read(options: argparse.Namespace) -> Config:
    """Reads the configuration, and imports what its merge needs."""
    from largemerge import api

    config = api.read_config(options.config, strict=options.strict)
    _quiet_libraries()
    with _importing(options):
        api.preload(config)
    return config


def _merge(options: argparse.Namespace) -> int:
    from largemerge import api

    max_shard_bytes, memory = _size(options.max_shard_size, "--max-shard-size"), _memory(options)
    try:
        config = _read(options)
        from rich.console import Console

        from largemerge.machine import reuse_freed_memory

        def planned(made: Plan) -> None:
            reuse_freed_memory(sparingly=made.sparing)
            if options.quiet:  # else the merge tells all notes
                _print_warnings(made)

        reuse_freed_memory(sparingly=True)
        report: Report = api.merge(
            config,
            options.out,
            device=options.device,
            resume=options.resume,
            force=options.force,
            max_shard_bytes=max_shard_bytes,
            quiet=options.quiet,
            verify=not options.no_verify,
            intermediate_dir=options.intermediate_dir,
            memory=memory,
            planned=planned,
        )
    except KeyboardInterrupt:
        return _interrupted(options)
    if not options.quiet:
        report.print(Console(stderr=True, markup=False, emoji=False))
    return 0


def _print_warnings(plan: Plan) -> None:
    """Prints the warnings of a plan before the long work."""
    from largemerge.config_file import WARNING

    if own_rank() == 0:
        for note in plan.notes:
            if note.startswith(WARNING):
                print(f"largemerge: {note}", file=sys.stderr)


def _interrupted(options: argparse.Namespace) -> int:
    """Says how to go on with an interrupted merge, if it has begun."""
    from largemerge.output import INTERMEDIATE_FOLDER, WORKING_FOLDER

    begun = [options.out / WORKING_FOLDER / name for name in ("manifest.json", INTERMEDIATE_FOLDER)]
    if own_rank() != 0 or not any(path.exists() for path in [*begun, options.intermediate_dir] if path is not None):
        raise KeyboardInterrupt
    kept = [argument for argument in options.given if argument not in ("--force", "--resume")]
    command = shlex.join(["largemerge", *kept, "--resume"])
    print(f"\nlargemerge: interrupted; what is finished is safe. Go on with:\n\n    {command}\n", file=sys.stderr)
    return INTERRUPTED


def _plan(options: argparse.Namespace) -> int:
    from largemerge import api

    memory, cluster = _memory(options), _cluster(options)
    made: Plan = api.plan(
        _read(options),
        device=options.device,
        probe=options.probe,
        num_ranks=options.num_ranks,
        cluster=cluster,
        from_config=options.from_config,
        memory=memory,
    )
    if options.json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        from rich.console import Console

        made.print(Console(markup=False, emoji=False))
    return EXIT_CODE if made.problems else 0


def _cluster(options: argparse.Namespace) -> Cluster | None:
    """Reads the description of other machines among the options, if there is one."""
    from largemerge import api

    names = ("num_nodes", "gpus_per_node", "gpu", "interconnect", "disk_rate", "node_memory")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    return api.cluster(**asked) if asked else None


def _demo(options: argparse.Namespace) -> int:
    _quiet_libraries()
    from largemerge.demo import run_demo

    run_demo(options.out)
    return 0


def _quiet_libraries() -> None:
    """Keeps other libraries' progress bars and advice out of ours; what matters is in our own report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # By default 1024, of half a megabyte each: as many as there are batches of unlike lengths, times their products.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


COMMANDS = {"merge": _merge, "plan": _plan, "demo": _demo}


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
    except RankAborted:
        code = EXIT_CODE
    except LargemergeError as error:
        print(f"largemerge: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        print("\nlargemerge: interrupted", file=sys.stderr)
        code = INTERRUPTED
    return code


class _Numbered(io.TextIOBase):
    """A stream whose lines begin with the rank, for several processes on one terminal."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._prefix, self._begins = stream, f"[rank {rank}] ", True

    def write(self, text: str) -> int:
        """Writes a text, with the rank before each line."""
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._begins else line)
            self._begins = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flushes the wrapped stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """File descriptor of the wrapped stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Always False, so that only rank 0 draws a progress bar."""
        return False


def _numbered(stream: TextIO) -> TextIO:
    """Wraps a stream so that lines begin with the rank; rank 0 keeps it as it is."""
    rank = own_rank()
    return cast(TextIO, _Numbered(stream, rank)) if rank else stream


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion script and ends; the library that writes it is imported only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        shells = ("bash", "zsh", "tcsh")
        super().__init__(option_strings, dest, choices=shells, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, __: str | None = None) -> None:
        import shtab

        for action in _all_actions(parser):
            if action.type is Path:
                setattr(action, "complete", shtab.FILE)  # noqa: B010 (argparse declares no such attribute)
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _all_actions(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largemerge", description="Merge K fine-tuned checkpoints of one architecture, a block at a time."
    )
    # DeepSpeed's launcher gives it to every process; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"largemerge {__version__}")
    parser.add_argument("--print-completion", action=_PrintCompletion, help="print what completes commands in a shell")
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
    merge.add_argument("--strict", action="store_true", help="warnings are errors")
    merge.add_argument("--quiet", action="store_true", help="no progress, no closing table")
    merge.add_argument("--no-verify", action="store_true", help="do not measure, at the end, what is in the output")
    plan = commands.add_parser("plan", help="show what a merge would do, without reading weights")
    plan.add_argument("config", type=Path, help="a YAML file")
    plan.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    _add_memory_options(plan)
    plan.add_argument("--strict", action="store_true", help="warnings are errors")
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
