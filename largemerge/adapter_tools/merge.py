"""Several LoRA adapters of one base as one adapter: `largemerge merge-adapters`.

    config ──► adapters, from their headers ──► modules of all ──► output folder ──► module after module: factors read,
               merged, written ──► report, config

The base is not opened, and no ΔW is made: a merge takes seconds whatever the model's size. An adapter that lacks a
module counts as zero there, which is told. Only where an adapter is a DoRA, whose magnitudes are lengths of rows of the
whole weight, the base's weights are read, one after the other (`dora.py`). Whole tensors (modules to save, biases) and
experts are refused by name.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from largemerge.adapter_tools.dora import (
    MAGNITUDE_DTYPE,
    PLAUSIBLE_GAINS,
    Base,
    DoraPart,
    base_reference,
    fit_base,
    merge_dora,
    open_base,
)
from largemerge.adapter_tools.factor_methods import (
    FACTOR_DTYPE,
    METHODS,
    MergedFactors,
    Scaled,
    merge_factors,
    merged_rank,
    squared_error,
)
from largemerge.adapter_tools.folder import (
    CARD_FILE,
    REPORT_FILES,
    check_out,
    check_room,
    finish_part,
    remove_earlier,
    tell,
)
from largemerge.adapter_tools.merge_config import AdapterMergeConfig
from largemerge.adapter_tools.merge_report import AdapterMergeReport, model_card
from largemerge.adapter_tools.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    factor_names,
    magnitude_name,
)
from largemerge.adapter_tools.report import ranks_shown
from largemerge.checkpoint.adapter_fit import FactorPair, read_factors
from largemerge.checkpoint.adapter_targets import PREFIX, Targets
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import locate_checkpoint, split_reference
from largemerge.checkpoint.lora import check_finite, open_own, open_reader
from largemerge.checkpoint.reader import CheckpointReader, TensorReader
from largemerge.checkpoint.tensor_info import OutputTensor, dtype_name, list_kinds, torch_dtype
from largemerge.checkpoint.writer import NotFiniteError, ShardWriter, layout_file, stored_sizes
from largemerge.errors import CheckpointError, ConfigError, LargemergeError, MergeError, shorten
from largemerge.output import InputWatch, OutputFolder, PartKind, open_output
from largemerge.progress import StepBar, stage
from largemerge.text_files import json_text
from largemerge.units import counted, gib

REPORT_FILE = REPORT_FILES[1]
_CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that decide which modules peft adapts."""


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter that is merged.

    Attributes:
        name: Reference that the user gives it.
        weight: Factor of its ΔW.
        own: Its config and tensors.
        factors: Its factors by path of the module.
    """

    name: str
    weight: float
    own: Checkpoint
    factors: Mapping[str, FactorPair]

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes."""
        return bool(self.own.config.get("use_dora"))


