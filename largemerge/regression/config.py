"""The configuration of a regression merge: the YAML as strict, typed models.

Keys that mergekit has too (`merge_method`, `base_model`, `models`, `parameters.weight`, `dtype`,
`tokenizer_source`) mean the same here. Every mistake in a file is reported at once, an unknown key
with the nearest right one. `load_config` is the way in; paths come out absolute.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from largemerge.calibration.config import CalibrationConfig, CalibrationDefaults
from largemerge.checkpoint.locate import Reference, absolute_reference
from largemerge.config_file import (
    LARGEST_COUNT,
    DtypeName,
    Regex,
    Size,
    Strict,
    Truth,
    check_source,
    grouped,
    nearest,
    read_known,
    read_yaml,
    shown,
    without_helpers,
)
from largemerge.errors import ConfigError
from largemerge.regression.gram_record import GramRecord
from largemerge.regression.gram_record import read_record as read_gram_record
from largemerge.regression.methods import METHODS, Anchor, Granularity, Normalization, Part, RegressionMethod, Stream
from largemerge.regression.sequence import SAMPLES_FILE, SequenceRecord, read_record
from largemerge.tokenizer.config import BASE, UNION, TokenizerSettings, TokenSource
from largemerge.weight_matching.config import Align


class CandidateParameters(Strict):
    """Settings that may differ from candidate to candidate."""

    weight: float = Field(1.0, ge=1e-30, le=1e30, allow_inf_nan=False)
    """Relative weight `c_i` of the candidate, in Gram matrices and in averages."""


class CandidateConfig(Strict):
    """One of the K models to merge."""

    model: Reference
    """A folder, or a Hub id (`owner/name` or `owner/name@revision`), followed by `+adapter` if it has one."""
    name: str | None = Field(None, min_length=1)
    """Unique name of the candidate; default: the last part of `model`."""
    calibration: CalibrationConfig | None = None
    parameters: CandidateParameters = CandidateParameters()

    @property
    def label(self) -> str:
        """`name`, or the last part of `model`."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def grams(self) -> str | None:
        """Folder of Gram matrices that stand for the candidate's data; `None` where there is data."""
        return self.calibration.grams if self.calibration is not None else None

    @property
    def has_samples(self) -> bool:
        """Whether there are samples of its own: neither an earlier merge's sums, nor Gram matrices, stand for them."""
        return self.calibration is not None and self.grams is None


class MethodParameters(Strict):
    """Settings of the regression methods; what is not set is as the method's row in the table says."""

    inputs: Stream | None = None
    """Whose hidden states enter a block: `candidate` or `merged`."""
    granularity: Granularity | None = None
    """Inside a block a linear's inputs come from the candidate's weights (`block`), from their average (`average`), or
    from what is merged so far (`linear`)."""
    target: float | None = Field(None, ge=0, le=1)
    """β: from the candidate's weight on the merged inputs (0) to the candidate's own features (1)."""
    drift: float | None = Field(None, ge=0, le=1)
    """γ: the share of the drift that is paid back where a linear's output is added to the hidden states."""
    shrinkage: Truth | None = None
    """Whether what `target` and `drift` add is scaled down as far as folds of the data disagree about it."""
    anchor: Anchor | None = None
    """What is kept where the data says nothing: `average`, `base` or `task_arithmetic`."""
    anchor_scale: float | None = Field(None, ge=-10, le=10)
    """The scale of the sum of task vectors, for `anchor: task_arithmetic`."""
    normalization: Normalization | None = None
    """What a candidate's sums are divided by: `tokens`, or `frobenius`, the norm of its Gram."""
    off_diagonal_scale: float | None = Field(None, ge=0, le=1)
    """The factor s on a Gram's off-diagonal (FusionBench: `reduce_non_diagonal_ratio`; MergeBench: `reduction`)."""
    ridge: float | None = Field(None, ge=0, le=1)
    """Pull towards the anchor, as a fraction of the mean diagonal of the summed Gram (see `solve.py`); with Frobenius
    norms, of the mean norm."""
    solve: tuple[Part, ...] | None = Field(None, min_length=1)
    """What is solved: `blocks`, the scales of their `norms`, `head`, and rows of the input `embeddings` by how often
    their tokens occur; everything else is averaged."""
    embedding_prior: float | None = Field(None, gt=0, allow_inf_nan=False)
    """κ: the number of tokens that the average of the embeddings counts for, beside those of the data."""
    scale: float | None = Field(None, ge=-10, le=10)
    """The factor of merged task vectors; published: 2."""
    power: float | None = Field(None, ge=0, le=10)
    """The exponent of the eigenvalues by which directions of a task vector are weighted."""
    scale_layers: Truth | None = None
    """Whether a merged task vector is multiplied by the square of its norm, relative to its kind of layer's mean."""
    include: tuple[Regex, ...] = ()
    """Regexes on names of parameters that are solved; all linears of the blocks if empty."""
    excluded: Literal["average", "base"] = "average"
    """What linears of the blocks become that `include` leaves out: their average, or, with their biases, the base's."""
    exclude: tuple[Regex, ...] = ()
    """Regexes on names of parameters that are taken from the base, or averaged where there is none."""


