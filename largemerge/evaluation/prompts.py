"""Class names and prompt templates, from which CLIP's text encoder makes a zero-shot classifier.

    a packaged name ──┐
                      ├──► names and templates, checked ──► Prompts ──► texts: one list for each class, by label
    a user's file   ──┘

Each class name is put into each template; the mean of the texts' normalised features is the class's row of the
classifier (Radford et al. 2021, section 3.1.4, https://arxiv.org/abs/2103.00020). The place of a name is its label, so
that a name too many or too few, or two that change places, give a number that looks right and is not.

`class_names/` has a file for each of twenty data sets, with its source, and with what other sources have otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from largemerge.config_file import Strict, explain, grouped, nearest, read_yaml, shown, to_json
from largemerge.errors import ConfigError
from largemerge.text_files import read_json, read_text

_FOLDER = Path(__file__).with_name("class_names")
_ENDINGS = (".yaml", ".yml", ".json", ".txt")
_EXAMPLE = "such as 'a photo of a {}.'"


def _check_name(name: str) -> str:
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError("expected a class name on one line, without blanks around it")
    return name


def _check_template(template: str) -> str:
    if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
        raise ValueError(f"expected a text with one {{}} for the class name, {_EXAMPLE}")
    return template


class Prompts(Strict):
    """Class names and templates of a data set."""

    class_names: tuple[Annotated[str, pydantic.AfterValidator(_check_name)], ...] = Field(min_length=2)
    """One name for each class, in the order of the labels."""
    templates: tuple[Annotated[str, pydantic.AfterValidator(_check_template)], ...] = Field(min_length=1)
    """Texts with one `{}`, where the class name goes."""
    dataset: str = ""
    """Hub id of the data set whose labels these are; empty where a file does not say it."""
    source: str = ""
    """Where names and templates were published; the path of a user's file that does not say it."""
    license: str = ""
    """Licence of the source."""
    notes: str = ""
    """What was checked, and what other sources have otherwise."""

    def texts(self) -> Iterator[list[str]]:
        """Yields the texts of each class, one for each template, in the order of the labels."""
        for name in self.class_names:
            yield [template.replace("{}", name) for template in self.templates]


def packaged_names() -> list[str]:
    """Lists the data sets whose class names come with largemerge, by the names that `load_prompts` takes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_prompts(name_or_path: str | Path, templates: Sequence[str] | None = None) -> Prompts:
    """Reads and checks the class names and templates of a data set.

    Args:
        name_or_path: One of `packaged_names`, where `-` and `_` are the same; or the path of a .yaml or .json file with
            the keys of `Prompts`, or of a .txt file with one class name a line. Whatever has a folder or one of
            these endings is a path, relative ones from the working directory.
        templates: Templates that take the place of the file's; those of a .txt file, which has none.

    Returns:
        The class names and templates; `source` is never empty.

    Raises:
        ConfigError: If no such names come with largemerge, or if the file cannot be read or has mistakes, with all of
            them.
    """
    path = _path_of(name_or_path)
    raw = _read(path)

    def placed(problems: Sequence[str]) -> list[str]:
        ours = templates is not None
        return [text if ours and text.startswith("templates") else f"{path}: {text}" for text in problems]

    if templates is not None:
        raw["templates"] = [templates] if isinstance(templates, str) else list(templates)
    elif path.suffix == ".txt":
        raise ConfigError(f"{path}: a text file has class names alone; set templates, {_EXAMPLE}")
    try:
        # Through JSON, so that lists become tuples while strictness holds for everything else.
        prompts = Prompts.model_validate_json(to_json(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(*placed(explain(error, Prompts))) from None
    problems = [*_repeated("class_names", prompts.class_names), *_repeated("templates", prompts.templates)]
    if problems:
        raise ConfigError(*placed(grouped(problems)))
    return prompts if prompts.source else prompts.model_copy(update={"source": str(path)})


def _path_of(name_or_path: str | Path) -> Path:
    """Finds the file of a packaged name, or returns the path that is given."""
    path = Path(name_or_path)
    if path.suffix in _ENDINGS:
        return path
    if isinstance(name_or_path, Path) or path.name != name_or_path:
        raise ConfigError(f"{path}: expected a file with class names, one of {', '.join(_ENDINGS)}")
    known = packaged_names()
    name = name_or_path.lower().replace("-", "_")
    if name not in known:
        raise ConfigError(
            f"{shown(name_or_path)}: no class names of this data set come with largemerge{nearest(name, known)}; "
            f"expected one of {', '.join(known)}, or the path of a file with your own ({', '.join(_ENDINGS)})"
        )
    return _FOLDER / f"{name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".txt":
        lines = read_text(path, error=ConfigError).replace("\r\n", "\n").removesuffix("\n")
        return {"class_names": lines.split("\n")}
    if path.suffix == ".json":
        read: dict[str, Any] = read_json(path, error=ConfigError)
        return read
    return dict(read_yaml(path, "'class_names' and 'templates'"))


def _repeated(key: str, texts: Sequence[str]) -> Iterator[str]:
    """Finds texts that stand in a list twice: two classes of one name could not be told apart."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text in first:
            yield f"{key}[{index}]: {shown(text)} is at {key}[{first[text]}] already; expected each of them once"
        first.setdefault(text, index)
