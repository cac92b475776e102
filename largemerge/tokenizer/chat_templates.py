"""The output's chat template: a built-in one, one that the user wrote, or the one that most models have (`auto`).

The built-in ones are written from the public descriptions of these formats.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from largemerge.checkpoint.side_files import check_inside
from largemerge.checkpoint.tokenizer_check import TEMPLATE_FOLDER
from largemerge.errors import CheckpointError
from largemerge.text_files import parse_json, read_json, read_text

AUTO = "auto"
_FILE = "chat_template.jinja"
_HOLDERS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""JSON files that may hold templates, under the key `chat_template`."""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_ALPACA = """\
{%- set titles = {'user': '### Instruction:\\n', 'user_context': '### Input:\\n', 'assistant': '### Response:\\n'} %}
{%- for message in messages %}
    {%- if message['role'] != 'system' and message['role'] not in titles %}
        {{- raise_exception('Expected the roles system, user, user_context and assistant, found ' + message['role']) }}
    {%- endif %}
    {{- titles.get(message['role'], '') + message['content'] | trim }}
    {{- '' if loop.last and not add_generation_prompt else '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""
_MISTRAL = """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('Expected user and assistant in turns, after one system message at most') }}
    {%- elif message['role'] == 'user' %}
        {{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
_EXAONE = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '[|' + message['role'] + '|]' + message['content'] }}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""
BUILT_IN: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def template_problem(setting: str) -> str | None:
    """Says what is wrong with the setting `chat_template`; `None` if nothing is."""
    if setting == AUTO or setting in BUILT_IN:
        return None
    if "{" not in setting:
        return f"{setting!r} is not known; expected {AUTO!r}, one of {sorted(BUILT_IN)} or a Jinja template's text"
    return syntax_problem(setting)


class _Generation(Extension):
    """The tag of Transformers around what an assistant says."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """Reads to the end tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def syntax_problem(template: str) -> str | None:
    """Says why a text is no chat template for Transformers, whose environment is Jinja's sandbox with one tag more."""
    try:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"not a Jinja template: line {error.lineno}: {error.message}"
    except (RecursionError, MemoryError):
        return "not a Jinja template: brackets stand too deep in each other"
    return None


def broken_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the file's name, and what is wrong, for the templates of a folder that are none.

    Files that are no text or no JSON, which other checks tell, are passed over.
    """
    named: list[tuple[str, str, str]] = []
    for path in (folder / _FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))):
        if path.is_file():
            with contextlib.suppress(CheckpointError):
                named.append((str(path.relative_to(folder)), "", read_text(path)))
    for name in _HOLDERS:
        if (folder / name).is_file():
            with contextlib.suppress(CheckpointError):
                value = read_json(folder / name).get("chat_template")
                named += [(name, f"chat_template{which}: ", text) for which, text in _templates_of(value)]
    for name, where, text in named:
        problem = syntax_problem(text)
        if problem is not None:
            yield name, f"{where}{problem}"


def _templates_of(value: object) -> Iterator[tuple[str, str]]:
    """Yields the templates that a key `chat_template` holds, one or several with their names."""
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        yield from ((f".{name}", text) for name, text in value.items() if isinstance(text, str))


def choose_template(setting: str, folders: Iterable[Path]) -> tuple[str | None, str]:
    """Chooses the text of the output's chat template, `None` for none, and says where it comes from.

    Args:
        setting: The configuration's `chat_template`.
        folders: Folders of the models' tokenizers, in order.
    """
    if setting != AUTO:
        return (BUILT_IN[setting], setting) if setting in BUILT_IN else (setting, "from the configuration")
    found = [text.strip() for text in map(template_in, folders) if text]
    if not found:
        return None, "auto: no model has one"
    text, count = Counter(found).most_common(1)[0]
    return text, f"auto: that of {count} of the {len(found)} models that have one"


def template_in(folder: Path) -> str | None:
    """Reads the chat template of a folder's tokenizer; the default one where there are several.

    Raises:
        CheckpointError: If its file cannot be read, or is a link that leads out of the folder.
    """
    for name in (_FILE, "tokenizer_config.json", "chat_template.json"):
        if os.path.lexists(folder / name):
            check_inside(folder / name, folder)  # its text may become the output's
    if os.path.lexists(folder / _FILE):
        return read_text(folder / _FILE)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not os.path.lexists(folder / name):
            continue
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Replaces the chat template in a tokenizer's files, by name, and returns the new files."""
    made = {name: content for name, content in files.items() if name != "chat_template.json"}
    made[_FILE] = template.encode()
    if "tokenizer_config.json" in made:
        try:
            settings = parse_json(made["tokenizer_config.json"].decode("utf-8-sig"))
        except ValueError as error:
            raise CheckpointError(
                f"chat_template: tokenizer_config.json of the tokenizer is not readable JSON ({error}); mend it first"
            ) from None
        if not isinstance(settings, dict):
            raise CheckpointError(
                "chat_template: tokenizer_config.json of the tokenizer has no keys and values; mend it first"
            )
        if settings.pop("chat_template", None) is not None:
            made["tokenizer_config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return made
