"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from largemerge.config import load_config
from largemerge.errors import EXIT_CODE, ConfigError, LargemergeError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `largemerge` command and exits: 0 done, 2 a mistake of the user's, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    options.given = given
    try:
        code = {"merge": _merge, "plan": _plan, "demo": _demo}[options.command](options)
    except LargemergeError as error:
        print(f"largemerge: {error}", file=sys.stderr)
        code = EXIT_CODE
    except KeyboardInterrupt:
        print("\nlargemerge: interrupted", file=sys.stderr)
        code = _INTERRUPTED
    sys.exit(code)


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `500MiB`, `1000000`.

    Raises:
        ConfigError: If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    unit = match[2] if match else None
    if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
        raise ConfigError(f"--max-shard-size {text!r}: expected a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[unit])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largemerge", description="Merge K fine-tuned checkpoints of one architecture, a block at a time."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="merge the models of a configuration")
    merge.add_argument("config", type=Path, help="a YAML file")
    merge.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    merge.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    merge.add_argument("--resume", action="store_true", help="go on with an interrupted merge")
    merge.add_argument("--force", action="store_true", help="replace what is in OUT, once the merge is finished")
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of an output file (default: 5GB)")
    merge.add_argument("--quiet", action="store_true", help="no progress, no closing table")
    plan = commands.add_parser("plan", help="show what a merge would do, without reading weights")
    plan.add_argument("config", type=Path, help="a YAML file")
    plan.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    demo = commands.add_parser(
        "demo", help="train three tiny models, merge them, compare; offline, under a minute or two"
    )
    demo.add_argument("--out", type=Path, default=Path("largemerge-demo"), help="folder (default: largemerge-demo)")
    return parser


def _merge(options: argparse.Namespace) -> int:
    from rich.console import Console

    max_shard_bytes = parse_size(options.max_shard_size)
    config = load_config(options.config)
    _quiet_libraries()
    from largemerge.merging import merge
    from largemerge.output import WORKING_FOLDER
    from largemerge.report import print_report

    try:
        report = merge(
            config,
            options.out,
            device=options.device,
            resume=options.resume,
            force=options.force,
            max_shard_bytes=max_shard_bytes,
            quiet=options.quiet,
        )
    except KeyboardInterrupt:
        if (options.out / WORKING_FOLDER / "manifest.json").exists():
            kept = [argument for argument in options.given if argument not in ("--force", "--resume")]
            command = shlex.join(["largemerge", *kept, "--resume"])
            print(
                f"\nlargemerge: interrupted; what is finished is safe. Go on with:\n\n    {command}\n", file=sys.stderr
            )
            return _INTERRUPTED
        raise
    if not options.quiet:
        print_report(report, str(options.out), Console(stderr=True, markup=False, emoji=False))
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    _quiet_libraries()
    from largemerge.merging import plan
    from largemerge.report import print_plan

    made = plan(config, device=options.device)
    if options.json:
        print(json.dumps(made.to_json(), indent=2))
    else:
        from rich.console import Console

        print_plan(made, Console(markup=False, emoji=False))
    return EXIT_CODE if made.problems else 0


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
