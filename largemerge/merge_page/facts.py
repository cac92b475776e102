"""What a finished merge says of itself, as the page needs it: the same for both kinds, and for older reports.

    OUT/merge_report.json ──► Report: checked, what an older version did not write is empty
                          └─► Facts: by block and candidate, under short names

Reports are files, which may be damaged or somebody else's: every value that the page uses is checked by Pydantic, and
all that is wrong is told at once.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, ValidationError

from largemerge.errors import OutputError, shorten
from largemerge.output import REPORT_FILE, check_finished
from largemerge.text_files import read_json

T = TypeVar("T")

EVALUATION_FILE = "evaluation.json"
"""Results of an evaluation, which somebody may have put into the folder."""
OUTSIDE = "outside"
"""Name that a report gives to all tensors outside the blocks."""
HEAD = "head"
"""Name that a report gives to linears of the head that were solved."""

_MAX_PROBLEMS = 8


Number = Annotated[float | None, AfterValidator(lambda value: value if value is None or math.isfinite(value) else None)]
"""A number that may be unknown, which NaN and infinity count as."""


class _Part(BaseModel):
    """Base of all parts of a report: what the page does not use may be anything."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Linear(_Part):
    """How one linear was solved; numbers are `None` where they were not finite."""

    shape: tuple[int, ...] = ()
    shares_gram_with: str = ""
    tokens: dict[str, FiniteFloat] = {}
    solver: str = ""
    condition: Number = None
    residual: Number = None
    fallbacks: tuple[str, ...] = ()
    num_dead_features: int = 0
    shrinkage: Number = None
    directions: dict[str, int] = {}
    directions_wanted: int = 0
    layer_scale: Number = None
    merged_task_vector_norm: Number = None
    relative_distance_to_candidates: dict[str, Number] = {}


class WrittenPart(_Part):
    """A block, the head, or all tensors outside the blocks."""

    linears: dict[str, Linear] = {}
    seconds: dict[str, FiniteFloat] = {}
    bytes_read: int | None = None
    bytes_written: int | None = None
    drift: dict[str, Number] = {}
    quantization_errors: dict[str, Number] = {}


class _InBlock(_Part):
    cosine: Number = None
    distance: Number = None


class _VerifiedCandidate(_Part):
    cosine_of_task_vectors: Number = None
    relative_distance: Number = None
    by_block: dict[str, _InBlock] = {}


class _Verified(_Part):
    candidates: dict[str, _VerifiedCandidate] = {}


class Calibration(_Part):
    """The data of one candidate."""

    num_samples: int | None = None
    tokens: int | None = None


class _Seconds(_Part):
    total: Number = None
    preparation: Number = None
    by_phase: dict[str, FiniteFloat] = {}


class MergedTensor(_Part):
    """How one tensor of a data-free merge came about."""

    copied: str = ""
    merged_otherwise: str = ""


class Report(_Part):
    """`merge_report.json`, as far as the page uses it."""

    config: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    calibration: dict[str, Calibration] = {}
    seconds: _Seconds = _Seconds()
    bytes_read: int | None = None
    bytes_written: int | None = None
    resumed_parts: int = 0
    peak_bytes: dict[str, int] = {}
    retries: tuple[str, ...] = ()
    timeline: tuple[tuple[FiniteFloat, str, str], ...] = ()
    memory_over_time: tuple[tuple[FiniteFloat, int, int], ...] = ()
    ranks: tuple[dict[str, Any], ...] = ()
    verified: _Verified | None = None
    redone_parts: tuple[str, ...] = ()
    before: dict[str, Any] = {}
    drift: dict[str, dict[str, Number]] = {}
    outside: WrittenPart = WrittenPart()
    head: WrittenPart = WrittenPart()
    blocks: dict[str, WrittenPart] | None = None
    tensors: dict[str, MergedTensor] | None = None
    digests: dict[str, Any] = {}


def read_report(out: Path) -> Report:
    """Reads the report in the folder of a finished merge.

    Raises:
        OutputError: If there is no such folder, no finished merge in it, or a report of another shape.
    """
    check_finished(out)
    path = out / REPORT_FILE
    raw = read_json(path, error=OutputError)
    try:
        report = Report.model_validate(raw)
    except ValidationError as error:
        raise OutputError(*_problems(path, error)) from None
    if (report.blocks is None) == (report.tensors is None):
        raise OutputError(
            f"{path} has {'neither' if report.blocks is None else 'both'} blocks and tensors; expected the report of a "
            "merge, which has 'blocks' (regression) or 'tensors' (without data)"
        )
    return report


