"""The inputs of a merge, opened and compared: checkpoints, model class, names on disk.

    references ──► checkpoints, adapters ──► skeleton of one model class ──► a key mapping for every checkpoint

Everything here comes from configs and headers; no weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from largemerge.checkpoint.index import Checkpoint
from largemerge.checkpoint.locate import locate_checkpoint, split_reference
from largemerge.checkpoint.lora import Adapter, open_model
from largemerge.checkpoint.reader import TensorReader
from largemerge.checkpoint.sentence_modules import module_notes
from largemerge.checkpoint.tensor_info import torch_dtype
from largemerge.config_file import matches
from largemerge.errors import CheckpointError, LargemergeError
from largemerge.heads import BASE, NONE, Heads, check_files, default_labels_note, find_heads
from largemerge.model.adapter_names import AdapterNames
from largemerge.model.classes import classify, oriented
from largemerge.model.config_differences import check_configs
from largemerge.model.key_mapping import KeyMapping, map_keys, prefix_on_disk
from largemerge.model.output_check import check_own_configs
from largemerge.model.skeleton import (
    Skeleton,
    build_skeleton,
    checkpoint_from_config,
    keep_computed,
    load_config,
)
from largemerge.model.ties import declared_ties, is_tied, untie_config, untied_heads
from largemerge.progress import stage
from largemerge.regression.config import MergeConfig
from largemerge.regression.tokens import Tokens, open_tokens
from largemerge.tokenizer.tokenizers import tokenizer_folder
from largemerge.weight_matching.permuted import Axes, PermutedReader
from largemerge.weight_matching.plan import AlignPlan, plan_alignment
from largemerge.weight_matching.run import Matched

Layout = tuple[Any, ...]
"""Whether a model is tied; name, shape and dtype of every tensor on disk."""


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a merge.

    Attributes:
        candidates: Checkpoints of the candidates, in the order of the config.
        base: Checkpoint of the base; `None` without a `base_model`.
        reference: Checkpoint that gives the output its config and names: the base if it is of the candidates' class
            and complete, else the first candidate.
        skeleton: The model without weights, built from the reference's config.
        candidate_mappings: How each candidate's tensors map to the skeleton.
        base_mapping: How the base's tensors map to the skeleton; `None` without a base.
        reference_mapping: How the reference's tensors map to the skeleton.
        notes: What a user should know though it stops nothing.
        adapters: Name of a checkpoint → its adapter, for those that have one.
        heads: Heads that are kept apart; `None` where all of them are merged.
        stored: Name of a checkpoint → the checkpoint as it lies on disk, where something of it does not enter the
            merge as it is.
        tokens: How rows of embeddings are brought to the output's; `None` where all models have the same ones.
        matching: How models are brought close to one of them before the merge; `None` where they stay as they are.
        matched: What was found of that, once it is.
    """

    candidates: tuple[Checkpoint, ...]
    base: Checkpoint | None
    reference: Checkpoint
    skeleton: Skeleton
    candidate_mappings: tuple[KeyMapping, ...]
    base_mapping: KeyMapping | None
    reference_mapping: KeyMapping
    notes: tuple[str, ...]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    heads: Heads | None = None
    stored: Mapping[str, Checkpoint] = field(default_factory=dict)
    tokens: Tokens | None = None
    matching: AlignPlan | None = None
    matched: Matched | None = None

    @property
    def aligned_to(self) -> dict[str, Checkpoint]:
        """The model that the others are brought close to, where it is not one of the merge."""
        return self.matching.read_besides(self.by_name) if self.matching is not None else {}

    def axes_of(self, name: str) -> Axes | None:
        """Returns what of a model is permuted; `None` for nothing."""
        return self.matched.axes.get(name) if self.matched is not None else None

    def permuted(self, name: str, reader: TensorReader) -> TensorReader:
        """Returns a reader of a model with its neurons and heads where they were found to belong."""
        axes = self.axes_of(name)
        return reader if axes is None else PermutedReader(reader, axes)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The candidates, and the base if there is one."""
        return (*self.candidates, *([self.base] if self.base is not None else []))

    @property
    def by_name(self) -> dict[str, Checkpoint]:
        """Checkpoints by name."""
        return {checkpoint.name: checkpoint for checkpoint in self.checkpoints}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(candidate.name for candidate in self.candidates)

    def keys_by_model(self, name: str) -> dict[str, dict[str, str]]:
        """Finds one tensor in the models that hold it as it lies in the output.

        Args:
            name: Name of a parameter, or name on disk of a tensor that the class does not know.

        Returns:
            Name on disk in the output → name on disk in every model that has it, by the model's name.
        """
        ours = self.reference_mapping
        keys = [name] if name in ours.unmapped else ours.keys_of(name)
        mappings = [*self.candidate_mappings, *([self.base_mapping] if self.base_mapping is not None else [])]
        found: dict[str, dict[str, str]] = {}
        for checkpoint, mapping in zip(self.checkpoints, mappings, strict=True):
            canonical = mapping.canonical(name)
            for key in keys:
                plain = len(keys) == 1 and canonical in mapping.renamed
                own = mapping.renamed[canonical] if plain else key
                if own in checkpoint.tensors:
                    found.setdefault(key, {})[checkpoint.name] = own
        return found

    @property
    def adapter_bytes(self) -> int:
        """Bytes that adapters keep in memory while the models are read."""
        return sum(adapter.kept_bytes for adapter in self.adapters.values())

    def stored_bytes(self, checkpoint: Checkpoint, keys: Sequence[str]) -> int:
        """Bytes on disk of some tensors of a checkpoint, given by their names there; adapters included."""
        adapter = self.adapters.get(checkpoint.name)
        added = adapter.bytes_of(keys) if adapter is not None else 0
        return sum(checkpoint.tensors[key].num_bytes for key in keys) + added

    def token_keys(self, name: str) -> dict[str, str]:
        """Model → name on disk of a parameter with a row for every token, for the models that have it."""
        mapped = list(zip(self.candidates, self.candidate_mappings, strict=True))
        if self.base is not None and self.base_mapping is not None:
            mapped.append((self.base, self.base_mapping))
        return {each.name: names.keys_of(name)[0] for each, names in mapped if names.has(name)}

    def on_disk(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint with all its tensors as they lie on disk, where its embeddings have been arranged anew."""
        return checkpoint if self.tokens is None else self.tokens.stored(checkpoint, self.stored[checkpoint.name])

    def quantized(self) -> dict[str, dict[str, int]]:
        """Name of a checkpoint → format → number of weights in it, for checkpoints with quantised weights."""
        return {checkpoint.name: checkpoint.quantized() for checkpoint in self.checkpoints if checkpoint.quantized()}