@dataclass(frozen=True)
class Module:
    """One module of the merged adapter.

    Attributes:
        path: Its path.
        rank: Its rank.
        outputs: O of its factors.
        inputs: I of its factors.
        embedding: Whether it is an embedding, whose factors have other names.
        has_magnitude: Whether it is a DoRA's.
    """

    path: str
    rank: int
    outputs: int
    inputs: int
    embedding: bool
    has_magnitude: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of A and B in the file, and of m if there is one."""
        names = factor_names(self.path)
        if self.embedding:
            names = f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return (*names, magnitude_name(self.path)) if self.has_magnitude else names

    def tensors(self, dtype: torch.dtype) -> dict[str, OutputTensor]:
        """Lists its tensors in the file, with factors of a dtype."""
        down, up, *magnitude = self.names
        found = {
            down: OutputTensor(dtype, (self.rank, self.inputs)),
            up: OutputTensor(dtype, (self.outputs, self.rank)),
        }
        wide = torch.promote_types(dtype, MAGNITUDE_DTYPE)
        return found | {name: OutputTensor(wide, (self.outputs,)) for name in magnitude}


def merge_adapters(
    config: AdapterMergeConfig, out: Path, *, resume: bool, force: bool, quiet: bool
) -> AdapterMergeReport:
    """Merges adapters into one; arguments as in `largemerge.merge_adapters`."""
    start = time.perf_counter()
    console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
    stage("reading the adapters' headers")
    adapters, base = open_all(config)
    inputs = [adapter.own.folder for adapter in adapters]
    modules = plan_modules(config, adapters)
    if base is not None:
        base = fit_base(base, modules, adapters[0].own.config)
        inputs += [base.checkpoint.folder, *(base.adapter.folders if base.adapter is not None else ())]
    check_out(out, inputs, resume=resume, force=force)
    dtype = torch_dtype(config.dtype) if config.dtype is not None else _widest(adapters)
    tensors = {name: tensor for module in modules for name, tensor in module.tensors(dtype).items()}
    shard = layout_file(WEIGHTS_FILE, tensors)
    check_room(out, shard)
    notes = list(dict.fromkeys([*_notes(adapters, modules), *_base_notes(config, adapters, base)]))
    rank = max(module.rank for module in modules)
    tell(console, f"{counted(len(modules), 'module')} at rank {rank}: adapter of {gib(shard.num_bytes)}")
    for note in notes:
        tell(console, f"{'' if note.startswith('warning: ') else 'note: '}{note}")
    manifest = {
        "merge-adapters": config.model_dump(mode="json"),
        "inputs": {adapter.name: dict(adapter.own.fingerprint) for adapter in adapters},
        "shards": [shard.file_name],
    }
    if base is not None:
        manifest["base"] = dict(base.checkpoint.fingerprint)
    watch = InputWatch(_checkpoints(base), {}, [file for adapter in adapters for file in _files(adapter)])
    with open_output(out, manifest, inputs, resume=resume, force=force) as folder:
        parts = [module.path for module in modules]
        folder.drop_damaged([PartKind(parts, folder.working, (shard,), stored_sizes(tensors))])
        todo = [module for module in modules if module.path not in folder.entries]
        with StepBar(len(todo), console) as bar, ShardWriter(folder.working, tensors, (shard,)) as writer:
            for path in _write_all(config, adapters, base, todo, dtype, folder, writer):
                bar.advance(f"merging {path}")
        watch.check()
        entries = {path: folder.entries[path] for path in parts}
        notes += _odd_gains(entries)
        report = AdapterMergeReport(
            out=out,
            method=config.merge_method,
            weights={adapter.name: adapter.weight for adapter in adapters},
            parameters={name: value for name, value in _parameters(config).items() if name != "rank"},
            base=base.name if base is not None else None,
            notes=notes,
            num_bytes=shard.num_bytes,
            seconds=time.perf_counter() - start,
            **_measures(entries, modules, rank),
        )
        made = _config(config, adapters, modules, rank)
        records = {
            CARD_FILE: model_card(report, made["base_model_name_or_path"]),
            REPORT_FILE: json_text({**report.to_json(), "digests": folder.digests_of((shard,))}, indent=2) + "\n",
            CONFIG_FILE: json.dumps(made, indent=2) + "\n",
        }
        folder.finish_records((shard,), records, remove_earlier)
    return report


def _measures(entries: Mapping[str, Mapping[str, Any]], modules: Sequence[Module], rank: int) -> dict[str, Any]:
    """Sums up what was measured of every module, as the report has it.

    Args:
        entries: Path of a module → its entry in the journal.
        modules: The modules.
        rank: Rank of the adapter.
    """
    whole = math.fsum(entry["square"] for entry in entries.values())
    squares = [entry["squares"] for entry in entries.values()]
    longest = max(map(len, squares))
    ranks = sorted({*ranks_shown(longest), rank}) if longest and whole else []
    return {
        "rank": rank,
        "kept": math.fsum(entry["kept"] for entry in entries.values()) / whole if whole else 1.0,
        "kept_by_rank": {each: math.fsum(math.fsum(own[:each]) for own in squares) / whole for each in ranks},
        "ranks": {module.path: module.rank for module in modules},
        "gains": {path: (entry["gains"][0], entry["gains"][1]) for path, entry in entries.items() if "gains" in entry},
        "errors": {path: _relative([entry]) for path, entry in entries.items()},
        "relative_error": _relative(list(entries.values())) or 0.0,
    }


def _relative(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Computes ‖error‖ / ‖Σ w ΔW‖ of some modules together; `None` where the sum is zero."""
    wanted = math.fsum(entry["wanted"] for entry in entries)
    return math.sqrt(math.fsum(entry["error"] for entry in entries) / wanted) if wanted else None


