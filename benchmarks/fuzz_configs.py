"""Put wrong values into every place of configurations of both kinds, and look at what is said.

    PYTHONPATH=. .venv/bin/python benchmarks/fuzz_configs.py --examples 20000

Three things are tried: a list of wrong values in every place of two configurations that have all keys, and for every
parameter of every method; values that hypothesis makes up in these places; and texts that hypothesis makes up as files.
A try passes if it gives a configuration or a `ConfigError` whose lines are short, and free of a library's idiom. The
last line is one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from largemerge.api import read_config
from largemerge.data_free.methods.post import POST_STEPS
from largemerge.data_free.methods.table import METHODS
from largemerge.errors import ConfigError

_LONGEST, _MOST_LINES, _MOST_SECONDS = 1600, 60, 20.0
_IDIOM = re.compile(
    r"Input should|Value error|type=|Extra inputs|valid (string|dict|list|integer|number|boolean|tuple)|pydantic|"
    r"Field required|(greater|less) than|String should|should have|Assertion|NoneType|unhashable|JSON|line 1 column|"
    r"object has no|not supported between|argument must be|sys\.set_int"
)

TOKENIZER: dict[str, Any] = {
    "source": "union",
    "tokens": {
        "t": {"source": {"kind": "model_token", "model": "o/a", "token": "x"}, "force": True},
        "u": {"source": "o/a"},
        "z": {"source": {"kind": "zero"}},
        "n": {"source": {"kind": "model_token", "model": "o/a", "token_id": 3}},
    },
    "pad_to_multiple_of": 8,
}
CALIBRATION: dict[str, Any] = {"num_samples": 3, "max_length": 4, "batch_size": 1, "seed": 0}
REGRESSION: dict[str, Any] = {
    "merge_method": "calibrated",
    "models": [
        {
            "model": "o/a",
            "name": "a",
            "calibration": CALIBRATION
            | {"data": "d", "subset": "s", "split": "t", "text_field": "x", "text_template": "{q}", "one_per": "line"}
            | {"messages_field": "m", "target_field": "y", "image_field": "i", "loss_mask_field": "l"}
            | {"assistant_only": False, "pack": False, "only": {"c": 1}},
            "parameters": {"weight": 1.0},
        },
        {"model": "o/b", "calibration": {"data": "e"}},
        {"model": "o/c", "calibration": {"grams": "g"}},
    ],
    "base_model": "o/base",
    "calibration": CALIBRATION,
    "parameters": {
        "inputs": "merged",
        "granularity": "linear",
        "target": 0.5,
        "drift": 0.5,
        "shrinkage": True,
        "anchor": "task_arithmetic",
        "anchor_scale": 0.5,
        "normalization": "frobenius",
        "off_diagonal_scale": 0.5,
        "ridge": 0.1,
        "solve": ["blocks", "head", "embeddings"],
        "embedding_prior": 1.0,
        "scale": 1.0,
        "power": 0.15,
        "scale_layers": True,
        "include": ["a"],
        "excluded": "base",
        "exclude": ["b"],
    },
    "sequence": {"previous": "p", "name": "n", "keep_sums": True, "keep_samples": 8},
    "output": {"quantization": "nf4", "double_quant": True},
    "dtype": "float32",
    "compute_dtype": "float32",
    "tokenizer_source": "union",
    "tokenizer": TOKENIZER,
    "head": "none",
    "align": {"reference": "o/d", "residual_stream": True},
    "memory": {"device": 1, "host": "4GB", "disk": "x", "hidden_states_8bit": False},
    "stacks": ["model.layers"],
    "variant": "fp16",
    "allow_crimes": False,
    "trust_remote_code": False,
}
_SOURCE = {"model": "o/a", "layer_range": [0, 3], "parameters": {"weight": 1}}
DATA_FREE: dict[str, Any] = {
    "merge_method": "ties",
    "name": "n",
    "models": [
        {"model": "o/a", "parameters": {"weight": 1}},
        {
            "model": {"model": {"path": "o/b", "revision": "main"}, "lora": {"path": "o/l"}},
            "parameters": {"weight": [0, 1], "density": [{"filter": "mlp", "value": 0.5}, {"value": [0, 1]}]},
        },
    ],
    "slices": [{"sources": [_SOURCE], "base_model": "o/a", "parameters": {"weight": 1}}],
    "modules": {
        "text": {
            "models": [{"model": "o/a", "parameters": {"weight": 1}}],
            "slices": [{"sources": [_SOURCE]}],
            "parameters": {"weight": 1},
        }
    },
    "base_model": "o/base",
    "parameters": {"lambda": 1, "normalize": True},
    "dtype": "float32",
    "out_dtype": "float16",
    "tokenizer_source": "union",
    "tokenizer": TOKENIZER,
    "chat_template": "chatml",
    "head": "base",
    "align": {"reference": "o/d", "residual_stream": True},
    "allow_crimes": False,
    "trust_remote_code": False,
    "seed": 1,
    "memory": {"device": 1, "host": 1},
    "variant": "x",
    "post": [
        "svc",
        {"svc": {"alpha": 0.5}},
        {"subspace_boosting": {"beta": [{"filter": "mlp", "value": 0.5}, {"value": [0, 1]}]}},
        {"rescale": {"match_norm": True, "factor": 1.5}},
    ],
    "candidates": ["o/b", "o/c"],
}

WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, -0.5, 1e-320, 1e300, 10**400, 2**63, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "0.5",
        "x",
        "-1",
        "1e400",
        "9" * 5000,
        "²",
        "\0",
        "\ud800",
        "é" * 5000,
        "+" * 5000,
        "base",
        "union",
        "(",
    ),
    *([], {}, [[]], [[1, 2], [3]], [None], [1, "x"], [True, 0.5], {"a": 1}, {1: 2}, {None: 1}, b"x", {1, 2}, object()),
    *({"filter": 5, "value": 1}, [{"filter": 5, "value": 1}], [{"filter": "a"}], [{"filter": "a", "value": 1, "z": 2}]),
    *([{"value": [{"value": 1}]}], {"model": 5}, {"model": {"path": 5}}, {"model": "x", "lora": {"path": None}}),
]

Place = tuple[str | int, ...]


def places(raw: Any, place: Place = ()) -> Iterator[Place]:
    """Yields the places of all values in a configuration, itself first."""
    yield place
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ():
        yield from places(value, (*place, key))


def with_value(raw: Any, place: Place, value: Any) -> Any:
    """Returns a copy with another value in one place."""
    if not place:
        return value
    changed = copy.deepcopy(raw)
    target = changed
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return changed


def with_parameters() -> Iterator[tuple[Any, Place]]:
    """Yields a configuration for every parameter of every data-free method and step, and the parameter's place."""
    for method, row in METHODS.items():
        models = [{"model": f"o/{name}", "parameters": {}} for name in "ab"]
        raw = {"merge_method": method, "models": models, "base_model": "o/base", "parameters": {}}
        yield from ((raw, ("parameters", name)) for name in row.shared)
        yield from ((raw, ("models", 0, "parameters", name)) for name in row.per_model)
    for step, post in POST_STEPS.items():
        raw = {"merge_method": "tsv_m", "models": [{"model": "o/a"}], "base_model": "o/base", "post": [{step: {}}]}
        yield from ((raw, ("post", 0, step, name)) for name in post.parameters)