class MemoryConfig(Strict):
    """How much a merge may hold. The plan finds the fastest placement that fits."""

    device: Size | None = None
    """Maximum memory on the accelerator; default: what is free."""
    host: Size | None = None
    """Maximum anonymous memory of the process, libraries included; default: what is free."""
    disk: str | None = Field(None, min_length=1)
    """Folder for hidden states that do not fit into memory; default: the output's."""
    hidden_states_8bit: bool = False
    """Keep hidden states in 8 bits between blocks (bitsandbytes): half of bfloat16's room, a small error.

    Measured on four SmolLM2-135M experts: the mean held-out loss rises from 2.336 to 2.337, and no merged tensor
    changes by more than 3.5 %.
    """

    @property
    def maps_inputs(self) -> bool:
        """Whether calibration inputs in floating point (pixels) are offloaded to a mapped file."""
        return self.host is not None or self.disk is not None


class OutputConfig(Strict):
    """How the weights of the output are stored."""

    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """bitsandbytes format of every linear that Transformers would quantise; default: not quantised."""
    double_quant: bool | None = None
    """Whether 4-bit formats quantise the scales of the blocks, too; default: yes."""


class SequenceConfig(Strict):
    """A merge that goes on from an earlier one, or that later ones can go on from."""

    previous: str | None = Field(None, min_length=1)
    """Folder of the merge so far, with its sums; it is a candidate that needs no data."""
    name: str | None = Field(None, min_length=1)
    """Unique name of the merge so far, as a candidate; default: the last part of `previous`."""
    keep_sums: Truth | None = None
    """Whether the sums are kept beside the output, so that models can be added later; default: as the merge before,
    else yes, unless samples are."""
    keep_samples: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    """Number of calibration samples of all models so far together that are kept in place of the sums; default: as many
    as the merge before has kept."""


_METHOD_SETTINGS = frozenset(MethodParameters.model_fields) - {"include", "excluded", "exclude"}


def _check_method(value: object) -> object:
    """Returns the name of a regression method; raises where it is none."""
    if isinstance(value, str) and value in METHODS:
        return value
    raise ValueError(f"expected a regression method, one of {sorted(METHODS)}")


