"""The command line: parse, call the public API, print.

    arguments ──► options ──► _merge, _plan, _gram: api.read_config ──► api.merge, … ──► report or plan, printed
                          └─► _demo

It knows neither kind of merge: `api` looks at the method, and plans and reports print themselves. torch and the like
are imported only once the configuration is known to be right.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largemerge import __version__, interrupts
from largemerge.distributed.launcher import Launch, own_rank, read_launch, several_processes
from largemerge.errors import (
    EXIT_CODE,
    UNEXPECTED,
    ConfigError,
    LargemergeError,
    RankAborted,
    advised,
    explain_failures,
)
from largemerge.installed import check_installed
from largemerge.log import LOGGER, stage, tell, verbose_lines, writing_log
from largemerge.streams import leave, output_kept, safe_streams
from largemerge.text_files import json_text

if TYPE_CHECKING:
    from largemerge.adapter_tools.extract import ExtractPlan
    from largemerge.adapter_tools.merge_report import AdapterMergeReport
    from largemerge.adapter_tools.report import ExtractReport
    from largemerge.api import Cluster, Config, Memory, Plan, Report
    from largemerge.data_free.report import DataFreeReport
    from largemerge.evaluation.results import Evaluation
    from largemerge.integrity import FolderCheck
    from largemerge.regression.gram_run import GramReport
    from largemerge.temperature.run import TemperatureReport
    from largemerge.trials.results import CompareReport

    OneProcessReport = GramReport | ExtractReport | AdapterMergeReport | TemperatureReport | DataFreeReport


def _size(text: str, option: str) -> int:
    from largemerge.config_file import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from None


@contextmanager
def _importing(options: argparse.Namespace) -> Iterator[None]:
    """Imports what a command needs, inside; from then on, in a process of our own, an interrupt is raised.

    The garbage collector is kept away meanwhile: torch and the like make very many objects that stay to the end. Never
    to look at them saves a command some tenths of a second.
    """
    stage("importing torch and Transformers")
    if not options.own_process:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
    interrupts.raising()


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

    config = api.read_config(options.config, strict=options.strict, to_gram=options.command == "gram")
    with _importing(options):
        api.preload(config)
    return config


def _merge(options: argparse.Namespace) -> int:
    launch = read_launch()
    with _told_to_all(launch, options):
        from largemerge import api

        max_shard_bytes, memory = _size(options.max_shard_size, "--max-shard-size"), _memory(options)
        api.check_apart(options.config, options.out)
        config = _read(options)
    measuring: list[str] = []  # how to go on, once the output is whole and is being measured
    started = time.time()
    try:
        from largemerge.machine import reuse_freed_memory

        def planned(made: Plan) -> None:
            reuse_freed_memory(sparingly=made.sparing)
            _warn_if_quiet(options, made)

        def written() -> None:
            if options.evaluate is not None:
                measuring.append(_evaluate_command(config, options))
                interrupts.is_safe(_how_to_measure(options, measuring[0]))

        reuse_freed_memory(sparingly=True)
        found: list[Evaluation] = []
        with output_kept(own_process=options.own_process), _told_if_whole(options, measuring):
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
                written=written,
                evaluate=options.evaluate,
                evaluated=found.append,
                limit=options.limit,
            )
    except KeyboardInterrupt as error:
        if not measuring and not _is_whole(options.out, started):
            return _interrupted(options, error)
        if not measuring and options.evaluate is not None:
            measuring.append(_evaluate_command(config, options))
        return _interrupted_when_whole(options, measuring, error)
    stage("")
    if launch.rank == 0:
        _show_report(report, options)
        for evaluation in found if not (options.quiet or options.json) else ():
            _print_table(evaluation, stderr=True)
    return EXIT_CODE if any(evaluation.problems for evaluation in found) else 0


def _gram(options: argparse.Namespace) -> int:
    _check_alone(options)
    from largemerge import api

    memory = _memory(options)
    api.check_apart(options.config, options.out)
    config = _read(options)

    def work() -> GramReport:
        from largemerge.machine import reuse_freed_memory

        reuse_freed_memory(sparingly=True)
        return api.gram(
            config,
            options.out,
            device=options.device,
            resume=options.resume,
            force=options.force,
            quiet=options.quiet,
            memory=memory,
        )

    return _reported(options, work, warns=options.quiet)


def _extract_lora(options: argparse.Namespace) -> int:
    _check_alone(options)
    from largemerge import api

    with _importing(options):
        import largemerge.adapter_tools.extract  # noqa: F401
    from largemerge.machine import reuse_freed_memory

    reuse_freed_memory(sparingly=True)

    def work() -> ExtractReport:
        return api.extract_lora(
            options.fine_tuned,
            options.base,
            options.out,
            rank=options.rank,
            targets=options.targets,
            save_others=options.save_others,
            dtype=options.dtype,
            device=options.device,
            resume=options.resume,
            force=options.force,
            quiet=options.quiet,
            trust_remote_code=options.trust_remote_code,
            planned=partial(_warn_if_quiet, options),
        )

    return _reported(options, work, warns=False)


def _align(options: argparse.Namespace) -> int:
    launch = read_launch()
    with _told_to_all(launch, options):
        from largemerge import api

        max_shard_bytes, memory = _size(options.max_shard_size, "--max-shard-size"), _memory(options)
        with _importing(options):
            import largemerge.data_free.multi  # noqa: F401
    from largemerge.machine import reuse_freed_memory

    reuse_freed_memory(sparingly=True)

    def work() -> DataFreeReport:
        return api.align(
            options.model,
            options.reference,
            options.out,
            residual_stream=options.residual_stream,
            resume=options.resume,
            force=options.force,
            max_shard_bytes=max_shard_bytes,
            quiet=options.quiet,
            memory=memory,
            trust_remote_code=options.trust_remote_code,
            planned=partial(_warn_if_quiet, options),
        )

    return _reported(options, work, warns=False)


def _merge_adapters(options: argparse.Namespace) -> int:
    _check_alone(options)
    from largemerge import api
    from largemerge.adapter_tools.merge_config import load_adapter_merge

    config = load_adapter_merge(options.config)  # before Transformers is imported, which takes seconds
    api.check_apart(options.config, options.out)
    with _importing(options):
        import largemerge.adapter_tools.merge  # noqa: F401

    def work() -> AdapterMergeReport:
        return api.merge_adapters(config, options.out, resume=options.resume, force=options.force, quiet=options.quiet)

    return _reported(options, work, warns=options.quiet)


def _reported(options: argparse.Namespace, work: Callable[[], OneProcessReport], *, warns: bool) -> int:
    """Does the long work of one process, and shows its report; `warns` prints the warnings in it first."""
    try:
        with output_kept(own_process=options.own_process):
            report = work()
    except KeyboardInterrupt as error:
        return _interrupted(options, error)
    stage("")
    if warns:
        _print_warnings(report)
    if read_launch().rank == 0:
        _show_report(report, options)
    return 0


def _show_report(report: Report, options: argparse.Namespace) -> None:
    """Shows the report of a finished merge: as JSON, or as a table unless all is to be quiet."""
    LOGGER.debug("report: %s", json_text(report.to_json()))
    if options.json:
        try:
            print(json_text(report.to_json(), indent=2), flush=True)
        except OSError as error:
            raise LargemergeError(
                f"{error.filename}: {error.strerror}; the work is finished, and its report is in {options.out}"
            ) from error
    elif not options.quiet:
        _print_table(report, stderr=True)


def _print_table(found: Report | Plan | FolderCheck | Evaluation | CompareReport, *, stderr: bool = False) -> None:
    from rich.console import Console

    found.print(Console(stderr=stderr, markup=False, emoji=False))


@contextmanager
def _told_to_all(launch: Launch, options: argparse.Namespace) -> Iterator[None]:
    """Tells the other ranks what is wrong here, so that rank 0 tells it once, and nobody waits for this rank."""
    try:
        yield
    except LargemergeError as error:
        if launch.size > 1:
            from largemerge.distributed.ranks import fail_together

            fail_together(error, on_gpus=options.device != "cpu")
        raise


def _check_alone(options: argparse.Namespace) -> None:
    """Refuses to share the work among ranks, of a command that cannot."""
    if read_launch().size > 1:
        raise ConfigError(f"{options.command} is for one process; start it without a launcher")


def _check_log_file(options: argparse.Namespace) -> None:
    """Refuses a log in the output folder, which would be found not to be empty."""
    writing = ("merge", "gram", "align", "extract-lora", "merge-adapters", "temperature")
    if options.log_file is not None and options.command in writing:
        out, log = os.path.realpath(options.out), os.path.realpath(options.log_file)
        if os.path.commonpath([out, log]) == out:
            raise ConfigError(f"--log-file {options.log_file} is in OUT ({options.out}); expected a file outside of it")


def _warn_if_quiet(options: argparse.Namespace, plan: Plan | ExtractPlan) -> None:
    """Prints a plan's warnings where the work itself tells no notes."""
    if options.quiet:
        _print_warnings(plan)