PLACES = [(raw, place) for raw in (REGRESSION, DATA_FREE) for place in places(raw)] + list(with_parameters())


def failure(source: Any) -> str | None:
    """Reads a configuration, and says what is wrong with how that went; `None` if nothing is."""
    begin = time.process_time()
    problems: tuple[str, ...] = ()
    try:
        read_config(source)
    except ConfigError as error:
        problems = error.problems
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    for problem in problems:
        if len(problem) > _LONGEST or _IDIOM.search(problem):
            return f"says {problem[:300]!r}"
    if len(problems) > _MOST_LINES:
        return f"says {len(problems)} lines"
    seconds = time.process_time() - begin
    return f"takes {seconds:.0f} s" if seconds > _MOST_SECONDS else None


def sweep(step: int = 1) -> Iterator[tuple[str, str | None]]:
    """Yields what went wrong with every wrong value (or every n-th) in every place, after what was tried."""
    tries = [(raw, place, value) for raw, place in PLACES for value in WRONG]
    for raw, place, value in tries[::step]:
        yield f"{raw['merge_method']} {place}: {ascii(value)[:80]}", failure(with_value(raw, place, value))


KEYS = st.sampled_from(["model", "models", "weight", "parameters", "filter", "value", "path", "kind", "source", "<<"])
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    *(st.dates(), st.binary(max_size=5), st.sampled_from(["1", "0.5", "union", "base", "true", "o/a", "2020-13-01"])),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MISTAKES = st.tuples(st.sampled_from(PLACES), VALUES).map(lambda drawn: with_value(*drawn[0], drawn[1]))
_WORDS = "merge_method: linear|models:|- |  |model: a|&a |*a|<<: |? |: |[|]|{|}|,|---|...|!!int |!!set |!x |%YAML 1.1|'"
_WORDS += '|"|>|#|1e400|0x_|1:59:59|.nan|2020-99-99|\\UFFFFFFFF|null|~|@|`|é'
TOKENS = st.sampled_from([*_WORDS.split("|"), "|", "\n", "\t", "\0", "\ufeff", "\x85", "9" * 50, "\n- ", "\n  "])
FILES = st.lists(TOKENS | st.text(max_size=5), max_size=40).map("".join)


def failure_of_file(text: str, path: Path) -> str | None:
    """Reads a text as a file, see `failure`."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return failure(path)


def failure_both_ways(raw: Any, path: Path) -> str | None:
    """Reads a configuration as it is, and as a file; see `failure`."""
    found = failure(raw)
    try:
        text = yaml.safe_dump(raw, allow_unicode=True)
    except yaml.YAMLError:
        return found
    return found or failure_of_file(text, path)


def main() -> None:
    """Try everything, and print what failed and how many passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="that hypothesis makes up, of each kind")
    parser.add_argument("--step", type=int, default=1, help="try every n-th wrong value only")
    parser.add_argument("--seed", type=int, default=0, help="of what hypothesis makes up")
    options = parser.parse_args()
    counts: dict[str, list[int]] = {}

    def note(kind: str, what: str, failed: str | None) -> None:
        count = counts.setdefault(kind, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + (failed is None)
        if failed is not None:
            print(f"{kind}: {what}: {failed}")

    for what, failed in sweep(options.step):
        note("places", what, failed)
    long = settings(
        max_examples=options.examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merge.yaml"

        @seed(options.seed)
        @long
        @given(MISTAKES)
        def try_values(raw: Any) -> None:
            note("values", ascii(raw)[:300], failure_both_ways(raw, path))

        @seed(options.seed)
        @long
        @given(FILES)
        def try_files(text: str) -> None:
            note("files", ascii(text)[:300], failure_of_file(text, path))

        try_values()
        try_files()
    figures = {kind: {"tried": tried, "passed": passed} for kind, (tried, passed) in counts.items()}
    print(json.dumps({"benchmark": "fuzz_configs", "seed": options.seed, **figures}))
    if any(tried != passed for tried, passed in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
