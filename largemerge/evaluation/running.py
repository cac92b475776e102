"""Runs a model on batches: whole where it fits, else block by block.

    whole       all weights are loaded once; every batch runs through the model's own forward
    by block    a block's weights are loaded, all batches run through it, their hidden states wait in memory or on disk;
                the end of the model (norm, pooling, head) runs batch by batch when the last block is through

Both read the same weights by the same reader, so that they differ by rounding alone. Block by block, memory does not
depend on the number of blocks, and each weight is read once, however many batches there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from largemerge.calibration.batches import Batch, Sample, pad_samples
from largemerge.checkpoint.lora import open_reader
from largemerge.checkpoint.reader import TensorReader, prefetched
from largemerge.checkpoint.tensor_info import Tensors
from largemerge.errors import LargemergeError, MergeError
from largemerge.evaluation.models import OpenedModel
from largemerge.evaluation.task import Generating, Samples
from largemerge.matmul import faster_linear
from largemerge.model.block_runner import BlockId, BlockRunner
from largemerge.model.forward import call_model
from largemerge.model.hidden_states import DiskStore, HiddenStates, MemoryStore, Store
from largemerge.model.skeleton import assign_tensors, linears_in
from largemerge.model.trace import trace_model
from largemerge.text_files import first_line

Way = Literal["whole", "by block"]
"""How a model is run."""

_STREAM = "model"


@dataclass(frozen=True)
class Limits:
    """What an evaluation may hold.

    Attributes:
        device: The device that computes.
        free_bytes: Bytes that weights and hidden states may take there.
        host_bytes: Bytes of host memory that may be taken beside what the process holds already.
        disk: Folder for hidden states that do not fit.
    """

    device: torch.device
    free_bytes: int
    host_bytes: int
    disk: Path

    def way(self, model: OpenedModel, working_bytes: int) -> Way:
        """Decides how a model is run; `working_bytes` are those of the activations of one batch."""
        return "whole" if model.num_bytes + working_bytes <= self.free_bytes else "by block"


class RunningModel(Protocol):
    """A model that can be run on batches."""

    way: Way

    def outputs(self, batches: Sequence[Batch]) -> Iterator[Any]:
        """Yields what the model's forward returns for each batch, in order."""
        ...


@contextmanager
def running(
    model: OpenedModel, way: Way, limits: Limits, step: Callable[[str], None] = lambda what: None
) -> Iterator[RunningModel]:
    """Opens a model's weights, and loads them where it is run whole.

    Args:
        model: The model.
        way: How it is run.
        limits: Device and memory.
        step: Called with the name of a block, or of the end, after each batch.
    """
    with open_reader(model.checkpoint, model.files.adapter) as reader:
        if way == "by block":
            yield ByBlock(model, reader, limits, step)
            return
        whole = Whole(model, reader, limits.device, step)
        try:
            yield whole
        finally:
            whole.close()


class Whole:
    """A model with all its weights in memory.

    Args:
        model: The model.
        reader: Reads its tensors.
        device: The device that computes.
        step: Called after each batch.
    """

    way: Way = "whole"

    def __init__(
        self, model: OpenedModel, reader: TensorReader, device: torch.device, step: Callable[[str], None]
    ) -> None:
        self._model, self._device, self._step = model, device, step
        module = model.skeleton.model
        for name in module.state_dict():
            if name not in model.mapping.aliases:
                for path, tensor in model.load([name], reader).items():
                    assign_tensors(model.skeleton, {path: _cast(tensor, model, device)})
        self._faster: list[Any] = []
        for linear in linears_in(module).values():
            faster = faster_linear(linear, model.files.compute_dtype, device)
            if faster is not None:
                linear.forward = faster
                self._faster.append(linear)
        for part in module.modules():
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[key] = buffer.to(device)

    @property
    def module(self) -> Any:
        """The model, to be called or to generate with."""
        return self._model.skeleton.model

    def outputs(self, batches: Sequence[Batch]) -> Iterator[Any]:
        """See `RunningModel`."""
        for batch in batches:
            inputs = {name: _cast(tensor, self._model, self._device) for name, tensor in batch.inputs.items()}
            try:
                with torch.inference_mode():
                    output = call_model(self._model.skeleton, inputs)
            except LargemergeError:
                raise
            except Exception as error:  # whatever a model's code raises
                raise MergeError(_cannot_run(self._model, batch, error)) from None
            yield output
            self._step("")

    def close(self) -> None:
        """Frees the weights; buffers stay real, as no file may have them when the model is run again."""
        buffers = [(part, dict(part._buffers)) for part in self.module.modules()]
        self.module.to("meta")
        for linear in self._faster:
            del linear.forward
        for part, own in buffers:
            part._buffers.update({key: None if each is None else each.cpu() for key, each in own.items()})