def open_inputs(config: MergeConfig, *, from_config: bool = False) -> Inputs:
    """Locates and opens all checkpoints and maps their names.

    Args:
        config: The configuration, from `load_config`.
        from_config: Look at each checkpoint's `config.json` alone, as if its weights were what the class would save.

    Raises:
        CheckpointError: If a checkpoint cannot be opened or does not fit, with the problems of all of them.
        ArchitectureError: If the model class is unknown or has no stacks.
    """
    candidates, base, adapters = _open_all(config, from_config)
    stored = {each.name: each for each in (*candidates, *([base] if base is not None else []))}
    if not from_config:
        check_own_configs(classify(stored, adapters, trust_remote_code=config.trust_remote_code), adapters)
    heads = _find_heads(config, candidates, base)
    if heads is not None:
        candidates = tuple(heads.view(candidate) for candidate in candidates)
        base = heads.view(base) if base is not None else None
    first = next((each for each in candidates if heads is not None and each.name == heads.choice), candidates[0])
    classes = {checkpoint.name: _class_name(checkpoint) for checkpoint in candidates}
    if len(set(classes.values())) > 1 and heads is None:
        raise CheckpointError(f"the candidates are of different model classes: {classes}; expected one")
    notes = module_notes(candidates)
    notes += [note for each in (*candidates, *([base] if base is not None else [])) for note in each.notes]
    notes += dict.fromkeys(note for adapter in adapters.values() for note in adapter.notes)
    if from_config:
        notes.append("planned from each config.json alone: weights and calibration data have not been looked at")
        references = [
            *(candidate.model for candidate in config.candidates),
            *([config.base_model] if config.base_model else []),
        ]
        if any(split_reference(reference)[1] is not None for reference in references):
            notes.append("adapters have not been looked at: their room in memory and the time to read them come on top")
    from_base = base is not None and _class_name(base) == _class_name(first)
    if heads is not None and heads.choice != NONE:
        from_base = heads.choice == BASE
    elif base is not None and not from_base:
        notes.append(
            f"the base is a {_class_name(stored[base.name])}, the candidates are {_class_name(stored[first.name])}: "
            f"config and names come from {first.name}"
        )
    chosen = base if base is not None and from_base else first
    notes += _compare_configs(config, [*candidates, *([base] if base is not None else [])], chosen, heads)
    chosen, tied, untied_notes = _untied(config, candidates, base, adapters, chosen)
    notes += untied_notes
    if chosen.name == first.name:
        first, candidates = chosen, tuple(chosen if each.name == chosen.name else each for each in candidates)
    else:
        base = chosen
    arguments: Any = {"first": first.name, "from_base": from_base, "tied": tied}
    made = _map_all(config, heads, adapters, candidates, base, **arguments)
    reference = "base" if from_base else first.name
    tokens, more = _open_tokens(config, made, adapters, reference, from_config=from_config)
    notes += more
    if tokens is not None:
        _check_heads(heads, tokens)
        candidates = tuple(map(tokens.arranged, candidates))
        base = tokens.arranged(base) if base is not None else None
        made = _map_all(config, heads, adapters, candidates, base, **arguments)
    skeleton, candidates, base, candidate_mappings, base_mapping = made
    first = next(each for each in candidates if each.name == first.name)
    reference_mapping, reference_checkpoint = candidate_mappings[candidates.index(first)], first
    if from_base and base is not None and base_mapping is not None:
        if set(base_mapping.missing) <= set(reference_mapping.missing) or (heads is not None and heads.choice == BASE):
            reference_mapping, reference_checkpoint = base_mapping, base
        else:
            notes.append(f"the base lacks {len(base_mapping.missing)} tensors: names come from {first.name}")
    lacking = {name for mapping in candidate_mappings for name in mapping.missing}
    computed = keep_computed(skeleton, sorted(lacking))
    if computed:
        notes.append(f"computed by the class, for files lack them: {', '.join(computed)}")
    reference_mapping = _with_untied(skeleton, reference_mapping, candidate_mappings)
    if heads is not None:
        reference_mapping = _with_missing(skeleton, reference_mapping)
    elif not from_config:
        labels = getattr(skeleton.model.config, "id2label", None) or {}
        note = default_labels_note(skeleton.model, list(labels.values()), config.names)
        notes += [note] if note is not None else []
    matching = _plan_matching(config, stored, adapters)
    notes += matching.notes if matching is not None else ()
    return Inputs(
        candidates=candidates,
        base=base,
        reference=reference_checkpoint,
        skeleton=skeleton,
        candidate_mappings=candidate_mappings,
        base_mapping=base_mapping,
        reference_mapping=reference_mapping,
        notes=tuple(notes),
        adapters=adapters,
        heads=heads,
        stored=stored,
        tokens=tokens,
        matching=matching,
    )


