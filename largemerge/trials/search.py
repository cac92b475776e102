"""A search over ranges of settings by optuna, whose TPE sampler proposes one trial after the other.

    Proposals.ask ──► settings ──► a trial, merged and measured ──► Proposals.tell ──► ask ──► …

The first ten proposals are random; each later one is drawn where good trials are denser than bad ones (Bergstra et al.,
"Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; Akiba et al., "Optuna", KDD 2019). The sampler is seeded,
and knows nothing but what it has proposed and what came of it. So nothing of it is kept on disk: a later run asks again
from the beginning, is told what the folder has noted, and comes to the same proposals.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from largemerge.trials.settings import Range

_SEED = 0
_DIGITS = 4
"""Digits of a proposal that count, of its number or of the width of its range; more would only make names long."""


def optuna_problem() -> str | None:
    """Says that optuna is missing; `None` where it is installed."""
    if importlib.util.find_spec("optuna") is not None:
        return None
    return "--search: needs optuna, which is not installed; pip install 'largemerge[optuna]'"


@dataclass
class Proposals:
    """Settings that are proposed by one study of optuna.

    Attributes:
        ranges: Where to look, by setting; the order matters to what is proposed.
        higher_is_better: Whether more of the objective is better.
    """

    ranges: Mapping[str, Range]
    higher_is_better: bool
    _study: Any = field(init=False, repr=False)
    _asked: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        import optuna

        with _quiet():
            self._study = optuna.create_study(
                direction="maximize" if self.higher_is_better else "minimize",
                sampler=optuna.samplers.TPESampler(seed=_SEED),
            )

    def ask(self) -> dict[str, int | float]:
        """Proposes settings, with few digits; what came of them is to be told before the next."""
        with _quiet():
            self._asked = self._study.ask({key: _distribution(each) for key, each in self.ranges.items()})
        return {key: _rounded(self._asked.params[key], each) for key, each in self.ranges.items()}

    def tell(self, objective: float | None) -> None:
        """Tells what came of the last proposal; `None` where the trial failed."""
        from optuna.trial import TrialState

        with _quiet():
            if objective is None:
                self._study.tell(self._asked, state=TrialState.FAIL)
            else:
                self._study.tell(self._asked, objective)


def _distribution(limits: Range) -> Any:
    """A range as optuna has it."""
    from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(limits.low, int) and isinstance(limits.high, int):
        return IntDistribution(limits.low, limits.high, log=limits.log)
    return FloatDistribution(limits.low, limits.high, log=limits.log)


def _rounded(value: float, limits: Range) -> int | float:
    """A proposal with fewer digits, inside its range."""
    if isinstance(value, int):
        return value
    if limits.log:
        short = float(f"{value:.{_DIGITS}g}")
    else:
        short = round(value, _DIGITS - 1 - math.floor(math.log10(limits.high - limits.low)))
    return min(max(short, limits.low), limits.high)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps optuna from telling of every study, and leaves it afterwards as loud as it was."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