class MergeConfig(Strict):
    """A whole merge: K candidates, one method, one output."""

    merge_method: Annotated[str, pydantic.BeforeValidator(_check_method)]
    models: tuple[CandidateConfig, ...] = Field(min_length=1)
    sequence: SequenceConfig | None = None
    """What this merge goes on from, and whether others may go on from it; default: neither."""
    base_model: Reference | None = None
    calibration: CalibrationDefaults = CalibrationDefaults()
    parameters: MethodParameters = MethodParameters()
    output: OutputConfig = OutputConfig()
    dtype: DtypeName | None = None
    """Dtype of the output; default: the candidates' for each tensor, for quantised ones that of their plain values."""
    compute_dtype: DtypeName | None = None
    """Dtype of the forward passes; default: the checkpoints'. Sums and solves are float32 or better always."""
    tokenizer_source: str | None = None
    """`union`, `base`, or the name of a candidate; default: the base's tokenizer where there is a base, else the first
    candidate's, and rows of embeddings are averaged by their numbers."""
    tokenizer: TokenizerSettings | None = None
    """The same as `tokenizer_source`, with more settings."""
    head: str | None = Field(None, min_length=1)
    """`none`, `base`, or the name of a candidate: the head that goes into the output. All heads that are not merged lie
    beside it; default: none, unless the base's fits all candidates."""
    align: Align | None = None
    """`weights`: before the merge, neurons and heads of all models are put into the order of one of them, the base or
    the first; or a mapping with another `reference`."""
    memory: MemoryConfig = MemoryConfig()
    stacks: tuple[str, ...] = ()
    """Module paths of the block stacks (`model.layers`), when those found are wrong."""
    variant: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")
    """Variant of the models' weights, such as `fp16` for `model.fp16.safetensors`."""
    allow_crimes: Truth = False
    """Merge models of different classes or configurations all the same; mergekit's word."""
    trust_remote_code: Truth = False
    """Allow a checkpoint to run Python code that it ships."""
    _strict: bool = pydantic.PrivateAttr(False)
    _merged_before: SequenceRecord | None = pydantic.PrivateAttr(None)
    _grams: dict[str, GramRecord] = pydantic.PrivateAttr(default_factory=dict)

    @property
    def strict(self) -> bool:
        """Whether warnings make the merge impossible; no key of the file, but an option of who runs it."""
        return self._strict

    def as_strict(self, strict: bool) -> MergeConfig:
        """Returns the configuration, its warnings made errors if `strict`."""
        copy = self.model_copy()
        copy._strict = self._strict or strict
        return copy

    @property
    def method(self) -> RegressionMethod:
        """The method's row in the table, with what the user has set instead."""
        row = METHODS[self.merge_method]
        settings = {name: getattr(self.parameters, name) for name in _METHOD_SETTINGS}
        return replace(row, **{name: value for name, value in settings.items() if value is not None})

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """Settings of the output's vocabulary; `None` where the user has made none."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def merged_before(self) -> SequenceRecord | None:
        """What the merge that this one goes on from has noted; `None` if there is none."""
        return self._merged_before

    @property
    def grams(self) -> Mapping[str, GramRecord]:
        """Name of a candidate → what its Gram matrices are of, for those that have them in place of data."""
        return self._grams

    @property
    def keeps_sums(self) -> bool:
        """Whether the sums are kept beside the output."""
        if self.sequence is None:
            return False
        return not self.keeps_samples if self.sequence.keep_sums is None else self.sequence.keep_sums

    @property
    def keeps_samples(self) -> int:
        """Number of calibration samples that are kept beside the output, in place of the sums; as many as before."""
        sequence, before = self.sequence, self._merged_before
        if sequence is None:
            return 0
        if sequence.keep_samples is None and sequence.keep_sums is None and before is not None:
            return before.samples
        return sequence.keep_samples or 0

    @property
    def sums_before(self) -> SequenceRecord | None:
        """What the merge that this one goes on from has noted, where it has kept its sums."""
        return self._merged_before if self._merged_before is not None and not self._merged_before.samples else None

    @property
    def candidates(self) -> tuple[CandidateConfig, ...]:
        """The models, and before them the merge that this one goes on from, weighing as much as all that is in it."""
        if self.sequence is None or self.sequence.previous is None:
            return self.models
        weight = self._merged_before.weight if self._merged_before is not None else 1.0
        parameters = CandidateParameters.model_construct(weight=weight)  # which many models may bring out of range
        calibration = None
        if self._merged_before is not None and self._merged_before.samples:
            file = str(Path(self.sequence.previous) / SAMPLES_FILE)
            kept = CalibrationConfig(data=file, num_samples=self._merged_before.samples)
            calibration = kept.with_defaults(self.calibration)
        before = CandidateConfig.model_construct(
            model=self.sequence.previous, name=self.sequence.name, calibration=calibration, parameters=parameters
        )
        return before, *self.models

    @property
    def num_merged(self) -> int:
        """Number of models in the output, those that were merged before included."""
        return len(self.models) + (len(self._merged_before.models) if self._merged_before is not None else 0)

    @property
    def aligned_to(self) -> str | None:
        """The name of the model that the others are brought close to before the merge, or the reference of another.

        `None` where they stay as they are.
        """
        if self.align is None:
            return None
        named = {candidate.model: candidate.label for candidate in reversed(self.candidates)}
        named |= {self.base_model: BASE} if self.base_model is not None else {}
        default = BASE if self.base_model is not None else self.candidates[0].label
        return default if self.align.reference is None else named.get(self.align.reference, self.align.reference)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidates, in order."""
        return tuple(candidate.label for candidate in self.candidates)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights `c_i` of the candidates, in order."""
        return tuple(candidate.parameters.weight for candidate in self.candidates)

    @property
    def shares(self) -> tuple[float, ...]:
        """`c_i / Σ c` of the candidates, in order."""
        return tuple(weight / sum(self.weights) for weight in self.weights)


def load_config(
    source: str | Path | Mapping[str, Any] | MergeConfig, folder: Path | None = None, *, to_gram: bool = False
) -> MergeConfig:
    """Reads and checks a configuration.

    Args:
        source: Path of a YAML file, a mapping of the same shape, or a `MergeConfig`. Relative paths
            inside a file are looked up beside that file first, then in the working directory.
        folder: Folder in which the relative paths of a mapping are looked up first.
        to_gram: Whether nothing is to be merged, but Gram matrices of each model are to be written: one is enough.

    Returns:
        The configuration, every local path absolute.

    Raises:
        ConfigError: If the configuration has mistakes, with all of them.
    """
    if isinstance(source, MergeConfig):
        raw: Any = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        raw = without_helpers(source, MergeConfig.model_fields)
    else:
        check_source(source)
        path = Path(source)
        raw, folder = without_helpers(read_yaml(path), MergeConfig.model_fields), path.resolve().parent
    folders = [*([folder] if folder is not None else []), Path.cwd()]
    raw, steps = _without_steps(raw)
    read, unread = read_known(MergeConfig, raw)
    missing = {"merge_method: missing": f"merge_method: missing; expected one of {sorted(METHODS)}"}
    steps += [missing.get(text, text) for text in unread]
    if read is None:
        raise ConfigError(*steps)
    config, problems = _with_previous(read, folders)
    config, unreadable = _with_grams(config, folders)
    config = _with_names(config)
    problems = [*steps, *problems, *unreadable, *_cross_checks(config, to_gram=to_gram)]
    if problems:
        raise ConfigError(*grouped(problems))
    return _with_settings(_with_absolute_paths(config, folders))


def _without_steps(raw: Any) -> tuple[Any, list[str]]:
    """Leaves steps after a merge out of a configuration's values, and says how a regression merge gets them."""
    if not isinstance(raw, Mapping) or raw.get("post") is None:
        return raw, []
    advice = (
        "post: its steps follow data-free merges only; merge without them, then give the output to a file with "
        "merge_method: passthrough, base_model, post, and these models as 'candidates'"
    )
    return {key: value for key, value in raw.items() if key not in ("post", "candidates")}, [advice]


