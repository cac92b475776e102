"""The public functions, and the only place that looks at which kind of merge a configuration asks for.

    configuration ──► read_config ──► regression/   MergeConfig
                                  └─► data_free/    DataFreeConfig, or Documents: several merges in one file

Plans and reports of both kinds follow the same protocol, so that the command line knows neither kind.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from largemerge.config_file import check_source, read_documents, shown, size_in_bytes
from largemerge.data_free.config import DataFreeConfig, Documents, load_data_free
from largemerge.data_free.curriculum import expand_curricula
from largemerge.distributed.launcher import own_rank, several_processes
from largemerge.errors import ConfigError, LargemergeError, OutputError, SystemFailure, explain_failures
from largemerge.regression.config import MergeConfig, load_config
from largemerge.regression.methods import METHODS as REGRESSION_METHODS

if TYPE_CHECKING:
    from rich.console import Console

    from largemerge.adapter_tools.extract import ExtractPlan
    from largemerge.adapter_tools.merge_config import AdapterMergeConfig
    from largemerge.adapter_tools.merge_report import AdapterMergeReport
    from largemerge.adapter_tools.report import ExtractReport
    from largemerge.data_free.plan import DataFreePlan, SeriesPlan
    from largemerge.data_free.report import DataFreeReport
    from largemerge.data_free.resources import MemoryBudget
    from largemerge.evaluation.config import EvaluationConfig
    from largemerge.evaluation.results import EvaluatedModel, Evaluation
    from largemerge.integrity import FolderCheck
    from largemerge.regression.gram_run import GramReport
    from largemerge.regression.plan import MergePlan
    from largemerge.regression.planning.rates import Cluster as Cluster
    from largemerge.regression.report import MergeReport
    from largemerge.temperature.run import TemperatureReport

Source = str | Path | Mapping[str, Any] | MergeConfig | DataFreeConfig | Documents
"""A configuration: a path, a mapping, or one that has been read."""
Config = MergeConfig | DataFreeConfig | Documents
"""A configuration that has been read."""
EvaluationSource: TypeAlias = "str | Path | Mapping[str, Any] | EvaluationConfig"
"""An evaluation: the path of an EVAL.yaml, a mapping like it, or one that has been read."""
DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""Size of an output file in bytes, unless one tensor is larger."""


class Plan(Protocol):
    """The plan of a merge of either kind."""

    @property
    def problems(self) -> Sequence[str]:
        """Reasons why the merge is impossible; empty for a plan that can be run."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know; warnings begin with `warning: `."""

    @property
    def sparing(self) -> bool:
        """Whether freed host memory is to go back to the system at once."""

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values."""

    def print(self, console: Console) -> None:
        """Shows the plan as a table."""


class Report(Protocol):
    """The report of a merge of either kind; the same is in `merge_report.json`."""

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""

    def print(self, console: Console) -> None:
        """Shows the report as a table."""


@dataclass(frozen=True)
class Memory:
    """Limits of memory that override those of the configuration. Sizes are bytes, or texts such as `4GiB`.

    Attributes:
        host: Maximum of anonymous memory of a process; `None` for the configuration's, or for all that is free.
        device: Maximum of memory on the accelerator, likewise.
        disk: Folder for hidden states that fit into neither.

    Raises:
        ConfigError: If a size is none, with all that are wrong.
    """

    host: int | str | None = None
    device: int | str | None = None
    disk: str | Path | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("host", "device"):
            try:
                object.__setattr__(self, name, _size(getattr(self, name)))
            except ValueError as error:
                problems.append(f"memory.{name}: {error}")
        if self.disk is not None and not _is_path(self.disk):
            problems.append(f"memory.disk: {shown(self.disk)}: expected a folder")
        if problems:
            raise ConfigError(*problems)


def _size(size: int | str | None) -> int | None:
    """Returns a size in bytes, if there is one; raises a `ValueError` where it is none."""
    return size_in_bytes(size) if size is not None else None


def _is_path(value: object) -> bool:
    """Whether a value can be the path of a file or folder: some text, each part as short as file systems want it."""
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        return False
    try:
        return max(map(len, map(os.fsencode, Path(value).parts)), default=0) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def _is_text(value: object) -> bool:
    """Whether a value is some text, short enough to be the name or pattern of a module."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= _MAX_PATTERN


