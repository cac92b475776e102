"""Does the plan tell the truth? Planned memory, time, samples and tokens beside those of the merge itself.

    python benchmarks/plan_vs_merge.py --work DIR              # 2 GB of disk, a quarter of an hour on 2 cores
    python benchmarks/plan_vs_merge.py --work DIR --only ties  # those whose names hold a word
    python benchmarks/plan_vs_merge.py --work DIR --edges      # exit codes of both around the smallest limit that fits
    python benchmarks/plan_vs_merge.py --work DIR --quick      # a smoke test: tiny models alone

Every merge is planned and run by the command line, each in a process of its own, without a limit of memory. Models
have random weights and a tokenizer that is trained on the spot; texts are words of a made-up language, pictures are
noise. Memory is anonymous memory of the process, as the plan says it and as `merge_report.json` has it; time is that
of the work, without imports and preparation. With `--edges`, ten limits from 4 MiB below to 4 MiB above the smallest
that fits are given to both, and the exit codes must be equal. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from measure import machine

MIB = 2**20
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
EDGES = (-4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
"""MiB from the smallest limit that fits."""
BASE_METHODS = {"ties": {"density": 0.5, "weight": 0.5}, "iso_c": {}, "tsv_m": {}, "task_arithmetic": {"weight": 0.5}}


@dataclass(frozen=True)
class Case:
    """A merge to plan and to run.

    Attributes:
        name: Name in the table.
        write: Function from a folder to the configuration of the merge there.
        small: Whether it is one of the smoke test.
    """

    name: str
    write: Callable[[Path], dict[str, Any]]
    small: bool = False


@dataclass(frozen=True)
class Row:
    """A merge as it was planned and as it was."""

    name: str
    planned_samples: list[int]
    samples: list[int]
    planned_tokens: list[int]
    tokens: list[int]
    planned_peak: int
    peak: int
    planned_seconds: float
    seconds: float
    parts: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """Peak over planned peak."""
        return self.peak / self.planned_peak

    def line(self) -> str:
        """The row of the table."""
        counts = f"{sum(self.planned_samples)} / {sum(self.samples)}" if self.samples else "–"
        tokens = f"{sum(self.planned_tokens)} / {sum(self.tokens)}" if self.tokens else "–"
        peaks = f"{self.planned_peak / MIB:.0f} | {self.peak / MIB:.0f} | {self.ratio:.2f}"
        return f"| {self.name} | {counts} | {tokens} | {peaks} | {self.planned_seconds:.1f} | {self.seconds:.1f} |"


# What is merged


def _words(seed: int, count: int) -> list[str]:
    made = random.Random(seed)
    return ["".join(made.choice("aeioubcdfglmnprst") for _ in range(made.randint(2, 9))) for _ in range(count)]


def _text(seed: int, num_words: int) -> str:
    made = random.Random(seed)
    words = _words(seed % 7, 400)
    return " ".join(made.choice(words) for _ in range(num_words))


def _save_tokenizer(folder: Path, size: int) -> None:
    made: Any = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    made.train_from_iterator([_text(seed, 500) for seed in range(14)], trainer)
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
    )
    fast.save_pretrained(folder)


def _write_texts(path: Path, seed: int, rows: int, words: int) -> None:
    made = random.Random(seed)
    lines = (json.dumps({"text": _text(seed * 1000 + row, made.randint(1, 2 * words))}) for row in range(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_images(folder: Path, seed: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        pixels = torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


LLAMA_SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4},
    "30m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 6},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
}
VOCABULARY = {"tiny": 600, "30m": 16000, "135m": 49152}


def _llama(size: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        **LLAMA_SIZES[size],
        num_key_value_heads=LLAMA_SIZES[size]["num_attention_heads"],
        vocab_size=VOCABULARY[size],
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _bert(size: str) -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**LLAMA_SIZES[size], vocab_size=VOCABULARY[size]))


def _t5(size: str) -> T5ForConditionalGeneration:
    sizes = LLAMA_SIZES[size]
    config = T5Config(
        d_model=sizes["hidden_size"], d_ff=sizes["intermediate_size"], num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"], d_kv=64, vocab_size=VOCABULARY[size], decoder_start_token_id=1,
        pad_token_id=3, eos_token_id=2,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _clip(size: str) -> CLIPVisionModel:
    tiny = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes = tiny if size == "tiny" else base
    return CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=32, image_size=224))


def _write_models(folder: Path, build: Callable[[str], Any], size: str, names: Sequence[str], dtype: str) -> None:
    """Writes models that are a base and a small difference each, with a tokenizer or an image processor."""
    torch.manual_seed(0)
    base = build(size)
    for seed, name in enumerate(names):
        if (folder / name / "config.json").exists():
            continue
        model, generator = build(size), torch.Generator().manual_seed(seed + 1)
        state = {
            key: value + 0.05 * value.abs().mean() * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for key, value in base.state_dict().items()
        }
        model.load_state_dict(state)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
        if isinstance(model, CLIPVisionModel):
            CLIPImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(folder / name)
        elif seed == 0:
            _save_tokenizer(folder / name, VOCABULARY[size])
        else:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / names[0] / file, folder / name / file)


def texts(
    method: str,
    size: str,
    *,
    build: Callable[[str], Any] = _llama,
    k: int = 2,
    rows: int = 48,
    words: int = 60,
    dtype: str = "float32",
    wanted: int = 256,
    max_length: int = 256,
    quantized: str | None = None,
    **more: Any,
) -> Callable[[Path], dict[str, Any]]:
    """A regression merge of language models."""

    def write(folder: Path) -> dict[str, Any]:
        names = [f"{build.__name__.strip('_')}-{size}-{dtype}-{number}" for number in range(k)]
        _write_models(folder, build, size, names, dtype)
        entries = []
        for number, name in enumerate(names):
            data = folder / f"texts-{number}-{rows}-{words}.jsonl"
            _write_texts(data, number, rows, words)
            entry: dict[str, Any] = {"data": str(data)}
            if build is _t5:
                entry |= {"text_field": "text", "target_field": "text"}
            model = _quantize(folder, name, quantized) if quantized else folder / name
            entries.append({"model": str(model), "name": f"m{number}", "calibration": entry})
        calibration = {"num_samples": wanted, "max_length": max_length, "batch_size": 8}
        return {"merge_method": method, "models": entries, "calibration": calibration, **more}

    return write


def _quantize(folder: Path, name: str, kind: str) -> Path:
    """Writes a copy whose linears bitsandbytes has quantised."""
    from transformers import BitsAndBytesConfig

    target = folder / f"{name}-{kind}"
    if not target.exists():
        options: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
        quantized = LlamaForCausalLM.from_pretrained(folder / name, quantization_config=BitsAndBytesConfig(**options))
        quantized.save_pretrained(target)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name / file, target / file)
    return target


def images(method: str, size: str, *, k: int = 2, count: int = 32, **more: Any) -> Callable[[Path], dict[str, Any]]:
    """A regression merge of CLIP's vision towers."""

    def write(folder: Path) -> dict[str, Any]:
        names = [f"clip-{size}-{number}" for number in range(k)]
        _write_models(folder, _clip, size, names, "float32")
        entries = []
        for number, name in enumerate(names):
            data = folder / f"images-{number}-{count}"
            _write_images(data, number, count)
            entries.append({"model": str(folder / name), "name": f"m{number}", "calibration": {"data": str(data)}})
        return {
            "merge_method": method,
            "models": entries,
            "calibration": {"num_samples": 256, "batch_size": 16},
            **more,
        }

    return write