def _cross_checks(config: MergeConfig, *, to_gram: bool) -> Iterator[str]:
    """Mistakes that show only when several keys are seen together."""
    taken = METHODS[config.merge_method].parameters
    foreign = {name for name in _METHOD_SETTINGS - taken if getattr(config.parameters, name) is not None}
    for name in sorted(foreign):
        others = ", ".join(method for method, row in METHODS.items() if name in row.parameters)
        takes = ", ".join(sorted(taken | {"include", "excluded", "exclude"}))
        yield f"parameters.{name}: {config.merge_method} has no such parameter, as {others} have; it takes {takes}"
    if not foreign:
        yield from (f"parameters.{mistake}" for mistake in config.method.mistakes())
    if to_gram:
        yield from _gram_mistakes(config)
    elif len(config.candidates) < 2 and config.sequence is None:
        yield "models: found 1; expected 2 or more, or 'sequence' with the 'previous' merge that this one is added to"
    elif len(config.candidates) < 2:
        yield "models: found 1; expected 2 or more where 'sequence' has no 'previous' merge that this one is added to"
    if config.sequence is not None and config.sequence.previous is None:
        if not config.keeps_sums and not config.keeps_samples:
            yield "sequence: neither goes on from a 'previous' merge nor keeps anything for a later one; leave it out"
        if config.sequence.name is not None:
            yield "sequence.name: is the name of the 'previous' merge, and there is none"
    if config.sequence is not None and config.sequence.keep_sums and config.keeps_samples:
        yield "sequence.keep_samples: stands in place of the sums; expected it, or 'keep_sums'"
    unseen = [each.label for each in config.candidates if not each.has_samples]
    if config.keeps_samples and unseen and all(each.calibration is not None for each in config.models):
        yield (
            f"sequence.keep_samples: there are no samples of {', '.join(unseen)} here, but sums; expected 'keep_sums', "
            "or samples of all models"
        )
    if 0 < config.keeps_samples < len(config.candidates):
        yield (
            f"sequence.keep_samples: {config.keeps_samples} of {len(config.candidates)} models together; expected one "
            "of each, or more"
        )
    if config.method.solves_norms and (config.keeps_sums or config.sums_before is not None):
        yield (
            "sequence: sums of an earlier merge say nothing of what 'norms' multiply; expected 'keep_samples' in their "
            "place, or 'solve: [blocks]'"
        )
    if config.method.merges_subspaces:
        yield from _mistakes_of_subspaces(config) if not to_gram else ()
    elif config.method.anchor != "average" and config.base_model is None:
        own = "" if config.parameters.anchor is not None else f", which is {config.merge_method}'s own choice,"
        found = f"parameters.anchor: {config.method.anchor!r}{own}"
        yield f"{found} needs a 'base_model'; expected one, or 'anchor: average'"
    if config.parameters.shrinkage and not config.method.compares:
        yield "parameters.shrinkage: scales what 'target' and 'drift' add; set one of them above 0, or exclude it"
    if config.parameters.embedding_prior is not None and not config.method.counts_tokens:
        yield "parameters.embedding_prior: is for 'solve: [blocks, embeddings]'; expected both, or neither"
    if config.parameters.anchor_scale is not None and config.method.anchor != "task_arithmetic":
        yield "parameters.anchor_scale: is for 'anchor: task_arithmetic'"
    if config.parameters.excluded == "base" and not config.parameters.include:
        yield "parameters.excluded: is for what 'include' leaves out, and there is none; expected both, or neither"
    elif config.parameters.excluded == "base" and config.base_model is None:
        yield "parameters.excluded: 'base' needs a 'base_model'; expected one, or 'excluded: average'"
    for name, count in sorted(Counter(config.names).items()):
        if count > 1:
            yield f"models: {count} candidates are called {shown(name)}; give each a 'name' of its own"
    if "base" in config.names:
        yield "models: 'base' stands for base_model; give that candidate another 'name'"
    if config.output.double_quant is not None and config.output.quantization not in ("nf4", "fp4"):
        yield f"output.double_quant: is for nf4 and fp4, found quantization {config.output.quantization!r}"
    if config.align is not None:
        yield from _align_mistakes(config, to_gram=to_gram)
    if config.tokenizer_source is not None and config.tokenizer is not None:
        yield "tokenizer_source: exclude it or 'tokenizer', whose 'source' means the same"
    for place, source in _tokenizer_sources(config):
        if source == BASE and config.base_model is None:
            yield f"{place}: 'base' needs a 'base_model'"
        elif source not in (BASE, *config.names) and not (source == UNION and place in _SOURCES):
            known = [*([UNION] if place in _SOURCES else []), BASE, *config.names]
            yield f"{place}: {shown(source)} is no candidate's name; expected one of {known}{nearest(source, known)}"
    if config.head == "base" and config.base_model is None:
        yield "head: 'base' needs a 'base_model'"
    elif config.head is not None and config.head not in ("none", "base", *config.names):
        known = ["none", "base", *config.names]
        yield f"head: {shown(config.head)} is no candidate's name; expected one of {known}{nearest(config.head, known)}"
    if config.head is not None and "none" in config.names:
        yield "models: 'none' stands for no head; give that candidate another 'name'"
    for index, candidate in enumerate(config.models):
        where = f"models[{index}] ({candidate.label})"
        calibration = candidate.calibration
        if calibration is None:
            yield f"{where}: {config.merge_method} needs calibration data; add calibration: {{data: FILE}}"
            continue
        if calibration.grams is not None:
            yield from _mistakes_with_grams(config, calibration, f"{where}.calibration")
        elif calibration.data is None:
            yield f"{where}.calibration.data: missing; expected a file or dataset, or 'grams' in its place"
        if calibration.assistant_only and calibration.messages_field is None:
            yield f"{where}.calibration.assistant_only: needs 'messages_field'"
        texts = [
            key for key in ("text_field", "text_template", "messages_field") if getattr(calibration, key) is not None
        ]
        if len(texts) > 1:
            yield f"{where}.calibration: {' and '.join(map(repr, texts))} exclude each other"
        if calibration.pack and calibration.loss_mask_field is not None:
            yield f"{where}.calibration: 'pack' and 'loss_mask_field' exclude each other"