def _plan_matching(
    config: MergeConfig, stored: Mapping[str, Checkpoint], adapters: Mapping[str, Adapter]
) -> AlignPlan | None:
    """Plans how all models are brought close to one of them, or to another; `None` where they stay as they are."""
    if config.align is None or config.aligned_to is None:
        return None
    stage("finding neurons and heads that may change places")
    plan = plan_alignment(
        stored,
        adapters,
        config.aligned_to,
        residual_stream=config.align.residual_stream,
        variant=config.variant,
        trust_remote_code=config.trust_remote_code,
    )
    if plan.problems:
        raise CheckpointError(*plan.problems)
    return plan


_Mapped = tuple[Skeleton, tuple[Checkpoint, ...], Checkpoint | None, tuple[KeyMapping, ...], KeyMapping | None]
"""Skeleton, candidates and base as the modules hold their weights, and how they map to the skeleton."""


def _map_all(
    config: MergeConfig,
    heads: Heads | None,
    adapters: Mapping[str, Adapter],
    candidates: tuple[Checkpoint, ...],
    base: Checkpoint | None,
    *,
    first: str,
    from_base: bool,
    tied: Collection[str],
) -> _Mapped:
    """Builds the skeleton from the base or the candidate `first`, and maps all checkpoints to it.

    Models whose names are in `tied` have one tensor for both embeddings, whether the skeleton has or not.
    """
    named = next(each for each in candidates if each.name == first)
    skeleton = build_skeleton(
        base if base is not None and from_base else named,
        _stacks(config, heads),
        dtype=_compute_dtype(config, candidates[0]),
        trust_remote_code=config.trust_remote_code,
    )
    candidates = tuple(oriented(skeleton.model, each, adapters.get(each.name)) for each in candidates)
    base = oriented(skeleton.model, base, adapters.get(base.name)) if base is not None else None
    maps: dict[Layout, KeyMapping] = {}
    candidate_mappings = tuple(_mapping_of(skeleton, each, maps, each.name in tied) for each in candidates)
    base_mapping = _mapping_of(skeleton, base, maps, base.name in tied) if base is not None else None
    return skeleton, candidates, base, candidate_mappings, base_mapping


