"""Folders of calibration data: what in them is images, tables, neither, or would be left out in silence.

    a folder ─┬─► is_image_folder, list_images ──► images
              ├─► unreadable_files, left_out_files ──► problems, before anything is read
              └─► folder_notes: what lies beside the images

Hidden files and folders are passed over everywhere.
"""

from __future__ import annotations

import csv
import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from largemerge.calibration.csv_rows import long_cells
from largemerge.config_file import WARNING
from largemerge.errors import shorten
from largemerge.text_files import file_problem
from largemerge.units import counted

TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables that say which images of a folder are samples, and what belongs to each of them."""
SPLITS = frozenset(("train", "test", "val", "valid", "validation", "dev"))
"""Names of folders that are splits of a folder of images, not one of its labels."""
_FOLDER_FORMATS = {
    **TABLE_BUILDERS,
    **{".txt": "text", ".tsv": "tsv", ".arrow": "arrow", ".xml": "xml", ".xlsx": "xlsx"},
    **{".gz": "gz", ".zst": "zst", ".zip": "zip", ".tar": "tar", ".bz2": "bz2", ".xz": "xz"},
}
"""Suffixes of files that the reader of folders may take for data, and their kinds; it takes one kind of them."""
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_NO_IMAGES = frozenset((".pdf", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".iim"))
"""Suffixes that Pillow has for what is no single image: documents, films, and tables of numbers."""
_ARRAYS = frozenset((".npy", ".npz"))
_COMMON_BESIDE = re.compile(r"(readme|licen[cs]e|notice|citation|copying|thumbs\.db|desktop\.ini)\b", re.IGNORECASE)
_FILE_NAMES = re.compile(r"(^|_)file_names?$")


def is_image_folder(path: Path) -> bool:
    """Whether a folder is a table of images alone.

    A folder with images and a `metadata` file beside them (captions, in the `imagefolder` layout) is a dataset.
    """
    if not path.is_dir():
        return False
    has_metadata = any((path / name).is_file() for name in METADATA_FILES)
    return not has_metadata and any(_images_under(path))


def image_splits(path: Path) -> list[str]:
    """Lists the splits of a folder of images: the folders in it, where all that hold images are called like splits."""
    if not is_image_folder(path):
        return []
    beside = [each for each in path.iterdir() if not each.name.startswith(".")]
    folders = [each.name for each in beside if each.is_dir() and any(_images_under(each))]
    has_images = any(each.suffix.lower() in IMAGE_SUFFIXES and each.is_file() for each in beside)
    return sorted(folders) if SPLITS.issuperset(folders) and not has_images else []


def folder_notes(path: Path | None, where: str) -> tuple[str, ...]:
    """Notes on what lies in a folder with images and is not read.

    Args:
        path: The path that `locate_data` has found.
        where: Candidate and data, for messages.
    """
    files = [file for file in visible_under(path) if file.is_file()] if path is not None and path.is_dir() else []
    if path is None or not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return ()
    notes = []
    is_dataset = not is_image_folder(path)
    if is_dataset:
        named = _images_of_metadata(path)
        images = [file for file in files if _is_image(file)]
        unnamed = sorted(str(file.relative_to(path)) for file in images if file not in named) if named else []
        if unnamed:
            notes.append(
                f"{WARNING}{where}: {counted(len(unnamed), 'image')} of {len(images)} not used, for no metadata file "
                f"names {'it' if len(unnamed) == 1 else 'them'}: {_some(unnamed)}"
            )
    others = sorted(
        str(file.relative_to(path))
        for file in files
        if not _is_image(file)
        and not _COMMON_BESIDE.match(file.name)
        and not (is_dataset and file.name in METADATA_FILES)
    )
    if others:
        notes.append(
            f"{where}: {counted(len(others), 'file')} beside the images not read: {_some(others)}. Of tables, a "
            f"{' or '.join(METADATA_FILES)} in the folder itself, with a column file_name, belongs to its images"
        )
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shorten, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_image(file: Path) -> bool:
    """Whether a file has the name of an image, of a format that is read or not."""
    from PIL import Image

    Image.init()
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES or (mimetypes.guess_type(file.name)[0] or "").startswith("image/"):
        return True
    return suffix in Image.registered_extensions() and suffix not in _NO_IMAGES


def _images_of_metadata(folder: Path) -> set[Path]:
    """Lists the files that the metadata of a folder names; none where that cannot be read, which its reader tells."""
    named: set[Path] = set()
    try:
        for path in visible_under(folder):
            if path.name in METADATA_FILES and path.is_file():
                named.update(path.parent / name for name in _file_names(path))
    except Exception:  # whatever is wrong with it, whoever reads all of it says so
        return set()
    return {Path(os.path.normpath(path)) for path in named}


def _file_names(path: Path) -> Iterator[str]:
    """Yields the values of columns such as `file_name` and `mask_file_names` of a metadata file."""
    rows: Iterable[Mapping[str, Any]]
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        names = [name for name in parquet.read_schema(path).names if _FILE_NAMES.search(name)]
        rows = parquet.read_table(path, columns=names).to_pylist()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file, long_cells():
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    for row in rows:
        for column, value in row.items():
            if _FILE_NAMES.search(column):
                yield from (value if isinstance(value, list) else [value] if isinstance(value, str) else [])


def list_images(path: Path) -> list[Path]:
    """Lists all images under a folder, sorted; hidden files and folders are passed over."""
    return sorted(_images_under(path))


def _images_under(path: Path) -> Iterator[Path]:
    for file in visible_under(path):
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file():
            yield file


def unreadable_files(path: Path) -> Iterator[str]:
    """Yields what has the name of an image or table and cannot be read: readers of folders pass over it in silence."""
    for file in sorted(visible_under(path)):
        if file.suffix.lower() not in (*IMAGE_SUFFIXES, *TABLE_BUILDERS) or file.is_dir():
            continue
        problem = file_problem(file)
        if problem is not None:
            yield f"{file} {problem}; mend it, or take it away"


def left_out_files(path: Path) -> Iterator[str]:
    """Yields what would be left out in silence: images that are not read, and all formats but one."""
    if is_image_folder(path):
        others = Counter(
            file.suffix.lower()
            for file in visible_under(path)
            if (_is_image(file) or file.suffix.lower() in _ARRAYS) and file.is_file()
        )
        unread = {suffix: count for suffix, count in others.items() if suffix not in IMAGE_SUFFIXES}
        if unread:
            yield (
                f"{_counted(unread)} beside images of formats that are read ({', '.join(IMAGE_SUFFIXES)}); convert "
                "them, or take them away"
            )
        return
    names_its_files = names_data_files(path / "README.md")
    has_images = any(_images_under(path))  # with a file of metadata beside them, which makes one dataset
    formats = Counter(
        file.suffix.lower()
        for file in visible_under(path)
        if file.suffix.lower() in _FOLDER_FORMATS and file.name not in _NOT_DATA and file.is_file()
    )
    if not names_its_files and not has_images and len({_FOLDER_FORMATS[suffix] for suffix in formats}) > 1:
        yield (
            f"a folder of several formats, {_counted(formats)}, of which the reader of folders would take one; name "
            "one file, or leave files of one format in it"
        )


def _counted(suffixes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {suffix} {'file' if count == 1 else 'files'}" for suffix, count in suffixes.items())


def names_data_files(card: Path) -> bool:
    """Whether a dataset's card says which files belong to it, under `configs`."""
    if not card.is_file():
        return False
    return re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


def visible_under(path: Path) -> Iterator[Path]:
    """Yields what lies under a folder, hidden files and folders left out."""
    for file in path.rglob("*"):
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file
