"""The block runner by itself: a whole model to its logits, two streams over one block, valid rows only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from largemerge.calibration.batches import Batch
from largemerge.checkpoint.index import open_checkpoint
from largemerge.model.block_runner import BlockId, BlockRunner
from largemerge.model.skeleton import build_skeleton
from largemerge.model.trace import trace_model

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


class Runner:
    """A runner of tiny models in memory, one for each owner; notes what was loaded."""

    def __init__(self, architecture: str, folder: Path, seeds: Sequence[int] = (0,)) -> None:
        self.models = {seed: tiny_models.perturbed(architecture, seed) for seed in seeds}
        for model in self.models.values():
            model.config.use_cache = False
            for name in model.config.sub_configs:
                getattr(model.config, name).use_cache = False
        next(iter(self.models.values())).save_pretrained(folder)
        self.skeleton = build_skeleton(open_checkpoint(folder, architecture))
        self.inputs = tiny_models.inputs(tiny_models.ARCHITECTURES[architecture].kind, 5, 0, "right")
        shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in self.inputs.items()}
        self.trace = trace_model(self.skeleton, shapes)
        self.batch = Batch(self.inputs, None)
        self.loaded: list[str] = []
        self.runner = BlockRunner(self.skeleton, self.trace, self._load, torch.float32, CPU, "input_ids")

    def _load(self, owner: Hashable, parameters: Sequence[str], buffers: Sequence[str]) -> Tensors:
        self.loaded += parameters
        state = self.models[owner].state_dict()  # type: ignore[index]
        return {name: state[name].clone() for name in [*parameters, *(name for name in buffers if name in state)]}

    def weights(self, owner: int, block: BlockId) -> Tensors:
        prefix = self.skeleton.stacks[block.stack].block_name(block.index) + "."
        state = self.models[owner].state_dict()
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    def blocks(self) -> list[BlockId]:
        stacks = self.skeleton.stacks
        return [BlockId(stack, index) for stack in self.trace.order for index in range(len(stacks[stack].blocks))]


def tensors_in(output: Any) -> list[torch.Tensor]:
    leaves = tree_flatten(dict(output))[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def plain(model: PreTrainedModel, inputs: Tensors) -> Any:
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_a_model_is_run_to_its_logits_one_block_at_a_time(tmp_path: Path, architecture: str) -> None:
    it = Runner(architecture, tmp_path)
    outputs: dict[int, Any] = {}
    for block in it.blocks():
        with it.runner.block(block, it.weights(0, block), it.runner.non_block_of(block, 0)) as running:
            outputs[block.stack] = running.run(it.batch, outputs)
    ended = tensors_in(it.runner.end(it.batch, outputs, it.runner.end_non_block(0)))
    expected = tensors_in(plain(it.models[0], it.inputs))
    assert len(ended) == len(expected) > 0
    valid = it.inputs.get("attention_mask")
    for found, wanted in zip(ended, expected, strict=True):
        assert found.shape == wanted.shape
        if valid is not None and found.shape[:2] == valid.shape:
            found, wanted = found[valid.bool()], wanted[valid.bool()]
        assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)
    assert all(
        parameter.is_meta for stack in it.skeleton.stacks for block in stack.blocks for parameter in block.parameters()
    )


def test_the_end_loads_norm_and_head_and_no_untied_embedding(tmp_path: Path) -> None:
    it = Runner("llama", tmp_path)
    outputs: dict[int, Any] = {}
    for block in it.blocks():
        with it.runner.block(block, it.weights(0, block), it.runner.non_block_of(block, 0)) as running:
            outputs[block.stack] = running.run(it.batch, outputs)
    it.loaded.clear()
    it.runner.end(it.batch, outputs, it.runner.end_non_block(0))
    it.runner.end(it.batch, outputs, it.runner.end_non_block(0))
    assert sorted(it.loaded) == ["lm_head.weight", "model.norm.weight"], "once, and nothing else"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "clip_vision", "mixtral"])
def test_two_streams_take_turns_over_one_block(tmp_path: Path, architecture: str) -> None:
    """Two models with weights, embeddings and hidden states of their own, batch by batch in turn."""
    it = Runner(architecture, tmp_path, seeds=(0, 1))
    halves = [
        Batch({name: tensor[part] for name, tensor in it.inputs.items()}, None) for part in (slice(2), slice(2, 5))
    ]
    states: dict[tuple[int, int], dict[int, Any]] = {(owner, half): {} for owner in (0, 1) for half in (0, 1)}
    for block in it.blocks():
        with (
            it.runner.block(block, it.weights(0, block), it.runner.non_block_of(block, 0)) as first,
            it.runner.block(block, it.weights(1, block), it.runner.non_block_of(block, 1)) as second,
        ):
            for half, batch in enumerate(halves):
                for owner, running in enumerate((first, second)):
                    state = states[owner, half]
                    state[block.stack] = running.run(batch, state)
    for owner, model in it.models.items():
        for half, batch in enumerate(halves):
            ended = tensors_in(it.runner.end(batch, states[owner, half], it.runner.end_non_block(owner)))
            expected = tensors_in(plain(model, batch.inputs))
            mask = batch.inputs.get("attention_mask")
            for found, wanted in zip(ended, expected, strict=True):
                if mask is not None and found.shape[:2] == mask.shape:
                    found, wanted = found[mask.bool()], wanted[mask.bool()]
                assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)
    ends = [
        tensors_in(it.runner.end(halves[0], states[owner, 0], it.runner.end_non_block(owner)))[0] for owner in (0, 1)
    ]
    assert not torch.allclose(*ends, atol=1e-3), "the models differ, or the test shows nothing"


def test_only_valid_rows_are_shown_once_each_and_nothing_after_the_last_is_run(tmp_path: Path) -> None:
    it = Runner("llama", tmp_path)
    mask = it.inputs["attention_mask"].bool()
    loss_mask = torch.zeros_like(mask)
    loss_mask[:, 1:4] = True
    batch = Batch(it.inputs, loss_mask)
    shown: dict[str, list[torch.Tensor]] = {}
    block = it.blocks()[0]
    watch = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"]
    with it.runner.block(block, it.weights(0, block), it.runner.non_block_of(block, 0)) as running:
        stopped = running.run(
            batch, {}, watch=watch, on_input=lambda path, x: shown.setdefault(path, []).append(x), whole=False
        )
        assert stopped is None
        whole = running.run(batch, {}, watch=watch, on_input=lambda path, x: shown[path].append(x))
    assert whole is not None and list(shown) == watch
    count = int((mask & loss_mask).sum())
    assert 0 < count < mask.numel()
    for rows in shown.values():
        assert [tuple(each.shape) for each in rows] == [(count, rows[0].shape[1])] * 2
        assert torch.equal(rows[0], rows[1]) and torch.isfinite(rows[0]).all()