def _open_tokens(
    config: MergeConfig, made: _Mapped, adapters: Mapping[str, Adapter], reference: str, *, from_config: bool
) -> tuple[Tokens | None, list[str]]:
    """Finds out whether vocabularies differ; see `tokens.py`."""
    skeleton, candidates, base, candidate_mappings, base_mapping = made
    models = {each.name: (each, names) for each, names in zip(candidates, candidate_mappings, strict=True)}
    excluded: frozenset[str] = frozenset()
    if base is not None and base_mapping is not None:
        models["base"] = base, base_mapping
        excluded = frozenset(
            name
            for name in skeleton.model.state_dict()
            if base_mapping.has(name) and _is_excluded(config, name, *base_mapping.keys_of(name))
        )
    folders = {name: tokenizer_folder(each, adapters.get(name)) for name, (each, _) in models.items()}
    return open_tokens(
        config.vocabulary, skeleton, models, folders, reference, excluded=excluded, from_config=from_config
    )


def _check_heads(heads: Heads | None, tokens: Tokens) -> None:
    """Refuses heads that have a row for every token, where rows are arranged anew."""
    for name, kept in heads.kept.items() if heads is not None else ():
        lost = [key for key in kept.values() if key in tokens.on_disk.get(name, {})]
        if lost:
            raise CheckpointError(
                f"{name}: its head {lost[0]} has a row for every token, and vocabularies differ; "
                "merge models of one class, or give all the same tokenizer and number of rows"
            )


def _compare_configs(
    config: MergeConfig, checkpoints: Sequence[Checkpoint], chosen: Checkpoint, heads: Heads | None
) -> list[str]:
    """Returns notes on how configs differ; labels are no matter where heads are kept apart.

    Raises:
        CheckpointError: If two models compute otherwise, and the user has not allowed that.
    """
    labels = ("id2label", "label2id") if heads is not None else ()
    configs = {
        each.name: {
            key: value
            for key, value in load_config(each, trust_remote_code=config.trust_remote_code).to_dict().items()
            if key not in labels
        }
        for each in checkpoints
    }
    problems, notes = check_configs(configs, chosen.name, allow_crimes=config.allow_crimes)
    if problems:
        raise CheckpointError(*problems)
    return notes


def _find_heads(config: MergeConfig, candidates: Sequence[Checkpoint], base: Checkpoint | None) -> Heads | None:
    """Finds heads that cannot be merged; see `largemerge.heads`."""
    heads = find_heads(
        candidates,
        base,
        config.head,
        excluded=partial(_is_excluded, config),
        trust_remote_code=config.trust_remote_code,
    )
    if heads is not None:
        check_files(heads)
    return heads


def _is_excluded(config: MergeConfig, *labels: str) -> bool:
    """Whether the user wants the base's tensor, by any of its names."""
    patterns = config.parameters.exclude
    return any(matches(pattern, label, "parameters.exclude") for pattern in patterns for label in labels)


def _stacks(config: MergeConfig, heads: Heads | None) -> tuple[str, ...]:
    """The user's stacks, in the bare body where the output is one."""
    if heads is None or heads.choice != NONE:
        return config.stacks
    paths = {head.body_path for head in heads.models.values()}
    return tuple(
        next((stack.removeprefix(f"{path}.") for path in paths if stack.startswith(f"{path}.")), stack)
        for stack in config.stacks
    )


def _with_missing(skeleton: Skeleton, names: KeyMapping) -> KeyMapping:
    """Gives names on disk to the parameters outside the blocks that the reference lacks, in the manner of its own."""
    outside = skeleton.non_block_tensors()
    prefix = prefix_on_disk((name, names.renamed[name]) for name in outside if name in names.renamed)
    new = {name: prefix + name for name in outside if names.canonical(name) in names.missing}
    missing = tuple(name for name in names.missing if name not in new)
    return dataclasses.replace(names, renamed={**names.renamed, **new}, missing=missing)


