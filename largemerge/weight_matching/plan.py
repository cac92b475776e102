"""What is permuted in which model, before any weight is read.

models, reference: classes and headers ──► blocks run on made-up input ──► units of every block ──► their tensors
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.errors import ArchitectureError, LargemergeError, shorten
from largemerge.model.adapter_names import AdapterNames
from largemerge.model.classes import ClassifiedModel, classify, translate
from largemerge.model.fake_forward import FakeModel, InputOutline, block_kind, fake_model
from largemerge.model.skeleton import Skeleton, build_skeleton, linears_in, weight_is_transposed
from largemerge.units import counted, gib
from largemerge.weight_matching.between import Between
from largemerge.weight_matching.finding import find_units, follows
from largemerge.weight_matching.stream_tensors import StreamPlan, StreamTensor, plan_streams
from largemerge.weight_matching.streams import Stream, find_streams
from largemerge.weight_matching.units import BlockUnits, Choice, Family, Slot, Tensor, decoded

PIECE_BYTES = 128 << 20
"""Of a large table, at once, in float32."""
_NUM_SAMPLES, _NUM_IMAGES = 32, 8  # rows of linears that are changed in one run
_TOKENS = 7


@dataclass(frozen=True)
class BlockPlan:
    """What is permuted in one block.

    Attributes:
        name: Path of the block, such as `model.layers.3`.
        units: Its units.
        tensors: Slot → the parameters that it is a dimension of.
    """

    name: str
    units: BlockUnits
    tensors: Mapping[Slot, tuple[Tensor, ...]]

    def axes(self, choices: Sequence[Choice]) -> dict[str, dict[int, torch.Tensor]]:
        """Returns the parameters that change, with the order along their dimensions."""
        found: dict[str, dict[int, torch.Tensor]] = {}
        for slot, index in self.units.indices(choices).items():
            for tensor in self.tensors[slot]:
                found.setdefault(tensor.name, {})[tensor.axis] = index
        return found

    def choices(self, entry: Mapping[str, Any]) -> list[Choice]:
        """Reads the choices of the block from its entry in the journal."""
        choices = []
        for family in self.units.families:
            own = entry["families"][family.name]
            inner = tuple(decoded(own["inner"][each.name], family.size, each.size) for each in family.inner)
            choices.append(Choice(decoded(own["members"], family.size), inner))
        return choices


@dataclass(frozen=True)
class ModelPlan:
    """What is permuted in one model.

    Attributes:
        model: The model.
        reference: What it is brought close to.
        adapters: Their adapters, if they have some: the model's, the reference's.
        names: Parameter of the model → parameter of the reference.
        blocks: Its blocks.
        streams: Its residual streams, if they are permuted.
    """

    model: ClassifiedModel
    reference: ClassifiedModel
    adapters: tuple[Adapter | None, Adapter | None]
    names: Mapping[str, str]
    blocks: tuple[BlockPlan, ...]
    streams: tuple[StreamPlan, ...] = ()

    def is_shared(self, tensor: StreamTensor) -> bool:
        """Whether another dimension of a stream's tensor may be permuted, too."""
        return self._num_places[tensor.key] > 1

    @cached_property
    def _num_places(self) -> Counter[str]:
        """How many dimensions of each tensor may be permuted, by its name on disk."""
        places = {(each.key, each.axis) for stream in self.streams for each in stream.tensors}
        renamed = self.model.mapping.renamed
        for block in self.blocks:
            places |= {(renamed[each.name], each.axis) for of in block.tensors.values() for each in of}
        return Counter(key for key, _ in places)

    def keys(self, block: BlockPlan) -> Iterator[tuple[str, str]]:
        """Yields the names on disk of a block's parameters, in the model and in the reference."""
        for name in dict.fromkeys(tensor.name for of in block.tensors.values() for tensor in of):
            yield self.model.mapping.renamed[name], self.reference.mapping.renamed[self.names[name]]

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor whose rows are permuted, in bytes."""
        tensors = self.model.checkpoint.tensors
        names = {each.name for block in self.blocks for of in block.tensors.values() for each in of if each.axis == 0}
        keys = {self.model.mapping.renamed[name] for name in names}
        keys |= {tensor.key for stream in self.streams for tensor in stream.tensors if tensor.axis == 0}
        return max((math.prod(i.shape) * i.dtype.itemsize for i in (tensors[key] for key in keys)), default=0)

    @property
    def peak_bytes(self) -> int:
        """Most bytes while a block or a stream is matched: both models' tensors in float32, products, assignment."""
        blocks, streams = map(self._peak_bytes, self.blocks), map(self._stream_bytes, self.streams)
        return max((*blocks, *streams), default=0)

    def _stream_bytes(self, stream: StreamPlan) -> int:
        infos = [(self.model.checkpoint.tensors[tensor.key], tensor) for tensor in stream.compared]
        largest = max(
            4 * math.prod(info.shape) if tensor.axis == 0 or self.is_shared(tensor) else PIECE_BYTES
            for info, tensor in infos
        )
        # Both in float32, and copies of both; A in float64, a product, the assignment's copies.
        return 4 * largest + stream.size**2 * (8 + 4 + 8 + 8)

    def _peak_bytes(self, block: BlockPlan) -> int:
        tensors = self.model.checkpoint.tensors
        worst = 0
        for family in block.units.families:
            names = {each.name for slot in family.places for each in block.tensors[slot]}
            elements = sum(math.prod(tensors[self.model.mapping.renamed[name]].shape) for name in names)
            # Both in float32, the transposed or gathered copies; A in float32, float64, and the assignment's copy.
            worst = max(worst, 4 * 4 * elements + family.size**2 * (4 + 4 + 8 + 8))
        return worst


