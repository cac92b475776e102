"""Forward passes of a model with made-up inputs and made-up weights that cost no memory.

    fake_model: inputs, weights ──► plain pass, every block recorded ──► FakeModel.resume: up to a block once more

All weights are overlapping views of one short vector. Blocks that are alike are represented by a few of them; the
others pass their input on. A product with such a matrix is a correlation with the vector, which a fast Fourier
transform computes without writing the matrix out. `trace.py` asks a fake model what a forward pass reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedConfig

from largemerge.errors import ArchitectureError
from largemerge.model.forward import KeptOutputs, Output, call_model, hand_on, replaced_forwards, resumed_at, run_block
from largemerge.model.norms import may_be_norms
from largemerge.model.skeleton import Skeleton, assign_tensors, linears_in
from largemerge.text_files import first_line

NUM_SAMPLES = 2
NUM_TOKENS = 7
NUM_DECODER_TOKENS = 5

InputOutline = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Forward argument → shape of one sample, and dtype."""

Examples = Mapping[str, torch.Tensor]
"""Forward argument → its values for the first samples, where they are known: integers that stand beside images."""

_MIN_ELEMENTS = 1 << 20  # of a matrix; below it, a plain product is as fast

_PLACEHOLDER = re.compile(
    r"(image|video|audio|speech|media|vision|boi|eoi).*(token|pad|start|end).*(id|index)$|(boi|eoi|boa|eoa)_token.*"
)


@dataclass(frozen=True)
class BlockRecord:
    """What one block was given and returned in the plain pass.

    Attributes:
        arguments: Arguments that the model gave the block, positional and by name, for each of its runs.
        output: What the block returned from its last run.
        linears: Path in the block and input of every call of a linear, in order.
        norms: The same of modules that may be norms; with `None` where one is given more than a tensor.
    """

    arguments: Any
    output: Output
    linears: list[tuple[str, torch.Tensor]]
    norms: list[tuple[str, torch.Tensor | None]] = field(default_factory=list)


@dataclass(frozen=True)
class FakeModel:
    """A model with made-up weights, and its plain pass.

    Attributes:
        skeleton: The model, which holds the weights.
        inputs: Made-up forward arguments.
        weights: Made-up parameters, by name.
        records: Records of the blocks that were really run, by stack and block.
        order: Indices of the stacks that run, in the order in which they do.
        kept: Blocks of each stack whose output is kept for later stacks, beside the last one's; found by the trace.
        runs: How often each block runs, by stack and block.
    """

    skeleton: Skeleton
    inputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    records: Sequence[Mapping[int, BlockRecord]]
    order: Sequence[int]
    runs: Mapping[tuple[int, int], int]
    kept: dict[int, frozenset[int]] = field(default_factory=dict)

    def outputs(self, stack: int, but: int | None = None) -> Output:
        """What is stored of a stack that has run: outputs of the kept blocks, and of the last.

        Args:
            stack: Index of the stack.
            but: A block whose output is NaN instead.
        """
        last = max(index for of, index in self.runs if of == stack)

        def output_of(index: int) -> Output:  # of a block without record: what the one before it returned
            output = next(entry.output for own, entry in reversed(list(self.records[stack].items())) if own <= index)
            return output if index != but else tree_map(_nan_like, output)

        kept = {index: output_of(index) for index in self.kept.get(stack, ()) if index != last}
        return KeptOutputs(output_of(last), kept) if kept else output_of(last)

    def records_of(self, inputs: Mapping[str, torch.Tensor]) -> Sequence[Mapping[int, BlockRecord]]:
        """Records of the blocks, by stack and block, in a plain pass on other inputs."""
        chosen = [representatives(stack.blocks) for stack in self.skeleton.stacks]
        return _plain_pass(self.skeleton, inputs, chosen)[0]

    def first_arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[int, Any]:
        """Arguments of the first block of every stack in a plain pass on other inputs."""
        records = self.records_of(inputs)
        return {stack: records[stack][0].arguments for stack in self.order}

    def resume(
        self,
        stack: int,
        index: int,
        *,
        run_block_too: bool = True,
        inputs: Mapping[str, torch.Tensor] | None = None,
        earlier_outputs: Mapping[int, Output] | None = None,
    ) -> tuple[Any, Output]:
        """Runs the model up to a block, from the output of the one before it.

        Args:
            stack: Index of the block's stack.
            index: Index of the block in its stack.
            run_block_too: Whether the block itself is run, too.
            inputs: Forward arguments in place of the made-up ones.
            earlier_outputs: Outputs of earlier stacks in place of those of the plain pass.

        Returns:
            The arguments of the block for each of its runs; and its output, `None` if it is not run. A block of
            several runs is always run.
        """
        runs = self.runs[stack, index]  # only blocks that run have records
        run_block_too = run_block_too or runs > 1
        earlier = self.order[: self.order.index(stack)]
        outputs = {number: self.outputs(number) for number in earlier} | dict(earlier_outputs or {})
        before = [entry.output for number, entry in self.records[stack].items() if number < index]
        if before:
            outputs[stack] = before[-1]
        arguments: list[Any] = []
        returned: list[Output] = [outputs.get(stack)]

        def visit(*args: Any, **kwargs: Any) -> Output:
            arguments.append(_clone_tensors((args, kwargs)))
            if run_block_too:
                returned.append(run_block(self.skeleton.stacks[stack].blocks[index], args, kwargs, returned[-1]))
            return returned[-1]

        with resumed_at(self.skeleton, stack, index, runs) as run:
            run(inputs or self.inputs, outputs, visit)
        return arguments, returned[-1] if run_block_too else None


