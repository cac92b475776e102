"""The difference of two models as a LoRA adapter: `largemerge extract-lora`.

    extract   references ──► both models, from their headers ──► every parameter compared ──► plan
              ──► matrices, one at a time: read, decomposed, written ──► whole tensors ──► report, config

Of every linear that differs, Δ = W - W_0 = U S Vᵀ `[O, I]`, the r largest singular values are kept, which is the best
matrix of that rank in the Frobenius norm (Eckart and Young 1936):

    B = U_r S_r^½  [O, r]        A = S_r^½ V_rᵀ  [r, I]        ‖Δ - B A‖² = ‖Δ‖² - Σ_{i≤r} s_i²

S is shared between A and B, so that both keep as many digits in 16 bits. `lora_alpha` is r, so that peft's scale is 1.
What no LoRA holds (norms, biases, embeddings, tied heads) is written as a whole where that is asked for, else named.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import regex
import torch
from rich.console import Console

from largemerge.adapter_tools.differences import (
    BASE,
    FINE_TUNED,
    Difference,
    ModelPair,
    Pair,
    PairReader,
    compare_all,
    open_pair,
    square_of,
    stored_dtype,
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
from largemerge.adapter_tools.peft_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    bias_name,
    factor_names,
    head_of,
    names_to_save,
    needs_head,
    target_names,
    task_type,
    whole_name,
)
from largemerge.adapter_tools.report import ExtractReport, LeftOut, MatrixReport, model_card, ranks_shown
from largemerge.checkpoint.adapter_targets import timed_match
from largemerge.checkpoint.locate import split_reference
from largemerge.checkpoint.tensor_info import LAYER_NUMBER, OutputTensor
from largemerge.checkpoint.writer import NotFiniteError, Shard, ShardWriter, layout_file, stored_sizes
from largemerge.config_file import nearest, shown
from largemerge.devices import choose_device
from largemerge.errors import CheckpointError, ConfigError, MergeError
from largemerge.log import LOGGER
from largemerge.machine import MemoryWatch
from largemerge.output import InputWatch, OutputFolder, PartKind, open_output
from largemerge.progress import StepBar, stage
from largemerge.singular import singular_vectors
from largemerge.text_files import json_text
from largemerge.units import counted, gib

REPORT_FILE = REPORT_FILES[0]
_ROWS_AT_ONCE = 1024
_EIGH_COPIES = 5  # of a float64 Gram matrix: itself, its eigenvectors, and LAPACK's workspace of two and more
_PATTERN_SECONDS = 2.0


@dataclass(frozen=True)
class ExtractOptions:
    """What a user asks for.

    Attributes:
        fine_tuned: Reference of the fine-tuned model.
        base: Reference of the base.
        rank: Rank of the adapter; matrices that are smaller have their own.
        targets: Names of modules, or regular expressions of their paths; `None`: all linears that differ.
        save_others: Write what differs and is no linear's weight as whole tensors.
        dtype: Dtype of the factors.
        trust_remote_code: Allow the checkpoints' own Python code.
    """

    fine_tuned: str
    base: str
    rank: int = 32
    targets: tuple[str, ...] | None = None
    save_others: bool = False
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Matrix:
    """A weight whose difference becomes two factors.

    Attributes:
        pair: The parameter in both models.
        difference: How it differs.
        outputs: Number of outputs, O.
        inputs: Number of inputs, I.
        transposed: Whether it lies `[in, out]`.
        rank: Rank of its factors.
    """

    pair: Pair
    difference: Difference
    outputs: int
    inputs: int
    transposed: bool
    rank: int

    @property
    def path(self) -> str:
        """Path of its module."""
        return self.pair.module


@dataclass(frozen=True)
class WholeTensors:
    """Tensors of the fine-tuned model that the adapter holds as they are.

    Attributes:
        sources: Name in the adapter's file → parameter of the fine-tuned model.
        modules: `modules_to_save`.
        biases: Whether biases of other modules are among them.
        ties: Whether they are one tensor under several names in both models, which are to stay so.
        held: Names of the parameters that differ and are held by these.
    """

    sources: Mapping[str, str]
    modules: tuple[str, ...]
    biases: bool
    ties: bool
    held: frozenset[str]


@dataclass(frozen=True)
class Contents:
    """What the adapter will hold, and what it will not.

    Attributes:
        matrices: Weights that are decomposed.
        whole: Tensors that are written as they are.
        held: Parameters that differ and are in `whole`.
        left_out: What differs and is not in the adapter.
    """

    matrices: tuple[Matrix, ...]
    whole: WholeTensors
    held: Mapping[str, Difference]
    left_out: Mapping[str, LeftOut]


@dataclass(frozen=True)
class ExtractPlan:
    """What an extraction will do.

    Attributes:
        num_matrices: Number of matrices that are decomposed.
        num_whole: Number of tensors that are written as a whole.
        rank: Rank of the adapter.
        num_bytes: Bytes of the adapter's file.
        peak_bytes: Bytes of memory for the largest matrix, at most, beside what Python and torch take.
        notes: What a user should know; warnings begin with `warning: `.
    """

    num_matrices: int
    num_whole: int
    rank: int
    num_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """One line for the terminal."""
        whole = f", {counted(self.num_whole, 'whole tensor')}" if self.num_whole else ""
        return (
            f"{counted(self.num_matrices, 'matrix', 'matrices')} at rank {self.rank}{whole}: adapter of "
            f"{gib(self.num_bytes)}, about {gib(self.peak_bytes)} of memory for the largest"
        )


@dataclass(frozen=True)
class Factors:
    """The factors of one difference.

    Attributes:
        down: A `[r, I]`.
        up: B `[O, r]`.
        squares: s_i² of the singular values that are in them, largest first.
    """

    down: torch.Tensor
    up: torch.Tensor
    squares: tuple[float, ...]


def low_rank_factors(delta_OI: torch.Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """Computes B = U_r S_r^½ and A = S_r^½ V_rᵀ of a matrix; zeros where it has fewer than r singular values.

    Args:
        delta_OI: The matrix, float32.
        rank: r, at most min(O, I).
        dtype: Dtype of the factors.
    """
    u_OR, s_R, v_IR = singular_vectors(delta_OI, rank)
    root_R = s_R.sqrt().to(torch.float32)
    down = torch.zeros(rank, delta_OI.shape[1], dtype=dtype)
    up = torch.zeros(delta_OI.shape[0], rank, dtype=dtype)
    down[: len(s_R)] = (v_IR * root_R).T.to("cpu", dtype)
    up[:, : len(s_R)] = (u_OR * root_R).to("cpu", dtype)
    return Factors(down, up, tuple(s_R.square().tolist()))


def extract(
    options: ExtractOptions,
    out: Path,
    *,
    device: str,
    resume: bool,
    force: bool,
    quiet: bool,
    planned: Callable[[ExtractPlan], None] | None = None,
) -> ExtractReport:
    """Writes the difference of two models as an adapter; arguments as in `largemerge.extract_lora`."""
    start = time.perf_counter()
    console = Console(stderr=True, quiet=quiet, markup=False, emoji=False)
    with MemoryWatch(choose_device(device)) as memory:
        stage("reading the headers of both models")
        models = open_pair(options.fine_tuned, options.base, trust_remote_code=options.trust_remote_code)
        _check_targets(models, options.targets)
        inputs = _folders(models)
        check_out(out, inputs, resume=resume, force=force)
        watch = InputWatch(_checkpoints(models), {})
        with models.reading() as reader:
            with StepBar(len(models.pairs), console) as bar:
                found = compare_all(reader, models.pairs, lambda name: bar.advance(f"comparing {name}"))
            contents = sort_differences(models, found, options)
            tensors = _tensors(models, contents, options.dtype)
            shard = layout_file(WEIGHTS_FILE, tensors)
            plan = _plan(models, contents, options, shard)
            check_room(out, shard)
            tell(console, str(plan))
            for note in plan.notes:
                tell(console, f"{'' if note.startswith('warning: ') else 'note: '}{note}")
            if planned is not None:
                planned(plan)
            manifest = _manifest(models, options, shard)
            with open_output(out, manifest, inputs, resume=resume, force=force) as folder:
                parts = [*(matrix.path for matrix in contents.matrices), *contents.whole.sources]
                folder.drop_damaged([PartKind(parts, folder.working, (shard,), stored_sizes(tensors))])
                resumed = len(folder.entries)
                with (
                    StepBar(len(parts) - resumed, console) as bar,
                    ShardWriter(folder.working, tensors, (shard,)) as writer,
                ):
                    for part in _write_all(reader, contents, options, memory.device, folder, writer):
                        bar.advance(f"writing {part}")
                watch.check()
                report = ExtractReport(
                    out=out,
                    fine_tuned=options.fine_tuned,
                    base=options.base,
                    rank=options.rank,
                    matrices=[_matrix_report(each, folder.entries[each.path]) for each in contents.matrices],
                    held={name: difference.relative_norm for name, difference in contents.held.items()},
                    held_square=sum(difference.square for difference in contents.held.values()),
                    left_out=contents.left_out,
                    notes=plan.notes,
                    num_bytes=shard.num_bytes,
                    bytes_read=reader.bytes_read,
                    resumed_parts=resumed,
                    redone_parts=tuple(folder.redone),
                    seconds=time.perf_counter() - start,
                    peak=memory.peak(),
                )
                digests = folder.digests_of((shard,))
                records = {
                    CARD_FILE: model_card(report, _base_name(models, options)[0]),
                    REPORT_FILE: json_text({**report.to_json(), "digests": digests}, indent=2) + "\n",
                    CONFIG_FILE: json.dumps(_config(models, contents, options), indent=2) + "\n",
                }
                folder.finish_records((shard,), records, remove_earlier)
        return report


# Before the work


def sort_differences(models: ModelPair, found: Mapping[str, Difference], options: ExtractOptions) -> Contents:
    """Sorts what differs: matrices that are decomposed, tensors that are written as a whole, and what is left out.

    Args:
        models: The two models.
        found: Differences by name of the parameter.
        options: What the user asks for.

    Raises:
        CheckpointError: If there is no matrix to decompose.
    """
    if not found:
        raise CheckpointError(
            f"{options.fine_tuned} and {options.base} have the same weights: there is nothing to extract; expected a "
            "fine-tuned model and the base that it was tuned from"
        )
    task = task_type(models.fine_tuned.model)
    matrices: list[Matrix] = []
    others: dict[str, tuple[Pair, str]] = {}
    for pair in models.pairs:
        if pair.name not in found:
            continue
        reason = _why_no_matrix(models, pair, task, options.targets)
        if reason is not None:
            others[pair.name] = (pair, reason)
            continue
        transposed = models.is_transposed(pair.module)
        outputs, inputs = reversed(pair.shape) if transposed else pair.shape
        rank = min(options.rank, outputs, inputs)
        matrices.append(Matrix(pair, found[pair.name], outputs, inputs, transposed, rank))
    if not matrices:
        listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in list(others.items())[:3])
        more = f" (and {len(others) - 3} more)" if len(others) > 3 else ""
        raise CheckpointError(
            f"no linear of {options.fine_tuned} differs from {options.base} in a way that a LoRA holds: {listed}{more}"
        )
    holdable = {name: pair for name, (pair, reason) in others.items() if options.save_others and _is_holdable(reason)}
    whole = _whole_tensors(models, matrices, holdable, task)
    left_out = {
        name: LeftOut(reason, found[name].relative_norm, found[name].square if pair.shape == pair.base_shape else 0.0)
        for name, (pair, reason) in others.items()
        if name not in whole.held
    }
    held = {name: difference for name, difference in found.items() if name in whole.held}
    return Contents(tuple(matrices), whole, held, left_out)


_NO_LINEAR, _TARGETS, _SHAPE = "no weight of a linear", "left out by --targets", "of another shape"
_TIED, _ABSENT, _HEAD = "tied in the base", "not in the base", "the task's head, which peft saves as a whole"


def _why_no_matrix(models: ModelPair, pair: Pair, task: str | None, targets: Sequence[str] | None) -> str | None:
    """Says why a parameter that differs gets no factors; `None` if it gets them."""
    if pair.base_shape is None:
        return _ABSENT
    if pair.shape != pair.base_shape:
        return f"{_SHAPE}: {list(pair.shape)}, in the base {list(pair.base_shape)}"
    if pair.leaf != "weight" or not models.is_linear(pair.module) or len(pair.shape) != 2:
        return _NO_LINEAR
    if pair.tied or pair.aliases:
        return _TIED
    if head_of(pair.module, task) is not None:
        return _HEAD
    if targets is not None and not any(_is_meant(target, pair.module) for target in targets):
        return _TARGETS
    return None


def _is_holdable(reason: str) -> bool:
    """Whether a whole tensor may hold what no factors hold."""
    return reason in (_NO_LINEAR, _TIED, _ABSENT, _HEAD)


def _whole_tensors(
    models: ModelPair, matrices: Sequence[Matrix], wanted: Mapping[str, Pair], task: str | None
) -> WholeTensors:
    """Finds the modules that must be saved as a whole for some parameters, and their tensors."""
    adapted = {matrix.path for matrix in matrices}
    paths: dict[str, None] = {}
    biases: list[str] = []
    for pair in wanted.values():
        if pair.base_shape is None and LAYER_NUMBER.search(f"{pair.name}."):
            continue  # of a layer that the base's class does not make
        for name in (pair.name, *pair.aliases):
            module, _, leaf = name.rpartition(".")
            head = head_of(module, task)
            path = head or module
            free = bool(path) and not any(each == path or each.startswith(f"{path}.") for each in adapted)
            is_bias = leaf == "bias" and head is None and pair.base_shape is not None
            if is_bias and (not free or models.is_linear(path)):
                biases.append(name)
            elif free:
                paths[path] = None
    names, taken = names_to_save(list(paths), models.modules)
    pairs = {name: pair for pair in models.pairs for name in (pair.name, *pair.aliases)}
    inside = {name for name in pairs if any(name.startswith(f"{path}.") for path in taken)}
    sources = {whole_name(name): pairs[name].source for name in pairs if name in inside}
    outside = [name for name in biases if name not in inside]
    for name in outside:
        module = name.rpartition(".")[0]
        sources[bias_name(module, adapted=module in adapted)] = pairs[name].source
    covered = {*inside, *outside}
    held = frozenset(pair.name for pair in wanted.values() if covered.issuperset((pair.name, *pair.aliases)))
    shared = [pair for pair in models.pairs if pair.name in inside and pair.tied]
    ties = bool(shared) and all(pair.aliases for pair in shared)
    return WholeTensors(sources, tuple(names), bool(outside), ties, held)


def _check_targets(models: ModelPair, targets: Sequence[str] | None) -> None:
    """Checks that every target is a linear, or matches some.

    Raises:
        ConfigError: If one does not; it names all.
    """
    linears = [path for path in models.modules if path and models.is_linear(path)]
    names = {path.rpartition(".")[2] for path in linears}
    problems = []
    for target in targets or ():
        try:
            regex.compile(target)
        except regex.error as error:
            problems.append(f"--targets {shown(target)}: neither a name nor a regular expression: {error}")
            continue
        if any(_is_meant(target, path) for path in linears):
            continue
        other = next((path for path in models.modules if path and _is_meant(target, path)), None)
        if other is not None:
            kind = type(models.modules[other]).__name__
            problems.append(f"--targets {shown(target)}: {other} is no linear but a {kind}, which gets no factors")
        else:
            problems.append(
                f"--targets {shown(target)}: matches no linear of {models.fine_tuned.class_name}; expected some of "
                f"{', '.join(sorted(names)[:12])}, or a pattern of whole paths{nearest(target, names)}"
            )
    if problems:
        raise ConfigError(*problems)


def _is_meant(target: str, path: str) -> bool:
    """Whether a target is a module's name, the end of its path, or a pattern of all of it."""
    if path == target or path.endswith(f".{target}"):
        return True
    try:
        return timed_match(target, path, "--targets", _PATTERN_SECONDS, whole=True) is not None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _folders(models: ModelPair) -> list[Path]:
    own = [model.checkpoint.root for model in (models.fine_tuned, models.base)]
    return list(dict.fromkeys([*own, *(folder for each in models.adapters.values() for folder in each.folders)]))


