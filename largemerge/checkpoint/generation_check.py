"""Checks of a `generation_config.json` that come before Transformers sees it: types and ranges of the well-known keys.

Transformers checks some of them when it reads the file, logs others, and lets most fail in `generate()`: a merge would
have an output that loads, and cannot speak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from largemerge.text_files import brief

_Check = Callable[[Any], str | None]
"""Says what was expected in a value's place; `None` if it is right."""


def generation_problems(config: Mapping[str, Any]) -> list[str]:
    """Lists what is wrong with the contents of a `generation_config.json`, by key; `null` is right anywhere."""
    return [
        f"{key}: expected {expected}, found {brief(config[key])}"
        for key, check in _checks()
        if config.get(key) is not None and (expected := check(config[key])) is not None
    ]


def _checks() -> Iterator[tuple[str, _Check]]:
    for minimum, keys in _WHOLE.items():
        yield from ((key, _whole(minimum)) for key in keys)
    for key, (low, high) in _NUMBERS.items():
        yield key, _number(low, high)
    for keys, check in _OTHERS:
        yield from ((key, check) for key in keys)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(minimum: int) -> _Check:
    def check(value: Any) -> str | None:
        if not _is_whole(value):
            return "a whole number"
        return f"{minimum} or more" if value < minimum else None

    return check


def _number(low: float, high: float, *, above: bool = False) -> _Check:
    limits = "a finite number" if low == -math.inf else f"a number above {low:g}" if above else f"{low:g} or more"
    expected = f"a number from {low:g} to {high:g}" if high < math.inf else limits

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "a finite number"
        return expected if not low <= value <= high or (above and value == low) else None

    return check


def _is_token(value: Any) -> bool:
    return _is_whole(value) and -1 <= value < 1 << 63  # -1 stands for none in old files


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_token, value))


def _is_nested_tokens(value: Any) -> bool:
    """Whether a value is a list of words, each the numbers of its tokens, or a list of such lists."""
    return isinstance(value, list) and all(_is_tokens(each) or _is_nested_tokens(each) for each in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _is_decay(value: Any) -> bool:
    numbers = isinstance(value, list) and all(_number(-math.inf, math.inf)(each) is None for each in value)
    return numbers and len(value) == 2


def _is_layers(value: Any) -> bool:
    return value in ("low", "high") or (isinstance(value, list) and all(map(_is_whole, value)))


def _is(is_right: Callable[[Any], bool], expected: str) -> _Check:
    return lambda value: None if is_right(value) else expected


_WHOLE: Mapping[int, tuple[str, ...]] = {
    1: (
        *("max_length", "max_new_tokens", "num_beams", "num_return_sequences", "num_beam_groups"),
        *("max_cache_len", "prefill_chunk_size", "max_matching_ngram_size"),
    ),
    0: (
        *("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("num_assistant_tokens", "prompt_lookup_num_tokens", "assistant_early_exit", "assistant_lookbehind"),
        "target_lookbehind",
    ),
}
"""Whole numbers by their minimum."""

_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_h": (0, 1),
    "typical_p": (0, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "assistant_confidence_threshold": (0, 1),
    "assistant_ensemble_weight": (0, 1),
    "diversity_penalty": (0, math.inf),
    "penalty_alpha": (0, math.inf),
    "max_time": (0, math.inf),
    "length_penalty": (-math.inf, math.inf),
    "guidance_scale": (-math.inf, math.inf),
}
"""Numbers and their ranges."""

_OTHERS: tuple[tuple[tuple[str, ...], _Check], ...] = (
    (("repetition_penalty", "encoder_repetition_penalty"), _number(0, math.inf, above=True)),
    (("pad_token_id",), _is(_is_token, "the number of a token")),
    (
        (
            *("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
            "forced_eos_token_id",
        ),
        _is(lambda value: _is_token(value) or _is_tokens(value), "the number of a token, or a list of them"),
    ),
    (("suppress_tokens", "begin_suppress_tokens"), _is(_is_tokens, "a list of the numbers of tokens")),
    (
        ("bad_words_ids", "force_words_ids"),
        _is(_is_nested_tokens, "a list of words, each a list of the numbers of its tokens"),
    ),
    (
        (
            *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "is_assistant"),
            *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "low_memory"),
            *("return_dict_in_generate", "disable_compile"),
        ),
        _is(lambda value: isinstance(value, bool), "true or false"),
    ),
    (
        ("early_stopping",),
        _is(lambda value: isinstance(value, bool) or value == "never", "true, false or 'never'"),
    ),
    (("stop_strings",), _is(_is_texts, "a text, or a list of texts")),
    (("dola_layers",), _is(_is_layers, "'low', 'high' or a list of layers")),
    (("exponential_decay_length_penalty",), _is(_is_decay, "a list of two numbers, the first token and the factor")),
    (("sequence_bias",), _is(lambda value: isinstance(value, Mapping | list), "tokens and their biases")),
    (
        ("watermarking_config", "compile_config", "cache_config", "continuous_batching_config"),
        _is(lambda value: isinstance(value, Mapping), "keys and values"),
    ),
    (
        ("cache_implementation", "num_assistant_tokens_schedule", "transformers_version"),
        _is(lambda value: isinstance(value, str), "a text"),
    ),
)
