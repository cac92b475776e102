"""The public functions: each looks at the method of a configuration, and calls those who know it.

Which configurations are data-free: all whose method is not one of the regression methods.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largemerge.config_file import read_documents, read_yaml
from largemerge.data_free.config import DataFreeConfig
from largemerge.errors import ConfigError
from largemerge.regression.config import MergeConfig, MergeMethod

if TYPE_CHECKING:
    from largemerge.data_free.plan import DataFreePlan, SeriesPlan
    from largemerge.data_free.report import DataFreeReport
    from largemerge.regression.plan import MergePlan
    from largemerge.regression.planning.rates import Cluster
    from largemerge.regression.report import MergeReport

Source = str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig
DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


def merge(
    config: Source,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    quiet: bool = True,
    intermediate_dir: str | Path | None = None,
) -> MergeReport | DataFreeReport:
    """Merges the models of a configuration into one checkpoint.

    Args:
        config: A path, a mapping, or a configuration that has been read.
        out: The output folder; new or empty unless `resume` or `force`.
        device: `auto`, `cpu`, `cuda:0`, ….
        resume: Go on with an interrupted merge; the result is bit for bit that of an unbroken run.
        force: Replace what is in `out`, once the merge is finished.
        max_shard_bytes: Size of a shard, unless one tensor is larger.
        quiet: Show no progress.
        intermediate_dir: Of a file of several merges: where the results go that the last one is made of, and stay;
            else they lie in `out` until it is finished.

    Returns:
        What happened; the same is in `out/merge_report.json`.

    Raises:
        LargemergeError: For anything wrong with config, inputs, data or output, before the long work.
    """
    options: dict[str, Any] = {"device": device, "resume": resume, "force": force, "quiet": quiet}
    options["max_shard_bytes"] = max_shard_bytes
    if isinstance(config, str | Path) and has_documents(config):
        from largemerge.data_free.multi import merge_series

        folder = Path(intermediate_dir) if intermediate_dir is not None else None
        return merge_series(Path(config), Path(out), folder, **options)
    if intermediate_dir is not None:
        raise ConfigError("intermediate_dir is for files of several merges, separated by '---'")
    if isinstance(config, DataFreeConfig) or is_data_free(config):
        from largemerge.data_free.merge import merge_data_free

        return merge_data_free(config, out, **options)
    from largemerge.regression.merge import merge_by_regression

    return merge_by_regression(config, out, **options)


def plan(
    config: Source,
    *,
    device: str = "auto",
    probe: bool = True,
    num_ranks: int = 1,
    cluster: Cluster | None = None,
    from_config: bool = False,
) -> MergePlan | DataFreePlan | SeriesPlan:
    """Plans a merge from configs and headers alone; of weights and samples it reads none.

    Args:
        config: A path, a mapping, or a configuration that has been read.
        device: `auto`, `cpu`, `cuda:0`, ….
        probe: Measure this machine for a few seconds, so that the plan says how long the merge will take.
        num_ranks: As many ranks share this machine: also say what each would hold, move and compute.
        cluster: Plan for these machines instead, one rank for each of their GPUs, by their data sheets.
        from_config: Each checkpoint's `config.json` is all there is: no weights, no tokenizer, no calibration data.

    Raises:
        LargemergeError: If the inputs cannot be opened. What merely makes the merge impossible is in the
            plan's `problems`.
    """
    if isinstance(config, str | Path) and has_documents(config):
        from largemerge.data_free.multi import plan_series

        return plan_series(Path(config), device=device, probe=probe)
    if isinstance(config, DataFreeConfig) or is_data_free(config):
        from largemerge.data_free.plan import plan_data_free

        return plan_data_free(config, device=device, probe=probe)
    from largemerge.regression.merge import plan_regression

    return plan_regression(
        config, device=device, probe=probe, num_ranks=num_ranks, cluster=cluster, from_config=from_config
    )


REGRESSION_METHODS: tuple[str, ...] = typing.get_args(MergeMethod)


def has_documents(source: str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig) -> bool:
    """Whether it is a file of several merges, separated by `---`.

    Raises:
        ConfigError: If there is no such file, or it is not YAML.
    """
    return isinstance(source, str | Path) and len(read_documents(Path(source))) > 1


def is_data_free(source: str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig) -> bool:
    """Whether a configuration names another method than the regression methods.

    Raises:
        ConfigError: If there is no such file, or it is not YAML.
    """
    if isinstance(source, MergeConfig | DataFreeConfig):
        return isinstance(source, DataFreeConfig)
    raw = source if isinstance(source, Mapping) else read_yaml(Path(source))
    method = raw.get("merge_method")
    return isinstance(method, str) and method not in REGRESSION_METHODS