# Before the work


def open_all(config: AdapterMergeConfig) -> tuple[list[OpenAdapter], Base | None]:
    """Opens all adapters, and their base if one of them is a DoRA.

    Raises:
        CheckpointError: If one cannot be opened, or is of a kind that is not merged; it names all.
    """
    opened, problems = _open_adapters(config)
    base = None
    if any(adapter.is_dora for adapter in opened):
        try:
            named = {adapter.name: adapter.own.config for adapter in opened}
            reference = base_reference(config.base_model, named, config.folders)
            base = open_base(reference, given=config.base_model is not None)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return opened, base


def _open_adapters(config: AdapterMergeConfig) -> tuple[list[OpenAdapter], list[str]]:
    """Opens all adapters without their model, as far as they can be; and says what is wrong with them."""
    opened: list[OpenAdapter] = []
    problems: list[str] = []
    for entry in config.models:
        name = entry.model
        try:
            own = open_own(locate_checkpoint(name, name), name)
            found, others = read_factors(own)
            refused = list(_refusals(own, others))
            if not refused:
                refused = list(_shape_problems(own, found))
            if not refused:
                check_finite(own)
        except ValueError as error:  # a pattern without an end
            problems.append(f"{name}: adapter_config.json: {error}")
            continue
        except LargemergeError as error:
            problems += error.problems
            continue
        problems += [f"{name}: {problem}" for problem in refused]
        opened.append(OpenAdapter(name, entry.parameters.weight, own, found))
    return opened, problems


