"""What the commands do: read options and configuration, call, print.

The command line: parse, call, print.
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

from largemerge.config_file import parse_size
from largemerge.errors import EXIT_CODE, INTERRUPTED, ConfigError, LargemergeError, ToldError
from largemerge.regression.config import MergeConfig, load_config

if TYPE_CHECKING:
    from largemerge.regression.plan import MergePlan
    from largemerge.regression.planning.rates import Cluster


def own_rank() -> int:
    """As the launcher says; MPI, which Accelerate knows too, names it otherwise."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def _size(text: str, option: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from None


@contextmanager
def _importing(options: argparse.Namespace) -> Iterator[None]:
    """For imports of torch and the like: they make very many objects that stay to the end.

    In a process of our own the garbage collector leaves them alone, then, later, and at the end, which saves a command
    some tenths of a second.
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


def _config(options: argparse.Namespace) -> MergeConfig:
    """The configuration, with the memory limits of the command line over those of the file."""
    limits: dict[str, int | str] = {}
    for key in ("device", "host"):
        text = getattr(options, f"memory_{key}")
        if text is not None:
            limits[key] = _size(text, f"--memory-{key}")
    if options.memory_disk is not None:
        limits["disk"] = str(options.memory_disk.expanduser().absolute())
    config = load_config(options.config)
    return config.model_copy(update={"memory": config.memory.model_copy(update=limits)})


def _merge(options: argparse.Namespace) -> int:
    from largemerge.api import has_documents, is_data_free

    if has_documents(options.config):
        run = _merge_data_free
    elif options.intermediate_dir is not None:
        raise ConfigError("--intermediate-dir is for files of several merges, separated by '---'")
    else:
        run = _merge_data_free if is_data_free(options.config) else _merge_by_regression
    try:
        return run(options, _size(options.max_shard_size, "--max-shard-size"))
    except KeyboardInterrupt:
        from largemerge.output import INTERMEDIATE_FOLDER, WORKING_FOLDER

        begun = [options.out / WORKING_FOLDER / name for name in ("manifest.json", INTERMEDIATE_FOLDER)]
        if own_rank() == 0 and any(path.exists() for path in [*begun, options.intermediate_dir] if path is not None):
            kept = [argument for argument in options.given if argument not in ("--force", "--resume")]
            command = shlex.join(["largemerge", *kept, "--resume"])
            print(
                f"\nlargemerge: interrupted; what is finished is safe. Go on with:\n\n    {command}\n", file=sys.stderr
            )
            return INTERRUPTED
        raise


def _merge_by_regression(options: argparse.Namespace, max_shard_bytes: int) -> int:
    config = _config(options)
    _quiet_libraries()
    with _importing(options):
        from rich.console import Console

        from largemerge.machine import reuse_freed_memory
        from largemerge.regression.merge import merge_by_regression
        from largemerge.regression.report import print_report

    def planned(made: MergePlan) -> None:
        reuse_freed_memory(sparingly=made.footprint.sparing)

    reuse_freed_memory(sparingly=True)
    report = merge_by_regression(
        config, options.out, max_shard_bytes=max_shard_bytes, planned=planned, **_merge_options(options)
    )
    if not options.quiet:
        print_report(report, str(options.out), Console(stderr=True, markup=False, emoji=False))
    return 0


def _merge_data_free(options: argparse.Namespace, max_shard_bytes: int) -> int:
    host, device = _memory_limits(options)
    with _importing(options):
        from rich.console import Console

        from largemerge.api import has_documents
        from largemerge.data_free.merge import merge_data_free
        from largemerge.data_free.multi import merge_series
        from largemerge.data_free.report import print_report
        from largemerge.data_free.resources import Limits
        from largemerge.machine import reuse_freed_memory

    reuse_freed_memory(sparingly=host is not None)
    more = {"max_shard_bytes": max_shard_bytes, "limits": Limits(host, device), **_merge_options(options)}
    if has_documents(options.config):
        report = merge_series(options.config, options.out, options.intermediate_dir, **more)
    else:
        report = merge_data_free(options.config, options.out, **more)
    if not options.quiet:
        print_report(report, str(options.out), Console(stderr=True, markup=False, emoji=False))
    return 0


def _merge_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("device", "resume", "force", "quiet")}


def _memory_limits(options: argparse.Namespace) -> tuple[int | None, int | None]:
    """Of a data-free merge: on the host and on the GPU."""
    if options.memory_disk is not None:
        raise ConfigError("--memory-disk: not for data-free methods, which hold nothing there")
    texts = ((options.memory_host, "--memory-host"), (options.memory_device, "--memory-device"))
    host, device = (None if text is None else _size(text, option) for text, option in texts)
    return host, device


def _plan(options: argparse.Namespace) -> int:
    from largemerge.api import has_documents, is_data_free

    if has_documents(options.config):
        return _plan_data_free(options)
    return _plan_data_free(options) if is_data_free(options.config) else _plan_regression(options)


def _plan_regression(options: argparse.Namespace) -> int:
    if options.num_ranks < 1:
        raise ConfigError(f"--num-ranks {options.num_ranks}: expected 1 or more")
    config = _config(options)
    _quiet_libraries()
    with _importing(options):
        from largemerge.regression.merge import plan_regression
        from largemerge.regression.report import print_plan

    made = plan_regression(
        config,
        device=options.device,
        probe=options.probe,
        num_ranks=options.num_ranks,
        cluster=_cluster(options),
        from_config=options.from_config,
    )
    if options.json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        from rich.console import Console

        print_plan(made, Console(markup=False, emoji=False))
    return EXIT_CODE if made.problems else 0


def _plan_data_free(options: argparse.Namespace) -> int:
    host, device = _memory_limits(options)
    if options.num_ranks != 1 or options.from_config or _cluster(options) is not None:
        raise ConfigError("ranks, other machines and --from-config are for regression methods")
    with _importing(options):
        from largemerge.api import has_documents
        from largemerge.data_free.multi import plan_series
        from largemerge.data_free.plan import plan_data_free
        from largemerge.data_free.report import print_plan
        from largemerge.data_free.resources import Limits

    plan = plan_series if has_documents(options.config) else plan_data_free
    made = plan(options.config, device=options.device, limits=Limits(host, device), probe=options.probe)
    if options.json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        from rich.console import Console

        print_plan(made, Console(markup=False, emoji=False))
    return EXIT_CODE if made.problems else 0


def _cluster(options: argparse.Namespace) -> Cluster | None:
    """The machines to plan for, if any option names them."""
    asked = ("num_nodes", "gpus_per_node", "gpu", "interconnect", "disk_rate", "node_memory")
    if all(getattr(options, name) is None for name in asked):
        return None
    from largemerge.regression.planning.rates import Cluster, find_gpu, parse_rate

    num_nodes = 1 if options.num_nodes is None else options.num_nodes
    gpus = 8 if options.gpus_per_node is None else options.gpus_per_node
    for option, number in (("--num-nodes", num_nodes), ("--gpus-per-node", gpus)):
        if number < 1:
            raise ConfigError(f"{option} {number}: expected 1 or more")
    if options.num_ranks != 1:
        raise ConfigError("--num-ranks is for this machine; with other machines there is a rank for every GPU")
    return Cluster(
        num_nodes=num_nodes,
        gpus_per_node=gpus,
        gpu=find_gpu(options.gpu or "h100"),
        interconnect=parse_rate(options.interconnect or "400Gbit", "--interconnect"),
        disk=parse_rate(options.disk_rate or "2GB/s", "--disk-rate"),
        host_memory=_size(options.node_memory or "1TiB", "--node-memory"),
    )


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