def _mistakes_of_subspaces(config: MergeConfig) -> Iterator[str]:
    """Mistakes where task vectors are merged in their subspaces, and nothing is regressed."""
    method = config.merge_method
    if config.base_model is None:
        yield f"base_model: missing; {method} merges what each model has learned beyond it: expected the models' base"
    if config.sequence is not None:
        yield (
            f"sequence: {method} merges the subspaces of all models at once, and has no sums that a later merge could "
            "go on from; leave it out, and merge all models again"
        )
    given = [each.parameters.weight for each in config.models]
    if len(set(given)) > 1:
        yield (
            f"models: have weights {', '.join(f'{weight:g}' for weight in given)}; {method} weighs each model by the "
            "norm of its task vector: expected no parameters.weight, or the same for all"
        )


def _align_mistakes(config: MergeConfig, *, to_gram: bool) -> Iterator[str]:
    """Says why the models cannot be aligned before the merge."""
    first = "align the models first (largemerge align), and use their outputs as models here"
    if to_gram:
        yield f"align: is for merges, and nothing is merged here; {first}"
    if config.sequence is not None:
        yield f"align: not with 'sequence', whose sums and samples are of models in one order; {first}"
    if any(candidate.grams is not None for candidate in config.candidates):
        yield f"align: not with 'grams', which are of models as they lie on disk; {first}"


