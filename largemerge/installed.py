"""What is installed beside this package: of versions that it works with, or a sentence that says what to install.

The list is that of the package's own metadata, from `setup.cfg`. It is read before anything large is imported, which
takes some milliseconds. Extras are not looked at: whoever never uses them may have any version.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from functools import cache

from largemerge.errors import InstallationError


def check_installed(requirements: Iterable[str] | None = None) -> None:
    """Checks that all packages that are needed are there, in versions that fit.

    Args:
        requirements: What is needed, such as `torch<3,>=2.9`; by default what the metadata of this package lists.
            Where there is none, as for sources that are not installed, nothing is checked.

    Raises:
        InstallationError: With what was found, what is needed, and how to install it.
    """
    problems = _own_problems(tuple(_own_requirements())) if requirements is None else tuple(_problems(requirements))
    if problems:
        raise InstallationError(*problems)


def _own_requirements() -> list[str]:
    from importlib import metadata

    try:
        return metadata.requires("largemerge") or []
    except metadata.PackageNotFoundError:
        return []


@cache  # read once where a process runs several commands
def _own_problems(listed: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_problems(listed))


def _problems(listed: Iterable[str]) -> Iterator[str]:
    from importlib import metadata

    try:
        from packaging.requirements import Requirement
        from packaging.version import InvalidVersion, Version
    except ImportError:
        yield "packaging is not installed, and largemerge needs it; pip install packaging"
        return
    for text in listed:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        install = f"pip install '{needed.name}{needed.specifier}'"
        wanted = f"largemerge needs {needed.name}{_spaced(str(needed.specifier))}"
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            yield f"{needed.name} is not installed in this Python {platform.python_version()}; {wanted}; {install}"
            continue
        try:
            # A vendor's build such as 2.9.0a0+nv25.10 counts as the release that it is built for.
            version = Version(Version(found).base_version)
        except (InvalidVersion, TypeError):
            continue  # a build of someone's own, who knows
        if not needed.specifier.contains(version, prereleases=True):
            yield f"{needed.name} {found} is installed, and {wanted}; {install}"


def _spaced(specifier: str) -> str:
    """Writes `<3,>=2.9` as ` >=2.9, <3`."""
    return "".join(f" {part}" if not index else f", {part}" for index, part in enumerate(_lower_first(specifier)))


def _lower_first(specifier: str) -> list[str]:
    return sorted((part for part in specifier.split(",") if part), key=lambda part: not part.startswith(">"))
