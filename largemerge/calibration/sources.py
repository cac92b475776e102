"""Sources of calibration data: a file, a folder or a Hub id becomes a table of rows.

    .jsonl .json .csv .parquet   one row each, read by `datasets`
    .txt                         a row per document (blank lines separate them) or per line
    a folder of images           a row per image, sorted by path
    a folder of data files       a dataset, as on the Hub
    owner/name                   a dataset of the Hub

Rows are read when asked for. `datasets` keeps its own converted copy of tabular files in its cache
(`HF_DATASETS_CACHE`); only the first run pays for it. Files of text are read here: the "text" reader of `datasets`
takes a blank line with spaces in it for text, keeps a byte order mark, and makes a row of every blank line.
.safetensors files are no tables: see `pretokenized.py`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.csv_rows import check_csv_rows, csv_header_problem, names_twice
from largemerge.calibration.folders import (
    IMAGE_SUFFIXES,
    TABLE_BUILDERS,
    image_splits,
    is_image_folder,
    left_out_files,
    list_images,
    names_data_files,
    unreadable_files,
    visible_under,
)
from largemerge.calibration.json_rows import check_json_rows
from largemerge.config_file import nearest
from largemerge.errors import CalibrationError, shorten
from largemerge.text_files import file_problem, first_line, os_reason

FILE_SUFFIXES = (".safetensors", *TABLE_BUILDERS, ".txt")
_REFUSED_WRITING = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.EEXIST)
)
_NO_ROOM = re.compile(r"[Nn]ot enough disk space|No space left on device|[Dd]isk quota exceeded|Read-only file system")
_MAX_PROBLEMS = 5


class Rows(Protocol):
    """Rows by their numbers: a list of dictionaries, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Source:
    """A table of samples.

    Attributes:
        where: Candidate and file, for messages.
        columns: Names of all columns.
        num_rows: Number of rows.
        select: Returns the rows with some columns alone, so that no other column is decoded.
        folder: Folder that relative paths of images start from; `None` where there is no such folder.
        labels: Column of labels that are numbers → their names, where the table knows them.
    """

    where: str
    columns: tuple[str, ...]
    num_rows: int
    select: Callable[[Sequence[str]], Rows]
    folder: Path | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def locate_data(config: CalibrationConfig, owner: str) -> tuple[str, Path | None]:
    """Finds the file or folder that `config.data` means, and checks settings that only some kinds of data have.

    Of a folder of images with folders such as `train` and `test`, that of `config.split` is meant.

    Args:
        config: Settings; `data` is a path, or a Hub dataset id.
        owner: Whose data it is, such as `candidate 'math'`, for messages.

    Returns:
        Owner and data, for messages; and the path, or `None` for a Hub dataset.

    Raises:
        CalibrationError: If there is no file of a kind that can be read, or settings do not apply to it.
    """
    assert config.data is not None, "whoever has no data reads none"
    where = f"{owner}: {config.data}"
    path = Path(config.data).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise CalibrationError(f"{owner}: {config.data[:60]!r} cannot be found: {error.args[-1]}") from None
    if not exists:
        if path.is_symlink():
            raise CalibrationError(f"{where}: {file_problem(path)}; mend the link, or name the file itself")
        if _looks_like_path(config.data):
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise CalibrationError(f"{where}: no such file or folder{nearest(path.name, siblings)}")
        found = None
    else:
        found = path
        if not path.is_file() and not path.is_dir():
            raise CalibrationError(f"{where}: neither a file nor a folder (a pipe or a device); expected one of them")
        if path.is_file() and path.suffix.lower() not in FILE_SUFFIXES:
            raise CalibrationError(
                f"{where}: cannot read {path.suffix or 'a file without suffix'}; "
                f"expected one of {', '.join(FILE_SUFFIXES)}, a folder, or a Hub dataset id"
            )
    splits = image_splits(found) if found is not None else []
    problems = list(_settings_without_effect(config, found, splits))
    if found is not None and config.split in splits:
        found, where = found / config.split, f"{where}, {config.split}"
    if found is not None and found.is_dir():
        problems += itertools.islice(unreadable_files(found), _MAX_PROBLEMS)
        problems += left_out_files(found)
    if problems:
        raise CalibrationError(*(f"{where}: {problem}" for problem in problems))
    return where, found