_MAX_NAME_BYTES, _MAX_PATTERN = 255, 10_000
_MAX_RANKS = 4096
_MAX_RANK = 1 << 16  # of an adapter
_DTYPES = Literal["float32", "bfloat16", "float16"]
_FLAG = (lambda value: isinstance(value, bool), "True or False")
_RANKS = (lambda value: type(value) is int and 1 <= value <= _MAX_RANKS, f"a whole number from 1 to {_MAX_RANKS}")
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "out": (_is_path, "a folder"),
    "intermediate_dir": (lambda value: value is None or _is_path(value), "a folder"),
    "device": (lambda value: isinstance(value, str), "auto, cpu or cuda:0"),
    "memory": (lambda value: value is None or isinstance(value, Memory), "largemerge.Memory(host=…, device=…)"),
    **dict.fromkeys(("planned", "written"), (lambda value: value is None or callable(value), "a function")),
    "cluster": (lambda value: value is None or hasattr(value, "num_ranks"), "largemerge.cluster(num_nodes=…)"),
    "limit": (lambda value: value is None or (type(value) is int and value >= 1), "a whole number from 1 on"),
    "num_trials": (lambda value: value is None or (type(value) is int and value >= 1), "a whole number from 1 on"),
    **dict.fromkeys(("fine_tuned", "base", "model", "reference"), (_is_path, "a folder or a Hub id")),
    "rank": (lambda value: type(value) is int and 1 <= value <= _MAX_RANK, f"a whole number from 1 to {_MAX_RANK}"),
    "targets": (
        lambda value: value is None or (isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))),
        "names of modules, or patterns of their paths",
    ),
    "dtype": (lambda value: value in typing.get_args(_DTYPES), f"one of {', '.join(typing.get_args(_DTYPES))}"),
    "num_ranks": _RANKS,
    "num_nodes": _RANKS,
    "gpus_per_node": _RANKS,
    **dict.fromkeys(("resume", "force", "quiet", "verify", "strict", "probe", "from_config", "keep_all"), _FLAG),
    **dict.fromkeys(("save_others", "residual_stream", "trust_remote_code"), _FLAG),
}
"""What arguments of the public functions may be: a check, and words for it."""
_OPTIONS = frozenset(
    (
        "intermediate_dir",
        "device",
        "num_ranks",
        "num_nodes",
        "gpus_per_node",
        "limit",
        "resume",
        "force",
        "strict",
        "from_config",
        "keep_all",
        "num_trials",
        "rank",
        "targets",
        "save_others",
        "residual_stream",
        "dtype",
        "trust_remote_code",
    )
)
"""Arguments that the command line has under the same names."""