def _checkpoints(models: ModelPair) -> list[Any]:
    own = [models.fine_tuned.checkpoint, models.base.checkpoint]
    return [*own, *(each.checkpoint for each in models.adapters.values())]


def _tensors(models: ModelPair, contents: Contents, dtype: torch.dtype) -> dict[str, OutputTensor]:
    """Lists the tensors of the adapter's file."""
    tensors: dict[str, OutputTensor] = {}
    for matrix in contents.matrices:
        down, up = factor_names(matrix.path)
        tensors[down] = OutputTensor(dtype, (matrix.rank, matrix.inputs))
        tensors[up] = OutputTensor(dtype, (matrix.outputs, matrix.rank))
    shapes = {pair.source: pair.shape for pair in models.pairs}
    for name, source in contents.whole.sources.items():
        tensors[name] = OutputTensor(stored_dtype(models.fine_tuned, source), shapes[source])
    return tensors


def _plan(models: ModelPair, contents: Contents, options: ExtractOptions, shard: Shard) -> ExtractPlan:
    notes = [*models.notes, *left_out_notes(contents.left_out, save_others=options.save_others)]
    _, revision = _base_name(models, options)
    if BASE in models.adapters:
        notes.append(
            f"the base is a model with adapters ({options.base}), which adapter_config.json cannot name: its "
            "base_model_name_or_path is left empty"
        )
    LOGGER.debug("base revision: %s", revision)
    return ExtractPlan(
        num_matrices=len(contents.matrices),
        num_whole=len(contents.whole.sources),
        rank=options.rank,
        num_bytes=shard.num_bytes,
        peak_bytes=_peak_bytes(models, contents),
        notes=tuple(dict.fromkeys(notes)),
    )


