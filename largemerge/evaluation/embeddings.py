"""Tasks of sentence embeddings: passages found for queries, and cosines held against people's scores.

A text's vector is made of its tokens' last hidden states, by the mean, the first (`cls`) or the last token, as the
folder's `modules.json` says, and normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch

from largemerge.calibration.batches import Batch, ForwardSignature, Sample
from largemerge.calibration.tokenizer import TextReader
from largemerge.checkpoint.index import read_json
from largemerge.checkpoint.sentence_modules import read_modules
from largemerge.errors import CalibrationError, ConfigError
from largemerge.evaluation.config import EvaluationConfig, Pooling, RetrievalTask, SimilarityTask
from largemerge.evaluation.metrics import correlation
from largemerge.evaluation.models import ModelFiles
from largemerge.evaluation.table import Table, numbers_of, open_table, open_texts, text_sample, text_samples
from largemerge.evaluation.task import Columns, Metric, Prepared, Record, mean_of

MRR = Metric("mrr@10", mean_of("reciprocal_rank"))
RECALL_1 = Metric("recall@1", mean_of("first"))
RECALL_10 = Metric("recall@10", mean_of("among_ten"))
NDCG = Metric("ndcg@10", mean_of("gain"))
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


def retrieval(
    task: RetrievalTask, config: EvaluationConfig, files: ModelFiles, signature: ForwardSignature
) -> Prepared:
    """Prepares queries and passages; the passage of a query's own row is the right one.

    Raises:
        LargemergeError: If the data cannot be read, or the model makes no vectors of sentences.
    """
    named = [("query_field", task.query_field), ("passage_field", task.passage_field)]
    table = open_table(task, config, named, texts=[setting for setting, _ in named], max_length=task.max_length)
    reader = open_texts(files, table, signature)
    queries = [task.query_prefix + text for text in table.column(task.query_field, str, "a text")]
    passages = [task.passage_prefix + text for text in table.column(task.passage_field, str, "a text")]
    # The same passage may stand in several rows: whichever of them is found is right.
    places = {text: number for number, text in enumerate(dict.fromkeys(passages))}
    own = np.array([places[text] for text in passages])

    def finish(records: Mapping[int, Record]) -> Columns:
        vectors = torch.stack([records[number]["vector"] for number in range(len(queries) + len(places))])
        similar = (vectors[: len(queries)] @ vectors[len(queries) :].T).double().numpy()
        right = similar[np.arange(len(queries)), own]
        ranks = (similar >= right[:, None]).sum(axis=1)  # ties count against the model, the passage's own not
        found = ranks <= 10
        return {
            "reciprocal_rank": np.where(found, 1 / ranks, 0.0),
            "first": (ranks == 1).astype(float),
            "among_ten": found.astype(float),
            "gain": np.where(found, 1 / np.log2(ranks + 1), 0.0),
            **_finite(vectors, len(queries)),
        }

    return _prepared(task.pooling, [*queries, *places], table, files, reader, finish, (MRR, RECALL_1, RECALL_10, NDCG))


def similarity(
    task: SimilarityTask, config: EvaluationConfig, files: ModelFiles, signature: ForwardSignature
) -> Prepared:
    """Prepares pairs of sentences with people's scores.

    Raises:
        LargemergeError: If the data cannot be read, or the model makes no vectors of sentences.
    """
    fields = (("first_field", task.first_field), ("second_field", task.second_field), ("score_field", task.score_field))
    table = open_table(task, config, fields, texts=("first_field", "second_field"), max_length=task.max_length)
    reader = open_texts(files, table, signature)
    scores = np.array(numbers_of(table, task.score_field))
    texts = [text for field in (task.first_field, task.second_field) for text in table.column(field, str, "a text")]

    def finish(records: Mapping[int, Record]) -> Columns:
        vectors = torch.stack([records[number]["vector"] for number in range(2 * len(scores))])
        cosines = (vectors[: len(scores)] * vectors[len(scores) :]).sum(dim=1).double().numpy()
        return {"cosine": cosines, "score": scores}

    metrics = (correlation("spearman", "cosine", "score"), correlation("pearson", "cosine", "score"))
    return _prepared(task.pooling, texts, table, files, reader, finish, metrics)


def _finite(vectors: torch.Tensor, count: int) -> Columns:
    """A column that is no number where vectors are none."""
    return {"finite": np.full(count, 1.0 if bool(vectors.isfinite().all()) else np.nan)}


def _prepared(
    pooling: Pooling,
    texts: Sequence[str],
    table: Table,
    files: ModelFiles,
    reader: TextReader,
    finish: Any,
    metrics: tuple[Metric, ...],
) -> Prepared:
    how = pooling_of(files, table.where) if pooling == "auto" else pooling
    samples = [text_sample(number, text, reader) for number, text in enumerate(texts)]

    def score(output: Any, batch: Batch, group: Sequence[Sample]) -> list[Record]:
        states_NTD = getattr(output, "last_hidden_state", None)
        if states_NTD is None:
            raise ConfigError(
                f"{table.where}: {files.name} returns no hidden states but {sorted(output.keys())}; expected an "
                "encoder, such as a BertModel"
            )
        mask = batch.inputs.get("attention_mask")
        mask_NT = torch.ones(states_NTD.shape[:2]) if mask is None else mask
        return [{"vector": vector.cpu()} for vector in pooled(states_NTD, mask_NT.to(states_NTD.device), how)]

    return Prepared(
        view=files,
        samples=text_samples(samples, files, reader, table.settings, more_notes=table.notes),
        score=lambda _: score,
        finish=finish,
        metrics=metrics,
    )


def pooled(states_NTD: torch.Tensor, mask_NT: torch.Tensor, how: str) -> torch.Tensor:
    """Makes one normalised vector of the hidden states of a text's tokens.

    Args:
        states_NTD: Hidden states, `[N, T, D]`; padding on the right.
        mask_NT: 1 for tokens, 0 for padding, `[N, T]`.
        how: `mean`, `cls` or `last`.

    Returns:
        Vectors `[N, D]` in float32.
    """
    states_NTD = states_NTD.float()
    if how == "mean":
        weights_NT1 = mask_NT[:, :, None].float()
        vectors_ND = (states_NTD * weights_NT1).sum(dim=1) / weights_NT1.sum(dim=1).clamp(min=1)
    elif how == "cls":
        vectors_ND = states_NTD[:, 0]
    else:
        last_N = mask_NT.long().sum(dim=1).clamp(min=1) - 1
        vectors_ND = states_NTD[torch.arange(len(states_NTD), device=states_NTD.device), last_N]
    return torch.nn.functional.normalize(vectors_ND, dim=-1)


def pooling_of(files: ModelFiles, where: str) -> str:
    """Finds how a sentence-transformers folder pools.

    Raises:
        ConfigError: If it does not say, or its modules do more than pooling.
    """
    root = files.checkpoint.root
    modules = read_modules(root, files.name)
    if not modules:
        expected = " or ".join(each for each in get_args(Pooling) if each != "auto")
        raise ConfigError(
            f"{where}: {files.name} has no modules.json that says how vectors are made of tokens; expected 'pooling: "
            f"{expected}'"
        )
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    unknown = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if unknown:
        raise ConfigError(
            f"{where}: {files.name} has the module {unknown[0]}, which is not run here; expected a transformer, "
            "pooling and normalisation"
        )
    pooling = next((module for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    if pooling is None:
        raise CalibrationError(f"{where}: {files.name}: no pooling in modules.json; set 'pooling'")
    settings = read_json(root / str(pooling["path"]) / "config.json", files.name)
    chosen = [how for key, how in _MODES.items() if settings.get(key)]
    chosen += [settings["pooling_mode"]] if isinstance(settings.get("pooling_mode"), str) else []
    if len(chosen) != 1 or chosen[0] not in get_args(Pooling):
        raise ConfigError(f"{where}: {files.name} pools by {chosen or 'something else'}; expected mean, cls or last")
    return str(chosen[0])
