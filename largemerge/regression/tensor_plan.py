"""How each tensor of the output is made, and in which dtype or quantisation it is written.

    skeleton, trace, config ──► plan_blocks, plan_non_block ──► a rule for every tensor, groups of linears
                            ──► output_tensors ──► quantize_output ──► the layout of the output

Every tensor gets exactly one rule, and a reason where it is not solved:

    solved    the method's closed-form solution
    averaged  Σ c_i W_i / Σ c_i
    base      excluded or not included by the user: taken from the base as it is
    copied    integers and the like, which have no average: taken from the first candidate
    head      of one candidate, whose head the output has
    new       what no input has, and the bare body wants: as its class initialises it

Linears that read the same tensor are solved together. Which linears are written quantised is asked of Transformers
itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.quantized import bitsandbytes, quantized_tensor
from largemerge.checkpoint.sentence_modules import module_problems, split_name
from largemerge.checkpoint.tensor_info import (
    OutputTensor,
    Quantization,
    TensorInfo,
    dtype_name,
    list_kinds,
    torch_dtype,
)
from largemerge.config_file import matches
from largemerge.errors import LargemergeError
from largemerge.heads import BASE
from largemerge.model.block_runner import BlockId
from largemerge.model.classes import token_parameters
from largemerge.model.inside_block import Residual
from largemerge.model.key_mapping import KeyMapping
from largemerge.model.skeleton import Skeleton, linears_in, weight_is_transposed
from largemerge.model.trace import LinearRole, ModelTrace
from largemerge.regression.config import MergeConfig, OutputConfig
from largemerge.regression.inputs import Inputs
from largemerge.regression.solve import solve_operations
from largemerge.regression.tokens import Tokens

HEAD = "head"
"""Name of the part that holds the head, in journal, report and progress."""
_UNMATCHED_ROWS = "rows of its input cannot be matched to the padding mask"
_QUANTIZABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MergeRule(str, Enum):
    """How a tensor of the output is made."""

    SOLVED = "solved"
    AVERAGED = "averaged"
    BASE = "base"
    COPIED = "copied"
    HEAD = "head"
    NEW = "new"


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Parameter name in the module; the name on disk for tensors that the class has no use for.
        rule: How the tensor is made.
        reason: Why the tensor is not solved; "" if it is.
        dtype: Dtype in which the tensor is written; of the plain values, where it is quantised.
        sources: Numbers of the candidates that it is made of; `None` for all of them.
    """

    name: str
    rule: MergeRule
    reason: str
    dtype: torch.dtype
    sources: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LinearPlan:
    """A linear whose weight is solved for.

    Attributes:
        path: Path of the linear in its block, such as `self_attn.q_proj`.
        name: Parameter name of the weight in the module.
        num_outputs: Number of outputs of the linear.
        dtype: Dtype in which the weight is written.
        residual: The tensor to which its output is added; `None` if it is to none, or nobody asked.
    """

    path: str
    name: str
    num_outputs: int
    dtype: torch.dtype
    residual: Residual | None = None


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same tensor and are solved together.

    Attributes:
        leader: Path in the block of the linear whose input is watched; it names the group.
        token_stack: Stack whose tokens the rows of the input are; `None` if they are no stack's.
        num_inputs: Number of features of the shared input.
        linears: The linears that are solved, in the order in which they run.
        transposed: Whether the weights lie `[in, out]`.
    """

    leader: str
    token_stack: int | None
    num_inputs: int
    linears: tuple[LinearPlan, ...]
    transposed: bool

    @property
    def outputs(self) -> dict[str, int]:
        """Path of a linear in the block → its number of outputs."""
        return {linear.path: linear.num_outputs for linear in self.linears}

    @property
    def num_outputs(self) -> int:
        """Number of outputs of all linears together."""
        return sum(linear.num_outputs for linear in self.linears)

    @property
    def mean_dtype(self) -> torch.dtype:
        """Dtype of the mean difference: the widest in which one of the weights is written."""
        return max((linear.dtype for linear in self.linears), key=lambda dtype: dtype.itemsize)

    @property
    def solve_operations(self) -> int:
        """Multiplications and additions of a factorisation and two triangular solves."""
        return solve_operations(self.num_inputs, self.num_outputs)


@dataclass(frozen=True)
class NormPlan:
    """A norm whose scale is averaged element by element, weighted by what it multiplies.

    Attributes:
        path: Path of the norm in its block, such as `input_layernorm`.
        name: Parameter name of the scale in the module.
        token_stack: Stack whose tokens the rows of the input are; `None` if they are no stack's.
        size: Number of elements of the scale.
    """

    path: str
    name: str
    token_stack: int | None
    size: int


@dataclass(frozen=True)
class BlockPlan:
    """One block: its tensors, and which of its linears are solved together.

    Attributes:
        stack: Index of the block's stack in the skeleton.
        index: Index of the block in its stack.
        name: Module path of the block.
        tensors: Plans of the block's tensors.
        groups: Groups of linears in the order in which the forward reaches them.
        norms: Norms whose scales are solved.
    """

    stack: int
    index: int
    name: str
    tensors: tuple[TensorPlan, ...]
    groups: tuple[LinearGroup, ...]
    norms: tuple[NormPlan, ...] = ()

    def stack_of(self, part: LinearGroup | NormPlan) -> int:
        """The stack whose tokens the rows of the input of a group or a norm are, else the block's own stack."""
        return self.stack if part.token_stack is None else part.token_stack


