"""Vocabularies, adapters, chat templates and several documents: the same YAML through mergekit and largemerge.

    python benchmarks/mergekit_yaml_parity.py --work DIR                          # installs mergekit; 5 minutes
    python benchmarks/mergekit_yaml_parity.py --work DIR --peer-python PATH       # an environment that has it
    python benchmarks/mergekit_yaml_parity.py --work DIR --no-peer --quick        # a smoke test

Tiny Llamas with random weights and tokenizers of their own (BPE, WordPiece, Unigram; other tokens, added tokens, tied
embeddings, bfloat16) are merged by both. Embeddings are compared by token, for the tokens that both outputs have: the
largest difference, relative to the largest weight, and the share of rows that are the same to the last bit; the other
tensors by name. Then both tokenizers encode the same texts. Where mergekit fails, the table says so. Ends with one line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from environments import OWN_TORCH, make_environment
from measure import machine
from tokenized_llamas import write_inputs

PEER_REQUIREMENTS = ("mergekit==0.1.5",)
TEXTS = ["the models are merged", "def merge(models): return", "<x>the<y>end", "merging is adding"]
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Case:
    """One YAML.

    Attributes:
        name: For the table.
        documents: Of the YAML.
        options: Of mergekit's command line.
    """

    name: str
    documents: list[dict[str, Any]]
    options: list[str] = field(default_factory=list)


def main() -> None:
    """Makes, merges, compares, prints."""
    arguments = _arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    peer = arguments.peer_python
    if peer is None and arguments.peer:
        peer = make_environment(work / "mergekit", PEER_REQUIREMENTS, arguments.torch)
    inputs = write_inputs(work / "inputs")
    rows = []
    for case in _cases(inputs)[: 2 if arguments.quick else None]:
        rows.append(_run(case, work, peer))
        print(json.dumps(rows[-1]), flush=True)
    _print(rows)
    print(json.dumps({"benchmark": "mergekit_yaml_parity", "machine": machine(), "rows": rows}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mergekit's YAML through both; see the top of this file.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for all files")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="only ours")
    parser.add_argument("--quick", action="store_true", help="two cases")
    parser.add_argument("--peer-python", type=Path, metavar="PATH", help="of an environment with mergekit")
    parser.add_argument("--torch", default=OWN_TORCH, help="requirement for mergekit's environment (%(default)s)")
    return parser.parse_args()


def _cases(inputs: Path) -> list[Case]:
    def at(name: str) -> str:
        return "+".join(str(inputs / part) for part in name.split("+"))

    def merge(method: str, names: list[str], base: str | None = None, **more: Any) -> list[dict[str, Any]]:
        merged = [*([base] if base and method == "linear" else []), *names]
        entries = [{"model": at(name), "parameters": {"weight": 0.4 + 0.2 * i}} for i, name in enumerate(merged)]
        return [{"merge_method": method, "models": entries, **({"base_model": at(base)} if base else {}), **more}]

    def passthrough(name: str) -> list[dict[str, Any]]:
        return [{"merge_method": "passthrough", "models": [{"model": at(name)}]}]

    token = {"kind": "model_token", "model": at("bpe-a"), "token": "</s>"}
    tokens = {
        "<x>": {"source": at("bpe-a")},
        "<z>": {"source": {"kind": "zero"}, "force": True},
        "<s>": {"source": token, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": at("bpe-b"), "token_id": 9}},
    }
    lora = ["--lora-merge-cache", str(inputs.parent / "lora-cache")]
    union: dict[str, Any] = {"tokenizer_source": "union"}
    padded = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}
    (first,) = merge("linear", ["bpe-a", "bpe-b"], "base", name="first", **union)
    second = {"merge_method": "slerp", "base_model": "first", "models": [{"model": at("bpe-b")}]}
    second |= {"parameters": {"t": 0.3}, "tokenizer_source": "base"}
    ties = {"parameters": {"density": 0.6}}
    return [
        Case("linear, union", merge("linear", ["bpe-a", "bpe-b"], "base", **union)),
        Case("linear, union, no base", merge("linear", ["bpe-b", "code"], **union)),
        Case("ties, union", merge("ties", ["bpe-a", "bpe-b"], "base", **union, **ties)),
        Case("ties, base", merge("ties", ["bpe-a", "code"], "base", tokenizer_source="base", **ties)),
        Case("task_arithmetic, a model's", merge("task_arithmetic", ["bpe-a"], "base", tokenizer_source=at("bpe-b"))),
        Case("linear, union of unlike BPE", merge("linear", ["code"], "base", **union)),
        Case("linear, tokens, padded", merge("linear", ["bpe-a", "bpe-b"], "base", tokenizer=padded)),
        Case("linear, union, tied", merge("linear", ["tied-b"], "tied-a", **union)),
        Case("linear, union, bfloat16", merge("linear", ["bf16-1", "bf16-2"], "bf16-0", **union)),
        Case("linear, average, bfloat16", merge("linear", ["bf16-1", "bf16-2", "bf16-0"], **union)),
        Case("linear, union of WordPiece", merge("linear", ["WordPiece-b"], "WordPiece-a", **union)),
        Case("linear, union of Unigram", merge("linear", ["Unigram-b"], "Unigram-a", **union)),
        Case("passthrough, adapter", passthrough("plain+lora"), lora),
        Case("passthrough, adapter, bfloat16", passthrough("bf16-0+lora-bf16"), lora),
        Case("ties, adapters", merge("ties", ["base+lora", "base+lora-bf16"], "base", **ties), lora),
        Case("two documents", [first, second]),
        Case("template: auto", merge("linear", ["bpe-a", "bpe-b"], "base", **union, chat_template="auto")),
        *(
            Case(f"template: {name}", merge("linear", [], "base", tokenizer_source="base", chat_template=name))
            for name in ("alpaca", "chatml", "exaone", "llama3", "mistral")
        ),
    ]


def _run(case: Case, work: Path, peer: Path | None) -> dict[str, Any]:
    ours, theirs = work / "ours", work / "theirs"
    config = work / "merge.yml"
    config.write_text(yaml.safe_dump_all(case.documents, sort_keys=False))
    _command(
        [sys.executable, "-m", "largemerge", "merge", str(config), str(ours), "--force", "--quiet"], work / "ours.log"
    )
    row: dict[str, Any] = {"case": case.name, "tokens": len(_vocabulary(ours))}
    if peer is None:
        return row
    shutil.rmtree(theirs, ignore_errors=True)
    if len(case.documents) > 1:
        shutil.rmtree(work / "intermediate", ignore_errors=True)
        command = ["mergekit-multi", str(config), "--out-path", str(theirs), "-I", str(work / "intermediate")]
    else:
        command = ["mergekit-yaml", str(config), str(theirs)]
    program = str(peer.parent / command[0])
    failure = _command([program, *command[1:], "--allow-crimes", *case.options], work / "theirs.log", may_fail=True)
    return row | ({"peer_failed": failure} if failure else _compare(ours, theirs))


def _command(command: list[str], log: Path, *, may_fail: bool = False) -> str:
    """Runs it; the last line of what it says if it fails."""
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return ""
    tail = log.read_text().splitlines()[-1]
    if not may_fail:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}: see {log}: {tail}")
    return tail


def _vocabulary(folder: Path) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _compare(ours: Path, theirs: Path) -> dict[str, Any]:
    left, right = _tensors(ours), _tensors(theirs)
    ids, peer_ids = _vocabulary(ours), _vocabulary(theirs)
    shared = sorted(ids.keys() & peer_ids.keys(), key=lambda token: ids[token])
    worst: Mapping[str, float] = {}
    same = rows = 0
    beyond = 0.0
    for name in left.keys() & right.keys():
        a, b = left[name].double(), right[name].double()
        if name in EMBEDDINGS:
            padding = [weight[max(each.values()) + 1 :] for weight, each in ((a, ids), (b, peer_ids))]
            beyond = max([beyond, *((p - q).abs().max().item() for p, q in [padding] if p.shape == q.shape and len(p))])
            a, b = a[[ids[token] for token in shared]], b[[peer_ids[token] for token in shared]]
            same, rows = same + int((a == b).all(dim=1).sum()), rows + len(shared)
        scale = b.abs().max().item() or 1.0
        worst = {**worst, name: (a - b).abs().max().item() / scale}
    template = _rendered(ours), _rendered(theirs)
    return {
        "only_in_ours": sorted(ids.keys() - peer_ids.keys()),
        "only_in_theirs": sorted(peer_ids.keys() - ids.keys()),
        "same_numbers": ids == peer_ids,
        "only_in_one": sorted(left.keys() ^ right.keys()),
        "embeddings_difference": max(value for name, value in worst.items() if name in EMBEDDINGS),
        "same_rows": same / rows,
        "padding_difference": beyond,
        "others_difference": max(value for name, value in worst.items() if name not in EMBEDDINGS),
        "rows": [len(left[EMBEDDINGS[0]]), len(right[EMBEDDINGS[0]])],
        "texts_alike": sum(_encoded(ours, text) == _encoded(theirs, text) for text in TEXTS),
        "text_tokens": [sum(len(_encoded(folder, text)) for text in TEXTS) for folder in (ours, theirs)],
        "template_same": template[0] == template[1],
        "templates": [] if template[0] == template[1] else list(template),
    }


def _encoded(folder: Path, text: str) -> list[str]:
    tokens: list[str] = AutoTokenizer.from_pretrained(folder).tokenize(text)
    return tokens


def _rendered(folder: Path) -> str | None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hm"},
    ]
    if not tokenizer.chat_template:
        return None
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def _print(rows: list[dict[str, Any]]) -> None:
    titles = ["case", "tokens", "embeddings, by token", "rows the same", "other tensors", "vocabulary"]
    titles += ["texts cut alike", "their tokens, ours / mergekit's"]
    print(f"\n| {' | '.join(titles)} |\n|---|---:|---:|---:|---:|---|---:|---:|")
    number: Callable[[float], str] = lambda value: "0" if value == 0 else f"{value:.1e}"  # noqa: E731
    for row in rows:
        cells = [row["case"], str(row["tokens"])]
        if "peer_failed" in row:
            cells += [f"mergekit fails: {row['peer_failed'][:80]}", "", "", "", "", ""]
        elif "rows" in row:
            unlike = row["only_in_ours"] or row["only_in_theirs"]
            vocabulary = "other tokens" if unlike else "the same" if row["same_numbers"] else "other numbers"
            cells += [number(row["embeddings_difference"]), f"{100 * row['same_rows']:.1f} %"]
            cells += [number(row["others_difference"]), vocabulary, f"{row['texts_alike']} of {len(TEXTS)}"]
            cells.append(" / ".join(map(str, row["text_tokens"])))
            cells[0] += "" if row["template_same"] else " (text differs)"
        print(f"| {' | '.join(cells)} |")
    print(f"\nmachine: {', '.join(f'{k} {v}' for k, v in machine().items())}")


if __name__ == "__main__":
    main()