def _refusals(own: Checkpoint, others: Sequence[str]) -> Iterator[str]:
    """Yields what in an adapter is more than factors that are added."""
    instead = "merge it into its model instead: largemerge merge, with model+adapter"
    config = own.config
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; expected 'LORA', whose factors can be merged; {instead}"
        return
    if config.get("target_parameters"):
        yield f"target_parameters (fused experts) are not merged by factors; {instead}"
        return
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora")):
        yield f"init_lora_weights is {start!r}, which changes the model's own weights, too; {instead}"
        return
    halves = [name for name in others if name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"))]
    if halves:
        names = [name.removeprefix(PREFIX) for name in halves]
        yield f"holds {shorten(list_kinds(names), 300)} without the other factor; fetch or save the adapter once more"
    others = [name for name in others if name not in halves]
    if others:
        names = [name.removeprefix(PREFIX) for name in others]
        yield (
            f"holds {shorten(list_kinds(names), 300)} beside its factors (modules_to_save, biases, rows of tokens), "
            f"which are not merged here; {instead}"
        )


def _shape_problems(own: Checkpoint, factors: Mapping[str, FactorPair]) -> Iterator[str]:
    if not factors:
        yield f"{own.folder.name} has no lora_A and lora_B of any module; expected the weights of a LoRA"
    targets = Targets(own.config)
    for path, pair in factors.items():
        down, up = own.tensors[pair.down], own.tensors[pair.up]
        if not (down.dtype.is_floating_point and up.dtype.is_floating_point):
            yield f"{path}: A is {dtype_name(down.dtype)} and B {dtype_name(up.dtype)}; expected floating-point numbers"
            continue
        setting = targets.left_out_by(path, is_linear=True)
        if setting is not None and not targets.is_out_of_time:
            yield (
                f"{path}: the file has its factors, and {setting} in adapter_config.json leaves it out, so that peft "
                "does not load them; expected a config that names what the file has"
            )
            continue
        if len(down.shape) != 2 or len(up.shape) != 2:
            yield f"{path}: A {list(down.shape)} and B {list(up.shape)}; expected matrices: convolutions are not merged"
        elif not down.shape[0] == up.shape[1] == pair.rank:
            yield (
                f"{path}: A and B are of rank {down.shape[0]} and {up.shape[1]}, adapter_config.json says {pair.rank}"
            )
        else:
            yield from _magnitude_problems(own, path, pair)


def _magnitude_problems(own: Checkpoint, path: str, pair: FactorPair) -> Iterator[str]:
    """Yields where a magnitude is not just where DoRA says so, or does not fit B."""
    use_dora, outputs = bool(own.config.get("use_dora")), own.tensors[pair.up].shape[0]
    if use_dora != (pair.magnitude is not None):
        held = "a" if pair.magnitude is not None else "no"
        yield (
            f"{path}: use_dora in adapter_config.json is {use_dora}, and the file has {held} lora_magnitude_vector; "
            "fetch or save the adapter once more"
        )
    elif pair.magnitude is not None:
        magnitude = own.tensors[pair.magnitude]
        if not magnitude.dtype.is_floating_point or math.prod(magnitude.shape) != outputs:
            yield (
                f"{path}: lora_magnitude_vector is {list(magnitude.shape)}, {dtype_name(magnitude.dtype)}; expected a "
                f"floating-point number for each of {outputs} outputs"
            )


def plan_modules(config: AdapterMergeConfig, adapters: Sequence[OpenAdapter]) -> list[Module]:
    """Lists the modules of the merged adapter, in the adapters' order.

    Raises:
        CheckpointError: If factors do not fit each other.
        ConfigError: If the method needs the same ranks and they are not.
    """
    modules, problems, unlike = [], list(_other_names(adapters)), []
    dora = any(adapter.is_dora for adapter in adapters)
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.factors):
        having = [(adapter, adapter.factors[path]) for adapter in adapters if path in adapter.factors]
        sides = {
            adapter.name: (adapter.own.tensors[pair.up].shape[0], adapter.own.tensors[pair.down].shape[1])
            for adapter, pair in having
        }
        if len(set(sides.values())) > 1 or len({pair.embedding for _, pair in having}) > 1:
            told = ", ".join(f"{list(side)} in {name}" for name, side in sides.items())
            problems.append(f"{path} is [out, in] {told}; expected adapters of one base")
            continue
        ranks = [pair.rank for _, pair in having]
        if METHODS[config.merge_method].same_ranks and len(set(ranks)) > 1:
            unlike.append(path)
            continue
        side = next(iter(sides.values()))
        rank = merged_rank(config.merge_method, ranks, config.parameters.rank, side)
        modules.append(Module(path, rank, *side, having[0][1].embedding, dora))
    if problems:
        raise CheckpointError(*problems[:20])
    if unlike:
        raise ConfigError(
            f"merge_method: {config.merge_method} adds A to A and B to B, and the adapters have other ranks in "
            f"{list_kinds(unlike)}; expected one rank, or cat, svd or knots, which take any"
        )
    return modules


def _other_names(adapters: Sequence[OpenAdapter]) -> Iterator[str]:
    """Yields the adapters that name the same modules otherwise, as those of a bare body and of a whole model do."""
    for adapter in adapters:
        path = next(iter(adapter.factors))
        for other in adapters:
            longer = next((each for each in other.factors if each.endswith(f".{path}")), None)
            if longer is not None and adapter.factors.keys().isdisjoint(other.factors):
                yield (
                    f"{adapter.name} has {path} where {other.name} has {longer}: adapters of other classes, of "
                    "which peft finds only one in a model; expected adapters of one class"
                )


def _widest(adapters: Sequence[OpenAdapter]) -> torch.dtype:
    """Finds the dtype that holds all factors, of 16 bits at least."""
    dtypes = {adapter.own.tensors[pair.up].dtype for adapter in adapters for pair in adapter.factors.values()}
    return reduce(torch.promote_types, {dtype if dtype.itemsize > 1 else torch.bfloat16 for dtype in dtypes})


