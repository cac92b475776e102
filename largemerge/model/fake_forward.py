"""Forward passes of a model with made-up inputs and made-up weights that cost no memory.

    fake_model: inputs, weights ──► plain pass, every block recorded ──► FakeModel.resume: up to a block once more

All weights are overlapping views of one short vector. Blocks that are alike are represented by a few of them; the
others pass their input on. `trace.py` asks a fake model what a forward pass reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedConfig

from largemerge.errors import ArchitectureError
from largemerge.model.forward import Output, original_forward, replaced_forwards, resumed_at
from largemerge.model.skeleton import Skeleton, assign_tensors, linears_in

NUM_SAMPLES = 2
NUM_TOKENS = 7
NUM_DECODER_TOKENS = 5

InputOutline = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Forward argument → shape of one sample, and dtype."""


@dataclass(frozen=True)
class BlockRecord:
    """What one block was given and returned in the plain pass.

    Attributes:
        arguments: Arguments that the model gave the block, positional and by name.
        output: What the block returned.
        linears: Path in the block and input of every call of a linear, in order.
    """

    arguments: Any
    output: Output
    linears: list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class FakeModel:
    """A model with made-up weights, and its plain pass.

    Attributes:
        skeleton: The model, which holds the weights.
        inputs: Made-up forward arguments.
        weights: Made-up parameters, by name.
        records: Records of the blocks that were really run, by stack and block.
        order: Indices of the stacks in the order in which they run.
    """

    skeleton: Skeleton
    inputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    records: Sequence[Mapping[int, BlockRecord]]
    order: Sequence[int]

    def resume(
        self,
        stack: int,
        index: int,
        *,
        run_block: bool = True,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Any, Output]:
        """Runs the model up to a block, from the output of the one before it.

        Args:
            stack: Index of the block's stack.
            index: Index of the block in its stack.
            run_block: Whether the block itself is run, too.
            inputs: Forward arguments in place of the made-up ones.

        Returns:
            The arguments of the block; and its output, `None` if it is not run.
        """
        earlier = self.order[: self.order.index(stack)]
        outputs = {number: list(self.records[number].values())[-1].output for number in earlier}
        before = [entry.output for number, entry in self.records[stack].items() if number < index]
        if before:
            outputs[stack] = before[-1]
        caught: list[Any] = []

        def visit(*args: Any, **kwargs: Any) -> None:
            caught.append(_clone_tensors((args, kwargs)))
            if run_block:
                caught.append(original_forward(self.skeleton.stacks[stack].blocks[index])(*args, **kwargs))

        with resumed_at(self.skeleton, stack, index) as run:
            run(inputs or self.inputs, outputs, visit)
        return caught[0], caught[1] if run_block else None


@contextmanager
def fake_model(skeleton: Skeleton, outline: InputOutline) -> Iterator[FakeModel]:
    """Gives a model made-up weights while the context is open, and runs the plain pass.

    Raises:
        ArchitectureError: If the model cannot be run on such inputs, or does not run every block once.
    """
    inputs = make_inputs(skeleton, outline)
    weights = _fake_weights(skeleton)
    assign_tensors(skeleton, weights)
    try:
        with torch.no_grad(), _experts_one_by_one(skeleton.model):
            chosen = [_representatives(stack.blocks) for stack in skeleton.stacks]
            records, order = _plain_pass(skeleton, inputs, chosen)
            yield FakeModel(skeleton, inputs, weights, records, order)
    finally:
        assign_tensors(skeleton, {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()})


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Runs experts one by one: kernels that run all at once refuse weights whose elements share memory."""
    known = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in known if isinstance(config, PreTrainedConfig)}.values())
    before = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def make_inputs(skeleton: Skeleton, outline: InputOutline) -> dict[str, torch.Tensor]:
    """Makes up a few samples: short token sequences with some padding, random pixels."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(skeleton.model.config.get_text_config(), "vocab_size", None) or 2
    has_decoder = any(name.startswith("decoder_") for name in outline)
    inputs = {}
    for name, (shape, dtype) in outline.items():
        if dtype.is_floating_point:
            inputs[name] = torch.randn(NUM_SAMPLES, *shape, generator=generator).to(skeleton.dtype)
            continue
        length = NUM_DECODER_TOKENS if name.startswith("decoder_") else NUM_TOKENS
        # Rows of an encoder and of a decoder are told apart by their number, however short the samples are.
        shape = (NUM_SAMPLES, length if has_decoder else min(shape[0], length), *shape[1:]) if shape else (NUM_SAMPLES,)
        if name.endswith("input_ids"):
            inputs[name] = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator)
        elif name.endswith("attention_mask"):
            inputs[name] = torch.ones(shape, dtype=dtype)
            inputs[name][0, -1:] = 0
        elif name.endswith("position_ids"):
            inputs[name] = torch.arange(shape[1]).expand(shape).clone()
        else:
            inputs[name] = torch.zeros(shape, dtype=dtype)
    return inputs