def _gram_mistakes(config: MergeConfig) -> Iterator[str]:
    """Mistakes in a configuration whose models' Gram matrices are to be written."""
    if config.method.solves_norms:
        yield f"parameters.solve: {_WHY_NO_NORMS}, so there are none to be written; expected 'solve: [blocks]'"
    elif not config.method.sums_stand_alone:
        yield (
            f"merge_method: {config.merge_method} {_WHY_NO_GRAMS}, so there are none to be written for later; expected "
            "'merge_method: regmean'"
        )
    if config.sequence is not None:
        yield "sequence: is for merges, and nothing is merged here; leave it out"
    for index, candidate in enumerate(config.models):
        if candidate.grams is not None:
            yield f"models[{index}] ({candidate.label}).calibration.grams: are there already; expected 'data'"


_WHY_NO_GRAMS = "runs merged blocks on each model's data, so that its Gram matrices depend on all models"


_WHY_NO_NORMS = "Gram matrices of linears say nothing of what 'norms' multiply"


def _mistakes_with_grams(config: MergeConfig, calibration: CalibrationConfig, where: str) -> Iterator[str]:
    """Mistakes where Gram matrices stand in place of data."""
    if config.method.solves_norms:
        yield f"{where}.grams: {_WHY_NO_NORMS}; expected 'data' in their place, or 'solve: [blocks]'"
    elif not config.method.sums_stand_alone:
        yield (
            f"{where}.grams: {config.merge_method} {_WHY_NO_GRAMS}; expected 'data' in its place, or 'merge_method: "
            "regmean'"
        )
    if calibration.others_set:
        keys = ", ".join(map(repr, calibration.others_set))
        yield f"{where}.grams: stands in place of data, whose samples have been drawn already; leave out {keys}"


def _with_grams(config: MergeConfig, folders: Sequence[Path]) -> tuple[MergeConfig, list[str]]:
    """A copy that knows what the Gram matrices are of that it names; and what is wrong with their folders."""
    copy, problems = config.model_copy(), list[str]()
    records: dict[str, GramRecord] = {}
    for index, candidate in enumerate(config.models):
        if candidate.grams is None:
            continue
        key = f"models[{index}] ({candidate.label}).calibration.grams"
        try:
            records[candidate.label] = read_gram_record(Path(_absolute(candidate.grams, folders)), key)
        except ConfigError as error:
            problems += error.problems
    copy._grams = records
    return copy, problems