def data_free(
    method: str,
    size: str,
    *,
    k: int = 3,
    dtype: str = "bfloat16",
    build: Callable[[str], Any] = _llama,
    lora: bool = False,
) -> Callable[[Path], dict[str, Any]]:
    """A merge without data."""

    def write(folder: Path) -> dict[str, Any]:
        names = [f"{build.__name__.strip('_')}-{size}-{dtype}-{number}" for number in range(k + 1)]
        _write_models(folder, build, size, names[: 1 if lora else None], dtype)
        models_ = [folder / name for name in names[1:]]
        references = [str(path) for path in models_]
        if lora:
            references = [f"{folder / names[0]}+{_write_adapter(folder, names[0], number)}" for number in range(k)]
        parameters = BASE_METHODS.get(method, {"weight": 0.5})
        entries = [{"model": reference, "parameters": parameters} for reference in references]
        base = {"base_model": str(folder / names[0])} if method in BASE_METHODS else {}
        return {"merge_method": method, "models": entries, "dtype": dtype, **base}

    return write


def _write_adapter(folder: Path, name: str, number: int) -> Path:
    """Writes a LoRA of rank 16 for all linears."""
    from peft import LoraConfig, get_peft_model

    target = folder / f"{name}-lora-{number}"
    if not target.exists():
        torch.manual_seed(number)
        model = LlamaForCausalLM.from_pretrained(folder / name)
        config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(target)
    return target


