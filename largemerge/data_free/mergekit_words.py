"""What mergekit's files may hold beyond what a merge looks at: read as mergekit reads it, with a warning that names it.

    raw mapping → read_mergekit → the mapping that `DataFreeConfig` checks, warnings

mergekit does not look at keys that it does not know. Those that are words of its own, in another place or on its
command line, are left out here as there, and named; all others stay, and are mistakes. `revision` and `lora` beside
`model`, which mergekit passes over, are taken as what they say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from largemerge.checkpoint.locate import split_reference
from largemerge.config_file import unquoted_truth, unquoted_whole_number

_COMMAND_LINE = {
    "random_seed": "seed: here",
    "out_shard_size": "--max-shard-size",
    "cuda": "--device cuda:0",
    "device": "--device",
    "gpu_rich": "--device cuda:0",
    "quiet": "--quiet",
    "transformers_cache": "HF_HOME in the environment",
    "num_threads": "OMP_NUM_THREADS in the environment",
} | dict.fromkeys(
    (
        "async_write",
        "clone_tensors",
        "copy_tokenizer",
        "lazy_unpickle",
        "lora_merge_cache",
        "lora_merge_dtype",
        "low_cpu_memory",
        "multi_gpu",
        "read_to_gpu",
        "safe_serialization",
        "verbosity",
        "write_model_card",
        "write_threads",
    ),
    "",
)
"""Options of mergekit's command line that people write into files, with what serves here."""

_KEYS = frozenset(
    [
        *("merge_method", "base_model", "models", "slices", "modules", "sources", "model", "layer_range", "parameters"),
        *("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template", "name", "residual_weight"),
        *("revision", "lora", "override_architecture", "input_model_parameters", "allow_crimes", "trust_remote_code"),
    ]
)
"""Keys that mergekit has somewhere in its files."""

FORMER_PARAMETERS = frozenset({"embed_slerp"})
"""Parameters that earlier versions of mergekit had."""

_ADAPTER_KEYS = ("lora", "adapter")