@dataclass(frozen=True)
class AlignPlan:
    """What is permuted in all models of a merge.

    Attributes:
        reference: Reference of the model that the others are brought close to.
        checkpoint: Its checkpoint.
        models: The models that are permuted, by reference.
        notes: What a user should know.
        problems: What makes it impossible.
    """

    reference: str
    checkpoint: Checkpoint
    models: Mapping[str, ModelPlan]
    notes: tuple[str, ...] = field(default=())
    problems: tuple[str, ...] = field(default=())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor whose rows are permuted, in bytes: a copy of it is made as it is read."""
        return max((model.largest_bytes for model in self.models.values()), default=0)

    @property
    def peak_bytes(self) -> int:
        """Most bytes while a block is matched."""
        return max((model.peak_bytes for model in self.models.values()), default=0)

    @property
    def num_blocks(self) -> int:
        """Number of blocks to match, of all models."""
        return sum(len(model.blocks) for model in self.models.values())

    @property
    def has_streams(self) -> bool:
        """Whether residual streams are permuted, too."""
        return any(model.streams for model in self.models.values())

    def read_besides(self, known: Collection[str]) -> dict[str, Checkpoint]:
        """Returns the reference's checkpoint by its reference, unless it is one of the known models."""
        return {} if self.reference in known else {self.reference: self.checkpoint}


