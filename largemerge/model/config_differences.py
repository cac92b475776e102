"""Configs of models that are to be merged, held against each other.

Weights mean what their config says. Two models with tensors of the same shapes may still compute otherwise: with other
heads, another activation, rotary frequencies of another base. What makes an average meaningless is a *crime*
(mergekit's word), and is refused unless the user allows it; what only shifts the result is a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CRIMES = re.compile(
    r"(^|_)(heads?|n_head|head_dim|head_size|hidden_act|hidden_activation|activation|activation_function|mlp_act"
    r"|dense_act_fn|feed_forward_proj|is_gated_act|use_parallel_residual|parallel_residual|do_layer_norm_before"
    r"|apply_residual_connection_post_layernorm|scale_decoder_outputs|layer_types|num_local_experts|num_experts"
    r"|n_routed_experts|position_embedding_type|alibi|parallel_attn|new_decoder_architecture|multi_query|patch_size|model_type)$"
)
_IDLE = re.compile(
    r"^(_.*|transformers_version|torch_dtype|dtype|architectures|use_cache|id2label|label2id|num_labels|auto_map"
    r"|finetuning_task|problem_type|task_specific_params|quantization_config|compression_config|vocab_size"
    r"|tie_word_embeddings|name_or_path|unsloth_.*|pretraining_tp|return_dict|torchscript|output_.*|use_bfloat16"
    r"|gradient_checkpointing|attn_implementation|initializer_.*|chunk_size_feed_forward|router_.*"
    r"|num_hidden_layers|num_layers|n_layer|n_layers|depth|encoder_layers|decoder_layers|num_decoder_layers"
    r"|.*_token_id|.*_token_ids|.*_token_index|.*dropout.*|.*_drop|.*pdrop|.*layerdrop|.*_prob|classifier_.*)$"
)
_DEFAULT_LABEL = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class ConfigDifferences:
    """How configs differ from the one that the output takes.

    Attributes:
        crimes: Differences by which the same numbers mean something else.
        notes: Differences that a user should know.
    """

    crimes: tuple[str, ...]
    notes: tuple[str, ...]


def compare_configs(configs: Mapping[str, Mapping[str, Any]], reference: str) -> ConfigDifferences:
    """Compares the configs of models with the one that the output takes.

    Args:
        configs: Contents of every model's config, with the class's defaults filled in where that can be had.
        reference: The model whose config the output takes.
    """
    crimes: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    ours = configs[reference]
    for name, theirs in configs.items():
        if name == reference:
            continue
        part = _fitting_part(ours, theirs)
        if part is None:
            text = f"{reference}, whose config the output takes, is a {ours.get('model_type')!r} model"
            crimes.setdefault(f"{text}; a {theirs.get('model_type')!r} model is", []).append(name)
            continue
        for key, left, right in _differences(part, theirs, ""):
            found = crimes if _CRIMES.search(key.rpartition(".")[2]) else notes
            found.setdefault(f"configs differ: {key} is {left!r} in {reference}, {right!r} in", []).append(name)
        labels = _unlike_labels(part, theirs)
        if labels is not None:
            text = f"labels differ: {labels[0]} in {reference}, {labels[1]} in"
            crimes.setdefault(text, []).append(name)
    return ConfigDifferences(
        tuple(f"{text} {', '.join(names)}" for text, names in crimes.items()),
        tuple(f"{text} {', '.join(names)}; the output takes {reference}'s" for text, names in notes.items()),
    )


def check_configs(
    configs: Mapping[str, Mapping[str, Any]], reference: str, *, allow_crimes: bool
) -> tuple[list[str], list[str]]:
    """Compares configs, and sorts what was found into problems and notes.

    Args:
        configs: As for `compare_configs`.
        reference: The model whose config the output takes.
        allow_crimes: Whether differences that make an average meaningless are notes, too.

    Returns:
        Problems, and notes.
    """
    found = compare_configs(configs, reference)
    if allow_crimes:
        return [], [*(f"warning: {crime}; allowed by allow_crimes" for crime in found.crimes), *found.notes]
    return [f"{crime}; expected alike models (allow_crimes: true merges them anyway)" for crime in found.crimes], list(
        found.notes
    )


def _fitting_part(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Finds what another model's config is to be held against: the whole, or the part of the same type, as a tower."""
    wanted = theirs.get("model_type")
    parts = [ours, *(part for part in ours.values() if isinstance(part, Mapping))]
    found = next((part for part in parts if part.get("model_type") == wanted), None)
    if found is None:  # the other way round: the whole beside a tower that gives the output its config
        inner = [part for part in theirs.values() if isinstance(part, Mapping)]
        fits = next((part for part in inner if part.get("model_type") == ours.get("model_type")), None)
        return theirs if fits is not None else None
    return found


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key), right.get(key)
        if _IDLE.match(key) or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif not (_is_by_layer(a, left) or _is_by_layer(b, right)) or _layers(left) == _layers(right):
            yield f"{prefix}{key}", a, b


def _layers(config: Mapping[str, Any]) -> Any:
    return next((config[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in config), None)


def _is_by_layer(value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a value is a list with an entry for every layer: such lists differ where the numbers of layers do."""
    return isinstance(value, list) and len(value) == _layers(config)


def _unlike_labels(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str]] | None:
    """Returns the labels of both, where they have as many, with names, and in another order."""
    left, right = label_names(ours), label_names(theirs)
    if left == right or len(left) != len(right) or not left:
        return None
    return (left, right)


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Labels of a classifier in the order of their numbers; empty where a config has only names by default."""
    named = config.get("id2label")
    if not isinstance(named, Mapping):
        return []
    labels = [str(label) for _, label in sorted(named.items(), key=lambda item: int(item[0]))]
    return [] if all(_DEFAULT_LABEL.fullmatch(label) for label in labels) else labels