class ByBlock:
    """A model that is run block by block.

    Args:
        model: The model.
        reader: Reads its tensors.
        limits: Device and memory.
        step: Called with the name of a block after each batch.
    """

    way: Way = "by block"

    def __init__(self, model: OpenedModel, reader: TensorReader, limits: Limits, step: Callable[[str], None]) -> None:
        self._model, self._reader, self._limits, self._step = model, reader, limits, step

    def outputs(self, batches: Sequence[Batch]) -> Iterator[Any]:
        """See `RunningModel`."""
        model, device = self._model, self._limits.device
        skeleton = model.skeleton
        trace = trace_model(skeleton, outline_of(batches), examples_of(model, batches), model.name)
        runner = BlockRunner(
            skeleton=skeleton,
            trace=trace,
            load_non_block=self._load_non_block,
            compute_dtype=model.files.compute_dtype,
            device=device,
            loss_input="",
        )
        order = [
            BlockId(stack, index)
            for stack in trace.order
            for index, runs in enumerate(trace.stacks[stack].runs)
            if runs
        ]

        def load(block: BlockId) -> Tensors:
            names = skeleton.block_tensors(skeleton.stacks[block.stack], block.index)
            return model.load(names, self._reader)

        with HiddenStates(self._store(batches)) as states, prefetched(load, order) as loaded:
            for block in order:
                name = skeleton.stacks[block.stack].block_name(block.index)
                weights = {path.removeprefix(f"{name}."): tensor for path, tensor in next(loaded).items()}
                with runner.block(block, weights, runner.non_block_of(block, _STREAM)) as running:
                    del weights
                    for number, batch in enumerate(batches):
                        states.prefetch(_STREAM, 0, number + 1)
                        output = running.run(batch, states.get(_STREAM, 0, number, device))
                        states.put(_STREAM, 0, number, block.stack, output)
                        self._step(name)
            end = runner.end_non_block(_STREAM)
            for number, batch in enumerate(batches):
                states.prefetch(_STREAM, 0, number + 1)
                yield runner.end(batch, states.get(_STREAM, 0, number, device), end)
                self._step("end")

    def _load_non_block(self, owner: Hashable, parameters: Sequence[str], buffers: Sequence[str]) -> Tensors:
        names = [*parameters, *(name for name in buffers if self._model.mapping.has(name))]
        return self._model.load(names, self._reader)

    def _store(self, batches: Sequence[Batch]) -> Store:
        """Keeps hidden states on the device, in host memory, or on disk: where the most that they may take has room."""
        needed = hidden_bytes(self._model, batches)
        if self._limits.device.type != "cpu" and needed <= self._limits.free_bytes // 4:
            return MemoryStore(self._limits.device, self._limits.device)
        if needed <= self._limits.host_bytes // 2:
            return MemoryStore(torch.device("cpu"), self._limits.device)
        return DiskStore(self._limits.disk)


def hidden_bytes(model: OpenedModel, batches: Sequence[Batch]) -> int:
    """Estimates the bytes of the hidden states of all batches, by the widest linear outside the MLPs' insides."""
    config = model.skeleton.model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0) or 1024
    rows = 0
    for batch in batches:
        tokens = [x.numel() for name, x in batch.inputs.items() if name.endswith("input_ids")]
        images = [x.shape[0] * _patches(model) for x in batch.inputs.values() if x.is_floating_point()]
        rows += sum(tokens) + sum(images)
    return int(rows) * int(width) * model.files.compute_dtype.itemsize