def _print_warnings(plan: Plan | ExtractPlan | OneProcessReport) -> None:
    """Prints the warnings of a plan before the long work, or of a report that has no plan after it."""
    from largemerge.config_file import WARNING

    if own_rank() == 0:
        for note in plan.notes:
            if note.startswith(WARNING):
                tell(note)


def _interrupted(options: argparse.Namespace, error: KeyboardInterrupt) -> int:
    """Says how to go on with an interrupted merge, if it has begun."""
    from largemerge.output import INTERMEDIATE_FOLDER, WORKING_FOLDER

    begun = [options.out / WORKING_FOLDER / name for name in ("manifest.json", INTERMEDIATE_FOLDER)]
    if own_rank() != 0 or not any(path.exists() for path in [*begun, options.intermediate_dir] if path is not None):
        raise error
    kept = [argument for argument in options.given if argument not in ("--force", "--resume")]
    command = shlex.join(["largemerge", *kept, "--resume"])
    said = str(error) or "interrupted"
    launcher = ", under the same launcher" if several_processes() else ""
    LOGGER.info(said)
    text = f"\nlargemerge: {said}; what is finished is safe. Go on with{launcher}:\n\n    {command}\n"
    print(text, file=sys.stderr)
    return interrupts.exit_code(error)


def _evaluate_command(config: Config, options: argparse.Namespace) -> str:
    """Writes the command that measures a finished merge as `merge --evaluate` would have."""
    from largemerge import api
    from largemerge.evaluation.config import load_evaluation

    models, base = api.models_of(config)
    own_base = [] if base is None or load_evaluation(options.evaluate).base is not None else ["--base", base]
    given = {"--limit": options.limit, "--device": options.device if options.device != "auto" else None}
    given |= {f"--memory-{key}": getattr(options, f"memory_{key}") for key in ("device", "host", "disk")}
    more = [str(part) for name, value in given.items() if value is not None for part in (name, value)]
    references = dict.fromkeys(model.reference for model in models)
    command = ["largemerge", "evaluate", str(options.evaluate), *references, str(options.out)]
    return shlex.join([*command, *own_base, "--out", str(options.out), *more])