def left_out_notes(left_out: Mapping[str, LeftOut], *, save_others: bool) -> Iterator[str]:
    """Yields a warning for every reason why something that differs is not in the adapter."""
    by_reason: dict[str, list[str]] = {}
    for name, each in left_out.items():
        by_reason.setdefault(each.reason.partition(":")[0], []).append(name)
    for reason, names in by_reason.items():
        norms = [norm for name in names if (norm := left_out[name].relative_norm) is not None]
        size = f", ‖Δ‖/‖W‖ up to {max(norms):.2g}" if norms and reason != _SHAPE else ""
        advice = "; --save-others writes it as whole tensors" if _is_holdable(reason) and not save_others else ""
        kinds = list(dict.fromkeys(LAYER_NUMBER.sub("*", name) for name in names))
        more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
        yield (
            f"warning: the adapter does not hold {', '.join(kinds[:6])}{more}, which differs ({reason}, "
            f"{counted(len(names), 'tensor')}{size}){advice}"
        )


def _peak_bytes(models: ModelPair, contents: Contents) -> int:
    """Estimates the memory that the largest step takes, in bytes."""
    most = 0
    for pair in models.pairs:
        stored = sum(
            pair.num_elements * stored_dtype(model, source).itemsize
            for model, source in ((models.fine_tuned, pair.source), (models.base, pair.base_source))
            if source is not None
        )
        most = max(most, stored + 8 * pair.num_elements)
    for matrix in contents.matrices:
        side = min(matrix.outputs, matrix.inputs)
        factors = 8 * matrix.rank * (matrix.outputs + matrix.inputs)
        copies = 4 * matrix.pair.num_elements * (2 if matrix.transposed else 1)
        most = max(most, copies + 8 * _EIGH_COPIES * side * side + factors)
    return most