def _with_previous(config: MergeConfig, folders: Sequence[Path]) -> tuple[MergeConfig, list[str]]:
    """A copy that knows the merge that it goes on from, by its absolute path; and what is wrong with that merge."""
    sequence = config.sequence
    if sequence is None or sequence.previous is None:
        return config, []
    folder = _absolute(sequence.previous, folders)
    name = sequence.name or sequence.previous.rstrip("/").rsplit("/", 1)[-1]
    copy = config.model_copy(update={"sequence": sequence.model_copy(update={"previous": folder, "name": name})})
    problems = [
        f"models[{number}] ({candidate.label}): is the merge that sequence.previous names, which is a candidate already"
        for number, candidate in enumerate(config.models)
        if _absolute(candidate.model, folders) == folder
    ]
    try:
        copy._merged_before = read_record(Path(folder))
    except ConfigError as error:
        return copy, [*problems, *error.problems]
    return copy, [*problems, *copy._merged_before.mistakes(config.merge_method, config.method, Path(folder))]


def _with_settings(config: MergeConfig) -> MergeConfig:
    """A copy in which every setting that the method takes is set, so that reports and resumed runs know it."""
    without = set() if config.method.anchor == "task_arithmetic" else {"anchor_scale"}
    without |= set() if config.method.counts_tokens else {"embedding_prior"}
    taken = METHODS[config.merge_method].parameters - without
    settings = {name: getattr(config.method, name) for name in sorted(taken)}
    return config.model_copy(update={"parameters": config.parameters.model_copy(update=settings)})


_SOURCES = ("tokenizer_source", "tokenizer.source")


def _tokenizer_sources(config: MergeConfig) -> Iterator[tuple[str, str]]:
    """Yields the models that settings of the tokenizer name, after their places in the file."""
    if config.tokenizer_source is not None:
        yield "tokenizer_source", config.tokenizer_source
    if config.tokenizer is not None:
        yield "tokenizer.source", config.tokenizer.source
        yield from config.tokenizer.models()


def _with_names(config: MergeConfig) -> MergeConfig:
    """A copy in which settings of the tokenizer name models by their names where they were given as in `model`."""
    names = {candidate.model: candidate.label for candidate in reversed(config.candidates)}
    if config.base_model is not None:
        names = {config.base_model: BASE, **names}

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return names.get(value, value)
        if isinstance(value, TokenSource):
            return value.model_copy(update={"model": names.get(value.model, value.model)})
        return value

    update: dict[str, Any] = {}
    if config.tokenizer_source is not None:
        update["tokenizer_source"] = named(config.tokenizer_source)
    if config.tokenizer is not None:
        tokens = {
            token: settings.model_copy(update={"source": named(settings.source)})
            for token, settings in config.tokenizer.tokens.items()
        }
        update["tokenizer"] = config.tokenizer.model_copy(
            update={"source": named(config.tokenizer.source), "tokens": tokens}
        )
    return config.model_copy(update=update) if update else config


def _with_absolute_paths(config: MergeConfig, folders: list[Path]) -> MergeConfig:
    """A copy with every local path absolute, each found in the first folder that has it, and calibration defaults."""
    models = []
    for candidate in config.models:
        calibration = candidate.calibration
        if calibration is not None and calibration.grams is not None:
            calibration = calibration.model_copy(update={"grams": _absolute(calibration.grams, folders)})
        elif calibration is not None and calibration.data is not None:
            found = {"data": _absolute(calibration.data, folders)}
            calibration = calibration.with_defaults(config.calibration).model_copy(update=found)
        update = {
            "model": absolute_reference(_absolute(candidate.model, folders), folders),
            "name": candidate.label,
            "calibration": calibration,
        }
        models.append(candidate.model_copy(update=update))
    base = None if config.base_model is None else absolute_reference(_absolute(config.base_model, folders), folders)
    align = config.align
    if align is not None and align.reference is not None:
        align = align.model_copy(update={"reference": absolute_reference(_absolute(align.reference, folders), folders)})
    memory = config.memory
    if memory.disk is not None:
        memory = memory.model_copy(update={"disk": str(folders[0] / os.path.expanduser(memory.disk))})
    return config.model_copy(update={"models": tuple(models), "base_model": base, "memory": memory, "align": align})


def _absolute(text: str, folders: Sequence[Path]) -> str:
    """The absolute path of what lies in the first folder that has it; the text as it is where none has."""
    for folder in folders:
        candidate = folder / os.path.expanduser(text)
        if os.path.exists(candidate):
            return str(candidate.resolve())
    return text
