"""Which of Transformers' model classes can be merged, and is what comes out right?

    python benchmarks/architectures.py [--kind KIND …] [--only CLASS …] [--methods METHOD …] [--seconds S] [--json FILE]
    python benchmarks/architectures.py --read FILE    # the tables of an earlier sweep, or of one under way

Takes the causal, masked, sequence-to-sequence, vision, audio and multimodal classes of Transformers' auto classes,
makes each tiny from its own config (`tiny_configs.py`), perturbs it twice, and merges the two by `linear`, `ties`,
`regmean` and `regmean_plusplus`. Of every merge it says

    clean      `from_pretrained` finds every tensor, and no other (`output_loading_info`)
    refused    a `LargemergeError` said what and why, before anything was written
    error      anything else: a fault

and whether the tensors are right: `linear` beside the mean; the regression methods beside a dense float64 solve of
every linear that the plan says is solved, its Grams from hooks on the real model (for RegMean++ a model whose earlier
blocks are merged, in the order in which they run), and the mean for every tensor that is not solved. Every class has a
process of its own and a time limit. Classes that cannot be built or run tiny are listed with the reason. Ends with a
table of counts, a list of what was refused and why, and one line of JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import largemerge
import largemerge.data_free.merge
import largemerge.regression.merge  # here, and not again in the process of every class
from largemerge import LargemergeError
from measure import machine
from tiny_configs import KINDS, Inputs, classes_of, make_inputs, model_inputs, perturbed, tiny_model

METHODS = ("linear", "ties", "regmean", "regmean_plusplus")
REGRESSION = ("regmean", "regmean_plusplus")
SCALE, RIDGE, TOLERANCE = 0.9, 0.01, 2e-3
BATCH_SIZE = 4


@dataclass
class Outcome:
    """What one merge of one class came to."""

    status: str
    """`clean`, `unclean`, `refused` or `error`."""
    reason: str = ""
    solved: int = 0
    """Linears that were solved."""
    linears: int = 0
    """Linears that the class has, in blocks and outside."""
    right: bool | None = None
    """Whether every tensor agrees with the reference; None if it was not compared."""
    worst: str = ""
    """Tensor that differs most, and its relative error."""
    averaged: dict[str, int] = field(default_factory=dict)
    """Reasons for which linears were averaged, and how many."""
    seconds: float = 0.0


@dataclass
class Row:
    """A line of the table."""

    kind: str
    name: str
    built: str
    """"" if the class could be built and run tiny; else why not."""
    merges: dict[str, Outcome] = field(default_factory=dict)


def sweep_class(kind: str, name: str, folder: Path, methods: Sequence[str]) -> Row:
    """Merges two models of a class by every method."""
    row = Row(kind, name, "")
    try:
        models, inputs = make_models(kind, name, folder)
    except Exception as error:  # whatever a class raises when it is built small is a line of the table
        row.built = _first_line(error)
        return row
    for method in methods:
        start = time.perf_counter()
        row.merges[method] = merge_models(method, models, inputs, folder)
        row.merges[method].seconds = round(time.perf_counter() - start, 2)
    return row


def make_models(kind: str, name: str, folder: Path) -> tuple[list[PreTrainedModel], list[Inputs]]:
    """Writes a base and two fine-tuned models of a class, and calibration tensors for each, into a folder."""
    base = tiny_model(getattr(transformers, name))
    base.save_pretrained(folder / "base")
    models = [perturbed(base, folder / "base", seed) for seed in range(2)]
    inputs = [make_inputs(model, kind, seed) for seed, model in enumerate(models)]
    for index, (model, tensors) in enumerate(zip(models, inputs, strict=True)):
        with torch.no_grad():
            model(**model_inputs(tensors))
        model.save_pretrained(folder / f"model{index}")
        save_file(tensors, folder / f"data{index}.safetensors")
    # Read again: what no file holds (tables that the class computes) is not what it was perturbed to.
    return [type(base).from_pretrained(folder / f"model{index}").eval() for index in range(2)], inputs


def merge_config(method: str, folder: Path, num_models: int) -> dict[str, Any]:
    """A configuration that merges what `make_models` has written."""
    config: dict[str, Any] = {"merge_method": method, "models": []}
    for index in range(num_models):
        entry: dict[str, Any] = {"model": str(folder / f"model{index}"), "parameters": {"weight": 1.0 + index}}
        if method in REGRESSION:
            entry["calibration"] = {"data": str(folder / f"data{index}.safetensors")}
        config["models"].append(entry)
    if method == "ties":
        config["base_model"] = str(folder / "base")
    if method in REGRESSION:
        config["parameters"] = {"ridge": RIDGE, "off_diagonal_scale": SCALE}
        config["calibration"] = {"batch_size": BATCH_SIZE}
    return config


def merge_models(method: str, models: list[PreTrainedModel], inputs: list[Inputs], folder: Path) -> Outcome:
    """Merges two models by one method, loads the result, and compares it."""
    out, config = folder / method, merge_config(method, folder, len(models))
    try:
        report: Any = largemerge.merge(config, out, quiet=True, device="cpu")
    except LargemergeError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("error", f"{_first_line(error)} ({_where(error)})")
    try:
        merged, info = type(models[0]).from_pretrained(out, output_loading_info=True)
    except Exception as error:
        return Outcome("unclean", f"does not load: {_first_line(error)}")
    faults = {
        key: sorted(map(str, info[key]))[:3]
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[key]
    }
    outcome = Outcome("unclean" if faults else "clean", str(faults) if faults else "")
    if method != "ties":
        _compare(method, merged, models, inputs, report, outcome)
    return outcome


def _compare(
    method: str,
    merged: PreTrainedModel,
    models: list[PreTrainedModel],
    inputs: list[Inputs],
    report: Any,
    outcome: Outcome,
) -> None:
    shares = [1 / 3, 2 / 3]
    expected = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in expected.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(sum(c * state[name].double() for c, state in zip(shares, states, strict=True)))
    outcome.linears = len([module for module in expected.modules() if isinstance(module, nn.Linear | Conv1D)])
    if method in REGRESSION:
        plan = report.plan
        solved = [
            (block.name, [linear.name for group in block.groups for linear in group.linears]) for block in plan.blocks
        ]
        outcome.solved = sum(len(names) for _, names in solved)
        linears = {
            f"{name}.weight" for name, module in expected.named_modules() if isinstance(module, nn.Linear | Conv1D)
        }
        outcome.averaged = dict(Counter(t.reason for t in plan.tensors if t.name in linears and t.reason))
        solve_densely(method, expected, models, inputs, shares, solved)
    found = merged.state_dict()
    errors = {
        name: float((found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12))
        for name, tensor in expected.state_dict().items()
        if tensor.is_floating_point() and name in found and found[name].shape == tensor.shape
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    outcome.right = errors[worst] < TOLERANCE
    outcome.worst = f"{worst} {errors[worst]:.1e}"


# The reference: whole models, hooks on every linear, dense solves


def solve_densely(
    method: str,
    expected: PreTrainedModel,
    models: list[PreTrainedModel],
    inputs: list[Inputs],
    shares: list[float],
    solved: list[tuple[str, list[str]]],
) -> None:
    """Puts solved weights in the place of averaged ones.

    Args:
        method: `regmean` or `regmean_plusplus`.
        expected: The averaged model; changed in place.
        models: The candidates.
        inputs: Their calibration tensors.
        shares: c_i / Σ c.
        solved: Block and names of its solved weights, in the order in which the blocks run.
    """
    every = [name.removesuffix(".weight") for _, names in solved for name in names]
    whole = [grams(model, every, x) for model, x in zip(models, inputs, strict=True)] if method == "regmean" else None
    averaged = {name: expected.get_parameter(f"{name}.weight").detach().clone() for name in every}
    for block, names in solved:
        paths = [name.removesuffix(".weight") for name in names]
        if not paths:
            continue
        collected = whole or [
            grams(_hybrid(expected, model, block), paths, x) for model, x in zip(models, inputs, strict=True)
        ]
        for path in paths:
            transposed = isinstance(expected.get_submodule(path), Conv1D)
            weights = [model.get_parameter(f"{path}.weight").detach().double() for model in models]
            weights = [weight.T if transposed else weight for weight in weights]
            mean = averaged[path].double().T if transposed else averaged[path].double()
            weight = _solve(weights, mean, [gram[path] for gram in collected], shares)
            with torch.no_grad():
                expected.get_parameter(f"{path}.weight").copy_(weight.T if transposed else weight)


def _hybrid(expected: PreTrainedModel, candidate: PreTrainedModel, block: str) -> PreTrainedModel:
    """The merged model so far, with one block of the candidate."""
    hybrid = copy.deepcopy(expected)
    parent, _, leaf = block.rpartition(".")
    # Not its weights put into the block: what blocks have in common would change in those before it, too.
    setattr(hybrid.get_submodule(parent), leaf, copy.deepcopy(candidate.get_submodule(block)))
    return hybrid


def _solve(
    weights: list[torch.Tensor], mean: torch.Tensor, gram: list[torch.Tensor], shares: list[float]
) -> torch.Tensor:
    scaled = [c * (SCALE * g + (1 - SCALE) * g.diagonal().diag()) for c, g in zip(shares, gram, strict=True)]
    total: Any = sum(scaled)
    system = total + RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    right: Any = sum((w - mean) @ g for w, g in zip(weights, scaled, strict=True))
    solution: torch.Tensor = mean + torch.linalg.solve(system, right.T).T
    return solution


def grams(model: PreTrainedModel, names: Sequence[str], inputs: Inputs) -> dict[str, torch.Tensor]:
    """XᵀX / tokens of the named linears over all their runs, in float64, padding left out."""
    sums: dict[str, Any] = {}
    masks = _masks(inputs)

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            rows = x.reshape(-1, x.shape[-1]).double()
            sizes = [size for size in x.shape[:-1] if size != 1]
            for mask in masks:
                if sizes == list(mask.T.shape):  # tokens first
                    rows = rows[mask.T.reshape(-1)]
                elif sizes[:2] == list(mask.shape) or sizes[:1] == [mask.numel()]:  # more dimensions: a token's rows
                    rows = rows.reshape(mask.numel(), -1, x.shape[-1])[mask.reshape(-1)].reshape(-1, x.shape[-1])
            gram, count = sums.get(name, (0, 0))
            sums[name] = (gram + rows.T @ rows, count + rows.shape[0])

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in dict.fromkeys(names)]
    with torch.no_grad():
        model(**model_inputs(inputs))
    for handle in handles:
        handle.remove()
    return {name: gram / count for name, (gram, count) in sums.items()}


def _masks(inputs: Inputs) -> list[torch.Tensor]:
    """Valid tokens of the encoder's or the only text."""
    return [inputs["attention_mask"].bool()] if "attention_mask" in inputs else []


