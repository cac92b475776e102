"""What a parameter is for one tensor.

0.5                                  the same everywhere
[0.0, 0.5, 1.0]                      a gradient over the layers, from the first to the last, linear in between
[{filter: mlp, value: 0.3}, {value: 0.5}]    the first whose filter is part of the tensor's name
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Setting = Any
"""A number, truth value or text; a list of them (a gradient); or a list of `{filter, value}`."""


def setting_problems(setting: Setting) -> Iterator[str]:
    """What is wrong with it."""
    if isinstance(setting, Mapping):
        if "value" not in setting or set(setting) - {"filter", "value"}:
            yield f"expected 'value' and maybe 'filter', found {sorted(setting)}"
        else:
            yield from setting_problems(setting["value"])
    elif isinstance(setting, list | tuple):
        conditions = [isinstance(entry, Mapping) for entry in setting]
        if not setting or (any(conditions) and not all(conditions)):
            yield f"expected numbers, or entries of 'filter' and 'value', found {setting!r}"
        for entry in setting:
            yield from setting_problems(entry)
    elif setting is not None and not isinstance(setting, bool | int | float | str):
        yield f"expected a number, a list of numbers, or entries of 'filter' and 'value', found {setting!r}"


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """Its value for a tensor, `None` where no filter fits.

    Args:
        setting: As in the file.
        tensor: Its name.
        t: Where its layer stands among those of its slice: 0 for the first, 1 for the last.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return setting
    if all(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            pattern = entry.get("filter")
            if pattern in (None, "*") or pattern in tensor:
                return evaluate(entry["value"], tensor, t)
        return None
    place = t * (len(setting) - 1)
    first = int(place)
    if not all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in setting):
        return setting[first]
    second = min(len(setting) - 1, first + 1)
    share = place - first
    return (1 - share) * setting[first] + share * setting[second]


@dataclass(frozen=True)
class Levels:
    """The parameters that hold for a slice of the output, from the narrowest level to the widest.

    Attributes:
        sources: Of every source, by its model.
        together: Of the slice, its module, the whole merge.
    """

    sources: Mapping[str, Mapping[str, Setting]]
    together: Sequence[Mapping[str, Setting]] = field(default=())

    def value(self, name: str, tensor: str, t: float, model: str | None = None) -> Any:
        """The parameter for a tensor, `None` where no level has it.

        Args:
            name: Of the parameter.
            tensor: Name of the tensor.
            t: Where its layer stands.
            model: Whose; `None` for what all models have in common.
        """
        own = [self.sources[model]] if model is not None and model in self.sources else []
        for level in (*own, *self.together):
            if name in level:
                value = evaluate(level[name], tensor, t)
                if value is not None:
                    return value
        return None