def _how_to_measure(options: argparse.Namespace, command: str) -> str:
    """Says that a merge is whole although measuring it was broken off, and how to go on."""
    launcher = " under the same launcher" if several_processes() else ""
    return f"the merge in {options.out} is whole; measure it{launcher} by: {command}"


@contextmanager
def _told_if_whole(options: argparse.Namespace, measuring: Sequence[str]) -> Iterator[None]:
    """Adds to what fails that the merge is whole, and how to go on, where only measuring it has failed."""
    try:
        yield
    except LargemergeError as error:
        if not measuring or not error.problems:
            raise
        raise type(error)(*advised(error.problems, _how_to_measure(options, measuring[0]))) from error
    except Exception:  # a mistake of ours, which is told as one
        if measuring:
            tell(_how_to_measure(options, measuring[0]))
        raise


def _is_whole(out: Path, since: float) -> bool:
    """Whether a merge that began at a time, in seconds since the epoch, has finished its folder."""
    from largemerge.output import REPORT_FILE, WORKING_FOLDER

    try:
        return (out / REPORT_FILE).stat().st_mtime >= since and not (out / WORKING_FOLDER).exists()
    except OSError:
        return False


def _interrupted_when_whole(options: argparse.Namespace, measuring: Sequence[str], error: KeyboardInterrupt) -> int:
    """Says that the merge is finished, and how to go on where it was being measured, or about to be."""
    if own_rank() != 0:
        raise error
    said = str(error) or "interrupted"
    LOGGER.info(said)
    what = _how_to_measure(options, measuring[0]) if measuring else f"the merge in {options.out} is whole"
    print(f"\nlargemerge: {said}; {what}", file=sys.stderr)
    return interrupts.exit_code(error)


