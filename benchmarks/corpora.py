"""Four kinds of text that any Debian machine can get: what the experts learn, and are measured on.

    python    the sources of Python's own library
    german    manual pages in German      (Debian packages manpages-de, manpages-de-dev)
    french    manual pages in French      (manpages-fr, manpages-fr-dev)
    headers   C headers of the kernel     (linux-libc-dev)

A file belongs to one split by the hash of its name; what two files have in common is dropped from
the smaller splits. Files are cut into documents of some 2000 characters, at line ends.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT_CHARS = 2000
SPLIT_OF_FIFTH = {0: "heldout", 1: "calibration"}
KINDS = ("python", "german", "french", "headers")
PACKAGES = {
    "german": ("manpages-de", "manpages-de-dev"),
    "french": ("manpages-fr", "manpages-fr-dev"),
    "headers": ("linux-libc-dev",),
}

# Sections in which translated pages say who translated them: the same words on every page.
CREDITS = ("ÜBERSETZUNG", "TRADUCTION")
PARAGRAPH_MACROS = {"PP", "P", "LP", "TP", "IP", "HP", "RS", "RE", "sp", "nf", "fi", "EX", "EE"}
ROFF_ESCAPES = {
    r"\-": "-", r"\e": "\\", r"\\": "\\", r"\ ": " ", r"\~": " ", r"\&": "", r"\:": "", r"\%": "", r"\,": "", r"\/": "",
    r"\[aq]": "'", r"\(aq": "'", r"\(cq": "'", r"\[dq]": '"', r"\[bu]": "•", r"\(bu": "•", r"\[ha]": "^", r"\[ti]": "~",
    r"\[en]": "–", r"\[em]": "—", r"\(+-": "±", r"\(rs": "\\", r"\[rs]": "\\",
}  # fmt: skip
ROFF_ESCAPE = re.compile(r"\\(?:f\[[^]]*\]|f\(..|f.|\[[^]]*\]|\(..|.)")


@dataclass(frozen=True)
class Corpus:
    """The documents of one kind of text, in three splits that share no file."""

    train: tuple[str, ...]
    """All documents of three files in five."""
    calibration: tuple[str, ...]
    """One document from the middle of each of one file in five, or a few."""
    heldout: tuple[str, ...]
    """The same of the last fifth."""


def load_corpus(kind: str, packages: Path, calibration_per_file: int = 1) -> Corpus:
    """Reads one kind of text.

    Args:
        kind: One of `KINDS`.
        packages: Folder for downloaded Debian packages; those already there are not asked for again.
        calibration_per_file: Documents of each file for calibration at most. First comes one of every file, then the
            second ones, and so on.

    Returns:
        The documents, in an order that depends on file names alone.
    """
    train: list[str] = []
    inner: dict[str, list[list[str]]] = {"calibration": [], "heldout": []}
    for digest, text in sorted((_digest(name), text) for name, text in _files(kind, packages)):
        documents = list(_documents(text))
        if not documents:
            continue
        split = SPLIT_OF_FIFTH.get(int(digest, 16) % 5, "train")
        if split == "train":
            train += documents
        else:
            inner[split].append(_from_the_middle(documents))
    trained = set(train)
    calibration = [
        file[number]
        for number in range(calibration_per_file)
        for file in inner["calibration"]
        if number < len(file) and file[number] not in trained
    ]
    seen = trained.union(calibration)
    heldout = [file[0] for file in inner["heldout"] if file[0] not in seen]
    return Corpus(tuple(train), tuple(calibration), tuple(heldout))


def _from_the_middle(documents: list[str]) -> list[str]:
    """The middle one first: the head of a file is often a licence, and so is its end."""
    middle = len(documents) // 2
    return [documents[place] for place in sorted(range(len(documents)), key=lambda place: abs(place - middle))]


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _documents(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARS:
            yield "".join(lines)
            lines, size = [], 0


def _files(kind: str, packages: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of all files of a kind."""
    if kind == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if name.parts[0] != "site-packages":
                yield str(name), path.read_text(encoding="utf-8", errors="ignore")
        return
    for package in PACKAGES[kind]:
        root = _unpacked(package, packages)
        for path in root.rglob("*.h" if kind == "headers" else "*.gz"):
            if path.is_symlink():
                continue
            if kind == "headers":
                yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="ignore")
            elif "man" in path.parts:
                with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as page:
                    yield str(path.relative_to(root)), plain_text(page.read())


def _unpacked(package: str, packages: Path) -> Path:
    """The folder with a Debian package's files. Unpacked, not installed: container images drop manual pages."""
    root = packages / package
    if root.is_dir():
        return root
    packages.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "--quiet", package], cwd=packages, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"cannot download the Debian package {package} ({error}); try `apt-get update` first"
        ) from None
    (archive,) = packages.glob(f"{package}_*.deb")
    partial = packages / f"{package}.partial"
    partial.mkdir(exist_ok=True)
    subprocess.run(["dpkg-deb", "--extract", archive, partial], check=True)
    partial.rename(root)
    return root


def plain_text(roff: str) -> str:
    """The text of a manual page written with the `man` macros; other requests and comments are dropped."""
    lines: list[str] = []
    for line in roff.splitlines():
        if not line.startswith((".", "'")):
            lines.append(ROFF_ESCAPE.sub(_escape, line))
            continue
        macro, _, arguments = line[1:].strip().partition(" ")
        arguments = ROFF_ESCAPE.sub(_escape, arguments).strip().strip('"')
        if macro in ("SH", "SS"):
            if arguments in CREDITS:
                break
            lines += ["", arguments, ""]
        elif macro == "IP" and arguments:
            lines += ["", arguments.partition('"')[0]]
        elif macro in PARAGRAPH_MACROS:
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _escape(match: re.Match[str]) -> str:
    return ROFF_ESCAPES.get(match[0], "")
