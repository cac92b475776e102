"""What the commands do: read options and configuration, call, print."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from largemerge.config import MergeConfig, load_config
from largemerge.errors import EXIT_CODE, INTERRUPTED, ConfigError
from largemerge.sizes import parse_size

if TYPE_CHECKING:
    from largemerge.cluster import Cluster
    from largemerge.merge_plan import MergePlan


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
    from largemerge.arithmetic.dispatch import has_documents, is_data_free

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

        from largemerge.memory import reuse_freed_memory
        from largemerge.merging import merge_by_regression
        from largemerge.tables import print_report

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

        from largemerge.arithmetic.dispatch import has_documents
        from largemerge.arithmetic.holding import Limits
        from largemerge.arithmetic.merge import merge_data_free
        from largemerge.arithmetic.series import merge_series
        from largemerge.arithmetic.tables import print_report
        from largemerge.memory import reuse_freed_memory

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
    from largemerge.arithmetic.dispatch import has_documents, is_data_free

    if has_documents(options.config):
        return _plan_data_free(options)
    return _plan_data_free(options) if is_data_free(options.config) else _plan_regression(options)


def _plan_regression(options: argparse.Namespace) -> int:
    if options.num_ranks < 1:
        raise ConfigError(f"--num-ranks {options.num_ranks}: expected 1 or more")
    config = _config(options)
    _quiet_libraries()
    with _importing(options):
        from largemerge.merging import plan_regression
        from largemerge.tables import print_plan

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
        from largemerge.arithmetic.dispatch import has_documents
        from largemerge.arithmetic.holding import Limits
        from largemerge.arithmetic.plan import plan_data_free
        from largemerge.arithmetic.series import plan_series
        from largemerge.arithmetic.tables import print_plan

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
    from largemerge.cluster import Cluster, find_gpu, parse_rate

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