def _plan(options: argparse.Namespace) -> int:
    if read_launch().rank != 0:
        return 0  # rank 0 plans and prints
    from largemerge import api

    memory, cluster = _memory(options), _cluster(options)
    with output_kept(own_process=options.own_process):
        made: Plan = api.plan(
            _read(options),
            device=options.device,
            probe=options.probe,
            num_ranks=options.num_ranks,
            cluster=cluster,
            from_config=options.from_config,
            memory=memory,
        )
    return _show(made, options)


def _show(found: Plan | FolderCheck | Evaluation | CompareReport, options: argparse.Namespace) -> int:
    """Prints what was found, as JSON or as a table; returns the exit code."""
    stage("")
    if options.json:
        print(json_text(found.to_json(), indent=2))
    else:
        _print_table(found)
    return EXIT_CODE if found.problems else 0


def _show_once(found: Evaluation | CompareReport, launch: Launch, options: argparse.Namespace) -> int:
    """Shows what was found, on rank 0; returns the exit code of every rank."""
    if launch.rank != 0:
        return EXIT_CODE if found.problems else 0
    return _show(found, options)


def _cluster(options: argparse.Namespace) -> Cluster | None:
    """Reads the description of other machines among the options, if there is one."""
    from largemerge import api

    names = ("num_nodes", "gpus_per_node", "gpu", "interconnect", "disk_rate", "node_memory")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    return api.cluster(**asked) if asked else None


def _verify(options: argparse.Namespace) -> int:
    from largemerge import api

    with _importing(options):
        import largemerge.integrity  # noqa: F401
    stage("comparing what is there with what was written")
    return _show(api.verify(options.out, trust_remote_code=options.trust_remote_code), options)


def _evaluate(options: argparse.Namespace) -> int:
    launch = read_launch()
    with _told_to_all(launch, options):
        from largemerge import api

        memory = _memory(options)
        with _importing(options):
            import largemerge.evaluation.evaluate  # noqa: F401
            from largemerge.evaluation.config import load_evaluation
            from largemerge.machine import reuse_freed_memory
        config = load_evaluation(options.config)
        reuse_freed_memory(sparingly=False)
    with output_kept(own_process=options.own_process):
        found = api.evaluate(
            config,
            options.models,
            out=options.out,
            device=options.device,
            limit=options.limit,
            memory=memory,
            quiet=options.quiet,
            base=options.base,
            force=options.force,
        )
    return _show_once(found, launch, options)


def _temperature(options: argparse.Namespace) -> int:
    _check_alone(options)
    from largemerge import api

    memory = _memory(options)
    with _importing(options):
        import largemerge.temperature.run  # noqa: F401
        from largemerge.machine import reuse_freed_memory
    reuse_freed_memory(sparingly=False)

    def work() -> TemperatureReport:
        return api.fit_temperature(
            options.config,
            options.model,
            options.out,
            device=options.device,
            limit=options.limit,
            memory=memory,
            resume=options.resume,
            force=options.force,
            quiet=options.quiet,
        )

    return _reported(options, work, warns=options.quiet)