@dataclass
class MergekitReader:
    """Reads one file.

    Attributes:
        keys: The keys that a configuration has, by level: `top`, `module`, `slice`, `source` and `entry`.
        parameters: Names of all parameters of mergekit's methods.
        own: The parameters of the file's method, where it is none of mergekit's.
        warnings: What is left out, or taken otherwise than by mergekit.
        problems: What is wrong.
    """

    keys: Mapping[str, Collection[str]]
    parameters: Collection[str]
    own: Collection[str] = ()
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a file's mapping without what mergekit passes over."""
        top = self._level(raw, "top", "")
        for key in ("base_model", "tokenizer_source"):
            if key in top:
                top[key] = self._tokenizer_source(self._reference(top[key], key))
        if isinstance(top.get("tokenizer"), Mapping):
            top["tokenizer"] = self._tokenizer(top["tokenizer"])
        self._parts(top, "")
        if isinstance(top.get("modules"), Mapping):
            top["modules"] = {name: self._module(module, f"modules.{name}.") for name, module in top["modules"].items()}
        return top

    def _module(self, raw: Any, where: str) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        module = self._level(raw, "module", where)
        self._parts(module, where)
        return module

    def _parts(self, level: dict[str, Any], where: str) -> None:
        """Reads the models and slices of a file or a module."""
        if isinstance(level.get("models"), list | tuple):
            level["models"] = list(self._entries(level["models"], "entry", f"{where}models"))
        if isinstance(level.get("slices"), list | tuple):
            level["slices"] = [
                self._slice(each, f"{where}slices[{number}].") for number, each in enumerate(level["slices"])
            ]

    def _slice(self, raw: Any, where: str) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        output_slice = self._level(raw, "slice", where)
        if "base_model" in output_slice:
            output_slice["base_model"] = self._reference(output_slice["base_model"], f"{where}base_model")
        if isinstance(output_slice.get("sources"), list | tuple):
            output_slice["sources"] = list(self._entries(output_slice["sources"], "source", f"{where}sources"))
        return output_slice

    def _entries(self, raw: Any, level: str, where: str) -> Iterator[Any]:
        for number, each in enumerate(raw):
            if not isinstance(each, Mapping):
                yield each
                continue
            place = f"{where}[{number}]."
            entry = self._level(self._with_beside(each, place), level, place)
            if "model" in entry:
                entry["model"] = self._reference(entry["model"], f"{place}model")
            yield entry

    def _level(self, raw: Mapping[str, Any], level: str, where: str) -> dict[str, Any]:
        """Leaves out mergekit's words that stand where they do nothing."""
        kept = {}
        for key, value in raw.items():
            word = str(key).replace("-", "_")
            if key in self.keys[level] or value is None:
                kept[key] = value
            elif word in _COMMAND_LINE:
                instead = f"; instead: {_COMMAND_LINE[word]}" if _COMMAND_LINE[word] else ""
                self.warnings.append(
                    f"{where}{key}: does nothing in a file: it is an option of mergekit's command line{instead}"
                )
            elif word in self.own:
                self.problems.append(f"{where}{key}: unknown key; it belongs under 'parameters'")
            elif word in self.parameters:
                self.warnings.append(f"{where}{key}: does nothing here, as in mergekit; it belongs under 'parameters'")
            elif word in _KEYS:
                self.warnings.append(f"{where}{key}: does nothing here, as in mergekit")
            else:
                kept[key] = value
        return kept

    def _with_beside(self, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Moves `revision` and `lora` from beside `model` into it."""
        beside = {key: entry[key] for key in ("revision", *_ADAPTER_KEYS) if entry.get(key) is not None}
        rest = {key: value for key, value in entry.items() if key not in ("revision", *_ADAPTER_KEYS)}
        model = entry.get("model")
        if not beside or model is None:
            return dict(entry) if model is None else rest
        adapters = [beside[key] for key in _ADAPTER_KEYS if key in beside]
        if isinstance(model, str):
            name, within = split_reference(model)
            model = {"model": name} | ({"lora": within} if within is not None else {})
        if not isinstance(model, Mapping):
            return rest
        model = dict(model) if "model" in model else {"model": model}
        path = model["model"]
        path = dict(path) if isinstance(path, Mapping) else {"path": path}
        twice = [
            key
            for key, has in (
                ("revision", path.get("revision") is not None or "@" in str(path.get("path"))),
                ("lora", model.get("lora") is not None or len(adapters) > 1),
            )
            if has and (key in beside if key == "revision" else adapters)
        ]
        for key in twice:
            self.problems.append(f"{where}{key}: stands here twice, beside 'model' and in it; expected one")
        if twice:
            return rest
        if "revision" in beside:
            path["revision"] = str(beside["revision"])
        if adapters:
            model["lora"] = adapters[0]
        for key in beside:
            self.warnings.append(f"{where}{key}: taken as part of 'model', where mergekit looks for it")
        return rest | {"model": model | {"model": path}}

    def _reference(self, value: Any, where: str) -> Any:
        """Leaves out what only tells mergekit which of its architectures to take."""
        if not isinstance(value, Mapping) or value.get("override_architecture") is None:
            return value
        self.warnings.append(
            f"{where}.override_architecture: does nothing: names and shapes come from the files, "
            "and the output's config.json keeps its class"
        )
        return {key: inner for key, inner in value.items() if key != "override_architecture"}

    def _tokenizer(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Reads `tokenizer`; a token without settings is added to the vocabulary all the same."""
        tokenizer = dict(raw)
        if "source" in tokenizer:
            tokenizer["source"] = self._tokenizer_source(self._reference(tokenizer["source"], "tokenizer.source"))
        if "pad_to_multiple_of" in tokenizer:
            tokenizer["pad_to_multiple_of"] = unquoted_whole_number(tokenizer["pad_to_multiple_of"])
        if isinstance(tokenizer.get("tokens"), Mapping):
            tokenizer["tokens"] = {str(token): self._token(of) for token, of in tokenizer["tokens"].items()}
        return tokenizer

    def _token(self, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return {} if raw is None else raw
        return dict(raw) | ({"force": unquoted_truth(raw["force"])} if "force" in raw else {})

    def _tokenizer_source(self, value: Any) -> Any:
        """Reads `model:PATH`, as earlier versions of mergekit wrote it, as the path."""
        return value.removeprefix("model:") if isinstance(value, str) else value