def _patches(model: OpenedModel) -> int:
    """Number of tokens that an image becomes."""
    config = model.skeleton.model.config
    config = getattr(config, "vision_config", config)
    size, patch = getattr(config, "image_size", 224), getattr(config, "patch_size", 16)
    size = size[0] if isinstance(size, list | tuple) else size
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    return (int(size) // max(1, int(patch))) ** 2 + 1


def outline_of(batches: Sequence[Batch]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The largest shape of one sample, and the dtype, of each forward argument of some batches."""
    outline: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for batch in batches:
        for name, tensor in batch.inputs.items():
            shape = tuple(tensor.shape[1:])
            known = outline.get(name, (shape, tensor.dtype))[0]
            outline[name] = (tuple(map(max, shape, known)), tensor.dtype)
    return outline


def examples_of(model: OpenedModel, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Integers of the first samples where images stand beside tokens: places of image tokens cannot be made up."""
    inputs = batches[0].inputs
    if not any(tensor.is_floating_point() for tensor in inputs.values()) or "input_ids" not in inputs:
        return {}
    return {name: tensor for name, tensor in inputs.items() if not tensor.is_floating_point()}


def _cast(tensor: torch.Tensor, model: OpenedModel, device: torch.device) -> torch.Tensor:
    return tensor.to(device, model.files.compute_dtype if tensor.is_floating_point() else None)


def _cannot_run(model: OpenedModel, batch: Batch, error: Exception) -> str:
    shapes = {name: list(tensor.shape) for name, tensor in batch.inputs.items()}
    hint = "; lower batch_size or max_length" if "memory" in str(error) else ""
    return f"{model.name} cannot be run on a batch of shapes {shapes} ({first_line(error, 160)}){hint}"


def working_bytes(model: OpenedModel, batches: Sequence[Batch]) -> int:
    """Estimates the bytes of the activations of the largest batch, its logits included."""
    module: Any = model.skeleton.model
    config = module.config.get_text_config()
    width = getattr(config, "intermediate_size", None) or 4 * (getattr(config, "hidden_size", None) or 1024)
    vocabulary = getattr(config, "vocab_size", 0) if module.get_output_embeddings() is not None else 0
    largest = 0
    for batch in batches:
        rows = max((x.numel() for name, x in batch.inputs.items() if name.endswith("input_ids")), default=0)
        rows += sum(x.shape[0] * _patches(model) for x in batch.inputs.values() if x.is_floating_point())
        largest = max(largest, rows)
    return largest * (8 * int(width) + int(vocabulary or 0)) * model.files.compute_dtype.itemsize


def write_answers(
    run: RunningModel, samples: Samples, generating: Generating, device: torch.device
) -> Iterator[list[list[int] | None]]:
    """Writes an answer to every prompt, the likeliest token after the other.

    A model that is run whole keeps keys and values between tokens. Block by block, each token is a pass over the whole
    model, for all prompts together.

    Args:
        run: The model.
        samples: The prompts, padded on the left.
        generating: How answers end.
        device: The device that computes.

    Yields:
        Of each batch, the tokens of every answer, without those at which it ends; `None` where no token was likeliest,
        since the logits hold NaN or infinity.
    """
    if isinstance(run, Whole):
        for batch in samples.batches():
            yield _generate(run, batch, generating, device)
        return
    written: list[list[list[int]]] = [[[] for _ in group] for group in samples.groups]
    lost = [[False for _ in group] for group in samples.groups]
    over = [[False for _ in group] for group in samples.groups]
    for _ in range(generating.max_new_tokens):
        going = [number for number in range(len(samples)) if not all(over[number])]
        if not going:
            break
        batches = [_extended(samples.groups[number], written[number], generating.pad) for number in going]
        for number, output in zip(going, run.outputs(batches), strict=True):
            for row, (own, sample) in enumerate(zip(written[number], samples.groups[number], strict=True)):
                if over[number][row]:
                    continue
                last = len(sample.sequences["input_ids"]) + len(own) - 1
                largest, place = output.logits[row, last].max(dim=0)
                if not largest.isfinite():
                    lost[number][row] = over[number][row] = True
                    continue
                token = int(place)
                if token in generating.ends:
                    over[number][row] = True
                    continue
                own.append(token)
                over[number][row] = generating.is_over(own)
    for answers, without in zip(written, lost, strict=True):
        yield [None if is_lost else own for own, is_lost in zip(answers, without, strict=True)]


def _extended(group: Sequence[Sample], written: Sequence[Sequence[int]], pad: int) -> Batch:
    """Prompts and what has been written so far, padded on the right."""
    extended = []
    for sample, own in zip(group, written, strict=True):
        more = {"input_ids": list(own), "attention_mask": [1] * len(own), "token_type_ids": [0] * len(own)}
        sequences = {name: [*values, *more[name]] for name, values in sample.sequences.items()}
        extended.append(replace(sample, sequences=sequences))
    return pad_samples(extended, {"input_ids": pad})


def _generate(run: Whole, batch: Batch, generating: Generating, device: torch.device) -> list[list[int] | None]:
    """Writes answers with a whole model, by Transformers."""
    import transformers

    make_settings: Any = transformers.GenerationConfig
    length = batch.inputs["input_ids"].shape[1]

    lost = torch.zeros(len(batch.inputs["input_ids"]), dtype=torch.bool, device=device)

    def watch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lost.logical_or_(~scores.amax(dim=1).isfinite())
        return scores

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.tensor([generating.is_over(row[length:].tolist()) for row in ids], device=ids.device)

    settings = make_settings(
        max_new_tokens=generating.max_new_tokens,
        do_sample=False,
        eos_token_id=list(generating.ends) or None,
        pad_token_id=generating.pad,
    )
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name != "token_type_ids"}
    criteria: Any = transformers.StoppingCriteriaList([stop])
    watching: Any = transformers.LogitsProcessorList([watch])
    with torch.inference_mode():
        ids = run.module.generate(
            **inputs, generation_config=settings, stopping_criteria=criteria, logits_processor=watching
        )
    answers: list[list[int] | None] = []
    for row, is_lost in zip(ids[:, length:].tolist(), lost.tolist(), strict=True):
        if is_lost:
            answers.append(None)
            continue
        ends = [place for place, token in enumerate(row) if token in generating.ends]
        answers.append(row[: ends[0]] if ends else row)
    return answers