def _compare(options: argparse.Namespace) -> int:
    launch = read_launch()
    with _told_to_all(launch, options), _importing(options):
        from largemerge.trials.run import compare
    with output_kept(own_process=options.own_process):
        found = compare(
            options.config,
            options.evaluation,
            out=options.out,
            methods=[name.strip() for name in options.methods.split(",") if name.strip()],
            sweep=options.sweep,
            search=options.search,
            num_trials=options.num_trials,
            device=options.device,
            limit=options.limit,
            memory={key: getattr(options, f"memory_{key}") for key in ("host", "device", "disk")},
            keep_all=options.keep_all,
            quiet=options.quiet,
        )
    return _show_once(found, launch, options)


def _report(options: argparse.Namespace) -> int:
    from largemerge import api

    stage("drawing the page")
    path = api.report(options.out, output=options.output)
    stage("")
    print(path)
    if options.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            raise LargemergeError(f"{path} is written; there is no browser here to open it")
    return 0


def _demo(options: argparse.Namespace) -> int:
    if read_launch().size > 1:
        raise ConfigError("the demo is for one process; start it without a launcher")
    stage("importing torch and Transformers")
    from largemerge.demo import run_demo

    if options.own_process:
        interrupts.raising()
    stage("")
    run_demo(options.out)
    return 0