def _notes(adapters: Sequence[OpenAdapter], modules: Sequence[Module]) -> Iterator[str]:
    """Yields what a user should know of how the adapters differ."""
    for adapter in adapters:
        lacking = [module.path for module in modules if module.path not in adapter.factors]
        if lacking:
            yield f"{adapter.name} has no factors of {list_kinds(lacking)}: they count as zero"
        names = Targets(adapter.own.config).names
        unheld = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in adapter.factors)]
        if unheld:
            yield f"warning: {adapter.name}: target_modules names {', '.join(unheld)}, of which its file has no factors"
    bases = {name for each in adapters if (name := each.own.config.get("base_model_name_or_path"))}
    if len(bases) > 1:
        yield (
            f"warning: the adapters name different bases ({', '.join(sorted(map(str, bases)))}); their sum means "
            "something on one base only"
        )
    for key in ("task_type", "fan_in_fan_out"):
        values = {str(each.own.config.get(key)) for each in adapters}
        if len(values) > 1:
            yield f"adapter_config.json: {key} is {' and '.join(sorted(values))}; that of {adapters[0].name} is kept"


def _base_notes(config: AdapterMergeConfig, adapters: Sequence[OpenAdapter], base: Base | None) -> Iterator[str]:
    """Yields what becomes of magnitudes, and of `base_model`."""
    if base is None:
        if config.base_model is not None:
            yield f"base_model: {config.base_model} is not read, as no adapter is a DoRA"
        return
    names = [adapter.name for adapter in adapters if adapter.is_dora]
    yield (
        f"use_dora: {', '.join(names)}; the result is a DoRA, too, with magnitudes for every module, and the lengths "
        f"of rows are those of {base.name}"
    )
    yield from base.notes


def _checkpoints(base: Base | None) -> list[Checkpoint]:
    if base is None:
        return []
    return [base.checkpoint, *([base.adapter.checkpoint] if base.adapter is not None else [])]


def _files(adapter: OpenAdapter) -> list[Path]:
    files = {info.file for info in adapter.own.tensors.values()}
    return [adapter.own.folder / CONFIG_FILE, *sorted(files)]


# The work


def _parameters(config: AdapterMergeConfig) -> dict[str, Any]:
    """All parameters of the method, those that are not given with their defaults."""
    return {**METHODS[config.merge_method].parameters, **config.parameters.given()}


def _write_all(
    config: AdapterMergeConfig,
    adapters: Sequence[OpenAdapter],
    base: Base | None,
    modules: Sequence[Module],
    dtype: torch.dtype,
    folder: OutputFolder,
    writer: ShardWriter,
) -> Iterator[str]:
    """Merges and writes modules, one after the other; yields their paths."""
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(adapter.own)) for adapter in adapters]
        weights = stack.enter_context(open_reader(base.checkpoint, base.adapter)) if base is not None else None
        for module in modules:
            parts = [
                _read_part(adapter, pair, reader)
                for adapter, reader in zip(adapters, readers, strict=True)
                if (pair := adapter.factors.get(module.path)) is not None
            ]
            if base is None or weights is None:
                tensors, measured = _merge_plain(config, module, [part.factors for part in parts], dtype)
            else:
                tensors, measured = _merge_dora(config, module, parts, dtype, base, weights)
            for name, tensor in zip(module.names, tensors, strict=True):
                try:
                    writer.write(name, tensor)
                except NotFiniteError as error:
                    advice = "dtype: float32 holds larger numbers" if dtype != torch.float32 else "use smaller weights"
                    raise MergeError(f"{name} {error}; {advice}") from None
            finish_part(module.path, module.names, measured, folder, writer)
            yield module.path


def _read_part(adapter: OpenAdapter, pair: FactorPair, reader: TensorReader) -> DoraPart:
    """Reads what an adapter has of one module."""
    down, up = (reader.read(name).to(FACTOR_DTYPE) for name in (pair.down, pair.up))
    magnitude = reader.read(pair.magnitude).to(FACTOR_DTYPE).reshape(-1) if pair.magnitude is not None else None
    return DoraPart(Scaled(down, up, pair.scale, adapter.weight), magnitude, adapter.name)