def _fake_weights(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """Makes every parameter a view of one random vector: element (i, j) is its (i + j)-th, counted from a start."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.named_parameters()}
    longest = max(sum(shape) + 1 for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    vector = (torch.randn(longest + 997, generator=generator) * 0.05).to(skeleton.dtype)
    starts = torch.randint(0, 997, (len(shapes),), generator=generator).tolist()
    return {
        name: vector.as_strided(shape, (1,) * len(shape), start)
        for (name, shape), start in zip(shapes.items(), starts, strict=True)
    }


def _representatives(blocks: tuple[nn.Module, ...]) -> set[int]:
    """Indices of the first, second and last block of every kind."""
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(block_kind(block, index), []).append(index)
    return {0} | {index for members in kinds.values() for index in (*members[:2], members[-1])}


def block_kind(block: nn.Module, index: int) -> str:
    """Describes a block: modules and plain attributes, without its own number. Equal for blocks that compute alike."""
    plain = [
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | float | str) or (isinstance(value, int) and value != index)
    ]
    return f"{block!r} {plain!r}"


def _plain_pass(
    skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], chosen: list[set[int]]
) -> tuple[list[dict[int, BlockRecord]], list[int]]:
    """Runs the model once; returns the records of the chosen blocks, and the order of the stacks."""
    records: list[dict[int, BlockRecord]] = [{} for _ in skeleton.stacks]
    order: list[int] = []
    runs: dict[tuple[int, int], int] = {}

    def recorder(stack: int, index: int, block: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Output:
            if stack not in order:
                order.append(stack)
            runs[stack, index] = runs.get((stack, index), 0) + 1
            if index not in chosen[stack]:
                return next(reversed(records[stack].values())).output
            arguments = _clone_tensors((args, kwargs))
            with _recorded_linears(block) as linears:
                output = original_forward(block)(*args, **kwargs)
            records[stack][index] = BlockRecord(arguments, output, linears)
            return output

        return forward

    forwards = {
        block: recorder(number, index, block)
        for number, stack in enumerate(skeleton.stacks)
        for index, block in enumerate(stack.blocks)
    }
    model: Any = skeleton.model
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        # Nobody reads the logits, and a made-up matrix of the vocabulary's size would have to be written out.
        forwards[head] = lambda x: x.new_zeros(()).expand(*x.shape[:-1], head.out_features)
    try:
        with replaced_forwards(forwards):
            skeleton.model(**inputs)
    except Exception as error:
        raise _run_error(skeleton, inputs, error) from error
    _check_runs(skeleton, runs)
    return records, order


def _run_error(skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], error: Exception) -> ArchitectureError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ArchitectureError(
        f"{skeleton.class_name}: cannot be run on calibration inputs {sorted(inputs)}: {text}; "
        f"its forward takes {sorted(skeleton.forward_arguments())}"
    )


def _check_runs(skeleton: Skeleton, runs: Mapping[tuple[int, int], int]) -> None:
    """Raises unless every block was run exactly once."""
    problems = []
    for number, stack in enumerate(skeleton.stacks):
        counts = [runs.get((number, index), 0) for index in range(len(stack.blocks))]
        if set(counts) != {1}:
            problems.append(
                f"{skeleton.class_name}: one forward pass on this calibration data runs the blocks of {stack.name} "
                f"{counts} times, expected once each; if it is no stack of blocks, name the stacks (stacks: [...])"
            )
    if problems:
        raise ArchitectureError(*problems)


@contextmanager
def _recorded_linears(block: nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yields a list that fills with path and input of every call of a linear."""
    record: list[tuple[str, torch.Tensor]] = []
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: record.append((name, args[0])))
        for name, linear in linears_in(block).items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _clone_tensors(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def equal_trees(left: Any, right: Any) -> bool:
    """Whether two trees hold the same tensors, bit for bit; a NaN equals any other."""
    tensors = [[leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)] for tree in (left, right)]
    if len(tensors[0]) != len(tensors[1]):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*tensors, strict=True)
    )  # fmt: skip