def open_source(config: CalibrationConfig, where: str, path: Path | None) -> Source:
    """Opens everything but .safetensors as a table.

    Args:
        config: Settings: which part of a dataset, which part of a .txt file is one row, and which rows are taken.
        where: Candidate and data, for messages.
        path: The path that `locate_data` has found; `None` for a Hub dataset.

    Raises:
        CalibrationError: If there is nothing in it, or it cannot be read.
    """
    source = _open_whole(config, where, path)
    return source if config.only is None else _rows_with(source, config.only)


@dataclass(frozen=True)
class _SomeRows:
    """Rows of a table by their place among those that are taken."""

    rows: Rows
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> Any:
        return self.rows[self.numbers[index]]


def _rows_with(source: Source, only: Mapping[str, str | int | bool]) -> Source:
    """Takes the rows whose columns have some values.

    Raises:
        CalibrationError: If there is no such column, label or row.
    """
    problems, wanted = [], dict[str, Any](only)
    for column, value in only.items():
        names = source.labels.get(column)
        if column not in source.columns:
            hint = nearest(column, source.columns)
            if source.columns == ("image",) and source.folder is not None:
                hint = "; of a folder of images, name the folder of a label itself"
            problems.append(f"only: no column {column!r}; the columns are {shorten(list(source.columns))}{hint}")
        elif names is not None and isinstance(value, str):
            if value in names:
                wanted[column] = names.index(value)
            else:
                problems.append(f"only: {column!r} has no label {value!r}{nearest(value, names)}")
    if problems:
        raise CalibrationError(*(f"{source.where}: {problem}" for problem in problems))
    table = source.select(tuple(only))
    numbers = [index for index in range(source.num_rows) if dict(table[index]) == wanted]
    text = ", ".join(f"{column}: {value}" for column, value in only.items())
    if not numbers:
        first = {column: table[0][column] for column in only}
        raise CalibrationError(f"{source.where}: only: no row has {{{text}}}; the first has {shorten(str(first))}")
    where = f"{source.where}, rows with {text}"
    return Source(
        where,
        source.columns,
        len(numbers),
        lambda columns: _SomeRows(source.select(columns), numbers),
        source.folder,
        source.labels,
    )


def _open_whole(config: CalibrationConfig, where: str, path: Path | None) -> Source:
    """Opens a table with all of its rows."""
    if path is None:
        assert config.data is not None
        return _from_datasets(where, None, config.data, config.subset, split=config.split)
    if path.is_file() and path.suffix.lower() == ".txt":
        return _from_list(where, "text", _read_texts(path, config.one_per, where), None)
    if path.is_file():
        _reject_blank_file(path, where)
        check_rows([path], where)
        check_headers([path], where)
        # An empty cell is an empty text, and the word "null" is a word.
        options = {"keep_default_na": False} if path.suffix.lower() == ".csv" else {}
        builder = TABLE_BUILDERS[path.suffix.lower()]
        return _from_datasets(where, path, builder, data_files=glob.escape(str(path)), split=config.split, **options)
    if not is_image_folder(path):
        check_rows(tables_to_check(path), where)
        check_headers([*path.rglob("*.parquet"), *path.rglob("*.csv")], where)
        return _from_datasets(where, path, str(path), config.subset, split=config.split, cache_dir=_cache_of(path))
    return _from_list(where, "image", [str(image) for image in list_images(path)], path)


def _cache_of(path: Path) -> str:
    """Names the cache of a folder of data files: another one for other files.

    `datasets` itself takes two folders of one name for the same, and a changed one for unchanged, where a card
    (README.md) says which files are which split.
    """
    import datasets

    files = sorted(visible_under(path))
    seen = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{digest}")


def _looks_like_path(data: str) -> bool:
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", data) is not None
    return not is_hub_id or Path(data).suffix.lower() in FILE_SUFFIXES


def _settings_without_effect(config: CalibrationConfig, path: Path | None, splits: Sequence[str]) -> Iterator[str]:
    suffix = path.suffix.lower() if path is not None and path.is_file() else ""
    is_dataset = path is None or (path.is_dir() and not is_image_folder(path))
    if config.subset is not None and not is_dataset:
        yield "subset: only datasets have subsets; remove it"
    inside = path / str(config.split) if path is not None else None
    is_folder = inside is not None and inside.is_dir()
    if splits and config.split not in splits:
        instead = f"; or remove it, and name the folder {inside}" if is_folder else ""
        yield f"split: {config.split!r} is none of the folder's splits; expected one of {', '.join(splits)}{instead}"
    elif config.split != "train" and not splits and not is_dataset and suffix not in TABLE_BUILDERS:
        instead = f", and name the folder {inside}" if is_folder else ""
        yield f"split: {config.split!r}, but only datasets have splits; remove it{instead}"
    if config.only is not None and suffix == ".safetensors":
        yield "only: ready-made tensors have no columns; remove it"
    if config.one_per != "document" and suffix != ".txt":
        yield f"one_per: {config.one_per!r}, but this is for .txt files; remove it"