def plan_alignment(
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[str, Adapter],
    reference: str,
    earlier: Mapping[str, Checkpoint] | None = None,
    *,
    residual_stream: bool = False,
    variant: str | None = None,
    trust_remote_code: bool = False,
) -> AlignPlan:
    """Finds out what is permuted in each of some models.

    Args:
        checkpoints: The models of a merge, by reference.
        adapters: The adapters of those that have one.
        reference: The model that the others are brought close to: one of them, or another, which is opened.
        earlier: Results of other merges by the names that the reference may use for them.
        residual_stream: Whether the features between blocks are permuted, too, where models permit it.
        variant: Variant of the reference's weights, such as `fp16`.
        trust_remote_code: Allow the checkpoints' own Python code.

    Raises:
        LargemergeError: If the reference cannot be opened, or the class of a model cannot be had.
    """
    if reference not in checkpoints:
        find_places = AdapterNames(trust_remote_code=trust_remote_code)
        opened, adapter = open_model(reference, earlier, variant=variant, find_places=find_places)
        checkpoints = {**checkpoints, reference: opened}
        adapters = {**adapters, reference: adapter} if adapter is not None else adapters
    models = classify(checkpoints, adapters, trust_remote_code=trust_remote_code)
    units: dict[int, _ModelUnits] = {}
    plans: dict[str, ModelPlan] = {}
    notes: dict[str, None] = {}
    problems: list[str] = []
    for name, model in models.items():
        if name == reference:
            continue
        try:
            if id(model.model) not in units:
                units[id(model.model)] = _find_all(
                    model, residual_stream=residual_stream, trust_remote_code=trust_remote_code
                )
            plans[name], told = _plan_model(model, models[reference], units[id(model.model)], reference)
            plans[name] = replace(plans[name], adapters=(adapters.get(name), adapters.get(reference)))
        except LargemergeError as error:
            problems += [f"align: {name}: {problem}" for problem in error.problems]
            continue
        notes |= dict.fromkeys(f"align: {note}" for note in told)
    found = AlignPlan(reference, checkpoints[reference], plans, tuple(notes), tuple(problems))
    if not plans:
        return found
    what, rounds = "a block", ""
    if found.has_streams:
        what, rounds = "a block or a residual stream", "; each round over blocks and streams reads the models twice"
    return replace(found, notes=(*notes, f"align: {what} of two models takes up to {gib(found.peak_bytes)}{rounds}"))


def card_section(plan: AlignPlan, reference: str) -> str:
    """Makes the model card's section on what was done before the merge.

    Args:
        plan: What was permuted.
        reference: What the card calls the model that the others were brought close to.
    """
    what, where = "Neurons and heads", "within blocks"
    if plan.has_streams:
        what, where = "Neurons, heads, and features of the residual stream", "within and between blocks"
    return (
        f"\n## Before the merge\n\n{what} were put into the order of {reference}: weight matching {where} "
        "([Git Re-Basin](https://arxiv.org/abs/2209.04836)).\n"
    )


@dataclass(frozen=True)
class _ModelUnits:
    """Units of the blocks of a class, its residual streams if they are asked for, and what was not looked at."""

    skeleton: Skeleton
    blocks: Mapping[str, BlockUnits]
    notes: tuple[str, ...]
    streams: tuple[Stream, ...] = ()
    held_streams: tuple[str, ...] = ()


def _find_all(model: ClassifiedModel, *, residual_stream: bool, trust_remote_code: bool) -> _ModelUnits:
    """Runs a model on made-up input, and finds the units of every block, and its residual streams."""
    skeleton = build_skeleton(model.checkpoint, dtype=torch.float64, trust_remote_code=trust_remote_code)
    problems: list[str] = []
    for outline in input_outlines(skeleton):
        try:
            with fake_model(skeleton, outline, {}) as fake:
                units = _units_of(fake)
                if not residual_stream:
                    return units
                streams, held = find_streams(fake)
                return replace(units, streams=tuple(streams), held_streams=tuple(held))
        except ArchitectureError as error:
            problems += error.problems
    raise ArchitectureError(
        *(problems or [f"{skeleton.class_name}: its blocks cannot be run: it takes neither tokens nor images"])
    )


