"""Several LoRA adapters of one base as one adapter: `largemerge merge-adapters`.

    config ──► adapters, from their headers ──► modules of all ──► output folder ──► module after module: factors read,
               merged, written ──► report, config

The base is not opened, and no ΔW is made: a merge takes seconds whatever the model's size. An adapter that lacks a
module counts as zero there, which is told. Nothing but factors of plain LoRA and rsLoRA can be merged so: DoRA's
magnitudes multiply the whole weight, and whole tensors (modules to save, biases) and experts are refused by name.
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
from rich.table import Table

from largemerge.adapter_tools.factor_methods import (
    FACTOR_DTYPE,
    METHODS,
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
from largemerge.adapter_tools.peft_files import CONFIG_FILE, WEIGHTS_FILE, adapter_config, factor_names
from largemerge.checkpoint.adapter_fit import FactorPair, read_factors
from largemerge.checkpoint.adapter_targets import PREFIX, Targets
from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import locate_checkpoint
from largemerge.checkpoint.lora import check_finite, open_own
from largemerge.checkpoint.reader import CheckpointReader
from largemerge.checkpoint.tensor_info import OutputTensor, dtype_name, list_kinds, torch_dtype
from largemerge.checkpoint.writer import NotFiniteError, ShardWriter, layout_file, stored_sizes
from largemerge.errors import CheckpointError, ConfigError, LargemergeError, MergeError, shorten
from largemerge.machine import versions
from largemerge.output import InputWatch, OutputFolder, PartKind, open_output
from largemerge.progress import StepBar, stage
from largemerge.streams import plain_text
from largemerge.text_files import json_text
from largemerge.units import counted, duration, gib

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


@dataclass(frozen=True)
class Module:
    """One module of the merged adapter.

    Attributes:
        path: Its path.
        rank: Its rank.
        outputs: O of its factors.
        inputs: I of its factors.
        embedding: Whether it is an embedding, whose factors have other names.
    """

    path: str
    rank: int
    outputs: int
    inputs: int
    embedding: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        if self.embedding:
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return factor_names(self.path)


@dataclass(frozen=True)
class AdapterMergeReport:
    """What `largemerge merge-adapters` has written.

    Attributes:
        out: The output folder.
        method: Name of the method.
        weights: Weight of every adapter, by reference.
        parameters: All parameters of the method, but for its rank.
        rank: Rank of the result.
        kept: Share of ‖ΔW‖² of the merge that this rank keeps.
        errors: Path of a module → ‖B A - Σ w ΔW‖ / ‖Σ w ΔW‖, as written; `None` where the sum is zero.
        relative_error: The same, of all modules together.
        notes: What a user should know; warnings begin with `warning: `.
        num_bytes: Bytes of the adapter's file.
        seconds: Seconds in total.
    """

    out: Path
    method: str
    weights: Mapping[str, float]
    parameters: Mapping[str, Any]
    rank: int
    kept: float
    errors: Mapping[str, float | None]
    relative_error: float
    notes: Sequence[str]
    num_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "versions": versions(),
            "merge_method": self.method,
            "weights": dict(self.weights),
            "parameters": dict(self.parameters),
            "rank": self.rank,
            "kept": self.kept,
            "relative_error": self.relative_error,
            "modules": {path: {"relative_error": error} for path, error in self.errors.items()},
            "notes": list(self.notes),
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        """What is shown, as plain text."""
        return plain_text(self.print)

    def print(self, console: Console) -> None:
        """Shows the report as a table."""
        title = f"{self.method}: {counted(len(self.weights), 'adapter')} → {self.out}"
        table = Table(title=title, show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row(
            "result", f"{METHODS[self.method].title}; rank {self.rank}, {counted(len(self.errors), 'module')}"
        )
        if "rank" in METHODS[self.method].parameters:
            table.add_row("kept", f"{self.kept:.2%} of ‖ΔW‖² of the merge, by its rank")
        table.add_row("error", f"{self.relative_error:.2g} of ‖Σ w ΔW‖, against the weighted sum, as written")
        table.add_row("disk", f"{gib(self.num_bytes)} written")
        table.add_row("time", duration(self.seconds))
        for note in self.notes:
            table.add_row("note", note)
        console.print(table)


def merge_adapters(
    config: AdapterMergeConfig, out: Path, *, resume: bool, force: bool, quiet: bool
) -> AdapterMergeReport:
    """Merges adapters into one; arguments as in `largemerge.merge_adapters`."""
    start = time.perf_counter()
    console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
    stage("reading the adapters' headers")
    adapters = open_adapters(config)
    inputs = [adapter.own.folder for adapter in adapters]
    check_out(out, inputs, resume=resume, force=force)
    modules = plan_modules(config, adapters)
    dtype = torch_dtype(config.dtype) if config.dtype is not None else _widest(adapters)
    tensors: dict[str, OutputTensor] = {}
    for module in modules:
        down, up = module.names
        tensors[down] = OutputTensor(dtype, (module.rank, module.inputs))
        tensors[up] = OutputTensor(dtype, (module.outputs, module.rank))
    shard = layout_file(WEIGHTS_FILE, tensors)
    check_room(out, shard)
    notes = list(dict.fromkeys([*_notes(adapters, modules), *_undivided(config)]))
    rank = max(module.rank for module in modules)
    tell(console, f"{counted(len(modules), 'module')} at rank {rank}: adapter of {gib(shard.num_bytes)}")
    for note in notes:
        tell(console, f"{'' if note.startswith('warning: ') else 'note: '}{note}")
    manifest = {
        "merge-adapters": config.model_dump(mode="json"),
        "inputs": {adapter.name: dict(adapter.own.fingerprint) for adapter in adapters},
        "shards": [shard.file_name],
    }
    watch = InputWatch((), {}, [file for adapter in adapters for file in _files(adapter)])
    with open_output(out, manifest, inputs, resume=resume, force=force) as folder:
        parts = [module.path for module in modules]
        folder.drop_damaged([PartKind(parts, folder.working, (shard,), stored_sizes(tensors))])
        todo = [module for module in modules if module.path not in folder.entries]
        with StepBar(len(todo), console) as bar, ShardWriter(folder.working, tensors, (shard,)) as writer:
            for path in _write_all(config, adapters, todo, dtype, folder, writer):
                bar.advance(f"merging {path}")
        watch.check()
        squares = {path: (folder.entries[path]["error"], folder.entries[path]["wanted"]) for path in parts}
        total = math.fsum(wanted for _, wanted in squares.values())
        whole = math.fsum(folder.entries[path]["square"] for path in parts)
        report = AdapterMergeReport(
            out=out,
            method=config.merge_method,
            weights={adapter.name: adapter.weight for adapter in adapters},
            parameters={name: value for name, value in _parameters(config).items() if name != "rank"},
            rank=rank,
            kept=math.fsum(folder.entries[path]["kept"] for path in parts) / whole if whole else 1.0,
            errors={path: math.sqrt(error / wanted) if wanted else None for path, (error, wanted) in squares.items()},
            relative_error=math.sqrt(math.fsum(error for error, _ in squares.values()) / total) if total else 0.0,
            notes=notes,
            num_bytes=shard.num_bytes,
            seconds=time.perf_counter() - start,
        )
        made = _config(adapters, modules, rank)
        records = {
            CARD_FILE: _card(report, made["base_model_name_or_path"]),
            REPORT_FILE: json_text({**report.to_json(), "digests": folder.digests_of((shard,))}, indent=2) + "\n",
            CONFIG_FILE: json.dumps(made, indent=2) + "\n",
        }
        folder.finish_records((shard,), records, remove_earlier)
    return report


# Before the work


def open_adapters(config: AdapterMergeConfig) -> list[OpenAdapter]:
    """Opens all adapters without their model.

    Raises:
        CheckpointError: If one cannot be opened, or is of a kind that its factors alone do not tell; it names all.
    """
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
    if problems:
        raise CheckpointError(*problems)
    return opened


def _refusals(own: Checkpoint, others: Sequence[str]) -> Iterator[str]:
    """Yields what in an adapter is more than factors that are added."""
    instead = "merge it into its model instead: largemerge merge, with model+adapter"
    config = own.config
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; expected 'LORA', whose factors can be merged; {instead}"
        return
    if config.get("use_dora"):
        yield f"use_dora: its magnitudes multiply the whole weight, so that factors alone do not tell ΔW; {instead}"
        return
    if config.get("target_parameters"):
        yield f"target_parameters (fused experts) are not merged by factors; {instead}"
        return
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora")):
        yield f"init_lora_weights is {start!r}, which changes the model's own weights, too; {instead}"
        return
    halves = [name for name in others if name.endswith((".lora_A.weight", ".lora_B.weight"))]
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


def plan_modules(config: AdapterMergeConfig, adapters: Sequence[OpenAdapter]) -> list[Module]:
    """Lists the modules of the merged adapter, in the adapters' order.

    Raises:
        CheckpointError: If factors do not fit each other.
        ConfigError: If the method needs the same ranks and they are not.
    """
    modules, problems, unlike = [], list(_other_names(adapters)), []
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
        modules.append(Module(path, rank, *side, having[0][1].embedding))
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


def _undivided(config: AdapterMergeConfig) -> Iterator[str]:
    """Yields that weights which add up to 0 divide nothing."""
    weights = [entry.parameters.weight for entry in config.models]
    if _parameters(config).get("normalize") and abs(sum(weights)) < 1e-8:
        told = ", ".join(f"{weight:g}" for weight in weights)
        yield f"warning: weight: {told} add up to 0: where all adapters agree, the sum is not divided by it"


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
    modules: Sequence[Module],
    dtype: torch.dtype,
    folder: OutputFolder,
    writer: ShardWriter,
) -> Iterator[str]:
    """Merges and writes modules, one after the other; yields their paths."""
    parameters = _parameters(config)
    with ExitStack() as stack:
        readers = [stack.enter_context(CheckpointReader(adapter.own)) for adapter in adapters]
        for module in modules:
            parts = [
                Scaled(
                    reader.read(pair.down).to(FACTOR_DTYPE),
                    reader.read(pair.up).to(FACTOR_DTYPE),
                    pair.scale,
                    adapter.weight,
                )
                for adapter, reader in zip(adapters, readers, strict=True)
                if (pair := adapter.factors.get(module.path)) is not None
            ]
            merged = merge_factors(config.merge_method, parts, module.rank, parameters)
            down, up = (each.to(dtype).contiguous() for each in (merged.down, merged.up))
            for name, tensor in zip(module.names, (down, up), strict=True):
                try:
                    writer.write(name, tensor)
                except NotFiniteError as error:
                    advice = "dtype: float32 holds larger numbers" if dtype != torch.float32 else "use smaller weights"
                    raise MergeError(f"{name} {error}; {advice}") from None
            error_square, wanted = squared_error((down.to(FACTOR_DTYPE), up.to(FACTOR_DTYPE)), parts)
            measured = {"error": error_square, "wanted": wanted, "kept": merged.kept_square, "square": merged.square}
            finish_part(module.path, module.names, measured, folder, writer)
            yield module.path


# What is said of it


def _config(adapters: Sequence[OpenAdapter], modules: Sequence[Module], rank: int) -> dict[str, Any]:
    """Makes `adapter_config.json`; modules are chosen as by the adapters where these all choose alike."""
    first = adapters[0].own.config
    alike = all(each.own.config.get(key) == first.get(key) for each in adapters for key in _CHOOSING)
    alike = alike and all(each.factors.keys() == adapters[0].factors.keys() for each in adapters)
    targets = first.get("target_modules") if alike else None
    made = adapter_config(
        base=first.get("base_model_name_or_path"),
        revision=first.get("revision"),
        task=first.get("task_type"),
        rank=rank,
        ranks={module.path: module.rank for module in modules},
        targets=targets if targets is not None else [module.path for module in modules],
        transposed=bool(first.get("fan_in_fan_out")),
        saved=(),
        biases=False,
        ties=bool(first.get("ensure_weight_tying")),
    )
    if alike:
        made |= {key: first[key] for key in _CHOOSING[1:] if first.get(key) is not None}
    if first.get("auto_mapping") is not None:
        made["auto_mapping"] = first["auto_mapping"]
    return made


def _card(report: AdapterMergeReport, base: str | None) -> str:
    names = [f"base_model: {base!r}"] if base else []
    lines = ["---", "library_name: peft", *names, "tags: [lora, largemerge]", "---", "", "# Merged LoRA adapters", ""]
    lines += [f"By `largemerge merge-adapters`, `{report.method}`: {METHODS[report.method].title}.", ""]
    for name, weight in report.weights.items():
        lines.append(f"- {weight:g} · `{Path(name).name if Path(name).exists() else name}`")
    return "\n".join([*lines, "", *(f"- {note}" for note in report.notes)]).rstrip() + "\n"