@contextmanager
def fake_model(skeleton: Skeleton, outline: InputOutline, examples: Examples, where: str = "") -> Iterator[FakeModel]:
    """Gives a model made-up weights while the context is open, and runs the plain pass.

    Args:
        skeleton: The model.
        outline: Shapes and dtypes of the forward arguments.
        examples: Integers of the first samples.
        where: Candidate and data that the outline is of, for messages.

    Raises:
        ArchitectureError: If the model cannot be run on such inputs, or its blocks do not run one after the other.
    """
    inputs = make_inputs(skeleton, outline, examples)
    weights = _fake_weights(skeleton)
    assign_tensors(skeleton, weights)
    try:
        with torch.no_grad(), _experts_one_by_one(skeleton.model), _ProductsByCorrelation():
            chosen = [representatives(stack.blocks) for stack in skeleton.stacks]
            records, order, runs = _plain_pass(skeleton, inputs, chosen, where)
            yield FakeModel(skeleton, inputs, weights, records, order, runs)
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


def make_inputs(skeleton: Skeleton, outline: InputOutline, examples: Examples) -> dict[str, torch.Tensor]:
    """Makes up a few samples: short token sequences with some padding, random pixels.

    Where images or sounds stand beside tokens, integers are taken from the examples: as many tokens as an image has
    features must stand for it, in the places that the model expects.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(skeleton.model.config.get_text_config(), "vocab_size", None) or 2
    has_decoder = any(name.startswith("decoder_") for name in outline)
    kept = _examples_to_keep(skeleton, outline, examples)
    inputs = {}
    for name, (shape, dtype) in outline.items():
        if name in kept:
            inputs[name] = kept[name]
            continue
        if dtype.is_floating_point:
            inputs[name] = torch.randn(NUM_SAMPLES, *shape, generator=generator).to(skeleton.dtype)
            continue
        length = NUM_DECODER_TOKENS if name.startswith("decoder_") else NUM_TOKENS
        # Rows of an encoder and of a decoder are told apart by their number, however short the samples are.
        shape = (NUM_SAMPLES, length if has_decoder else min(shape[0], length), *shape[1:]) if shape else (NUM_SAMPLES,)
        if name.endswith("input_ids"):
            ids = torch.randint(min(3, vocabulary - 1), vocabulary, shape, generator=generator)
            for token in placeholder_tokens(skeleton.model.config):
                ids[ids == token] = 0
            inputs[name] = ids
        elif name.endswith("attention_mask"):
            inputs[name] = torch.ones(shape, dtype=dtype)
            inputs[name][0, -1:] = 0
        elif name.endswith("position_ids"):
            inputs[name] = torch.arange(shape[1]).expand(shape).clone()
        else:
            inputs[name] = torch.zeros(shape, dtype=dtype)
    return inputs


def placeholder_tokens(config: Any) -> frozenset[int]:
    """Tokens that stand for images, videos or sounds, by the names that configs have for them."""
    found = set()
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for name, value in vars(part).items():
            if isinstance(value, int) and not isinstance(value, bool) and _PLACEHOLDER.search(name):
                found.add(value)
    return frozenset(found)


def _examples_to_keep(skeleton: Skeleton, outline: InputOutline, examples: Examples) -> dict[str, torch.Tensor]:
    """The integers of the first samples, if images or sounds stand beside tokens; text after the last is cut off."""
    if not any(dtype.is_floating_point for _, dtype in outline.values()) or not examples:
        return {}
    kept = {name: x.repeat(NUM_SAMPLES, *(1 for _ in x.shape[1:]))[:NUM_SAMPLES] for name, x in examples.items()}
    ids = kept.get("input_ids")
    if ids is None:
        return kept
    special = torch.isin(ids, torch.tensor(sorted(placeholder_tokens(skeleton.model.config)), dtype=ids.dtype))
    length = ids.shape[1]
    if special.any():
        length = min(length, int(special.any(dim=0).nonzero().max()) + 1 + NUM_TOKENS)
    return {name: x[:, :length] if x.shape[1:2] == ids.shape[1:2] else x for name, x in kept.items()}


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


class _ProductsByCorrelation(TorchFunctionMode):
    """Computes products with large made-up matrices from the vector that they are views of.

    With element (o, i) of the matrix the (o + i)-th of the vector v, output o is the sum of v[o + i] · x[i] over i.
    Where a processor only emulates bfloat16, the plain product takes seconds for each linear of a large model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _made_up_linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _made_up_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `F.linear`, whose arguments have these names."""
    is_view = weight.dim() == 2 and weight.stride() == (1, 1) and input.shape[-1] == weight.shape[-1]
    if not is_view or weight.numel() < _MIN_ELEMENTS:
        return nn.functional.linear(input, weight, bias)
    num_outputs, num_inputs = weight.shape
    vector = weight.as_strided((num_outputs + num_inputs - 1,), (1,))
    length = len(vector)
    spectrum = torch.fft.rfft(input.float(), length).conj() * torch.fft.rfft(vector.float())
    output: torch.Tensor = torch.fft.irfft(spectrum, length)[..., :num_outputs].to(input.dtype)
    return output if bias is None else output + bias


def representatives(blocks: tuple[nn.Module, ...]) -> set[int]:
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
    skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], chosen: list[set[int]], where: str = ""
) -> tuple[list[dict[int, BlockRecord]], list[int], dict[tuple[int, int], int]]:
    """Runs the model once; returns records of the chosen blocks, the order of the stacks, and the runs of blocks."""
    records: list[dict[int, BlockRecord]] = [{} for _ in skeleton.stacks]
    visited: list[tuple[int, int]] = []

    def recorder(stack: int, index: int, block: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Output:
            visited.append((stack, index))
            known = records[stack]
            before = next(reversed(known.values())).output if known else None
            if index not in chosen[stack]:
                return hand_on(before, args, kwargs)
            arguments = _clone_tensors((args, kwargs))
            with _recorded_linears(block) as linears, _recorded_norms(block) as norms:
                output = run_block(block, args, kwargs, before)
            earlier = known.get(index, BlockRecord([], None, []))
            known[index] = BlockRecord(
                [*earlier.arguments, arguments], output, [*earlier.linears, *linears], [*earlier.norms, *norms]
            )
            return hand_on(output, args, kwargs)

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
        forwards[head] = lambda x: x.new_zeros((*x.shape[:-1], head.out_features))
    try:
        with replaced_forwards(forwards):
            call_model(skeleton, inputs)
    except Exception as error:
        raise _run_error(skeleton, inputs, error, where) from error
    order, runs = _check_runs(skeleton, visited)
    return records, order, runs


def _run_error(
    skeleton: Skeleton, inputs: Mapping[str, torch.Tensor], error: Exception, where: str
) -> ArchitectureError:
    shapes = {name: list(x.shape) for name, x in sorted(inputs.items())}
    return ArchitectureError(
        f"{f'{where}: ' if where else ''}{skeleton.class_name}: cannot be run on calibration inputs {sorted(inputs)}, "
        f"tried with {NUM_SAMPLES} samples as {shapes}; expected what its forward takes, in the shapes that it takes: "
        f"{sorted(skeleton.forward_arguments())} ({first_line(error, 160)})"
    )


def _check_runs(skeleton: Skeleton, visited: Sequence[tuple[int, int]]) -> tuple[list[int], dict[tuple[int, int], int]]:
    """Raises unless blocks run one after the other, each of its runs right after the one before.

    Returns:
        The stacks that run, in the order in which they do; and how often each block runs.
    """
    # Runs of one block right after one another count as one visit.
    visits = [place for number, place in enumerate(visited) if number == 0 or visited[number - 1] != place]
    order = list(dict.fromkeys(stack for stack, _ in visits))
    turns = [stack for number, (stack, _) in enumerate(visits) if number == 0 or visits[number - 1][0] != stack]
    hint = "name other stacks (stacks: [...]), or use a method that needs no data"
    problems = []
    for number in order:
        name = skeleton.stacks[number].name
        own = [index for of, index in visits if of == number]
        if turns.count(number) > 1:
            others = [skeleton.stacks[other].name for other in order if other != number and turns.count(other) > 1]
            with_others = f", in turns with those of {', '.join(others)}" if others else ""
            problems.append(
                f"{skeleton.class_name}: the blocks of {name} run in {turns.count(number)} parts{with_others}, with "
                f"something between them that cannot be resumed; expected one stack after the other: {hint}"
            )
        elif own != sorted(set(own)):
            counts = [visited.count((number, index)) for index in range(len(skeleton.stacks[number].blocks))]
            problems.append(
                f"{skeleton.class_name}: one forward pass on this calibration data runs the blocks of {name} {counts} "
                f"times, in the order {_shortened(own)}; expected one after the other, for a block can be merged "
                f"only when everything before it is merged: {hint}"
            )
        elif own[0] != 0:
            problems.append(
                f"{skeleton.class_name}: the first block of {name} that runs is {own[0]}; expected 0: {hint}"
            )
    if not order:
        problems.append(f"{skeleton.class_name}: one forward pass on this calibration data runs no block: {hint}")
    if problems:
        raise ArchitectureError(*problems)
    return order, {place: visited.count(place) for place in dict.fromkeys(visited)}


def _shortened(numbers: Sequence[int]) -> str:
    return f"{numbers[:8]}…" if len(numbers) > 8 else str(list(numbers))


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


@contextmanager
def _recorded_norms(block: nn.Module) -> Iterator[list[tuple[str, torch.Tensor | None]]]:
    """Yields a list that fills with path and input of every call of a module that may be a norm."""
    record: list[tuple[str, torch.Tensor | None]] = []

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        alone = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        record.append((name, args[0] if alone else None))

    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, module in may_be_norms(block).items()
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _nan_like(leaf: Any) -> Any:
    nan = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return torch.full_like(leaf, float("nan")) if nan else leaf


def _clone_tensors(tree: Any) -> Any:
    def clone(leaf: Any) -> Any:
        if isinstance(leaf, MutableMapping) and not isinstance(leaf, dict):  # a mapping that blocks share
            return _clone_tensors(dict(leaf))
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(clone, tree)


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