# The sweep


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:240]}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "largemerge/" in frame.filename][-2:]
    other = [frame for frame in frames if "/transformers/" in frame.filename][-1:]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*own, *other))


def _child(kind: str, name: str, work: Path, methods: Sequence[str], result: Path) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    row = sweep_class(kind, name, work, methods)
    result.write_text(json.dumps(asdict(row)))


def sweep(
    kinds: Sequence[str], only: Sequence[str], methods: Sequence[str], seconds: float, file: Path | None
) -> list[dict[str, Any]]:
    """Sweeps all classes, each in a process of its own; prints and writes a line as soon as a class is done."""
    context = multiprocessing.get_context("fork")
    rows = []
    for kind in kinds:
        for name in [name for name in classes_of(kind) if not only or name in only]:
            work = Path(tempfile.mkdtemp(prefix="architectures-"))
            result = work / "row.json"
            process = context.Process(target=_child, args=(kind, name, work, methods, result))
            process.start()
            process.join(seconds)
            row: dict[str, Any]
            if process.is_alive():
                process.kill()
                process.join()
                row = asdict(Row(kind, name, f"took more than {seconds:.0f} s"))
            elif result.exists():
                row = json.loads(result.read_text())
            else:
                row = asdict(Row(kind, name, f"the process ended with {process.exitcode}"))
            shutil.rmtree(work, ignore_errors=True)
            rows.append(row)
            print(line(row), flush=True)
            if file is not None:
                file.write_text(json.dumps(rows, indent=1))
    return rows