def argument_problems(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with arguments, by the names of the command line's options where it has them."""
    for name, value in arguments.items():
        is_right, expected = _ARGUMENTS[name]
        if not is_right(value):
            option = f"--{name.replace('_', '-')}" if name in _OPTIONS else f"{name}:"
            yield f"{option} {shown(value)}: expected {expected}"
    if arguments.get("resume") is True and arguments.get("force") is True:
        yield "--resume goes on with what --force would replace: expected one of them"


def _checked(config: Source, problems: list[str], to_gram: bool = False, /, **arguments: Any) -> Config:
    """Reads a configuration, and checks the other arguments of a call; all that is wrong is told at once."""
    problems += argument_problems(arguments)
    try:
        resolved = read_config(config, strict=arguments["strict"] is True, to_gram=to_gram)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if problems:
        raise ConfigError(*problems)
    return resolved


@explain_failures()
def read_config(source: Source, *, strict: bool = False, to_gram: bool = False) -> Config:
    """Reads and checks a configuration as the kind of merge that its method belongs to.

    Args:
        source: A path, a mapping, or a configuration that has been read.
        strict: Make warnings errors when the merge is planned.
        to_gram: Whether Gram matrices are to be written, for which one model is enough.

    Returns:
        A `MergeConfig` for the regression methods, a `DataFreeConfig` for all others, or `Documents` for a file of
        several merges, which are checked when they are planned.

    Raises:
        ConfigError: If there are mistakes; it names all of them.
    """
    if isinstance(source, MergeConfig):
        return load_config(source, to_gram=to_gram).as_strict(strict or source.strict)
    if isinstance(source, DataFreeConfig):
        return source.as_strict(strict)
    if isinstance(source, Documents):
        return Documents(source.path, source.raw, strict or source.strict)
    check_source(source)
    if isinstance(source, Mapping):
        path, documents = Path("configuration.yaml"), expand_curricula([source], None)
    else:
        path = Path(source)
        documents = expand_curricula(read_documents(path), path.resolve().parent)
    if len(documents) > 1:
        return Documents(path, tuple(documents), strict)
    folder = None if isinstance(source, Mapping) else path.resolve().parent
    return read_mapping(documents[0], folder, strict=strict, to_gram=to_gram)


def read_mapping(
    raw: Mapping[str, Any], folder: Path | None, *, strict: bool = False, to_gram: bool = False
) -> MergeConfig | DataFreeConfig:
    """Reads and checks the mapping of one merge; other arguments and errors as in `read_config`.

    Args:
        raw: The mapping.
        folder: Folder in which its relative paths are looked up first; `None` for the working directory alone.
        strict: Make warnings errors when the merge is planned.
        to_gram: Whether Gram matrices are to be written.
    """
    method = raw.get("merge_method")
    if not isinstance(method, str) or method not in REGRESSION_METHODS:
        return load_data_free(raw, folder, other_methods=tuple(REGRESSION_METHODS), strict=strict)
    return load_config(raw, folder, to_gram=to_gram).as_strict(strict)


def preload(config: Config) -> None:
    """Imports what a merge of this kind needs: torch, Transformers, and our own code."""
    if isinstance(config, MergeConfig):
        import largemerge.regression.merge
    else:
        import largemerge.data_free.multi  # noqa: F401


@explain_failures()
def merge(
    config: Source,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    max_shard_bytes: int | str = DEFAULT_MAX_SHARD_BYTES,
    quiet: bool = True,
    verify: bool = True,
    intermediate_dir: str | Path | None = None,
    memory: Memory | None = None,
    strict: bool = False,
    planned: Callable[[Plan], None] | None = None,
    written: Callable[[], None] | None = None,
    evaluate: EvaluationSource | None = None,
    evaluated: Callable[[Evaluation], None] | None = None,
    limit: int | None = None,
) -> MergeReport | DataFreeReport:
    """Merges the models of a configuration into one checkpoint.

    Args:
        config: A path, a mapping, or a configuration that has been read.
        out: The output folder; new or empty unless `resume` or `force`.
        device: `auto`, `cpu`, `cuda:0`, ….
        resume: Go on with an interrupted merge; the result is bit for bit that of an unbroken run.
        force: Replace what is in `out`, once the merge is finished.
        max_shard_bytes: Size of an output file in bytes, or a text such as `5GB`, unless one tensor is larger.
        quiet: Show no progress.
        verify: At the end, measure how much of every candidate is in the output.
        intermediate_dir: Folder that keeps the results that the last one of several merges is made of. By default they
            lie in `out` until it is finished.
        memory: Limits that override those of the configuration.
        strict: Make warnings errors.
        planned: Called with the plan before the long work.
        written: Called once the output is whole, before it is evaluated.
        evaluate: An evaluation: the path of an EVAL.yaml, a mapping like it, or one that has been read. All models of
            the merge and its output are measured in its tasks, and `evaluation.json`, `.csv` and `.html` are written to
            `out`.
        evaluated: Called with what the evaluation has found.
        limit: Samples of each task of the evaluation, at most, for a quick try; calibration keeps its own.

    Returns:
        The report; the same is in `out/merge_report.json`.

    Raises:
        LargemergeError: If anything is wrong with config, inputs, data or output; before the long work.
    """
    options: dict[str, Any] = {"device": device, "resume": resume, "force": force, "quiet": quiet}
    options |= {"planned": planned, "verify": verify}
    more = {
        "out": out,
        "written": written,
        "intermediate_dir": intermediate_dir,
        "memory": memory,
        "strict": strict,
        "limit": limit,
    }
    problems: list[str] = []
    if limit is not None and evaluate is None:
        problems.append("--limit: limits what --evaluate measures; expected --evaluate with it")
    try:
        options["max_shard_bytes"] = size_in_bytes(max_shard_bytes)
    except ValueError as error:
        problems.append(f"--max-shard-size {error}")
    sizes = {"max_shard_bytes": options.pop("max_shard_bytes", None)}
    resolved, memory = _checked(config, problems, **options, **more), memory or Memory()
    if isinstance(config, str | Path):
        check_apart(Path(config), Path(out))
    options |= sizes
    if intermediate_dir is not None and not isinstance(resolved, Documents):
        raise ConfigError("--intermediate-dir is for files of several merges, separated by '---'")
    tasks = _checked_evaluation(evaluate, resolved, memory, limit) if evaluate is not None else None
    report = _merge(resolved, Path(out), intermediate_dir, memory, options)
    if written is not None:
        written()
    if tasks is not None:
        from largemerge.evaluation.evaluate import evaluate_models
        from largemerge.evaluation.page import write_evaluation

        checked, models = tasks
        found = evaluate_models(checked, [*models, _merged_model(models, Path(out))], device=device, quiet=quiet)
        if own_rank() == 0:
            write_evaluation(found, Path(out))
        if evaluated is not None:
            evaluated(found)
    return report


def _merge(
    config: Config, out: Path, intermediate_dir: str | Path | None, memory: Memory, options: dict[str, Any]
) -> MergeReport | DataFreeReport:
    """Merges by whichever kind of method a configuration asks for; options are those of `merge`."""
    if isinstance(config, MergeConfig):
        from largemerge.regression.merge import merge_by_regression

        return merge_by_regression(limited(config, memory), out, **options)
    options["limits"] = _budget(memory)
    from largemerge.data_free.merge import merge_data_free
    from largemerge.data_free.multi import merge_series

    if isinstance(config, DataFreeConfig):
        return merge_data_free(config, out, **options)
    folder = Path(intermediate_dir) if intermediate_dir is not None else None
    return merge_series(config, out, folder, other_methods=tuple(REGRESSION_METHODS), **options)


def _checked_evaluation(
    source: EvaluationSource, config: Config, memory: Memory, limit: int | None
) -> tuple[EvaluationConfig, list[EvaluatedModel]]:
    """Reads an evaluation, and checks it with the models of a merge before they are merged.

    Raises:
        ConfigError: If it has mistakes, or does not fit the models.
    """
    from largemerge.evaluation.config import load_evaluation
    from largemerge.evaluation.prepare import prepare

    if isinstance(config, Documents):
        raise ConfigError(
            "--evaluate is for one merge; of a file of several, or a curriculum, evaluate the folder when it is written"
        )
    loaded = load_evaluation(source).with_limits(limit, host=memory.host, device=memory.device, disk=memory.disk)
    models, base = models_of(config)
    if base is not None and loaded.base is None:
        loaded = loaded.model_copy(update={"base": base})
    try:
        prepare(loaded, models)
    except ConfigError as error:  # what the merge itself says of its models comes first
        raise ConfigError(*plan_problems(config, memory=memory), *error.problems) from None
    return loaded, models


def plan_problems(config: Source, *, device: str = "auto", memory: Memory | None = None) -> tuple[str, ...]:
    """Plans a merge, and returns why it is impossible; under a launcher nothing, for ranks plan together."""
    if several_processes():
        return ()
    try:
        return tuple(plan(config, device=device, probe=False, memory=memory).problems)
    except SystemFailure:
        raise
    except LargemergeError as error:
        return error.problems


def models_of(config: Config) -> tuple[list[EvaluatedModel], str | None]:
    """Lists the models of a merge for an evaluation, and its base.

    Raises:
        ConfigError: If the configuration is of several merges.
    """
    from largemerge.evaluation.prepare import name_models
    from largemerge.evaluation.results import EvaluatedModel

    if isinstance(config, Documents):
        raise ConfigError(f"{config.path}: has several merges; expected one")
    if isinstance(config, MergeConfig):
        models = [EvaluatedModel(each.label, each.model, "candidate") for each in config.candidates]
    else:
        references = [each for each in dict.fromkeys(config.references) if each != config.base_model]
        models = [EvaluatedModel(each.name, each.reference, "candidate") for each in name_models(references)]
    return models, config.base_model


def _merged_model(models: Sequence[EvaluatedModel], out: Path) -> EvaluatedModel:
    """The output of a merge, as a model to evaluate."""
    from largemerge.evaluation.results import EvaluatedModel

    taken = {model.name for model in models}
    return EvaluatedModel(out.name if out.name not in taken else f"{out.name} (merged)", str(out), "merge")


@explain_failures()
def plan(
    config: Source,
    *,
    device: str = "auto",
    probe: bool = True,
    num_ranks: int = 1,
    cluster: Cluster | None = None,
    from_config: bool = False,
    memory: Memory | None = None,
    strict: bool = False,
) -> MergePlan | DataFreePlan | SeriesPlan:
    """Plans a merge from configs, headers and calibration data; no weight is read, and of large data some rows.

    Args:
        config: A path, a mapping, or a configuration that has been read.
        device: `auto`, `cpu`, `cuda:0`, ….
        probe: Measure this machine for a few seconds, so that the plan says how long the merge will take.
        num_ranks: Number of ranks that share this machine, for regression methods; the plan says what each holds, moves
            and computes.
        cluster: Other machines to plan for, for regression methods, with one rank for each of their GPUs.
        from_config: Look at each checkpoint's `config.json` alone, for regression methods.
        memory: Limits that override those of the configuration.
        strict: Make warnings reasons why the merge is impossible.

    Raises:
        LargemergeError: If the inputs cannot be opened. Reasons why the merge is impossible are in the plan's
            `problems`.
    """
    arguments = {"device": device, "probe": probe, "num_ranks": num_ranks, "cluster": cluster}
    more = {"from_config": from_config, "memory": memory, "strict": strict}
    resolved, memory = _checked(config, [], **arguments, **more), memory or Memory()
    if isinstance(resolved, MergeConfig):
        if num_ranks > 1 and cluster is not None:
            raise ConfigError("--num-ranks is for this machine; with other machines there is a rank for every GPU")
        from largemerge.regression.merge import plan_regression

        return plan_regression(
            limited(resolved, memory),
            device=device,
            probe=probe,
            num_ranks=num_ranks,
            cluster=cluster,
            from_config=from_config,
        )
    limits = _budget(memory)
    if num_ranks != 1 or from_config or cluster is not None:
        raise ConfigError("ranks, other machines and --from-config are for regression methods")
    from largemerge.data_free.multi import plan_series
    from largemerge.data_free.plan import plan_data_free

    if isinstance(resolved, DataFreeConfig):
        return plan_data_free(resolved, device=device, limits=limits, probe=probe)
    return plan_series(resolved, other_methods=tuple(REGRESSION_METHODS), device=device, limits=limits, probe=probe)


@explain_failures()
def evaluate(
    config: EvaluationSource,
    models: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    out: str | Path | None = None,
    device: str = "auto",
    limit: int | None = None,
    memory: Memory | None = None,
    quiet: bool = True,
    base: str | Path | None = None,
    force: bool = False,
) -> Evaluation:
    """Measures models in the tasks of an evaluation.

    Args:
        config: The path of an EVAL.yaml, a mapping like it, or one that has been read.
        models: Folders or Hub ids, with `+adapter` if wanted, or one alone; or those by names.
        out: Folder to write `evaluation.json`, `.csv` and `.html` to; `None` to write nothing.
        device: `auto`, `cpu`, `cuda:0`, ….
        limit: Samples of each task, at most, for a quick try.
        memory: Limits that override those of the configuration.
        quiet: Show no progress.
        base: The model that all were tuned from, where the evaluation names none.
        force: Replace these files in `out`, if they are there.

    Returns:
        The scores. A task that fails says so in its score, and loses no other's.

    Raises:
        LargemergeError: If models, data and tasks do not fit together; before the first weight is read.
    """
    from largemerge.evaluation.config import load_evaluation
    from largemerge.evaluation.evaluate import evaluate_models
    from largemerge.evaluation.page import written_before
    from largemerge.evaluation.prepare import name_models

    given = {"device": device, "quiet": quiet, "memory": memory, "limit": limit, "force": force}
    problems = list(argument_problems(given))
    if out is not None and (not _is_path(out) or (Path(out).exists() and not Path(out).is_dir())):
        problems.append(f"--out {shown(str(out))}: expected a folder, new or not")
    elif out is not None and force is False and (there := written_before(Path(out))):
        problems.append(
            f"--out {out}: holds {', '.join(there)}, which would be replaced; expected another folder, or --force"
        )
    try:
        resolved = load_evaluation(config)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if base is not None and resolved.base is not None:
        problems.append(f"--base {shown(str(base))}: the evaluation has the base {resolved.base}; expected one of them")
    if problems:
        raise ConfigError(*problems)
    if base is not None:
        resolved = resolved.model_copy(update={"base": str(base)})
    memory = memory or Memory()
    evaluation = evaluate_models(
        resolved.with_limits(limit, host=memory.host, device=memory.device, disk=memory.disk),
        name_models(models),
        device=device,
        quiet=quiet,
    )
    if out is not None and own_rank() == 0:
        from largemerge.evaluation.page import write_evaluation

        write_evaluation(evaluation, Path(out))
    return evaluation


@explain_failures()
def gram(
    config: Source,
    out: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    memory: Memory | None = None,
    strict: bool = False,
) -> GramReport:
    """Writes the Gram matrices of every model of a configuration, to be used later in place of its data.

    Args:
        config: A path, a mapping, or a configuration that has been read, of `regmean`; one model is enough.
        out: The output folder; new or empty unless `resume` or `force`. Of several models, each gets a folder in it.
        device: `auto`, `cpu`, `cuda:0`, ….
        resume: Go on with an interrupted run.
        force: Replace what is in `out`, once all is written.
        quiet: Show no progress.
        memory: Limits that override those of the configuration.
        strict: Make warnings errors.

    Returns:
        The report, with the record of each model.

    Raises:
        LargemergeError: If anything is wrong with config, models, data or output; before the long work.
    """
    options: dict[str, Any] = {"device": device, "resume": resume, "force": force, "quiet": quiet}
    resolved = _checked(config, [], True, out=out, memory=memory, strict=strict, **options)
    if isinstance(config, str | Path):
        check_apart(Path(config), Path(out))
    if not isinstance(resolved, MergeConfig):
        raise ConfigError(
            "merge_method: gram is for 'regmean', one merge in a file; data-free methods have no such sums"
        )
    if several_processes():
        raise ConfigError("gram is for one process; start it without a launcher")
    from largemerge.regression.gram_run import write_grams

    return write_grams(limited(resolved, memory or Memory()), Path(out), **options)


@explain_failures()
def align(
    model: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    residual_stream: bool = False,
    resume: bool = False,
    force: bool = False,
    max_shard_bytes: int | str = DEFAULT_MAX_SHARD_BYTES,
    quiet: bool = True,
    memory: Memory | None = None,
    trust_remote_code: bool = False,
    planned: Callable[[DataFreePlan], None] | None = None,
) -> DataFreeReport:
    """Writes a model with its neurons and heads in the order in which they are closest to another model's.

    It computes what it did before; only merges with the other model, or with others that were brought close to it, are
    not the same any more.

    Args:
        model: The model that is written: a folder or Hub id, with `@revision` and `+adapter` if wanted.
        reference: The model that it is brought close to.
        out: The output folder; new or empty unless `resume` or `force`.
        residual_stream: Permute the features between blocks, too, where the model permits it.
        resume: Go on with an interrupted run.
        force: Replace what is in `out`, once the new checkpoint is finished.
        max_shard_bytes: Size of an output file in bytes, or a text such as `5GB`, unless one tensor is larger.
        quiet: Show no progress.
        memory: Limits of memory.
        trust_remote_code: Allow the checkpoints' own Python code.
        planned: Called with the plan before the long work.

    Returns:
        The report; the same is in `out/merge_report.json`, under `align` what was permuted.

    Raises:
        LargemergeError: If anything is wrong with arguments, models or output; before the long work.
    """
    options: dict[str, Any] = {"resume": resume, "force": force, "quiet": quiet, "planned": planned}
    asked = {"residual_stream": residual_stream, "trust_remote_code": trust_remote_code, "memory": memory}
    problems = list(argument_problems({"model": model, "reference": reference, "out": out, **options, **asked}))
    try:
        shard_bytes = size_in_bytes(max_shard_bytes)
    except ValueError as error:
        problems.append(f"--max-shard-size {error}")
    if problems:
        raise ConfigError(*problems)
    config = load_data_free(
        {
            "merge_method": "passthrough",
            "models": [{"model": str(model)}],
            "align": {"reference": str(reference), **({"residual_stream": True} if residual_stream else {})},
            "trust_remote_code": trust_remote_code,
        }
    )
    from largemerge.data_free.merge import merge_data_free

    limits = _budget(memory or Memory())
    return merge_data_free(config, Path(out), device="cpu", max_shard_bytes=shard_bytes, limits=limits, **options)


@explain_failures()
def extract_lora(
    fine_tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int = 32,
    targets: str | Sequence[str] | None = None,
    save_others: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    trust_remote_code: bool = False,
    planned: Callable[[ExtractPlan], None] | None = None,
) -> ExtractReport:
    """Writes the difference of two models as a LoRA adapter, which peft loads as it is.

    Args:
        fine_tuned: The fine-tuned model: a folder or Hub id, with `@revision` and `+adapter` if wanted.
        base: The model that it was tuned from.
        out: The output folder; new or empty unless `resume` or `force`.
        rank: Rank of the adapter. Matrices that are smaller get all of theirs.
        targets: Names of modules such as `q_proj`, or regular expressions of whole paths; by default all linears that
            differ.
        save_others: Write what differs and is no linear's weight as whole tensors (`modules_to_save`, biases).
        dtype: Dtype of the factors.
        device: `auto`, `cpu`, `cuda:0`, …, on which matrices are decomposed.
        resume: Go on with an interrupted run.
        force: Replace the adapter that is in `out`, once the new one is finished.
        quiet: Show no progress.
        trust_remote_code: Allow the checkpoints' own Python code.
        planned: Called with the plan before the long work.

    Returns:
        The report; the same is in `out/extract_report.json`.

    Raises:
        LargemergeError: If anything is wrong with arguments, models or output.
    """
    targets = (targets,) if isinstance(targets, str) else targets
    options: dict[str, Any] = {"device": device, "resume": resume, "force": force, "quiet": quiet, "planned": planned}
    asked: dict[str, Any] = {
        "rank": rank,
        "targets": targets,
        "save_others": save_others,
        "trust_remote_code": trust_remote_code,
    }
    problems = list(
        argument_problems({"fine_tuned": fine_tuned, "base": base, "out": out, "dtype": dtype, **options, **asked})
    )
    if problems:
        raise ConfigError(*problems)
    if several_processes():
        raise ConfigError("extract-lora is for one process; start it without a launcher")
    from largemerge.adapter_tools.extract import ExtractOptions, extract
    from largemerge.checkpoint.tensor_info import torch_dtype

    asked["targets"] = tuple(targets) if targets is not None else None
    chosen = ExtractOptions(str(fine_tuned), str(base), dtype=torch_dtype(dtype), **asked)
    return extract(chosen, Path(out), **options)


@explain_failures()
def merge_adapters(
    config: str | Path | Mapping[str, Any] | AdapterMergeConfig,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> AdapterMergeReport:
    """Merges LoRA adapters of one base into one adapter, by their factors: the base is opened for DoRA alone.

    Args:
        config: The path of a YAML file, or a mapping like it: `merge_method` (`cat`, `svd`, `linear`, `ties`, `knots`),
            `models` that are adapters, `parameters`, and `base_model` for DoRA; or what was read of one.
        out: The output folder; new or empty unless `resume` or `force`.
        resume: Go on with an interrupted run.
        force: Replace the adapter that is in `out`, once the new one is finished.
        quiet: Show no progress.

    Returns:
        The report; the same is in `out/merge_adapters_report.json`.

    Raises:
        LargemergeError: If anything is wrong with config, adapters or output.
    """
    from largemerge.adapter_tools.merge_config import AdapterMergeConfig, load_adapter_merge

    options: dict[str, Any] = {"resume": resume, "force": force, "quiet": quiet}
    problems = list(argument_problems({"out": out, **options}))
    try:
        loaded = config if isinstance(config, AdapterMergeConfig) else load_adapter_merge(config)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if problems:
        raise ConfigError(*problems)
    if several_processes():
        raise ConfigError("merge-adapters is for one process; start it without a launcher")
    if isinstance(config, str | Path):
        check_apart(Path(config), Path(out))
    from largemerge.adapter_tools.merge import merge_adapters as merge_them

    return merge_them(loaded, Path(out), **options)


@explain_failures()
def fit_temperature(
    config: EvaluationSource,
    model: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    limit: int | None = None,
    memory: Memory | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> TemperatureReport:
    """Fits one softmax temperature by likelihood on samples, and writes the model with it in its weights.

    Args:
        config: The path of an EVAL.yaml, a mapping like it, or one that has been read; its samples should be none that
            the model was made with. Tasks without a likelihood are left out, with a note.
        model: The model: a folder or Hub id, with `@revision` and `+adapter` if wanted.
        out: The output folder; new or empty unless `resume` or `force`.
        device: `auto`, `cpu`, `cuda:0`, …, on which the model is run.
        limit: Samples of each task, at most.
        memory: Limits that override those of the configuration.
        resume: Fit again, and go on with an output that was interrupted.
        force: Replace what is in `out`, once all is done.
        quiet: Show no progress.

    Returns:
        The report; the same is in `out/temperature_report.json`.

    Raises:
        LargemergeError: If anything is wrong with tasks, model or output, or no temperature is best.
    """
    from largemerge.evaluation.config import load_evaluation

    options: dict[str, Any] = {"device": device, "resume": resume, "force": force, "quiet": quiet}
    problems = list(argument_problems({"model": model, "out": out, "limit": limit, "memory": memory, **options}))
    try:
        resolved = load_evaluation(config)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if problems:
        raise ConfigError(*problems)
    if several_processes():
        raise ConfigError("temperature is for one process; start it without a launcher")
    if isinstance(config, str | Path):
        check_apart(Path(config), Path(out))
    from largemerge.temperature.run import set_temperature

    memory = memory or Memory()
    return set_temperature(
        resolved.with_limits(limit, host=memory.host, device=memory.device, disk=memory.disk),
        str(model),
        Path(out),
        max_shard_bytes=DEFAULT_MAX_SHARD_BYTES,
        **options,
    )


def check_apart(config: Path, out: Path) -> None:
    """Refuses a configuration that lies in the output folder, where the merge's files could take its place.

    Raises:
        OutputError: If it does.
    """
    try:
        inside = out.resolve() in config.resolve().parents
    except (OSError, ValueError, RuntimeError):
        return  # whoever opens them says what is wrong
    if inside:
        raise OutputError(f"{config}, the configuration, lies in the output folder {out}; copy it elsewhere first")


@explain_failures()
def verify(out: str | Path, *, trust_remote_code: bool = False) -> FolderCheck:
    """Compares a finished merge with the digests in its report, and checks that its keys and shapes load.

    Args:
        out: The output folder of a merge.
        trust_remote_code: Allow the folder's own Python code, where its class needs it.

    Returns:
        The findings; `problems` is empty for a merge that is whole.

    Raises:
        OutputError: If the folder holds no finished merge, or one whose report has no digests.
    """
    if not isinstance(out, str | Path) or not str(out) or "\0" in str(out):
        raise OutputError(f"out: expected the folder of a finished merge, found {shown(out)}")
    if not isinstance(trust_remote_code, bool):
        raise OutputError(f"trust_remote_code: expected true or false, found {shown(trust_remote_code)}")
    from largemerge.integrity import verify_folder

    return verify_folder(Path(out), trust_remote_code=trust_remote_code)


@explain_failures()
def report(out: str | Path, *, output: str | Path | None = None) -> Path:
    """Makes a page of a finished merge: one HTML file that needs nothing beside it.

    Args:
        out: The output folder of a merge.
        output: The file; by default `merge_report.html` in the folder, which is only read otherwise.

    Returns:
        The file.

    Raises:
        OutputError: If the folder holds no finished merge, its report has another shape, or the file cannot be written,
            or is there and no page of a merge.
    """
    problems = [] if _is_path(out) else [f"out: expected the folder of a finished merge, found {shown(out)}"]
    if output is not None and not _is_path(output):
        problems.append(f"--output: expected a file, found {shown(output)}")
    if problems:
        raise OutputError(*problems)
    from largemerge.merge_page.build import write_page

    return write_page(Path(out), Path(output) if output is not None else None)


def cluster(
    *,
    num_nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "h100",
    interconnect: str = "400Gbit",
    disk_rate: str = "2GB/s",
    node_memory: int | str = 2**40,
) -> Cluster:
    """Describes other machines, for `plan`, by the data sheets of their parts.

    Args:
        num_nodes: Number of nodes.
        gpus_per_node: Number of GPUs in each node.
        gpu: Name of the GPU: `a100`, `h100`, `h200`, `b200`, `l40s` or `rtx4090`.
        interconnect: Rate between nodes, each way, such as `400Gbit` or `25GB/s`.
        disk_rate: Rate at which a node reads, likewise.
        node_memory: Host memory of a node in bytes, or a text such as `1TiB`.

    Raises:
        ConfigError: If a number is none from 1 to 4,096, the GPU is not known, or a text is not a rate or size.
    """
    from largemerge.regression.planning.rates import Cluster, find_gpu, parse_rate

    problems = list(argument_problems({"num_nodes": num_nodes, "gpus_per_node": gpus_per_node}))
    if not problems and num_nodes * gpus_per_node > _MAX_RANKS:
        problems.append(
            f"--num-nodes {num_nodes}, --gpus-per-node {gpus_per_node}: expected up to {_MAX_RANKS} GPUs together"
        )
    readers: dict[str, Callable[[], Any]] = {
        "gpu": lambda: find_gpu(gpu),
        "interconnect": lambda: parse_rate(interconnect, "--interconnect"),
        "disk": lambda: parse_rate(disk_rate, "--disk-rate"),
        "host_memory": lambda: size_in_bytes(node_memory),
    }
    parts: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            parts[name] = read()
        except ConfigError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"--node-memory {error}")
    if problems:
        raise ConfigError(*problems)
    return Cluster(num_nodes=num_nodes, gpus_per_node=gpus_per_node, **parts)


def limited(config: MergeConfig, memory: Memory) -> MergeConfig:
    """Returns the configuration with other limits in place of its own."""
    limits: dict[str, Any] = {"device": _size(memory.device), "host": _size(memory.host)}
    if memory.disk is not None:
        limits["disk"] = str(Path(memory.disk).expanduser().absolute())
    given = {name: value for name, value in limits.items() if value is not None}
    return config.model_copy(update={"memory": config.memory.model_copy(update=given)}) if given else config


def _budget(memory: Memory) -> MemoryBudget:
    """Returns the limits as data-free merges know them."""
    if memory.disk is not None:
        raise ConfigError("--memory-disk: not for data-free methods, which hold nothing there")
    from largemerge.data_free.resources import MemoryBudget

    return MemoryBudget(_size(memory.host), _size(memory.device))