def input_outlines(skeleton: Skeleton) -> Iterator[InputOutline]:
    """Yields inputs that a model may take: tokens and images, tokens alone, images alone."""
    arguments, config = skeleton.forward_arguments(), skeleton.model.config
    tokens: dict[str, Any] = {}
    for prefix in ("", "decoder_") if config.is_encoder_decoder else ("",):
        if f"{prefix}input_ids" in arguments:
            tokens[f"{prefix}input_ids"] = ((_TOKENS,), torch.int64)
        if f"{prefix}attention_mask" in arguments and f"{prefix}input_ids" in arguments:
            tokens[f"{prefix}attention_mask"] = ((_TOKENS,), torch.int64)
    images: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
    if "pixel_values" in arguments and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        images["pixel_values"] = ((channels, height, width), torch.float32)
    if tokens and images:
        yield {**tokens, **images}
    if tokens:
        yield tokens
    if images:
        yield images


def _units_of(fake: FakeModel) -> _ModelUnits:
    """Finds the units of every block; of blocks that compute alike, one is looked at, and some others are tried."""
    skeleton, notes = fake.skeleton, list[str]()
    one = {name: x[-1:] for name, x in fake.inputs.items()}
    num_samples = _NUM_IMAGES if any(x.is_floating_point() for x in one.values()) else _NUM_SAMPLES
    many = {name: x.repeat(num_samples, *(1,) * (x.dim() - 1)) for name, x in one.items()}
    single, batched = fake.records_of(one), fake.records_of(many)
    found: dict[str, BlockUnits] = {}
    for number, stack in enumerate(skeleton.stacks):
        if number not in fake.order:
            notes.append(f"{stack.name} stays as it is: tokens alone do not reach it")
            continue
        by_kind: dict[str, BlockUnits] = {}
        for index, record in reversed(list(single[number].items())):
            kind, name = block_kind(stack.blocks[index], index), stack.block_name(index)
            if len(record.arguments) != 1:
                notes.append(f"{name} stays as it is: it runs {len(record.arguments)} times in one pass")
                continue
            known = by_kind.get(kind)
            try:
                between = Between(
                    stack.blocks[index], record.arguments[0], batched[number][index].arguments[0], num_samples
                )
                found[name] = known if known is not None and follows(between, known) else _find(between)
            except Exception as error:  # whatever a block raises whose linears return made-up numbers
                notes.append(f"{name} stays as it is: it cannot be run on made-up numbers ({shorten(error)})")
                continue
            by_kind.setdefault(kind, found[name])
        for index, block in enumerate(stack.blocks):
            kind = block_kind(block, index)
            if index not in single[number] and kind in by_kind and fake.runs.get((number, index)):
                found[stack.block_name(index)] = by_kind[kind]
    return _ModelUnits(skeleton, found, tuple(notes))


def _find(between: Between) -> BlockUnits:
    """Finds the units of a block, from a few of its tokens where that will do."""
    short = between.shortened()
    units = find_units(short) if short is not None else None
    return units if units is not None and follows(between, units) else find_units(between)


