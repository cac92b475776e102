"""The documentation: every example is run, every link leads somewhere, every method and parameter is there.

A page is a folder of tiny models and data under the names that its examples use. Its blocks run from top to bottom:

    yaml      written to the file that its first line names: `# merge.yaml`
    sh        every line is a command, run in this process, or in one of its own where it limits memory; what a
              launcher would start is run without the launcher
    python    run as it stands
    text      a picture or formula; no example

A block after `<!-- not run: why -->` is left out, and one after `<!-- enable when built -->` until what it shows is
there.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import processes
import pytest
import quantized_models
import tiny_models
import torch
import transformers as tf
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenized import CODE, ENGLISH, train
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import largemerge
from largemerge.cli import main
from largemerge.output import OutputFolder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 165
LEFT_OUT = re.compile(r"<!-- (not run: \S.*|enable when built) -->\s*$")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w-]+\.ya?ml)\n")
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
INTERRUPTED = 130


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Blocks of a page


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: After the opening fence.
        text: Between the fences.
        line: Of the opening fence.
        is_run: Whether nothing before it says that it is not.
    """

    language: str
    text: str
    line: int
    is_run: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            match["text"],
            text.count("\n", 0, match.start()) + 1,
            LEFT_OUT.search(text[: match.start()]) is None,
        )
        for match in FENCE.finditer(text)
    ]


def commands_in(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# What the examples name: tiny models and data, made when a page wants them


@cache
def tokenizer(kind: str = "code") -> PreTrainedTokenizerFast:
    texts = {"code": [*ENGLISH, *CODE], "german": ["das Verschmelzen von Modellen ist bloß Addieren", *ENGLISH]}[kind]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=train("BPE", texts), **names)
    if kind == "german":
        made.add_tokens(["<|im_end|>"])
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    return made


def save(folder: Path, model: PreTrainedModel, text: PreTrainedTokenizerFast | None = None) -> None:
    model.save_pretrained(folder)
    if text is not None:
        text.save_pretrained(folder)


def llama(folder: Path, seed: int, *, wide: bool = False, layers: int = 2, kind: str = "code") -> None:
    text = tokenizer(kind)
    sizes = tiny_models.LLM | {"vocab_size": len(text), "num_hidden_layers": layers}
    if wide:  # whole blocks of 64: bitsandbytes' CPU kernels are not reliable for others
        sizes |= {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(seed)
    save(folder, tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), text)


def llava(folder: Path, seed: int) -> None:
    """A vision-language model whose language part is as large as `llama`'s."""
    text = tokenizer()
    sizes = tiny_models.LLM | {"vocab_size": len(text), "num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(**tiny_models.VISION)
    torch.manual_seed(seed)
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**sizes), vision_config=vision)
    save(folder, tf.LlavaForConditionalGeneration(config), text)


def nf4(folder: Path, seed: int) -> None:
    llama(folder, seed, wide=True)
    quantized_models.quantize_folder(folder, "nf4")
    tokenizer().save_pretrained(folder)


def adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter of `base`."""
    torch.manual_seed(seed)
    width, rank = tiny_models.LLM["hidden_size"], 4
    modules = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    tensors = {f"{module}.lora_A.weight": torch.randn(rank, width) for module in modules}
    tensors |= {f"{module}.lora_B.weight": torch.randn(width, rank) for module in modules}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def dora(folder: Path, seed: int) -> None:
    """A DoRA adapter of `base`."""
    adapter(folder, seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    ups = {key: tensor for key, tensor in tensors.items() if "lora_B" in key}
    magnitudes = {key.replace("lora_B.weight", "lora_magnitude_vector"): 1 + up[:, 0] / 9 for key, up in ups.items()}
    save_file(tensors | magnitudes, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def vision(folder: Path, seed: int) -> None:
    tiny_models.perturbed("clip_vision", seed).save_pretrained(folder)
    size = tiny_models.VISION["image_size"]
    processor = tf.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)


def images(folder: Path, seed: int) -> None:
    folder.mkdir()
    pixels = torch.randint(256, (4, 16, 20, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")


def translator(folder: Path, seed: int) -> None:
    text = tokenizer()
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(vocab_size=len(text), decoder_start_token_id=2, **sizes)
    save(folder, tf.T5ForConditionalGeneration(config), text)


def rows(path: Path, seed: int) -> None:
    """A row for every kind of column that the examples name."""
    lines = [*ENGLISH, *CODE]
    table = [
        {
            "text": line,
            "question": line,
            "answer": str(seed + number),
            "messages": [{"role": "user", "content": line}, {"role": "assistant", "content": f"number {number}"}],
            "english": line,
            "german": f"das {line}",
            "french": f"le {line}",
        }
        for number, line in enumerate(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))


def fisher(path: Path, seed: int) -> None:
    """Positive numbers for every tensor of a tiny llama."""
    llama(path.parent / "of-fisher", seed)
    model = tf.LlamaForCausalLM.from_pretrained(path.parent / "of-fisher")
    save_file({name: tensor.square().contiguous() for name, tensor in model.state_dict().items()}, path)


def classifier(folder: Path, seed: int, labels: int) -> None:
    """A BERT with a head of so many labels."""
    text = tokenizer()
    sizes = tiny_models.TEXT | {"vocab_size": len(text), "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    save(folder, tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=labels)), text)


def glue(path: Path, seed: int) -> None:
    """A row for the columns of two tasks."""
    table = [{key: f"{line} {seed}" for key in ("sentence", "premise", "hypothesis")} for line in ENGLISH]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))


def config_alone(folder: Path, seed: int) -> None:
    llama(folder, seed)
    (folder / "model.safetensors").unlink()


Maker = Callable[[Path, int], None]
MAKERS: dict[str, Maker] = {
    "base": llama,
    "expert-math": llama,
    "expert-code": llama,
    "expert-chat": llama,
    "expert-german": lambda folder, seed: llama(folder, seed, kind="german"),
    "expert-math-nf4": nf4,
    "llava": llava,
    "chat": llama,
    "chat-fine-tuned-to-insult": llama,
    "forget-1": llama,
    "forget-2": llama,
    "forget-3": llama,
    "only-a-config": config_alone,
    "math-lora": adapter,
    "code-lora": adapter,
    "math-dora": dora,
    "vision-photos": vision,
    "vision-drawings": vision,
    "photos": images,
    "drawings": images,
    "to-german": translator,
    "to-french": translator,
    "math.jsonl": rows,
    "code.jsonl": rows,
    "chat.jsonl": rows,
    "german.jsonl": rows,
    "french.jsonl": rows,
    "code.txt": lambda path, _: path.write_text("\n\n".join(CODE)) and None,
    "fisher-math.safetensors": fisher,
    "fisher-code.safetensors": fisher,
    "sst2": lambda folder, seed: classifier(folder, seed, 2),
    "mnli": lambda folder, seed: classifier(folder, seed, 3),
    "sst2.jsonl": glue,
    "mnli.jsonl": glue,
}
OF_PAGES: dict[str, dict[str, Maker]] = {
    # Its examples name layers up to the twelfth.
    "docs/mergekit-yaml.md": {
        name: lambda folder, seed: llama(folder, seed, layers=12)
        for name in ("base", "expert-math", "expert-code", "expert-chat")
    },
    "docs/quantisation.md": {
        name: lambda folder, seed: llama(folder, seed, wide=True) for name in ("expert-math", "expert-code")
    },
}
"""Other models than most pages', by page."""


def furnish(folder: Path, page: Path) -> None:
    """Makes what a page names."""
    text = page.read_text(encoding="utf-8")
    for seed, (name, make) in enumerate((MAKERS | OF_PAGES.get(name_of(page), {})).items()):
        if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text):
            make(folder / name, seed)


# Running a page


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    code = caught.value.code
    assert isinstance(code, int)
    return code


def run_limited(arguments: list[str]) -> int:
    """Runs a command, in a process of its own where it limits memory: this one holds what other tests have left."""
    if not any(argument.startswith("--memory-") for argument in arguments):
        return run(arguments)
    return processes.run(arguments, Path("process.log"))


def without_launcher(words: list[str]) -> list[str]:
    """The command that a launcher starts, as one process would be called: `largemerge merge …`."""
    return words[words.index("largemerge") :] if words[0] in LAUNCHERS else words


def output_of(arguments: list[str]) -> Path | None:
    """OUT of a merge."""
    return Path(arguments[2]) if arguments[0] == "merge" else None