COMMANDS = {
    "merge": _merge,
    "plan": _plan,
    "gram": _gram,
    "align": _align,
    "extract-lora": _extract_lora,
    "merge-adapters": _merge_adapters,
    "temperature": _temperature,
    "verify": _verify,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "demo": _demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the `largemerge` command and exits.

    The exit code is 0 if all is done, 2 after a mistake of the user's or a failure of the system, 70 after a mistake in
    largemerge itself, and 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.

    Args:
        arguments: Of the command line; by default those of this process, which is the command's own then.
    """
    given, own_process = list(sys.argv[1:] if arguments is None else arguments), arguments is None
    if own_process:
        interrupts.install()
    with safe_streams(own_rank(), own_process=own_process):
        code = _run(given, own_process=own_process)
        if own_process:
            interrupts.ending()
        if code and _has_joined_ranks():
            leave(code)  # threads that wait for a rank that is gone would keep this process
    sys.exit(code)


def _has_joined_ranks() -> bool:
    """Whether this process is still in the group of a merge's ranks, which it leaves at the end of one that is done."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def _run(given: list[str], *, own_process: bool) -> int:
    """Parses and runs a command; whatever goes wrong is told in a line or a list, and returned as an exit code."""

    def parse_and_run() -> int:
        options = _parse(given)
        options.given, options.own_process = given, own_process
        _check_log_file(options)
        with writing_log(options.log_file, own_rank()), verbose_lines(shown=options.verbose):
            code = _told(lambda: _logged(options), verbose=options.verbose)
            LOGGER.debug("exit code %d", code)
            return code

    return _told(parse_and_run, verbose=False)


def _told(function: Callable[[], int], *, verbose: bool) -> int:
    """Calls a function; tells what goes wrong, and returns the exit code."""
    try:
        with explain_failures():
            code = function()
            sys.stdout.flush()
        return code
    except SystemExit as error:  # of the parser, which has said why
        return error.code if isinstance(error.code, int) else EXIT_CODE
    except RankAborted:
        return EXIT_CODE
    except LargemergeError as error:
        tell(str(error))
        return EXIT_CODE
    except KeyboardInterrupt as error:
        if own_rank() == 0:
            print(f"\nlargemerge: {str(error) or 'interrupted'}", file=sys.stderr)
        return interrupts.exit_code(error)
    except Exception as error:
        _tell_unexpected(error, verbose=verbose)
        return UNEXPECTED


def _parse(given: list[str]) -> argparse.Namespace:
    """Parses arguments; all ranks have the same ones, and rank 0 tells what is wrong with them."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        if own_rank() != 0:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return _parser().parse_args(given)


def _logged(options: argparse.Namespace) -> int:
    """Runs a command; what it was, and how it ended, goes to the log."""
    LOGGER.debug("largemerge %s, %s: %s", __version__, sys.version.split()[0], shlex.join(options.given))
    try:
        check_installed()
        _prepare_libraries()
        with _stages(options), explain_failures():
            stage("reading the configuration" if options.command != "demo" else "")
            return COMMANDS[options.command](options)
    except BaseException as error:
        trace = not (options.verbose and isinstance(error, LargemergeError | KeyboardInterrupt))  # none on the terminal
        LOGGER.debug("ended by %s: %s", type(error).__name__, error, exc_info=trace)
        raise


def _prepare_libraries() -> None:
    """Sets what other libraries read from the environment when they are imported, unless the user has set it."""
    # Their progress bars and advice would stand between our lines; what matters is in our own report.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # By default 1024, of half a megabyte each: as many as there are batches of unlike lengths, times their products.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # Threads of a product that wait for each other sleep: by default they spin, and beside another process they then
    # keep the very core that the thread which they wait for is waiting for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def _stages(options: argparse.Namespace) -> Iterator[None]:
    """Shows what is being done before there is progress to show."""
    if options.quiet or options.verbose or own_rank() != 0:
        yield
        return
    from largemerge.progress import showing_stages

    with showing_stages():
        yield


def _tell_unexpected(error: Exception, *, verbose: bool) -> None:
    first_line = (str(error) or "no message").splitlines()[0]
    shown = "the traceback above" if verbose else "what --verbose or --log-file FILE shows of it"
    tell(
        f"unexpected {type(error).__name__}: {first_line}; this is a mistake in largemerge, not yours: please report "
        f"it, with {shown}; a merge that had begun can go on with --resume"
    )


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


def _whole(text: str) -> int:
    """Reads a number among the options; what is none is quoted no longer than it helps."""
    try:
        return int(text)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:30]}…"
        raise argparse.ArgumentTypeError(f"{shown!r} is no whole number") from None


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
    merge.add_argument("--json", action="store_true", help="print the report as JSON, in place of the closing table")
    _add_log_options(merge).add_argument("--quiet", action="store_true", help="no progress, no closing table")
    merge.add_argument(
        "--evaluate", type=Path, metavar="EVAL", help="a YAML file of tasks: measure all models and the merge in them"
    )
    merge.add_argument(
        "--limit", type=_whole, metavar="N", help="with --evaluate: at most N samples of each task, for a quick try"
    )
    merge.add_argument("--no-verify", action="store_true", help="do not measure, at the end, what is in the output")
    plan = commands.add_parser("plan", help="show what a merge would do, without reading weights")
    plan.add_argument("config", type=Path, help="a YAML file")
    plan.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    _add_memory_options(plan)
    plan.add_argument("--strict", action="store_true", help="warnings are errors")
    plan.add_argument("--no-probe", dest="probe", action="store_false", help="no time estimate, no seconds spent on it")
    plan.add_argument(
        "--num-ranks",
        type=_whole,
        default=1,
        metavar="N",
        help="what each of N processes holds, moves and computes",
    )
    plan.add_argument(
        "--from-config", action="store_true", help="look at config.json files alone: no weights, no calibration data"
    )
    elsewhere = plan.add_argument_group("machines that are not here, by their data sheets")
    elsewhere.add_argument("--num-nodes", type=_whole, metavar="N", help="plan for so many nodes (default: 1)")
    elsewhere.add_argument("--gpus-per-node", type=_whole, metavar="N", help="and so many GPUs in each (default: 8)")
    elsewhere.add_argument("--gpu", metavar="NAME", help="a100, h100 (default), h200, b200, l40s or rtx4090")
    elsewhere.add_argument("--interconnect", metavar="RATE", help="between nodes, each way (default: 400Gbit)")
    elsewhere.add_argument("--disk-rate", metavar="RATE", help="at which a node reads (default: 2GB/s)")
    elsewhere.add_argument("--node-memory", metavar="SIZE", help="host memory of a node (default: 1TiB)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_log_options(plan)
    gram = commands.add_parser("gram", help="write the sums of RegMean for each model, to be used in place of its data")
    gram.add_argument("config", type=Path, help="a YAML file of a merge by regmean; one model is enough")
    gram.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    gram.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    gram.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    gram.add_argument("--force", action="store_true", help="replace what is in OUT, once all is written")
    _add_memory_options(gram)
    gram.add_argument("--strict", action="store_true", help="warnings are errors")
    gram.add_argument("--json", action="store_true", help="print the report as JSON, in place of the closing table")
    _add_log_options(gram).add_argument("--quiet", action="store_true", help="no progress, no closing table")
    gram.set_defaults(intermediate_dir=None)
    align = commands.add_parser(
        "align", help="write a model with its neurons and heads in the order of another's, for a later merge"
    )
    align.add_argument("model", metavar="MODEL", help="a folder or Hub id, with +adapter if wanted")
    align.add_argument("reference", metavar="REFERENCE", help="the model that it is brought close to")
    align.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    align.add_argument(
        "--residual-stream",
        action="store_true",
        help="permute the features between blocks, too, where MODEL permits it",
    )
    align.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    align.add_argument("--force", action="store_true", help="replace what is in OUT, once all is written")
    align.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of an output file (default: 5GB)")
    align.add_argument("--memory-host", metavar="SIZE", help="most memory of this process (default: what is free)")
    align.add_argument("--trust-remote-code", action="store_true", help="allow the folders' own Python code")
    align.add_argument("--json", action="store_true", help="print the report as JSON, in place of the closing table")
    _add_log_options(align).add_argument("--quiet", action="store_true", help="no progress, no closing table")
    align.set_defaults(intermediate_dir=None, device="cpu", memory_device=None, memory_disk=None)
    extract = commands.add_parser(
        "extract-lora", help="write the difference of two models as a LoRA adapter, which peft loads"
    )
    extract.add_argument("fine_tuned", metavar="FINE_TUNED", help="a folder or Hub id, with +adapter if wanted")
    extract.add_argument("base", metavar="BASE", help="the model that it was tuned from")
    extract.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    extract.add_argument("--rank", type=_whole, default=32, metavar="R", help="of the adapter (default: 32)")
    extract.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="modules such as q_proj, or regular expressions of whole paths (default: all linears that differ)",
    )
    extract.add_argument(
        "--save-others",
        action="store_true",
        help="write norms, biases, embeddings and tied heads that differ as whole tensors",
    )
    extract.add_argument("--dtype", default="float32", help="of the factors: float32 (default), bfloat16 or float16")
    extract.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    extract.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    extract.add_argument(
        "--force", action="store_true", help="replace the adapter in OUT, once the new one is finished"
    )
    extract.add_argument("--trust-remote-code", action="store_true", help="allow the folders' own Python code")
    extract.add_argument("--json", action="store_true", help="print the report as JSON, in place of the closing table")
    _add_log_options(extract).add_argument("--quiet", action="store_true", help="no progress, no closing table")
    extract.set_defaults(intermediate_dir=None)
    adapters = commands.add_parser("merge-adapters", help="merge LoRA adapters of one base into one adapter")
    adapters.add_argument("config", type=Path, help="a YAML file whose models are adapters")
    adapters.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    adapters.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    adapters.add_argument("--force", action="store_true", help="replace the adapter in OUT, once all is written")
    adapters.add_argument("--json", action="store_true", help="print the report as JSON, in place of the closing table")
    _add_log_options(adapters).add_argument("--quiet", action="store_true", help="no progress, no closing table")
    adapters.set_defaults(intermediate_dir=None)
    verify = commands.add_parser("verify", help="check that a finished merge is as it was written, and loads")
    verify.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    verify.add_argument("--trust-remote-code", action="store_true", help="allow the folder's own Python code")
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    _add_log_options(verify)
    evaluate = commands.add_parser("evaluate", help="measure models in tasks: losses, accuracies, a page")
    evaluate.add_argument("config", type=Path, metavar="EVAL", help="a YAML file of tasks")
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="a folder or Hub id, with +adapter if wanted")
    evaluate.add_argument("--base", metavar="MODEL", help="what all were tuned from, where EVAL names no base")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write evaluation.json, .csv and .html there")
    evaluate.add_argument("--force", action="store_true", help="replace these files in --out")
    evaluate.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    evaluate.add_argument("--limit", type=_whole, metavar="N", help="at most N samples of each task, for a quick try")
    _add_memory_options(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print what was found as JSON")
    _add_log_options(evaluate).add_argument("--quiet", action="store_true", help="no progress")
    temperature = commands.add_parser(
        "temperature", help="fit one softmax temperature by likelihood, and write the model with it"
    )
    temperature.add_argument("config", type=Path, metavar="EVAL", help="a YAML file of tasks, of samples held out")
    temperature.add_argument("model", metavar="MODEL", help="a folder or Hub id, with +adapter if wanted")
    temperature.add_argument("out", type=Path, metavar="OUT", help="the output folder, new or empty")
    temperature.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    temperature.add_argument("--limit", type=_whole, metavar="N", help="at most N samples of each task")
    _add_memory_options(temperature)
    temperature.add_argument("--resume", action="store_true", help="fit again, and go on with an interrupted output")
    temperature.add_argument("--force", action="store_true", help="replace what is in OUT, once all is done")
    temperature.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_log_options(temperature).add_argument("--quiet", action="store_true", help="no progress, no report")
    compare = commands.add_parser("compare", help="merge by several methods or settings, and keep the best")
    compare.add_argument("config", type=Path, help="a YAML file")
    compare.add_argument(
        "evaluation",
        type=Path,
        metavar="EVAL",
        nargs="?",
        help="a YAML file of tasks (default: calibration texts that are held out)",
    )
    compare.add_argument("--methods", default="", metavar="A,B", help="methods (default: the configuration's own)")
    compare.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="values of a setting, such as ridge=1e-4,1e-2; may be given several times",
    )
    compare.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="KEY=LOW:HIGH[:log]",
        help="a range in which optuna proposes values of a setting; may be given several times",
    )
    compare.add_argument(
        "--num-trials", type=_whole, metavar="N", help="with --search: trials of each method (default: 20)"
    )
    compare.add_argument("--out", type=Path, default=Path("comparison"), help="folder (default: comparison)")
    compare.add_argument("--keep-all", action="store_true", help="keep the weights of all trials, not only of the best")
    compare.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, …")
    compare.add_argument("--limit", type=_whole, metavar="N", help="at most N samples of each task, for a quick try")
    _add_memory_options(compare)
    compare.add_argument("--json", action="store_true", help="print what was found as JSON")
    _add_log_options(compare).add_argument("--quiet", action="store_true", help="no progress")
    report = commands.add_parser("report", help="make a page of a finished merge: which block or model is the trouble")
    report.add_argument("out", type=Path, metavar="OUT", help="the output folder")
    report.add_argument("--output", type=Path, metavar="FILE", help="of the page (default: OUT/merge_report.html)")
    report.add_argument("--open", action="store_true", help="show the page in a browser")
    _add_log_options(report)
    demo = commands.add_parser(
        "demo", help="train three tiny models, merge them, compare; offline, under a minute or two"
    )
    demo.add_argument("--out", type=Path, default=Path("largemerge-demo"), help="folder (default: largemerge-demo)")
    _add_log_options(demo)
    return parser


def _add_log_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds what all commands have; returns the group of options on how much is shown."""
    parser.set_defaults(quiet=False)
    parser.add_argument(
        "--log-file", type=Path, metavar="FILE", help="add everything that is told to FILE, with times and details"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "-v", "--verbose", action="store_true", help="show details, and the traceback of a mistake of ours"
    )
    return shown


def _add_memory_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory-device", metavar="SIZE", help="most memory on the GPU (default: what is free)")
    parser.add_argument("--memory-host", metavar="SIZE", help="most memory of this process (default: what is free)")
    parser.add_argument(
        "--memory-disk", type=Path, metavar="FOLDER", help="for hidden states that do not fit (default: OUT)"
    )