def read_evaluation(out: Path) -> Mapping[str, Any]:
    """Reads the results of an evaluation that lie in the folder; empty where there are none.

    Raises:
        OutputError: If the file is not a JSON object.
    """
    path = out / EVALUATION_FILE
    if not path.exists():
        return {}
    found: dict[str, Any] = read_json(path, error=OutputError)
    return found


def _problems(path: Path, error: ValidationError) -> list[str]:
    found = [
        f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg'][:1].lower()}{each['msg'][1:]}"
        + (f", found {shorten(repr(each['input']))}" if each["type"] != "missing" else "")
        for each in error.errors(include_url=False)
    ]
    more = f"{path}: {len(found) - _MAX_PROBLEMS} more values are not what a merge writes"
    return found if len(found) <= _MAX_PROBLEMS else [*found[:_MAX_PROBLEMS], more]


class Facts:
    """What the page shows, by block and candidate, under names as short as they can be told apart.

    Args:
        report: The report.
        evaluation: Results of an evaluation, if there are any.

    Attributes:
        report: The report.
        evaluation: Results of an evaluation, if there are any.
        by_regression: Whether it was a merge by regression.
        method: The name of the merging method.
    """

    def __init__(self, report: Report, evaluation: Mapping[str, Any]) -> None:
        self.report, self.evaluation = report, evaluation
        self.by_regression = report.blocks is not None
        self.method = str(report.config.get("merge_method", "unknown method"))

    @cached_property
    def candidates(self) -> dict[str, str]:
        """Short names of the candidates, by name; a base is none of them."""
        verified = self.report.verified.candidates if self.report.verified is not None else {}
        names = [*self.report.calibration, *self.report.drift, *verified]
        if not names:
            names = [str(name) for name in self.report.plan.get("candidates") or self.report.plan.get("models") or ()]
        return short_names(names, "/", at_least=1) if not self.by_regression else dict(zip(names, names, strict=True))

    @cached_property
    def blocks(self) -> dict[str, str]:
        """Short names of the blocks, by name, from the first to the last."""
        verified = self.report.verified.candidates.values() if self.report.verified is not None else ()
        names = [*(self.report.blocks or ()), *(block for each in verified for block in each.by_block)]
        return short_names([name for name in names if name != OUTSIDE], ".", at_least=2)

    @cached_property
    def drift(self) -> dict[str, dict[str, float | None]]:
        """‖h_m − h_e‖ / ‖h_e‖ after each block, by candidate and block; empty where the method does not know it."""
        return {
            self.candidates[name]: {self.blocks[block]: value for block, value in own.items() if block in self.blocks}
            for name, own in self.report.drift.items()
        }

    @cached_property
    def mean_drift(self) -> dict[str, float]:
        """Mean of the drift over the candidates, after each block."""
        found = {}
        for block in self.blocks.values():
            known = [value for own in self.drift.values() if (value := own.get(block)) is not None]
            if known:
                found[block] = statistics.fmean(known)
        return found

    @cached_property
    def drift_growth(self) -> dict[str, float]:
        """By how much the mean drift grows in each block; it begins at 0 in every stack of blocks."""
        found: dict[str, float] = {}
        before: dict[str, float] = {}
        for block, mean in self.mean_drift.items():
            found[block] = mean - before.get(_stack(block), 0.0)
            before[_stack(block)] = mean
        return found

    @cached_property
    def later_growth(self) -> dict[str, float]:
        """The same without the first block of each stack, which begins at 0 and so nearly always grows most."""
        first = {_stack(block): block for block in reversed(self.drift_growth)}
        return {block: value for block, value in self.drift_growth.items() if first[_stack(block)] != block}

    @cached_property
    def distances(self) -> dict[str, dict[str, float]]:
        """How far the merge lies from each candidate, by block and candidate, relative to the weights.

        Of a regression merge, the mean over the linears of a block; else what was measured on a sample of its rows.
        """
        return self._of_linears() if self.distances_are_of_linears else self._verified(lambda each: each.distance)

    @cached_property
    def distances_are_of_linears(self) -> bool:
        """Whether the distances are those of solved linears, not of sampled rows."""
        return bool(self.in_blocks(self._of_linears()))

    @cached_property
    def cosines(self) -> dict[str, dict[str, float]]:
        """Cosine of a candidate's and the merge's task vectors, by block and candidate; empty without a base."""
        return self._verified(lambda each: each.cosine)

    @cached_property
    def linears(self) -> dict[str, tuple[str, Linear]]:
        """All linears that were solved, with their block's short name, by names that begin with it."""
        found = {name.removesuffix(".weight"): (HEAD, each) for name, each in self.report.head.linears.items()}
        for block, part in (self.report.blocks or {}).items():
            short = self.blocks[block]
            for name, each in part.linears.items():
                inside = name.removeprefix(f"{block}.").removesuffix(".weight")
                found[f"{short}.{inside}" if name.startswith(f"{block}.") else name] = (short, each)
        return found

    @cached_property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Seconds by block and stage."""
        return {
            self.blocks[name]: {words(stage): value for stage, value in part.seconds.items()}
            for name, part in (self.report.blocks or {}).items()
            if part.seconds
        }

    @property
    def memory(self) -> list[tuple[str, int, int]]:
        """Kind of memory, bytes planned (0 where that is not known), and the peak that was measured."""
        peak, plan = self.report.peak_bytes, self.report.plan
        planned = {
            "host": peak.get("planned_host", plan.get("peak_bytes")),
            "device": peak.get("planned_device", plan.get("device_bytes")),
            "disk": peak.get("planned_disk"),
        }
        measured = {"host": "host_anonymous", "device": "device", "disk": "disk"}
        return [
            (kind, number if isinstance(number, int) else 0, peak.get(measured[kind], 0))
            for kind, number in planned.items()
            if measured[kind] in peak
        ]

    @property
    def notes(self) -> list[str]:
        """What the plan says that a user should know."""
        found = self.report.plan.get("notes")
        return [note for note in found if isinstance(note, str)] if isinstance(found, list) else []

    @property
    def missing(self) -> list[str]:
        """What a report of this kind could have and this one has not, each with the reason."""
        found = []
        if self.report.verified is None:
            found.append("how much of each candidate is in the output (the merge was told not to measure it)")
        if not self.report.memory_over_time:
            found.append("memory over time (the merge was made by an earlier version)")
        if not self.report.timeline:
            found.append("stages over time (the merge was made by an earlier version, or had nothing left to do)")
        return found

    def in_blocks(self, values: Mapping[str, T]) -> dict[str, T]:
        """Keeps what is of blocks: what lies outside of them is not like them."""
        return {block: values[block] for block in self.blocks.values() if block in values}

    def of_linears(self, value: Callable[[Linear], float | None]) -> dict[str, float]:
        """The largest of a number over the linears of each block, by block."""
        found: dict[str, float] = {}
        for block, linear in self.linears.values():
            number = value(linear)
            if number is not None and math.isfinite(number):
                found[block] = max(number, found.get(block, -math.inf))
        return found

    def _of_linears(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, list[float]]] = {}
        for block, linear in self.linears.values():
            for name, value in linear.relative_distance_to_candidates.items():
                if value is not None:
                    found.setdefault(block, {}).setdefault(self.candidates.get(name, name), []).append(value)
        return {block: {name: statistics.fmean(each) for name, each in own.items()} for block, own in found.items()}

    def _verified(self, value: Callable[[_InBlock], float | None]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        candidates = self.report.verified.candidates if self.report.verified is not None else {}
        order = [*self.blocks.items(), (OUTSIDE, OUTSIDE)]
        for block, short in order:
            own = {
                self.candidates[name]: number
                for name, each in candidates.items()
                if block in each.by_block and (number := value(each.by_block[block])) is not None
            }
            if own:
                found[short] = own
        return found


def short_names(names: Iterable[str], separator: str, *, at_least: int) -> dict[str, str]:
    """Shortens names to their last parts, as few as tell them apart.

    Args:
        names: The names; the same one may come twice.
        separator: What stands between parts.
        at_least: The fewest parts of each.
    """
    whole = list(dict.fromkeys(names))
    split = {name: [part for part in name.split(separator) if part] or [name] for name in whole}
    for length in range(at_least, max(map(len, split.values()), default=0) + 1):
        short = {name: separator.join(parts[-length:]) for name, parts in split.items()}
        if len(set(short.values())) == len(whole):
            return short
    return {name: name for name in whole}


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


def words(stage: str) -> str:
    """The name of a stage as people write it."""
    return stage.replace("_", " ")


def stands_out(values: Mapping[str, float], *, factor: float = 1.5) -> str | None:
    """Names the largest value if it is so many times the median, which must be of three or more; else `None`."""
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(known) < 3:
        return None
    largest = max(known, key=lambda name: known[name])
    middle = statistics.median(known.values())
    return largest if known[largest] > factor * max(middle, 0.0) and known[largest] > 0 else None


def as_json(value: Any) -> str:
    """A value of the report as text, for those who want to see all of it."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def listed(names: Sequence[str], at_most: int = 3) -> str:
    """Names some things, and counts the others."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