CASES = (
    Case("RegMean++, Llama tiny, 61 texts of 256 wanted", texts("regmean_plusplus", "tiny", rows=61, words=9), True),
    Case("RegMean++, Llama 30M, long texts", texts("regmean_plusplus", "30m", rows=64, words=400)),
    Case("RegMean, Llama 30M, 4 models", texts("regmean", "30m", k=4)),
    Case("RegMean++, Llama 135M, bfloat16", texts("regmean_plusplus", "135m", k=3, dtype="bfloat16", rows=24)),
    Case("RegMean, Llama 135M, float32", texts("regmean", "135m", rows=24)),
    Case("RegMean++, Llama 135M, NF4", texts("regmean_plusplus", "135m", rows=24, dtype="bfloat16", quantized="nf4")),
    Case("RegMean++, BERT 30M", texts("regmean_plusplus", "30m", build=_bert)),
    Case("RegMean, T5 30M", texts("regmean", "30m", build=_t5)),
    Case("RegMean++, CLIP tiny, images", images("regmean_plusplus", "tiny"), True),
    Case("RegMean++, CLIP ViT-B/32, images", images("regmean_plusplus", "b-32")),
    Case("RegMean, CLIP ViT-B/32, images, 4 models", images("regmean", "b-32", k=4, count=48)),
    Case("linear, Llama tiny", data_free("linear", "tiny"), True),
    Case("linear, Llama 135M", data_free("linear", "135m")),
    Case("ties, Llama 135M", data_free("ties", "135m")),
    Case("task_arithmetic, LoRA of Llama 135M", data_free("task_arithmetic", "135m", lora=True)),
    Case("iso_c, Llama 135M", data_free("iso_c", "135m")),
    Case("tsv_m, Llama 30M, float32", data_free("tsv_m", "30m", dtype="float32")),
)  # fmt: skip


# What is measured


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "largemerge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _checked(*arguments: object) -> str:
    done = _run(*arguments)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout


def measure(case: Case, folder: Path) -> Row:
    """Plans a merge and runs it."""
    config, out = _written(case, folder), folder / "out"
    plan = json.loads(_checked("plan", config, "--json"))
    shutil.rmtree(out, ignore_errors=True)
    _checked("merge", config, out, "--quiet", "--no-verify")
    report = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    peak, seconds = plan["peak_bytes"], plan["seconds"]
    seen = report.get("calibration", {})
    return Row(
        name=case.name,
        planned_samples=list(plan.get("num_samples", {}).values()),
        samples=[entry["num_samples"] for entry in seen.values()],
        planned_tokens=list(plan.get("num_tokens", {}).values()),
        tokens=[entry["tokens"] for entry in seen.values()],
        planned_peak=peak["host"] if isinstance(peak, dict) else peak,
        peak=report["peak_bytes"]["host_anonymous"],
        planned_seconds=seconds["total"] if "total" in seconds else sum(seconds.values()),
        seconds=report["seconds"]["total"] - report["seconds"]["preparation"],
        parts=peak["parts"] if isinstance(peak, dict) else {},
    )


def edges(case: Case, folder: Path) -> dict[str, Any]:
    """Gives both commands limits around the smallest that fits."""
    config, out = _written(case, folder), folder / "out"
    smallest = _smallest_limit(config)
    found = []
    for offset in EDGES:
        limit = int(smallest + offset * MIB)
        shutil.rmtree(out, ignore_errors=True)
        codes = (
            _run("plan", config, "--no-probe", "--memory-host", limit).returncode,
            _run("merge", config, out, "--quiet", "--no-verify", "--memory-host", limit).returncode,
        )
        found.append({"limit": limit, "plan": codes[0], "merge": codes[1]})
    return {"case": case.name, "smallest": smallest, "limits": found}


def _smallest_limit(config: Path) -> int:
    """The number of bytes that a plan with a limit of 1 MiB says would do."""
    plan = json.loads(_run("plan", config, "--no-probe", "--json", "--memory-host", MIB).stdout)
    peak = plan["peak_bytes"]
    return int(peak["host"] if isinstance(peak, dict) else peak)


def _written(case: Case, folder: Path) -> Path:
    name = re.sub(r"\W+", "-", case.name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(case.write(folder), sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare plans with merges; see the top of this file.")
    parser.add_argument("--work", type=Path, help="folder for models and data (a temporary one)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose names hold this word")
    parser.add_argument("--edges", action="store_true", help="exit codes around the smallest limit, instead")
    parser.add_argument("--quick", action="store_true", help="tiny models alone")
    arguments = parser.parse_args()
    cases = [
        case for case in CASES if arguments.only.lower() in case.name.lower() and (case.small or not arguments.quick)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.edges:
            tried = [edges(case, folder) for case in cases]
            unequal = [limit for each in tried for limit in each["limits"] if limit["plan"] != limit["merge"]]
            for each in tried:
                codes = ", ".join(f"{limit['plan']}/{limit['merge']}" for limit in each["limits"])
                print(f"{each['case']}: smallest {each['smallest'] / MIB:.1f} MiB; plan/merge end with {codes}")
            print(json.dumps({"machine": machine(), "edges": tried, "unequal": len(unequal)}))
            return
        print("| merge | samples | tokens | planned MiB | MiB | ratio | planned s | s |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        rows = []
        for case in cases:
            rows.append(measure(case, folder))
            print(rows[-1].line(), flush=True)
    print(
        json.dumps({"machine": machine(), "rows": [row.__dict__ for row in rows], "worst": max(r.ratio for r in rows)})
    )


if __name__ == "__main__":
    main()