@dataclass(frozen=True)
class HeadPlan:
    """The linears outside the blocks that are solved.

    Attributes:
        tied: The head that is tied to the input embedding, a group of one linear; `None` where it is not solved.
        groups: Other linears that run after the blocks, those that read one tensor together, in the order of running.
    """

    tied: LinearGroup | None = None
    groups: tuple[LinearGroup, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is solved."""
        return self.tied is not None or bool(self.groups)

    def to_json(self) -> list[dict[str, Any]]:
        """The head as plain JSON values: weights that are solved together, and when."""
        entries = [("first, with the embedding", self.tied)] if self.tied is not None else []
        entries += [("last", group) for group in self.groups]
        return [{"solved": when, "weights": [linear.name for linear in group.linears]} for when, group in entries]

    @property
    def names(self) -> frozenset[str]:
        """Parameter names of the weights that are solved."""
        groups = [*([self.tied] if self.tied is not None else []), *self.groups]
        return frozenset(linear.name for group in groups for linear in group.linears)


def plan_head(
    config: MergeConfig, inputs: Inputs, trace: ModelTrace, non_block: Sequence[TensorPlan]
) -> tuple[HeadPlan, tuple[TensorPlan, ...]]:
    """Plans the head, where the method solves it.

    Returns:
        The plan; and the plans of all tensors outside the blocks, those of the head solved.
    """
    if not config.method.solves_head:
        return HeadPlan(), tuple(non_block)
    model: Any = inputs.skeleton.model
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    names |= {id(tensor): name for name, tensor in reversed(list(model.named_parameters()))}
    plans, embedding = {plan.name: plan for plan in non_block}, None
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
    tied, groups = None, dict[str, list[tuple[LinearPlan, int, int | None]]]()
    for role in trace.end.roles:
        linear = model.get_submodule(role.name)
        plan = plans.get(names[id(linear.weight)])
        if plan is None or weight_is_transposed(linear) or not _is_averaged_everywhere(config, inputs, plan):
            continue
        rows, columns = linear.weight.shape
        own = LinearPlan(role.name, plan.name, rows, plan.dtype)
        if embedding is not None and getattr(embedding, "weight", None) is linear.weight:
            tied = LinearGroup(role.name, role.token_stack, columns, (own,), transposed=False)
        else:
            groups.setdefault(role.group, []).append((own, columns, role.token_stack))
    head = HeadPlan(
        tied,
        tuple(
            LinearGroup(leader, own[0][2], own[0][1], tuple(linear for linear, *_ in own), transposed=False)
            for leader, own in groups.items()
        ),
    )
    solved = {name: replace(plans[name], rule=MergeRule.SOLVED, reason="") for name in head.names}
    return head, tuple(solved.get(plan.name, plan) for plan in non_block)


def plan_embedding(
    config: MergeConfig, inputs: Inputs, non_block: Sequence[TensorPlan]
) -> tuple[TensorPlan | None, tuple[TensorPlan, ...]]:
    """Plans the input embedding, where its rows are averaged by how often their tokens occur.

    Returns:
        Its plan, `None` where there is no such embedding, or nobody asked; and the plans of all tensors outside the
        blocks, this one among them.
    """
    _, name = token_parameters(inputs.skeleton.model)
    found = next((plan for plan in non_block if plan.name == name), None)
    if not config.method.counts_tokens or found is None or not _is_averaged_everywhere(config, inputs, found):
        return None, tuple(non_block)
    planned = replace(found, reason=f"{found.reason}; rows averaged by how often their tokens occur in the data")
    return planned, tuple(planned if plan is found else plan for plan in non_block)


def _is_averaged_everywhere(config: MergeConfig, inputs: Inputs, plan: TensorPlan) -> bool:
    """Whether all candidates have a tensor, and the user leaves it to the method."""
    labels, parameters = tensor_labels(inputs.reference_mapping, plan.name), config.parameters
    included = _is_included(config, inputs, plan.name)
    excluded = _matches(parameters.exclude, labels, "parameters.exclude")
    return plan.rule is MergeRule.AVERAGED and plan.sources is None and included and not excluded


def plan_blocks(config: MergeConfig, inputs: Inputs, trace: ModelTrace) -> tuple[BlockPlan, ...]:
    """Plans the blocks, in the order in which they run."""
    blocks = []
    shared = _shared_by_blocks(inputs.skeleton)
    for stack_index in trace.order:
        stack = inputs.skeleton.stacks[stack_index]
        for index in [index for index, runs in enumerate(trace.stacks[stack_index].runs) if runs]:
            names = [name for name in inputs.skeleton.block_tensors(stack, index) if _in_any_candidate(inputs, name)]
            roles = {role.name: role for role in trace.stacks[stack_index].roles[index]}
            prefix = stack.block_name(index) + "."
            linears = linears_in(stack.blocks[index])
            reasons = {
                name: "parameters.solve does not name the blocks"
                if "blocks" not in config.method.solve
                else "several blocks have it in common"
                if name in shared
                else _why_not_solvable(name.removeprefix(prefix), linears, roles, trace, stack_index)
                for name in names
            }
            of_base = _left_to_base(config, inputs, reasons, [prefix + path for path in linears])
            tensors = [_plan_tensor(config, inputs, name, reasons[name], of_base=name in of_base) for name in names]
            norms, tensors = _plan_norms(config, inputs, tensors, prefix, trace, BlockId(stack_index, index), shared)
            residuals = trace.stacks[stack_index].residuals[index] if trace.stacks[stack_index].residuals else {}
            groups = _plan_groups(stack.blocks[index], tensors, prefix, roles, residuals)
            blocks.append(BlockPlan(stack_index, index, prefix.rstrip("."), tuple(tensors), groups, norms))
    return tuple(blocks)


def _shared_by_blocks(skeleton: Skeleton) -> frozenset[str]:
    """Parameters that several blocks have in common (Zamba's shared attention), by all their names."""
    prefixes = [stack.block_name(index) + "." for stack in skeleton.stacks for index in range(len(stack.blocks))]
    found: set[str] = set()
    for names in skeleton.aliases.values():
        if len({prefix for prefix in prefixes for name in names if name.startswith(prefix)}) > 1:
            found.update(names)
    return frozenset(found)


def plan_non_block(config: MergeConfig, inputs: Inputs, trace: ModelTrace) -> tuple[TensorPlan, ...]:
    """Plans the tensors of no block, of blocks that do not run, and those that the model class has no use for."""
    reasons = dict.fromkeys(inputs.skeleton.non_block_tensors(), "not in a block")
    for stack, traced in zip(inputs.skeleton.stacks, trace.stacks, strict=True):
        for index in [index for index, runs in enumerate(traced.runs) if runs == 0]:
            name = stack.block_name(index) if any(traced.runs) else stack.name
            names = inputs.skeleton.block_tensors(stack, index)
            reasons |= dict.fromkeys(names, f"the calibration data does not reach {name}")
    planned = [
        _plan_of_body_or_head(config, inputs, name) or _plan_tensor(config, inputs, name, reason)
        for name, reason in reasons.items()
        if inputs.heads is not None or _in_any_candidate(inputs, name)
    ]
    known = [plan for plan in planned if plan is not None]
    if inputs.tokens is not None:
        known = [_by_token(inputs, inputs.tokens, plan) for plan in known]
    unmapped = inputs.reference_mapping.unmapped if inputs.heads is None else ()  # what is left of other heads
    unknown = [_plan_unmapped(config, inputs, key) for key in unmapped]
    return (*known, *unknown)


def _by_token(inputs: Inputs, tokens: Tokens, plan: TensorPlan) -> TensorPlan:
    """Says of a tensor with a row for every token how its rows are matched, and finds that out."""
    if plan.name not in tokens.parameters:
        return plan
    keys = inputs.token_keys(plan.name)
    tokens.rows_of(list(keys), keys)
    how = "rows matched by number" if tokens.vocabulary is None else "rows matched by token"
    return replace(plan, reason=f"{plan.reason}; {how}")


def _plan_of_body_or_head(config: MergeConfig, inputs: Inputs, name: str) -> TensorPlan | None:
    """Plans a tensor of the output's head, or one that not all candidates' bodies have; `None` for any other."""
    heads = inputs.heads
    if heads is None:
        return None
    pairs = list(zip(inputs.candidates, inputs.candidate_mappings, strict=True))
    if name in heads.parameters and heads.choice != BASE:
        chosen = inputs.names.index(heads.choice)
        dtype = _output_dtype(config, inputs, name, (chosen,))
        return TensorPlan(name, MergeRule.HEAD, f"of {heads.choice}, whose head the output has", dtype, (chosen,))
    having = tuple(number for number, (_, names) in enumerate(pairs) if names.keys_of(name))
    if name not in heads.parameters and (len(having) == len(pairs) or _lacking_by_mistake(inputs, name, having)):
        return None
    if name not in heads.parameters and having:
        some = ", ".join(inputs.names[number] for number in having)
        reason = f"not in a block; only {some} {'has' if len(having) == 1 else 'have'} it"
        return TensorPlan(name, MergeRule.AVERAGED, reason, _output_dtype(config, inputs, name, having), having)
    if inputs.base is not None and inputs.base_mapping is not None and inputs.base_mapping.has(name):
        info = _info(inputs.base, inputs.base_mapping, name)
        assert info is not None
        dtype = torch_dtype(config.dtype) if config.dtype and info.dtype.is_floating_point else info.dtype
        reason = "the base's head" if name in heads.parameters else "no candidate has it"
        return TensorPlan(name, MergeRule.BASE, reason, dtype)
    dtype = torch_dtype(config.dtype) if config.dtype else inputs.skeleton.dtype
    return TensorPlan(name, MergeRule.NEW, "not trained: no input has it, and the class wants it", dtype)


def _lacking_by_mistake(inputs: Inputs, name: str, having: tuple[int, ...]) -> bool:
    """Whether a candidate lacks a tensor that its class has."""
    heads = inputs.heads
    lacking = [model for number, model in enumerate(inputs.names) if number not in having]
    return heads is not None and any(not heads.lacks(model, name) for model in lacking) and bool(having)


def output_tensors(inputs: Inputs, plans: tuple[TensorPlan, ...]) -> dict[str, OutputTensor]:
    """Lays out the output: names, shapes and order of the reference, dtypes of the plans."""
    names, reference = inputs.reference_mapping, inputs.reference
    dtypes: dict[str, torch.dtype] = {}
    for plan in plans:
        if plan.name in names.unmapped:
            dtypes[plan.name] = plan.dtype
        else:
            dtypes |= {key: plan.dtype for key in names.disk_keys([names.canonical(plan.name)])}
    output = {key: OutputTensor(dtypes[key], info.shape) for key, info in reference.tensors.items() if key in dtypes}
    if set(output) != set(dtypes):  # what the reference lacks
        shapes = {names.renamed[name]: tuple(tensor.shape) for name, tensor in _named(inputs) if name in names.renamed}
        output |= {key: OutputTensor(dtype, shapes[key]) for key, dtype in dtypes.items() if key not in output}
    return output


def _named(inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    yield from inputs.skeleton.model.state_dict().items()


def check_tensors(inputs: Inputs, plans: tuple[TensorPlan, ...]) -> list[str]:
    """Finds tensors that candidates lack or hold in other shapes, unless they are taken from the base."""
    problems = module_problems(inputs.checkpoints)
    stacks = tuple(f".{stack.name}." for stack in inputs.skeleton.stacks)
    for checkpoint, names in zip(inputs.candidates, inputs.candidate_mappings, strict=True):
        extra = [key for key in names.unmapped if any(stack in f".{key}" for stack in stacks)]
        extra = [key for key in extra if key not in inputs.reference_mapping.unmapped]
        if extra:
            some = ", ".join(extra[:3])
            problems.append(f"{checkpoint.name}: has {len(extra)} tensors in blocks that others lack, such as {some}")
    state = inputs.skeleton.model.state_dict()
    for plan in plans:
        if plan.name not in state or plan.rule in (MergeRule.BASE, MergeRule.NEW):
            continue
        shapes = {}
        pairs = list(zip(inputs.candidates, inputs.candidate_mappings, strict=True))
        for checkpoint, names in pairs if plan.sources is None else [pairs[number] for number in plan.sources]:
            name = names.canonical(plan.name)
            if name in names.missing:
                problems.append(f"{checkpoint.name}: has no tensor for {plan.name}, which the others have")
            elif name in names.mismatched:
                shapes[checkpoint.name] = list(names.mismatched[name])
        if shapes:
            expected = list(state[plan.name].shape)
            by_token = plan.name in token_parameters(inputs.skeleton.model)[0]
            advice = "put each model's tokenizer beside it, so that rows are matched by token, or " if by_token else ""
            if inputs.reference is inputs.base and len(shapes) == len(pairs):
                advice += "give a base_model that has it as they do, or none"
            else:
                advice += "exclude it (parameters.exclude) and give a base_model that has it"
                advice += _base_lacks(inputs, plan.name)
            problems.append(f"{plan.name}: expected {expected} as in {inputs.reference.name}, found {shapes}; {advice}")
    return problems


def check_anchor(config: MergeConfig, inputs: Inputs, plans: Sequence[TensorPlan]) -> list[str]:
    """Finds solved tensors that the base lacks or holds in another shape, where the method pulls to the base."""
    names, tokens = inputs.base_mapping, inputs.tokens
    if config.method.anchor == "average" or inputs.base is None or names is None:
        return []
    by_token = tokens.parameters if tokens is not None else frozenset[str]()
    solved = [plan.name for plan in plans if plan.rule is MergeRule.SOLVED and plan.name not in by_token]
    lacking = [name for name in solved if not names.has(name)]
    if not lacking:
        return []
    where = f"{inputs.base.name}: has no {list_kinds(lacking)} as in {inputs.reference.name}"
    if config.method.merges_subspaces:
        what = "of which task vectors are merged; expected a base_model that has them, or 'exclude' with their names"
    else:
        what = (
            f"to which 'anchor: {config.method.anchor}' pulls; expected a base_model that has all that is solved, "
            "'anchor: average', or less under 'solve'"
        )
    return [f"{where}, {what}"]


def _base_lacks(inputs: Inputs, name: str) -> str:
    """Says that the base is of no help, where it is not."""
    if inputs.base is None or inputs.base_mapping is None or inputs.base_mapping.has(name):
        return ""
    return f" ({inputs.base.folder.name} does not)"


def _in_any_candidate(inputs: Inputs, name: str) -> bool:
    """Whether any candidate has the tensor, so that the output must."""
    return any(names.canonical(name) not in names.missing for names in inputs.candidate_mappings)


def _left_to_base(
    config: MergeConfig, inputs: Inputs, reasons: Mapping[str, str | None], linears: Sequence[str]
) -> frozenset[str]:
    """Names of the tensors of linears that could be solved, are not included, and are to be the base's.

    A bias is its weight's: what is left out is a whole linear.

    Args:
        config: The merge.
        inputs: Its models.
        reasons: Name of a tensor of a block → why it cannot be solved; `None` if it can.
        linears: Names of the block's linears.
    """
    if config.parameters.excluded != "base":
        return frozenset()
    left_out = [
        linear
        for linear in linears
        if reasons.get(f"{linear}.weight", "no tensor") is None and not _is_included(config, inputs, f"{linear}.weight")
    ]
    return frozenset(f"{linear}.{leaf}" for linear in left_out for leaf in ("weight", "bias"))


def _is_included(config: MergeConfig, inputs: Inputs, name: str) -> bool:
    """Whether a tensor is among those that the user wants solved."""
    patterns = config.parameters.include
    return not patterns or _matches(patterns, tensor_labels(inputs.reference_mapping, name), "parameters.include")


def _of_base(inputs: Inputs, name: str, reason: str, dtype: torch.dtype) -> TensorPlan:
    """Plans a tensor that is the base's; averaged where there is none."""
    base = inputs.base_mapping
    if base is None:
        return TensorPlan(name, MergeRule.AVERAGED, f"{reason}, and there is no base", dtype)
    if not base.has(name):
        return TensorPlan(name, MergeRule.AVERAGED, f"{reason}, but the base does not have it", dtype)
    return TensorPlan(name, MergeRule.BASE, reason, dtype)


def _plan_tensor(
    config: MergeConfig, inputs: Inputs, name: str, unsolvable: str | None, *, of_base: bool = False
) -> TensorPlan:
    dtype = _output_dtype(config, inputs, name)
    if not dtype.is_floating_point:
        return TensorPlan(name, MergeRule.COPIED, "not a floating-point tensor", dtype)
    labels = tensor_labels(inputs.reference_mapping, name)
    if _matches(config.parameters.exclude, labels, "parameters.exclude"):
        return _of_base(inputs, name, "excluded", dtype)
    if of_base:
        return _of_base(inputs, name, "not included", dtype)
    if unsolvable is not None:
        return TensorPlan(name, MergeRule.AVERAGED, unsolvable, dtype)
    if not _is_included(config, inputs, name):
        return TensorPlan(name, MergeRule.AVERAGED, "not included", dtype)
    return TensorPlan(name, MergeRule.SOLVED, "", dtype)


def _plan_unmapped(config: MergeConfig, inputs: Inputs, key: str) -> TensorPlan:
    """Plans a tensor that the model class has no use for: averaged where all candidates have it, else copied."""
    infos = [checkpoint.tensors.get(key) for checkpoint in inputs.candidates]
    reference = inputs.reference.tensors[key]
    everywhere = all(info is not None and info.shape == reference.shape for info in infos)
    dtype = reference.dtype
    reason = "a module beside the transformer" if split_name(key)[0] else "unknown to the model class"
    if everywhere and dtype.is_floating_point:
        wanted = torch_dtype(config.dtype) if config.dtype else dtype
        return TensorPlan(key, MergeRule.AVERAGED, reason, wanted)
    return TensorPlan(key, MergeRule.COPIED, reason, dtype)


def _why_not_solvable(
    path: str,
    linears: Mapping[str, torch.nn.Module],
    roles: Mapping[str, LinearRole],
    trace: ModelTrace,
    stack: int,
) -> str | None:
    """Why a tensor of a block of a stack cannot be solved; `None` if it can."""
    module, _, leaf = path.rpartition(".")
    if leaf != "weight" or module not in linears:
        return "not a linear's weight"
    if module not in roles:
        return "the calibration data does not run its linear"
    return None if _rows_are_known(trace, stack, roles[module]) else _UNMATCHED_ROWS


def _rows_are_known(trace: ModelTrace, stack: int, role: LinearRole) -> bool:
    """Whether it is known which rows of what a linear or a norm of a stack reads are padding."""
    rows = trace.stacks[stack if role.token_stack is None else role.token_stack]
    return not rows.unmatched and (role.token_stack is not None or rows.token_input is None)


def _plan_norms(
    config: MergeConfig,
    inputs: Inputs,
    tensors: list[TensorPlan],
    prefix: str,
    trace: ModelTrace,
    block: BlockId,
    shared: frozenset[str],
) -> tuple[tuple[NormPlan, ...], list[TensorPlan]]:
    """Plans the norms of a block, where the method solves them; returns the plans of its tensors with their reasons."""
    if not config.method.solves_norms:
        return (), tensors
    stack = trace.stacks[block.stack]
    roles = stack.norms[block.index] if stack.norms else {}
    norms, plans = [], []
    for plan in tensors:
        path, _, leaf = plan.name.removeprefix(prefix).rpartition(".")
        role = roles.get(path) if leaf == "weight" else None
        if role is None or plan.name in shared or not _is_averaged_everywhere(config, inputs, plan):
            plans.append(plan)
        elif not _rows_are_known(trace, block.stack, role):
            plans.append(replace(plan, reason=f"{plan.reason}, and {_UNMATCHED_ROWS}"))
        else:
            size = inputs.skeleton.model.get_parameter(plan.name).shape[0]
            norms.append(NormPlan(role.name, plan.name, role.token_stack, size))
            plans.append(replace(plan, reason="the scale of a norm: weighted by the squares of what it multiplies"))
    return tuple(norms), plans


def _plan_groups(
    block: torch.nn.Module,
    tensors: list[TensorPlan],
    prefix: str,
    roles: Mapping[str, LinearRole],
    residuals: Mapping[str, Residual],
) -> tuple[LinearGroup, ...]:
    """Groups the solved linears of a block by the tensor that they read."""
    linears = linears_in(block)
    solved = {
        plan.name.removeprefix(prefix).removesuffix(".weight"): plan
        for plan in tensors
        if plan.rule is MergeRule.SOLVED
    }
    groups: dict[tuple[str, bool], dict[str, tuple[int, int]]] = {}
    for path in [name for name in roles if name in solved]:
        linear = linears[path]
        transposed = weight_is_transposed(linear)
        rows, columns = linear.get_parameter("weight").shape
        size = (columns, rows) if transposed else (rows, columns)
        groups.setdefault((roles[path].group, transposed), {})[path] = size
    order = list(roles)
    return tuple(
        LinearGroup(
            leader=leader,
            token_stack=roles[leader].token_stack,
            num_inputs=next(iter(members.values()))[1],
            linears=tuple(
                LinearPlan(path, solved[path].name, outputs, solved[path].dtype, residuals.get(path))
                for path, (outputs, _) in members.items()
            ),
            transposed=transposed,
        )
        for (leader, transposed), members in sorted(groups.items(), key=lambda item: order.index(item[0][0]))
    )


def _output_dtype(
    config: MergeConfig, inputs: Inputs, name: str, sources: tuple[int, ...] | None = None
) -> torch.dtype:
    """The user's dtype for floating-point tensors, else the one that the candidates' dtypes promote to."""
    infos = [
        _info(checkpoint, names, name)
        for number, (checkpoint, names) in enumerate(zip(inputs.candidates, inputs.candidate_mappings, strict=True))
        if sources is None or number in sources
    ]
    dtypes = [info.dtype for info in infos if info is not None]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return torch_dtype(config.dtype) if config.dtype and result.is_floating_point else result


def _info(checkpoint: Checkpoint, names: KeyMapping, name: str) -> TensorInfo | None:
    keys = names.keys_of(name)
    return checkpoint.tensors[keys[0]] if keys else None


def tensor_labels(names: KeyMapping, name: str) -> set[str]:
    """Names that patterns are matched with: a tensor's name in the module, and its names on disk."""
    return {name} if name in names.unmapped else {name, *names.keys_of(name)}


def _matches(patterns: tuple[str, ...], labels: set[str], where: str) -> bool:
    return any(matches(pattern, label, where) for pattern in patterns for label in labels)


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """Makes the settings with which Transformers loads a quantised checkpoint; `dtype` is that of 4-bit products."""
    config_class: Any = BitsAndBytesConfig  # has no annotations
    if quantization.method == "int8":
        return config_class(load_in_8bit=True)
    return config_class(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def quantized_linears(skeleton: Skeleton, quantization: Quantization) -> dict[str, bool]:
    """Finds the linears that Transformers quantises, by letting it replace those of a copy of the model.

    Args:
        skeleton: The model; left as it is.
        quantization: Format of the quantised weights.

    Returns:
        Module path → whether the module holds its weight `[in, out]`, for every linear that was replaced.

    Raises:
        LargemergeError: If bitsandbytes is not installed or does not work here.
    """
    package: Any = bitsandbytes("output.quantization")
    quantizer: Any = AutoHfQuantizer.from_config(bitsandbytes_config(quantization, skeleton.dtype), pre_quantized=True)
    try:
        quantizer.validate_environment(device_map=None)
    except (ImportError, RuntimeError, ValueError) as error:
        raise LargemergeError(f"output.quantization: {str(error).splitlines()[0]}") from None
    model = copy.deepcopy(skeleton.model)
    before: dict[str, nn.Module] = dict(model.named_modules())
    quantizer.preprocess_model(model=model, device_map=None)
    replaced = (package.nn.Linear4bit, package.nn.Linear8bitLt)
    return {
        path: isinstance(before.get(path), Conv1D)
        for path, module in model.named_modules()
        if isinstance(module, replaced)
    }


def output_quantization(config: OutputConfig) -> Quantization | None:
    """The quantisation that the configuration asks for; `None` for a plain output."""
    if config.quantization is None:
        return None
    double_quant = config.quantization != "int8" and config.double_quant is not False
    return Quantization(config.quantization, double_quant)


def quantize_output(
    config: OutputConfig, inputs: Inputs, output: Mapping[str, OutputTensor]
) -> tuple[dict[str, OutputTensor], list[str]]:
    """Lays out the weights that Transformers would quantise as quantised ones.

    Args:
        config: The part `output` of the configuration.
        inputs: The opened inputs, from `open_inputs`.
        output: The plain layout, by name on disk.

    Returns:
        The layout, and problems that make it impossible.

    Raises:
        LargemergeError: If bitsandbytes is not installed or does not work here.
    """
    quantization = output_quantization(config)
    if quantization is None or not output:
        return dict(output), []
    names = inputs.reference_mapping
    result, problems = dict(output), []
    linears = quantized_linears(inputs.skeleton, quantization)
    for path, transposed in linears.items():
        name = names.canonical(f"{path}.weight")
        if names.conversion_of(name) is not None:
            problems.append(
                f"output.quantization: {name} is no tensor of its own on disk, and cannot be written quantised; "
                "merge without output.quantization, and quantise with Transformers"
            )
            continue
        key = names.renamed.get(name)
        if key is None or key not in output:
            continue
        plain = output[key]
        if plain.dtype not in _QUANTIZABLE_DTYPES:
            problems.append(f"output.quantization: {key} is {dtype_name(plain.dtype)}; set dtype: bfloat16")
            continue
        how = Quantization(quantization.method, quantization.double_quant, transposed)
        result[key] = quantized_tensor(key, plain.dtype, plain.shape, how)
    if not any(tensor.quantization for tensor in result.values()) and not problems:
        problems.append(f"output.quantization: Transformers quantises no linear of {inputs.skeleton.class_name}")
    return result, problems


def quantization_settings(config: OutputConfig, dtype: torch.dtype) -> dict[str, Any] | None:
    """Makes the output's `quantization_config`; `None` for a plain output."""
    quantization = output_quantization(config)
    if quantization is None:
        return None
    settings: dict[str, Any] = json.loads(json.dumps(bitsandbytes_config(quantization, dtype).to_dict()))
    return settings