def _merge_plain(
    config: AdapterMergeConfig, module: Module, parts: Sequence[Scaled], dtype: torch.dtype
) -> tuple[Sequence[torch.Tensor], dict[str, Any]]:
    """Merges one module by its factors alone; returns its tensors, and what was measured."""
    merged = merge_factors(config.merge_method, parts, module.rank, _parameters(config))
    down, up = (each.to(dtype).contiguous() for each in (merged.down, merged.up))
    error, wanted = squared_error((down.to(FACTOR_DTYPE), up.to(FACTOR_DTYPE)), parts)
    return (down, up), _measured(merged, error, wanted)


def _merge_dora(
    config: AdapterMergeConfig,
    module: Module,
    parts: Sequence[DoraPart],
    dtype: torch.dtype,
    base: Base,
    reader: TensorReader,
) -> tuple[Sequence[torch.Tensor], dict[str, Any]]:
    """Merges one module as a DoRA; returns its tensors, and what was measured."""
    place = base.weights[module.path]
    weight = reader.read(place.key)
    try:
        found = merge_dora(
            config.merge_method,
            weight.T if place.transposed else weight,
            parts,
            module.rank,
            _parameters(config),
            dtype,
        )
    except MergeError as error:
        raise MergeError(*(f"{module.path}: {problem}" for problem in error.problems)) from None
    measured = _measured(found.merged, found.error, found.wanted)
    return found.tensors, {**measured, "gains": found.gains, "medians": found.medians}


def _measured(merged: MergedFactors, error: float, wanted: float) -> dict[str, Any]:
    return {
        "error": error,
        "wanted": wanted,
        "kept": merged.kept_square,
        "square": merged.square,
        "squares": merged.squares,
    }


# What is said of it


def _odd_gains(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the adapters whose magnitudes are of another order than the rows that were measured."""
    odd: dict[str, dict[str, float]] = {}
    low, high = PLAUSIBLE_GAINS
    for path, entry in entries.items():
        for name, median in entry.get("medians", {}).items():
            if not low <= median <= high:
                odd.setdefault(name, {})[path] = median
    for name, medians in odd.items():
        path, median = next(iter(medians.items()))
        yield (
            f"warning: {name}: magnitudes are {median:.2g} times the lengths of rows in {path} (and {len(medians) - 1} "
            "more modules), by the median; the base may not be the one that it was trained on"
        )


def _config(
    config: AdapterMergeConfig, adapters: Sequence[OpenAdapter], modules: Sequence[Module], rank: int
) -> dict[str, Any]:
    """Makes `adapter_config.json`; modules are chosen as by the adapters where these all choose alike."""
    first = adapters[0].own.config
    alike = all(each.own.config.get(key) == first.get(key) for each in adapters for key in _CHOOSING)
    alike = alike and all(each.factors.keys() == adapters[0].factors.keys() for each in adapters)
    targets = first.get("target_modules") if alike else None
    made = adapter_config(
        base=first.get("base_model_name_or_path") or _whole_base(config),
        revision=first.get("revision"),
        task=first.get("task_type"),
        rank=rank,
        ranks={module.path: module.rank for module in modules},
        targets=targets if targets is not None else [module.path for module in modules],
        transposed=bool(first.get("fan_in_fan_out")),
        saved=(),
        biases=False,
        ties=bool(first.get("ensure_weight_tying")),
        dora=modules[0].has_magnitude,
    )
    if alike:
        made |= {key: first[key] for key in _CHOOSING[1:] if first.get(key) is not None}
    if first.get("auto_mapping") is not None:
        made["auto_mapping"] = first["auto_mapping"]
    return made


def _whole_base(config: AdapterMergeConfig) -> str | None:
    """Returns `base_model`, unless it has adapters, which peft could not load."""
    base = config.base_model
    return base if base is not None and split_reference(base)[1] is None else None