def _from_list(where: str, column: str, values: list[str], folder: Path | None) -> Source:
    rows = [{column: value} for value in values]
    return Source(where, (column,), len(rows), lambda columns: rows, folder)


def _read_texts(path: Path, one_per: str, where: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{where}: not readable as UTF-8 text: {error}") from None
    texts = content.split("\n") if one_per == "line" else re.split(r"\n(?:[^\S\n]*\n)+", content)
    texts = [text.strip("\r\n") for text in texts if text.strip()]
    if not texts:
        raise CalibrationError(f"{where}: empty; expected at least one {one_per}")
    return texts


def tables_to_check(path: Path) -> list[Path]:
    """Lists the files of a table whose rows are checked: the file itself, or those of a folder."""
    if path.is_file():
        return [path]
    # A card may name another separator of cells, and which files are read.
    suffixes = set(_ROW_CHECKS) - ({".csv"} if names_data_files(path / "README.md") else set())
    return sorted(file for file in visible_under(path) if file.suffix.lower() in suffixes)


def check_rows(paths: Sequence[Path], where: str, most: int | None = None) -> None:
    """Checks the rows of JSON and CSV files, whose reader would not say which is at fault, or would crash.

    Args:
        paths: The files; others are passed over.
        where: Candidate and data, for messages.
        most: Characters of a file after which no more of its rows are looked at.

    Raises:
        CalibrationError: If a row is at fault; it names the first.
    """
    for path in paths:
        check = _ROW_CHECKS.get(path.suffix.lower())
        problem = check(path, most) if check is not None and path.is_file() else None
        if problem is not None:
            inside = f": {path}" if len(paths) > 1 or str(path) not in where else ""
            raise CalibrationError(f"{where}{inside}: {problem}")


def check_headers(paths: Sequence[Path], where: str) -> None:
    """Checks the columns of Parquet and CSV files, of which nothing but the header or footer is read.

    Raises:
        CalibrationError: If a Parquet file is broken or empty, or a column stands twice; it names several files.
    """
    checks = {".parquet": _parquet_problem, ".csv": csv_header_problem}
    problems = []
    for path in paths:
        check = checks.get(path.suffix.lower())
        problem = check(path) if check is not None and path.is_file() else None
        if problem is not None:
            inside = "" if str(path) in where else f": {path}"
            problems.append(f"{where}{inside}: {problem}")
    if problems:
        raise CalibrationError(*problems[:_MAX_PROBLEMS])


def _parquet_problem(path: Path) -> str | None:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # Arrow raises several types for what is broken
        return f"no whole Parquet file: it is damaged, cut off, or of another format ({first_line(error, 160)})"
    if not names or not num_rows:
        columns = shorten([str(name) for name in names])
        return f"empty; expected at least one sample, found the columns {columns}, and no rows"
    return names_twice(names)


_ROW_CHECKS: Mapping[str, Callable[[Path, int | None], str | None]] = {
    ".jsonl": check_json_rows,
    ".json": check_json_rows,
    ".csv": check_csv_rows,
}


def _reject_blank_file(path: Path, where: str) -> None:
    try:
        with path.open("rb") as file:
            is_blank = not any(line.strip() for line in file)
    except OSError as error:
        raise CalibrationError(f"{where}: cannot be read: {error}") from None
    if is_blank:
        raise CalibrationError(f"{where}: empty; expected at least one sample")


def _from_datasets(where: str, path: Path | None, *arguments: Any, **options: Any) -> Source:
    import datasets

    try:
        with _quiet_datasets():
            table = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # whatever `datasets` and its readers raise, it is about the user's data
        raise CalibrationError(f"{where}: {_why_unreadable(path, error, arguments, options)}") from None
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            # Opened by us: with our own message, and only if drawn.
            table = table.cast_column(column, datasets.Image(decode=False))
    folder = path.parent if path is not None and path.is_file() else path
    labels = {
        name: tuple(feature.names)
        for name, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    columns = tuple(table.column_names)
    return Source(where, columns, len(table), lambda columns: table.select_columns(columns), folder, labels)


def cache_problem(error: BaseException, path: Path | None) -> str | None:
    """Says what is wrong with the cache of `datasets` if that, and not the data, is why a table cannot be opened.

    Args:
        error: What `datasets` has raised.
        path: The data.

    Returns:
        The cache's folder, the cause, and what to do; `None` if the data is at fault.
    """
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    seen: BaseException | None = error
    while seen is not None:
        of_data = of_cache = False
        if isinstance(seen, OSError) and isinstance(seen.filename, str):
            of_data = path is not None and Path(seen.filename).is_relative_to(path)
            of_cache = Path(seen.filename).is_relative_to(cache) or cache.is_relative_to(seen.filename)
        refused = isinstance(seen, OSError) and seen.errno in _REFUSED_WRITING
        if not of_data and (of_cache or refused or _NO_ROOM.search(str(seen))):
            return (
                f"{cache}, the cache that tables are converted into, cannot be used: "
                f"{shorten(os_reason(seen), 160)}; make room there, or set HF_DATASETS_CACHE to a folder that has room "
                "and can be written"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _why_unreadable(path: Path | None, error: Exception, arguments: Sequence[Any], options: dict[str, Any]) -> str:
    from datasets.exceptions import DatasetGenerationError

    of_cache = cache_problem(error, path)
    if of_cache is not None:
        return of_cache
    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    split = str(options["split"])
    if isinstance(error, UnicodeDecodeError):
        return f"not readable as UTF-8 text: {error}"
    told = in_our_words(str(error), split)
    if told is not None:
        return told
    reason = f"{type(error).__name__}: {first_line(error, 160)}"
    if path is None:
        subset = arguments[1] if len(arguments) > 1 else None
        return (
            "no such file or folder here, and the Hub has no such dataset that can be loaded "
            f"(id {arguments[0]!r}, subset {subset!r}, split {split!r}): {reason}"
        )
    if path.is_dir() and isinstance(error, FileNotFoundError):
        return (
            f"neither images ({', '.join(IMAGE_SUFFIXES)}) nor data files ({', '.join(TABLE_BUILDERS)}) in this folder"
        )
    return f"cannot be read: it is damaged, or mixes types of values that no table holds ({reason})"


_MEANINGS: tuple[tuple[str, str], ...] = (
    (r"corresponds to no data", "empty; expected at least one sample in split {split!r}"),
    (
        r"Unknown split .*Should be one of (.*?)\.?$",
        "split: {split!r} is not there; expected one of {0}, or a part of one such as 'train[:100]'",
    ),
    (
        r"Split name should match|Unrecognized instruction|slice boundaries|[Rr]ead ?[Ii]nstruction|Requested slice",
        "split: {split!r} is no split; expected a name, or a part such as 'train[:100]' or 'train[10%:20%]'",
    ),
    (r"BuilderConfig (.*) not found. Available: (.*)", "subset: {0} is not there; expected one of {1}"),
    (r"Column\(/(.*)\) was specified twice", "the key {0!r} stands twice in one object; remove one of them"),
    (
        r"Column\(/(.*)\) changed from (\w+) to (\w+) in row (\d+)",
        "row {3}: {0!r}: expected values of one type, found a {2} after a {1}",
    ),
    (r"Number too big", "a number is too large; expected numbers up to 1.8e308"),
    (r"surrogate", "half of a character, such as \\ud800, stands in a text; write whole characters"),
    (
        r"Expected (\d+) fields in line (\d+), saw (\d+)",
        "line {1} has {2} cells, expected {0} as before; put cells that have commas in double quotes",
    ),
    (r"EOF inside string starting at row (\d+)", 'a double quote opens in row {0} and is never closed; add a second "'),
    (
        r"Couldn't cast|column names don't match|All the data files must have the same columns",
        "its files have other columns, or values of other types, than each other; expected the same in all",
    ),
)
"""Messages of `datasets`, Arrow and pandas, and what they mean."""


def in_our_words(message: str, split: str) -> str | None:
    """Says what a message of the libraries that read tables means; `None` for those that nobody has seen yet."""
    for pattern, meaning in _MEANINGS:
        found = re.search(pattern, message)
        if found is not None:
            return meaning.format(*map(shorten, found.groups("")), split=split)
    return None


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps progress bars and log lines of `datasets` away: our own errors say what is wrong."""
    import datasets
    from datasets.utils import are_progress_bars_disabled

    verbosity, had_bars = datasets.logging.get_verbosity(), not are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