def line(row: dict[str, Any]) -> str:
    """A class in one line of text."""
    if row["built"]:
        return f"{row['kind']:10} {row['name']:50} not built: {row['built']}"
    parts = []
    for method, merge in row["merges"].items():
        text = merge["status"]
        if merge["right"] is not None:
            text += " right" if merge["right"] else f" WRONG ({merge['worst']})"
        if merge["solved"]:
            text += f" {merge['solved']}/{merge['linears']}"
        if merge["reason"]:
            text += f" [{merge['reason'].splitlines()[0][:200]}]"
        parts.append(f"{method}: {text}")
    return f"{row['kind']:10} {row['name']:50} " + "; ".join(parts)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind and method."""
    counts: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        counts[kind] = {"classes": len(own), "built": sum(not row["built"] for row in own)}
        for method in METHODS:
            merges = [row["merges"][method] for row in own if method in row["merges"]]
            counted = Counter(merge["status"] for merge in merges)
            counted["right"] = sum(bool(merge["right"]) for merge in merges)
            counted["wrong"] = sum(merge["right"] is False for merge in merges)
            counts[kind][method] = dict(counted)
    return counts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Counts as a table in Markdown, and the reasons of what was refused or failed."""
    lines = [
        "| kind | classes | run tiny | method | clean | right | refused | faults |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for kind, counts in summary(rows).items():
        for method in METHODS:
            found = counts[method]
            right = "" if method == "ties" else found["right"]
            faults = found["wrong"] + found.get("error", 0) + found.get("unclean", 0)
            cells = (found.get("clean", 0), right, found.get("refused", 0), faults)
            head = (kind, counts["classes"], counts["built"]) if method == METHODS[0] else ("", "", "")
            lines.append("| " + " | ".join(map(str, (*head, f"`{method}`", *cells))) + " |")
    for status in ("refused", "error", "unclean", "wrong"):
        for row in rows:
            for method, merge in row["merges"].items():
                if merge["status"] == status or (status == "wrong" and merge["right"] is False):
                    reason = " ".join(merge["reason"].split()) if status != "wrong" else merge["worst"]
                    lines.append(f"- {status}: {row['name']}, `{method}`: {reason[:300]}")
    return "\n".join(lines)


def main() -> None:
    """Reads the arguments, sweeps, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", nargs="+", default=[], metavar="CLASS")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of a class")
    parser.add_argument("--json", type=Path, help="a file for all rows")
    parser.add_argument("--read", type=Path, help="a file with the rows of an earlier sweep, instead of a new one")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.read:
        rows = json.loads(arguments.read.read_text())
    else:
        rows = sweep(arguments.kind, arguments.only, arguments.methods, arguments.seconds, arguments.json)
    print(table(rows))
    print(json.dumps({"benchmark": "architectures", "machine": machine(), "summary": summary(rows)}))


if __name__ == "__main__":
    main()