def _plan_model(
    model: ClassifiedModel, reference: ClassifiedModel, units: _ModelUnits, reference_name: str
) -> tuple[ModelPlan, list[str]]:
    """Finds the tensors of a model's units, and of the reference's.

    Returns:
        The plan, and notes.

    Raises:
        LargemergeError: If the reference has other shapes, or lacks a tensor.
    """
    stored = reference.mapping.renamed
    names = {place: own for own, place in translate(reference.model, model.model).items() if own in stored}
    names |= {own: place for own, place in translate(model.model, reference.model).items() if place in stored}
    notes, problems, blocks = list(units.notes), list[str](), list[BlockPlan]()
    told: dict[str, list[str]] = {}
    for name in _in_order(units):
        found = units.blocks[name]
        tensors = _tensors(units.skeleton, name, found)
        kept = []
        for family in found.families:
            own = [each.name for slot in family.places for each in tensors[slot]]
            fixed = [each for each in own if each not in model.mapping.renamed or _is_tied(model, each)]
            if fixed:
                why = f"{family.name} stay: {fixed[0].removeprefix(f'{name}.')} is tied, or lies together with others"
                told.setdefault(why, []).append(name)
                continue
            problems += _misfits(model, reference, names, own, reference_name)
            kept.append(family)
        for held in found.held:
            told.setdefault(held, []).append(name)
        if found.untouched:
            told.setdefault(f"not permuted: {', '.join(found.untouched)}", []).append(name)
        if kept:
            used = {slot: tensors[slot] for family in kept for slot in family.places}
            blocks.append(BlockPlan(name, replace(found, families=tuple(kept)), used))
    if problems:
        raise LargemergeError(*dict.fromkeys(problems))
    streams, told_streams = plan_streams(model, reference, names, units.streams)
    told_streams += units.held_streams
    if told_streams and not streams:
        raise ArchitectureError(*told_streams, "expected a stream that may be permuted; leave residual_stream out")
    if not blocks and not streams:
        raise ArchitectureError(
            f"{model.class_name}: nothing in its blocks can change places; leave align out", *dict.fromkeys(notes)
        )
    some: dict[str, list[str]] = {}
    for block in blocks:
        text = "; ".join(_described(family) for family in block.units.families)
        some.setdefault(text, []).append(block.name)
    notes = [f"{_listed(of)}: permuted are {text}" for text, of in some.items()] + notes
    notes += [f"{_listed(of)}: {text}" for text, of in told.items()] + told_streams
    return ModelPlan(model, reference, (None, None), names, tuple(blocks), tuple(streams)), notes


def _described(family: Family) -> str:
    """Says what may change places in a family."""
    inner = [f"{each.size} {each.name}" for each in family.inner]
    inside = f"{'in each ' if not family.is_free else 'and in each '}{' and '.join(inner)}" if inner else ""
    return " ".join(part for part in (f"{family.size} {family.name}", inside) if part)


def _listed(names: Sequence[str]) -> str:
    """Lists blocks in short."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} … {names[-1].rpartition('.')[2]} ({counted(len(names), 'block')})"


def _in_order(units: _ModelUnits) -> list[str]:
    """Lists the blocks in the order of the class."""
    stacks = units.skeleton.stacks
    every = [stack.block_name(index) for stack in stacks for index in range(len(stack.blocks))]
    return [name for name in every if name in units.blocks]


def _is_tied(model: ClassifiedModel, name: str) -> bool:
    return name in model.mapping.aliases or name in model.mapping.aliases.values()


def _misfits(
    model: ClassifiedModel, reference: ClassifiedModel, names: Mapping[str, str], own: Sequence[str], what: str
) -> Iterator[str]:
    """Yields which parameters the reference does not have in the model's shape."""
    for name in own:
        shape = model.checkpoint.tensors[model.mapping.renamed[name]].shape
        if name not in names:
            yield f"{what} has no {name}; expected a model of the same architecture to align to"
            continue
        other = reference.checkpoint.tensors[reference.mapping.renamed[names[name]]].shape
        if shape != other:
            yield f"{name} is {list(shape)}, and {list(other)} in {what}; expected the same shapes to align to"


def _tensors(skeleton: Skeleton, block: str, units: BlockUnits) -> dict[Slot, tuple[Tensor, ...]]:
    """Finds the parameters that every slot of a block's families is a dimension of."""
    linears = linears_in(skeleton.model.get_submodule(block))
    found: dict[Slot, tuple[Tensor, ...]] = {}
    for slot in {slot for family in units.families for slot in family.places}:
        name = f"{block}.{slot.path}"
        if slot.side == "elements":
            found[slot] = (Tensor(name, 0),)
            continue
        turned = weight_is_transposed(linears[slot.path])
        is_outputs = slot.side == "outputs"
        weight = Tensor(f"{name}.weight", int(turned == is_outputs))
        has_bias = is_outputs and getattr(linears[slot.path], "bias", None) is not None
        found[slot] = (weight, Tensor(f"{name}.bias", 0)) if has_bias else (weight,)
    return found