def _open_all(
    config: MergeConfig, from_config: bool
) -> tuple[tuple[Checkpoint, ...], Checkpoint | None, dict[str, Adapter]]:
    """Opens candidates, base and adapters; raises with the problems of all of them."""
    problems: list[str] = []
    adapters: dict[str, Adapter] = {}
    find_places = AdapterNames(trust_remote_code=config.trust_remote_code)

    def attempt(reference: str, name: str) -> Checkpoint | None:
        try:
            if from_config:
                folder = locate_checkpoint(split_reference(reference)[0], name, weights=False)
                return checkpoint_from_config(folder, name, trust_remote_code=config.trust_remote_code)
            checkpoint, adapter = open_model(reference, name=name, variant=config.variant, find_places=find_places)
            if adapter is not None:
                adapters[name] = adapter
            return checkpoint
        except LargemergeError as error:
            problems.extend(error.problems)
            return None

    opened = [attempt(candidate.model, candidate.label) for candidate in config.candidates]
    base = attempt(config.base_model, "base") if config.base_model is not None else None
    if problems:
        raise CheckpointError(*problems)
    return tuple(checkpoint for checkpoint in opened if checkpoint is not None), base, adapters


def _compute_dtype(config: MergeConfig, candidate: Checkpoint) -> torch.dtype:
    """The user's compute dtype, else the candidate's own."""
    if config.compute_dtype is not None:
        return torch_dtype(config.compute_dtype)
    return candidate.main_dtype()


def _mapping_of(skeleton: Skeleton, checkpoint: Checkpoint, known: dict[Layout, KeyMapping], tied: bool) -> KeyMapping:
    """The checkpoint's key mapping: the same object for all that are laid out alike.

    Of a model that is tied, though the output is not, both parameters are the one that lies on disk.
    """
    layout = (tied, *((name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()))
    if layout not in known:
        mapping = map_keys(skeleton.model, checkpoint)
        pairs = declared_ties(skeleton.model) if tied else {}
        aliases = {name: to for name, to in pairs.items() if name in mapping.missing and to not in mapping.missing}
        missing = tuple(name for name in mapping.missing if name not in aliases)
        known[layout] = dataclasses.replace(mapping, aliases={**mapping.aliases, **aliases}, missing=missing)
    return known[layout]


def _untied(
    config: MergeConfig,
    candidates: Sequence[Checkpoint],
    base: Checkpoint | None,
    adapters: Mapping[str, Adapter],
    chosen: Checkpoint,
) -> tuple[Checkpoint, frozenset[str], list[str]]:
    """Unties the output's embeddings where a model has trained both, and the class would tie them.

    Returns:
        The model whose config the output takes, with that config; the names of models that are tied; and notes.
    """
    checkpoints = {each.name: each for each in (*candidates, *([base] if base is not None else []))}
    if all(each.offset is None and each.file.name == "config.json" for each in chosen.tensors.values()):
        return chosen, frozenset(), []  # planned from configs alone
    models = classify(checkpoints, trust_remote_code=config.trust_remote_code)
    tied = frozenset(name for name, model in models.items() if is_tied(model.model))
    separate = untied_heads(models, adapters)
    if not separate or chosen.name not in tied:
        return chosen, tied, []
    note = f"{', '.join(separate)}: has output embeddings of its own, so the output's are untied from the input's"
    return dataclasses.replace(chosen, config=untie_config(chosen.config)), tied, [note]


def _with_untied(skeleton: Skeleton, names: KeyMapping, others: Sequence[KeyMapping]) -> KeyMapping:
    """Gives a name on disk to what the reference ties and the output does not: the name that another model has."""
    ours = set(names.aliases) - set(_aliases_of(skeleton))
    new = {
        name: next(other.renamed[name] for other in others if name in other.renamed)
        for name in ours
        if any(name in other.renamed for other in others)
    }
    aliases = {name: to for name, to in names.aliases.items() if name not in new}
    return dataclasses.replace(names, renamed={**names.renamed, **new}, aliases=aliases) if new else names


def _aliases_of(skeleton: Skeleton) -> list[str]:
    return [name for group in skeleton.aliases.values() for name in group]


def _class_name(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type", "unknown")]
    return str(names[0])
