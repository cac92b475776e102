"""Checks of an image processor's settings, before the library that obeys them sees them.

    preprocessor_config.json, processor_config.json ──► JSON ──► types and ranges, by key ──► AutoImageProcessor

The library takes what a file says: images of 10⁶ by 10⁶ pixels are made, pixels are divided by a deviation of 0, and
most mistakes end as errors of NumPy in the midst of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from largemerge.errors import CheckpointError, shorten
from largemerge.text_files import read_json

SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json")
MAX_SIDE, MAX_PIXELS = 16_384, 1 << 26
"""Pixels of an image's side, and of a whole image, that a processor may be told to make."""
MAX_ABSOLUTE = 1e30
"""Largest floating-point input; the square of anything larger is infinite in float32."""
MAX_ABSOLUTE_PIXEL = 1e6
"""Largest pixel. Processors make numbers near 1, or up to 65,535 where they leave them as they are; and what is far
beyond that is not infinite by itself, but becomes so in the midst of a model."""

_LEAST_SCALE, _LARGEST_SCALE = 1e-6, 1e6
_SIZES = ("size", "crop_size", "pad_size", "mask_size", "mask_pad_size", "max_image_size", "patch_size")
_COUNTS = ("merge_size", "temporal_patch_size", "min_pixels", "max_pixels", "size_divisor", "max_image_tiles")
_OF_PIXELS = ("merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
"""Settings of processors whose `shortest_edge` and `longest_edge` are numbers of pixels of the whole image."""
_RESAMPLERS = range(6)


def largest_of(name: str) -> float:
    """Largest number that a forward argument may have."""
    return MAX_ABSOLUTE_PIXEL if name.startswith("pixel_values") else MAX_ABSOLUTE


def check_processor_files(folder: Path, processor: Any = None) -> None:
    """Checks the settings of a folder's image processor; unknown settings may be anything that is finite.

    Args:
        folder: The folder.
        processor: What was loaded from there, once it is: its edges are then known to be sides, or numbers of pixels.

    Raises:
        CheckpointError: If a file is no JSON object, or a setting has a wrong type or range; it names all mistakes.
    """
    by_area = processor is None or any(hasattr(processor, name) for name in _OF_PIXELS)
    problems: list[str] = []
    for name in SETTINGS_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = read_json(path)
        except CheckpointError as error:
            problems += error.problems
            continue
        inner = settings.get("image_processor") if name == "processor_config.json" else settings
        prefix = "image_processor." if name == "processor_config.json" else ""
        if inner is not None and not isinstance(inner, Mapping):
            problems.append(f"{path}: image_processor: expected keys and values, found {shorten(repr(inner))}")
        elif inner is not None:
            problems += [f"{path}: {prefix}{problem}" for problem in _problems_of(inner, by_area)]
    if problems:
        raise CheckpointError(*problems)


def _problems_of(settings: Mapping[str, Any], by_area: bool) -> Iterator[str]:
    """Yields what is wrong with the settings of an image processor, by key."""
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        yield from _unless(settings, key, lambda value: isinstance(value, str), "the name of a class")
    if not isinstance(settings.get("auto_map", {}), Mapping):
        yield f"auto_map: expected names of classes by their kinds, found {shorten(repr(settings['auto_map']))}"
    for key, value in settings.items():
        if key.startswith("do_"):
            yield from _unless(settings, key, lambda value: value in (True, False), "true or false")
        if _has_no_number(value):
            yield f"{key}: expected finite numbers, found {shorten(repr(value))}"
    for key in _SIZES:
        if settings.get(key) is not None:
            yield from _size_problems(key, settings[key], by_area)
    for key in _COUNTS:
        yield from _unless(settings, key, lambda value: _is_whole(value, MAX_PIXELS), f"1 to {MAX_PIXELS:,}")
    yield from _unless(
        settings,
        "resample",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value in _RESAMPLERS,
        f"the number of one of Pillow's filters, {_RESAMPLERS[0]} to {_RESAMPLERS[-1]}",
    )
    yield from _unless(settings, "crop_pct", lambda value: _is_number(value) and 0 < value <= 1, "more than 0, up to 1")
    yield from _scale_problems(settings)


def _unless(settings: Mapping[str, Any], key: str, is_right: Callable[[Any], bool], expected: str) -> Iterator[str]:
    """Yields a problem where a setting is there and not right."""
    value = settings.get(key)
    if value is not None and not is_right(value):
        yield f"{key}: expected {expected}, found {shorten(repr(value))}"


def _size_problems(key: str, size: Any, by_area: bool) -> Iterator[str]:
    """Yields what is wrong with a size: a number, a pair, or sides by name."""
    sides: dict[str, Any]
    if isinstance(size, Mapping):
        sides = {f"{key}.{name}": value for name, value in size.items() if value is not None}
    elif isinstance(size, list) and len(size) == 2:
        sides = {f"{key}[{place}]": value for place, value in enumerate(size)}
    else:
        sides = {key: size}
    if not sides:
        yield f"{key}: expected a size such as {{'height': 224, 'width': 224}}, found {shorten(repr(size))}"
    wrong = False
    for name, value in sides.items():
        if name.endswith("_pixels") or (name.endswith("_edge") and len(sides) == 2 and by_area):
            most = MAX_PIXELS
        else:
            most = MAX_SIDE if len(sides) == 2 and not name.endswith("_edge") else math.isqrt(MAX_PIXELS)
        if not _is_whole(value, most):
            wrong = True
            yield f"{name}: expected a whole number from 1 to {most:,}, found {shorten(repr(value))}"
    is_area = len(sides) == 2 and not any(name.endswith(("_edge", "_pixels")) for name in sides)
    if is_area and not wrong and math.prod(sides.values()) > MAX_PIXELS:
        yield f"{key}: expected {MAX_PIXELS:,} pixels at most, found {' x '.join(map(str, sides.values()))}"


def _scale_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the numbers that pixels are scaled by, as far as they are used."""
    scale = f"a number from {_LEAST_SCALE:g} to {_LARGEST_SCALE:g}"
    if settings.get("do_rescale") is not False:
        yield from _unless(settings, "rescale_factor", _is_scale, scale)
    if settings.get("do_normalize") is False:
        return
    lengths = {}
    for key, is_right, expected in (
        ("image_mean", _is_mean, f"a number from {-_LARGEST_SCALE:g} to {_LARGEST_SCALE:g}"),
        ("image_std", _is_scale, scale),
    ):
        value = settings.get(key)
        if isinstance(value, list):
            lengths[key] = len(value)
            if len(value) not in (1, 3):
                yield f"{key}: expected 3 numbers, one a colour (or 1 for grey images), found {len(value)}"
            elif not all(map(is_right, value)):
                yield f"{key}: expected {expected} for each colour, found {shorten(repr(value))}"
        else:
            yield from _unless(settings, key, is_right, f"{expected}, or one a colour")
    if set(lengths.values()) == {1, 3}:
        found = " and ".join(map(str, lengths.values()))
        yield f"image_mean, image_std: expected as many numbers in both, found {found}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_mean(value: Any) -> bool:
    return _is_number(value) and abs(value) <= _LARGEST_SCALE


def _is_scale(value: Any) -> bool:
    return _is_number(value) and _LEAST_SCALE <= value <= _LARGEST_SCALE


def _has_no_number(value: Any) -> bool:
    """Whether NaN or infinity stands anywhere in a setting; JSON has been checked not to be deep."""
    if isinstance(value, Mapping):
        return any(map(_has_no_number, value.values()))
    if isinstance(value, list):
        return any(map(_has_no_number, value))
    return isinstance(value, float) and not math.isfinite(value)