def _manifest(models: ModelPair, options: ExtractOptions, shard: Shard) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the one before."""
    asked = {key: str(value) if key == "dtype" else value for key, value in asdict(options).items()}
    files = {FINE_TUNED: models.fine_tuned.checkpoint.fingerprint, BASE: models.base.checkpoint.fingerprint}
    named = {"extract-lora": asked, "inputs": {name: dict(prints) for name, prints in files.items()}}
    return {**named, "header": shard.header[8:].decode().strip(), "shards": [shard.file_name]}


# The work


def _write_all(
    reader: PairReader,
    contents: Contents,
    options: ExtractOptions,
    device: torch.device,
    folder: OutputFolder,
    writer: ShardWriter,
) -> Iterator[str]:
    """Writes everything that is not in the journal yet, and notes it there; yields the names of its parts."""
    for matrix in contents.matrices:
        if matrix.path in folder.entries:
            continue
        measured = _write_matrix(reader, matrix, options, device, writer)
        finish_part(matrix.path, factor_names(matrix.path), measured, folder, writer)
        yield matrix.path
    for name, source in contents.whole.sources.items():
        if name not in folder.entries:
            writer.write(name, reader.fine_tuned(source).contiguous())
            finish_part(name, (name,), {}, folder, writer)
            yield name


def _write_matrix(
    reader: PairReader, matrix: Matrix, options: ExtractOptions, device: torch.device, writer: ShardWriter
) -> dict[str, Any]:
    """Decomposes one difference and writes its factors; returns what was measured."""
    delta = reader.delta(matrix.pair).to(device)
    delta = delta.T.contiguous() if matrix.transposed else delta
    factors = low_rank_factors(delta, matrix.rank, options.dtype)
    for name, tensor in zip(factor_names(matrix.path), (factors.down, factors.up), strict=True):
        try:
            writer.write(name, tensor)
        except NotFiniteError as error:
            raise MergeError(f"{name} {error}; --dtype float32 holds larger numbers") from None
    square = square_of(delta)
    if not math.isfinite(square):
        raise MergeError(f"{matrix.pair.name}: the difference of the two models is too large for float32")
    return {"squares": list(factors.squares), "square": square, "error": _error(delta, factors)}


def _error(delta_OI: torch.Tensor, factors: Factors) -> float:
    """Computes ‖Δ - B A‖² of the factors as they are written, with their rounding; Δ is overwritten."""
    down, up = (each.to(delta_OI.device, torch.float32) for each in (factors.down, factors.up))
    for start in range(0, len(delta_OI), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        delta_OI[rows].sub_(up[rows] @ down)
    return square_of(delta_OI)


# What is said of it


def _matrix_report(matrix: Matrix, entry: Mapping[str, Any]) -> MatrixReport:
    squares, square = entry["squares"], entry["square"]
    kept = {rank: min(1.0, math.fsum(squares[:rank]) / square) if square else 1.0 for rank in ranks_shown(matrix.rank)}
    return MatrixReport(
        name=matrix.pair.name,
        outputs=matrix.outputs,
        inputs=matrix.inputs,
        rank=matrix.rank,
        own_rank=len(squares) if len(squares) < matrix.rank else None,
        square=square,
        relative_norm=matrix.difference.relative_norm,
        kept=kept,
        relative_error=math.sqrt(entry["error"] / square) if square else 0.0,
    )


def _base_name(models: ModelPair, options: ExtractOptions) -> tuple[str | None, str | None]:
    """Name of the base for `adapter_config.json`, and its revision; `None` where it has adapters of its own."""
    model, adapters = split_reference(options.base)
    if adapters is not None or BASE in models.adapters:
        return None, None
    if Path(model).expanduser().is_dir():
        return model, None
    name, _, revision = model.partition("@")
    return name, revision or None


def _config(models: ModelPair, contents: Contents, options: ExtractOptions) -> dict[str, Any]:
    base, revision = _base_name(models, options)
    paths = [matrix.path for matrix in contents.matrices]
    task = task_type(models.fine_tuned.model)
    if needs_head(task) and not any(head_of(source, task) is not None for source in contents.whole.sources.values()):
        task = None  # without a head in the file peft cannot load it as what it is; without a task it loads
    return adapter_config(
        base=base,
        revision=revision,
        task=task,
        rank=options.rank,
        ranks={matrix.path: matrix.rank for matrix in contents.matrices},
        targets=target_names(paths, models.modules),
        transposed=any(matrix.transposed for matrix in contents.matrices),
        saved=contents.whole.modules,
        biases=contents.whole.biases,
        ties=contents.whole.ties,
    )