def clear_the_way(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example stands for itself: OUT is not there yet, or holds an interrupted merge for `--resume`."""
    out = output_of(arguments)
    if out is None or "--force" in arguments:
        return
    shutil.rmtree(out, ignore_errors=True)
    if "--resume" in arguments:
        record = OutputFolder.record

        def stop_after_two(self: OutputFolder, part: str, entry: Mapping[str, Any]) -> None:
            record(self, part, entry)
            if len(self.entries) == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "record", stop_after_two)
            assert run([argument for argument in arguments if argument != "--resume"]) == INTERRUPTED


def check_output(out: Path) -> None:
    """It is a whole checkpoint, and loads."""
    config = json.loads((out / "config.json").read_text())
    model_class = getattr(tf, config["architectures"][0])
    _, info = model_class.from_pretrained(out, output_loading_info=True, device_map="cpu")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not (out / ".largemerge").exists()


def run_command(words: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = without_launcher(words)
    assert command[0] == "largemerge", f"{where}: {' '.join(words)} is neither run nor marked as `not run`"
    clear_the_way(command[1:], monkeypatch)
    assert run_limited(command[1:]) == 0, f"{where}: {' '.join(words)}"
    out = output_of(command[1:])
    if out is not None:
        check_output(out)
        resumed = json.loads((out / "merge_report.json").read_text())["resumed_parts"]
        assert (resumed > 0) == ("--resume" in command), where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_example_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, page)
    written: set[str] = set()
    used = ""
    for block in blocks_of(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in ("yaml", "sh", "python", "text"), f"{where}: a block needs a language"
        if not block.is_run:
            continue
        if block.language == "yaml":
            match = FILE_NAME.match(block.text)
            assert match is not None, f"{where}: expected a first line such as '# merge.yaml'"
            (tmp_path / match[1]).write_text(block.text)
            written.add(match[1])
        elif block.language == "sh":
            for words in commands_in(block):
                run_command(words, where, monkeypatch)
            used += block.text
        elif block.language == "python":
            for name in re.findall(r'merge\([^)]*"([\w-]+)"', block.text):
                shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / "example.py").write_text(block.text)
            runpy.run_path("example.py", run_name="example")
            for report in tmp_path.glob("*/merge_report.json"):
                check_output(report.parent)
            used += block.text
    assert not [name for name in written if name not in used], "no example uses these files"


@pytest.mark.slow
def test_the_example_of_torchrun_runs_under_torchrun(tmp_path: Path) -> None:
    page = ROOT / "docs" / "many-processes.md"
    furnish(tmp_path, page)
    blocks = [block for block in blocks_of(page) if block.is_run]
    (tmp_path / "merge.yaml").write_text(blocks[0].text)
    (words,) = (words for block in blocks for words in commands_in(block) if words[0] == "torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:], "--device", "cpu"]
    variables = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_output(tmp_path / "merged")
    assert len(json.loads((tmp_path / "merged" / "merge_report.json").read_text())["ranks"]) == 2


# What no example can show to be wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_example_can_rot_unseen(page: Path) -> None:
    """Whatever looks like an example is a fenced block, and one that is run or says why not."""
    text = page.read_text(encoding="utf-8")
    outside = FENCE.sub("", text)
    assert "```" not in outside
    assert not re.search(r"^ {4,}largemerge ", outside, re.MULTILINE), "put commands into ```sh blocks"
    for block in blocks_of(page):
        assert block.language != "text" or "largemerge " not in block.text
    blocks_after_markers = re.findall(r"<!-- (?:not run|enable).*?-->\n(.*)", text)
    assert all(line.startswith("```") for line in blocks_after_markers), "a marker stands just before its block"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


def test_all_pages_are_in_both_lists() -> None:
    names = [page.name for page in PAGES if page.name != "README.md"]
    assert names
    for index, prefix in ((ROOT / "README.md", "docs/"), (ROOT / "docs" / "README.md", "")):
        assert [name for name in names if f"({prefix}{name})" not in index.read_text(encoding="utf-8")] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def table_rows(text: str) -> dict[str, str]:
    """Rows of tables by what stands in backticks in their first two columns; the first one counts."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {name: line for line in reversed(lines) for name in re.findall(r"`(\w+)`", "|".join(line.split("|")[:3]))}


def test_every_method_is_explained_with_its_parameters() -> None:
    from largemerge.data_free.methods.base import REQUIRED
    from largemerge.data_free.methods.table import METHODS
    from largemerge.regression.methods import METHODS as REGRESSION_METHODS

    choice, _, rest = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("\n## Regression methods")
    in_readme, in_docs = table_rows((ROOT / "README.md").read_text(encoding="utf-8")), table_rows(rest)
    for name in (*REGRESSION_METHODS, *METHODS):
        assert name in in_readme and name in in_docs, f"{name} is missing from a table"
        assert f"`{name}`" in choice, f"{name}: when to take it?"
    for name, method in METHODS.items():
        cells = re.split(r"(?<!\\)\|", in_docs[name])
        told = {}
        for text in re.findall(r"`(\w+(?:: [^`]+)?)`", "|".join(cells[-3:])):
            key, _, value = text.partition(": ")
            told[key] = yaml.safe_load(value) if value else None
        defaults = {**method.shared, **method.per_model}
        assert told == {key: None if value is REQUIRED else value for key, value in defaults.items()}, name


@pytest.mark.parametrize(
    "function", [largemerge.merge, largemerge.plan, largemerge.extract_lora, largemerge.fit_temperature]
)
def test_the_arguments_of_these_functions_are_told(function: Callable[..., Any]) -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## `{function.__name__}(")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert told == set(inspect.signature(function).parameters)


def test_every_row_of_what_goes_in_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "inputs.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        if row.startswith("| what you have"):
            continue
        named = re.search(r"<!-- (tests/\S+?)(?:::(test_\w+))? -->", row)
        assert named is not None, row
        text = (ROOT / named[1]).read_text()
        assert named[2] is None or f"def {named[2]}(" in text, row


def test_the_table_of_parameters_is_what_the_code_declares() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "parameter_table"))
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert script["BEGIN"] + script["table"]() + script["END"] in page, "run scripts/parameter_table"
