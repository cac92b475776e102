"""Tasks of language models: loss on texts, answers chosen by likelihood, answers written.

language_model    Σ −log p(token t | tokens before) over the tokens that count, and how often the likeliest is right
multiple_choice   argmax over answers of Σ log p(answer | prompt); also per byte of the answer, as lm-eval's acc_norm
generation        the likeliest token after the other; what is written, or what a regex finds in it, is the answer
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from largemerge.calibration.batches import Batch, ForwardSignature, Sample
from largemerge.calibration.columns import choose_fields, message_problem
from largemerge.calibration.config import CalibrationConfig
from largemerge.calibration.load import read_samples
from largemerge.calibration.sources import Source
from largemerge.calibration.tokenizer import TextReader, encode_text, has_chat_template, open_text_reader
from largemerge.errors import CalibrationError
from largemerge.evaluation.config import EvaluationConfig, GenerationTask, LanguageModelTask, MultipleChoiceTask
from largemerge.evaluation.metrics import ACCURACY, LOSS, PERPLEXITY, TOKEN_ACCURACY
from largemerge.evaluation.models import ModelFiles
from largemerge.evaluation.table import (
    Table,
    all_skipped,
    as_sample,
    first_problems,
    length_limit,
    open_source_of,
    open_table,
    open_texts,
    read_tensors_of,
    text_samples,
)
from largemerge.evaluation.task import Columns, Generating, Metric, Prepared, Record, Samples, columns_of, mean_of
from largemerge.text_files import brief

ACCURACY_BY_LENGTH = Metric("accuracy_by_length", mean_of("correct_by_length"))
EXACT_MATCH = Metric("exact_match", mean_of("correct"))


def counted_logits(output: Any, batch: Batch, samples: Sequence[Sample]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields of each sequence the logits that predict tokens that count, and these tokens.

    Args:
        output: What the model's forward returns, with `logits` `[B, T, V]`.
        batch: The forward arguments, and the loss mask `[B, T]`.
        samples: The sequences.

    Yields:
        Logits `[N, V]`, float32, and tokens `[N]`, on the device of the logits; N may be 0.
    """
    decoder = "decoder_input_ids" in batch.inputs
    prefix = "decoder_" if decoder else ""
    ids = batch.inputs[f"{prefix}input_ids"]
    counts = torch.ones_like(ids, dtype=torch.bool)
    attention = batch.inputs.get(f"{prefix}attention_mask")
    counts = counts if attention is None else attention != 0
    if batch.loss_mask is not None:
        counts = counts & batch.loss_mask
    for row in range(len(samples)):
        places = counts[row, 1:].nonzero()[:, 0]
        logits = output.logits[row]
        # Models of images and text have more rows of logits than tokens only where places of images are written out.
        yield logits[places.to(logits.device)].float(), ids[row, 1:][places].to(logits.device)


def token_scores(output: Any, batch: Batch, samples: Sequence[Sample]) -> list[Record]:
    """Sums the losses of each sequence over its tokens that count; arguments as in `counted_logits`.

    Returns:
        Of each sequence `loss` in nats, `tokens`, and `correct`, the number of tokens that were the likeliest.
    """
    records: list[Record] = []
    for logits_NV, wanted in counted_logits(output, batch, samples):
        if not len(wanted):
            records.append({"loss": 0.0, "tokens": 0, "correct": 0})
            continue
        losses = torch.nn.functional.cross_entropy(logits_NV, wanted, reduction="none")
        right = logits_NV.argmax(dim=1) == wanted
        records.append({"loss": float(losses.double().sum()), "tokens": len(wanted), "correct": int(right.sum())})
    return records


def language_model(
    task: LanguageModelTask, config: EvaluationConfig, files: ModelFiles, signature: ForwardSignature
) -> Prepared:
    """Prepares the loss of a model on texts.

    Raises:
        CalibrationError: If the data cannot be read, or does not fit the model.
    """
    names = ("max_length", "text_field", "text_template", "messages_field", "target_field", "loss_mask_field")
    settings = {name: getattr(task, name) for name in (*names, "assistant_only", "one_per", "pack")}
    tensors = read_tensors_of(task, config, signature, **settings)
    if tensors is not None:
        ready, batch_size, where = tensors
        return _prepared(files, Samples.of(_numbered(ready), batch_size, where))
    source, calibration = open_source_of(task, config, **settings)
    fields = replace(choose_fields(calibration, source.columns, signature, source.where), image=None)
    if not fields.has_text:
        raise CalibrationError(f"{source.where}: no texts; expected a column 'text', or 'text_field' with its name")
    reader = open_text_reader(
        files.text_folder, calibration, fields, signature, source.where, trust_remote_code=files.trust_remote_code
    )
    samples = read_samples(source, fields, calibration, reader, whole_target=True, skip=task.skip)
    if not samples and task.skip:
        raise CalibrationError(all_skipped(source, task))
    if not samples:
        raise CalibrationError(f"{source.where}: all texts are empty; expected at least one with words")
    return _prepared(files, _batches_of_texts(samples, task, files, reader, source, calibration))


def _batches_of_texts(
    samples: Sequence[Sample],
    task: LanguageModelTask,
    files: ModelFiles,
    reader: TextReader,
    source: Source,
    calibration: CalibrationConfig,
) -> Samples:
    """Groups texts into batches, and notes what of the data is not measured."""
    if task.pack:
        left_over = samples[-1].num_cut
        notes = [f"{left_over:,} tokens at the end of the texts fill no sample, and are left out"] if left_over else []
        whole = [replace(sample, num_cut=0) for sample in samples]
        return text_samples(_numbered(whole), files, reader, calibration, more_notes=notes)
    assert calibration.num_samples is not None
    wanted = min(source.num_rows, calibration.num_samples) - task.skip
    fewer = f"{len(samples):,} texts are measured in place of {wanted:,}, as others are empty"
    return text_samples(
        _numbered(samples),
        files,
        reader,
        calibration,
        what="texts or targets" if task.target_field is not None else "texts",
        more_notes=[fewer] if len(samples) < wanted else [],
    )


def _numbered(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, row=number) for number, sample in enumerate(samples)]


def _prepared(files: ModelFiles, samples: Samples) -> Prepared:
    counted = sum(sum(_counting(sample)[1:]) for group in samples.groups for sample in group)
    if not counted:
        raise CalibrationError(
            f"{samples.where}: no token is left to predict: texts have one token each, or the loss mask keeps all out"
        )
    return Prepared(
        view=files,
        samples=samples,
        score=lambda _: token_scores,
        finish=columns_of,
        metrics=(LOSS, PERPLEXITY, TOKEN_ACCURACY),
        logits=lambda _: counted_logits,
    )


def _counting(sample: Sample) -> Sequence[int]:
    name = "decoder_input_ids" if "decoder_input_ids" in sample.sequences else "input_ids"
    return sample.loss_mask if sample.loss_mask is not None else [1] * len(sample.sequences[name])


def multiple_choice(
    task: MultipleChoiceTask, config: EvaluationConfig, files: ModelFiles, signature: ForwardSignature
) -> Prepared:
    """Prepares questions whose answers are chosen by likelihood.

    Raises:
        CalibrationError: If the data cannot be read, answers are none of the choices, or one does not fit in.
    """
    table = _question_table(task, config, [task.answer_field, *([task.choices_field] if task.choices_field else [])])
    reader = open_texts(files, table, signature)
    prompts = table.texts(task.prompt)
    choices = _choices(task, table)
    answers = _answers(task, table, choices)
    samples: list[Sample] = []
    owner: list[tuple[int, int]] = []
    problems: list[str] = []
    for question, (prompt, own) in enumerate(zip(prompts, choices, strict=True)):
        for number, choice in enumerate(own):
            stem = prompt.rstrip()  # blanks before the answer are part of its first token, as in lm-eval
            tokens, mask, num_cut = _continued(stem, prompt[len(stem) :] + task.separator + choice, reader)
            if len(mask) - sum(mask) < 1:
                problems.append(
                    f"{table.where}: row {table.numbers[question]}: answer {brief(choice)} leaves no room for the "
                    f"prompt in {reader.max_length} tokens; raise 'max_length'"
                )
            samples.append(as_sample(len(samples), tokens, mask, reader, num_cut))
            owner.append((question, number))
    if problems:
        raise CalibrationError(*first_problems(problems))
    lengths = [len((task.separator + choices[question][number]).encode()) for question, number in owner]

    def finish(records: Mapping[int, Record]) -> Columns:
        scores: list[list[float]] = [[] for _ in prompts]
        by_length: list[list[float]] = [[] for _ in prompts]
        for sequence in sorted(records):
            question, _ = owner[sequence]
            scores[question].append(-records[sequence]["loss"])
            by_length[question].append(-records[sequence]["loss"] / lengths[sequence])
        return {"correct": _right(scores, answers), "correct_by_length": _right(by_length, answers)}

    return Prepared(
        view=files,
        samples=text_samples(
            samples,
            files,
            reader,
            table.settings,
            what="prompts with their answers",
            kept="the beginnings of the prompts are left out",
        ),
        score=lambda _: token_scores,
        finish=finish,
        metrics=(ACCURACY, ACCURACY_BY_LENGTH),
    )


def _right(scores: Sequence[Sequence[float]], answers: Sequence[int]) -> np.ndarray:
    """Whether the right answer of each question has the highest score, as 1 or 0; NaN where a score is."""
    return np.array(
        [
            float(np.argmax(own) == answer) if not np.isnan(own).any() else math.nan
            for own, answer in zip(scores, answers, strict=True)
        ]
    )


def _question_table(
    task: MultipleChoiceTask | GenerationTask, config: EvaluationConfig, columns: Sequence[str]
) -> Table:
    from largemerge.calibration.config import template_columns

    named = [("prompt", column) for column in (template_columns(task.prompt) if task.prompt is not None else ())]
    settings = {"answer_field": task.answer_field}
    settings |= {"choices_field": getattr(task, "choices_field", None) or ""}
    settings |= {"messages_field": getattr(task, "messages_field", None) or ""}
    named += [(next(key for key, value in settings.items() if value == column), column) for column in columns]
    return open_table(task, config, named, max_length=task.max_length)


def _choices(task: MultipleChoiceTask, table: Table) -> list[list[str]]:
    if task.choices is not None:
        return [list(task.choices)] * len(table.rows)
    assert task.choices_field is not None
    found = table.column(task.choices_field, (list, dict), "a list of answers")
    # ARC and its kin: {"text": […], "label": […]}
    lists: list[Any] = [value.get("text") if isinstance(value, dict) else value for value in found]
    problems = [
        f"{table.where}: row {row}: {task.choices_field!r}: expected a list of two texts or more, found {brief(value)}"
        for row, value in zip(table.numbers, lists, strict=True)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str) and each for each in value)
    ]
    if problems:
        raise CalibrationError(*first_problems(problems))
    return lists


def _answers(task: MultipleChoiceTask, table: Table, choices: Sequence[Sequence[str]]) -> list[int]:
    """Numbers of the right answers: given as numbers from 0, letters, labels of the row's own, or texts."""
    numbers, problems = [], []
    own_labels: list[Any] = [None] * len(choices)
    if task.choices_field is not None:
        values = [row[task.choices_field] for row in table.rows]
        own_labels = [value.get("label") if isinstance(value, dict) else None for value in values]
    for index, value in enumerate(table.column(task.answer_field, (int, str), "a number, a letter or a text")):
        own, labels = list(choices[index]), own_labels[index]
        if isinstance(labels, list) and str(value) in map(str, labels):
            number = [str(label) for label in labels].index(str(value))
        elif isinstance(value, str) and value in own:
            number = own.index(value)
        elif isinstance(value, str) and re.fullmatch(r"[A-Z]", value.strip()):
            number = ord(value.strip()) - ord("A")
        else:
            number = int(value) if isinstance(value, int) or value.isdecimal() else -1
        if not 0 <= number < len(own):
            problems.append(
                f"{table.where}: row {table.numbers[index]}: {task.answer_field!r} is {brief(value)}; expected the "
                f"number (0 to {len(own) - 1}), letter or text of one of {len(own)} answers"
            )
        numbers.append(number)
    if problems:
        raise CalibrationError(*first_problems(problems))
    return numbers


def _continued(prompt: str, continuation: str, reader: TextReader) -> tuple[dict[str, list[int]], list[int], int]:
    """Encodes a prompt and what follows, the prompt's beginning cut off where all is too long.

    Both are tokenised as one text; what follows is what comes after as many tokens as the prompt alone has.

    Returns:
        The tokens, the mask of what follows, and how many tokens are cut off.
    """
    first = encode_text(reader.tokenizer, prompt, add_special_tokens=True)["input_ids"]
    whole = encode_text(reader.tokenizer, prompt + continuation, add_special_tokens=True)
    ends = _special_at_end(reader)
    start = max(1, min(len(first) - ends, len(whole["input_ids"]) - 1))
    tokens = {name: list(whole[name]) for name in reader.token_arguments}
    if ends:
        tokens = {name: values[:-ends] for name, values in tokens.items()}
    mask = [0] * start + [1] * (len(tokens["input_ids"]) - start)
    num_cut = max(0, len(mask) - reader.max_length)
    return {name: values[num_cut:] for name, values in tokens.items()}, mask[num_cut:], num_cut


def _special_at_end(reader: TextReader) -> int:
    """Number of special tokens that the tokenizer adds after a text."""
    plain = encode_text(reader.tokenizer, "a", add_special_tokens=False)["input_ids"]
    whole = encode_text(reader.tokenizer, "a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return len(whole) - start - len(plain)
    return 0


def generation(
    task: GenerationTask, config: EvaluationConfig, files: ModelFiles, signature: ForwardSignature
) -> Prepared:
    """Prepares prompts whose answers are written.

    Raises:
        CalibrationError: If the data cannot be read, or the model writes nothing.
    """
    columns = [task.answer_field, *([task.messages_field] if task.messages_field is not None else [])]
    table = _question_table(task, config, columns)
    reader = open_texts(files, table, signature)
    right = [
        [value]
        if isinstance(value, str)
        else [str(each) for each in value]
        if isinstance(value, list)
        else [str(value)]
        for value in table.column(task.answer_field, (str, int, float, list), "a text, or a list of texts")
    ]
    wanted = [{_extracted(text, task) for text in own} for own in right]
    problems = [
        f"{table.where}: row {row}: {task.answer_field!r} is empty; expected a right answer"
        for row, own in zip(table.numbers, right, strict=True)
        if not own
    ]
    problems += [
        f"{table.where}: row {row}: {task.answer_field!r}: 'extract' finds nothing in {brief(own[0])}"
        for row, own, texts in zip(table.numbers, right, wanted, strict=True)
        if task.extract is not None and None in texts
    ]
    if problems:
        raise CalibrationError(*first_problems(problems))
    room = max(1, reader.max_length - task.max_new_tokens)
    samples = [_prompt(number, text, reader, room) for number, text in enumerate(_prompts(task, table, reader))]
    tokenizer = reader.tokenizer

    def written(tokens: Sequence[int]) -> str:
        text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
        cuts = [place for stop in task.stop if (place := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    def is_over(tokens: Sequence[int]) -> bool:
        if not task.stop:
            return False
        text = tokenizer.decode(list(tokens), skip_special_tokens=True)
        return any(stop in text for stop in task.stop)

    def score(output: Any, batch: Batch, group: Sequence[Sample]) -> list[Record]:
        return [
            {
                "correct": float(_extracted(written(row), task) in wanted[each.row]),
                "cut_off": float(len(row) >= task.max_new_tokens and not is_over(row)),
            }
            if row is not None
            else {"correct": math.nan, "cut_off": math.nan}
            for row, each in zip(output, group, strict=True)
        ]

    def remark(columns: Columns) -> str:
        num_cut = int(columns["cut_off"].sum())
        told = f"{num_cut:,} of {len(samples):,} answers have not ended after max_new_tokens ({task.max_new_tokens:,})"
        return told if num_cut else ""

    limit = f"{room:,} tokens, which is {length_limit(reader, table.settings)} less max_new_tokens"
    return Prepared(
        view=files,
        samples=text_samples(
            samples,
            files,
            reader,
            table.settings,
            what="prompts",
            limit=limit,
            kept="their beginnings are left out",
            left=True,
        ),
        score=lambda _: score,
        finish=columns_of,
        metrics=(EXACT_MATCH,),
        generating=Generating(
            max_new_tokens=task.max_new_tokens,
            ends=_end_tokens(files, tokenizer),
            pad=reader.padding["input_ids"],
            is_over=is_over,
        ),
        remark=remark,
    )


def _prompts(task: GenerationTask, table: Table, reader: TextReader) -> list[Any]:
    if task.prompt is not None:
        return table.texts(task.prompt)
    assert task.messages_field is not None
    if not has_chat_template(reader.tokenizer):
        raise CalibrationError(
            f"{table.where}: messages_field: the model's tokenizer has no chat template; give plain text by 'prompt'"
        )
    conversations = table.column(task.messages_field, list, "a list of messages")
    problems = [
        f"{table.where}: row {row}: {task.messages_field!r}: {message_problem(messages) or 'empty; expected messages'}"
        for row, messages in zip(table.numbers, conversations, strict=True)
        if not messages or message_problem(messages) is not None
    ]
    if problems:
        raise CalibrationError(*first_problems(problems))
    return conversations


def _prompt(number: int, prompt: Any, reader: TextReader, room: int) -> Sample:
    """Makes a sample of a prompt, its beginning cut off where it has more tokens than there is room for."""
    if isinstance(prompt, str):
        encoded = encode_text(reader.tokenizer, prompt)
        ends = _special_at_end(reader)
        tokens = {name: list(encoded[name]) for name in reader.token_arguments}
        tokens = {name: values[:-ends] if ends else values for name, values in tokens.items()}
    else:
        encoded = dict(
            reader.tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
        )
        tokens = {name: list(encoded[name]) for name in reader.token_arguments}
    num_cut = max(0, len(tokens["input_ids"]) - room)
    return as_sample(number, {name: values[num_cut:] for name, values in tokens.items()}, None, reader, num_cut)


def _extracted(text: str, task: GenerationTask) -> str | None:
    """The answer in a text, as it is compared; `None` if there is none."""
    if task.extract is not None:
        found = list(re.finditer(task.extract, text))
        if not found:
            return None
        text = next((group for group in found[-1].groups() if group is not None), found[-1].group(0))
    text = " ".join(text.split())
    return text.casefold() if task.ignore_case else text


def _end_tokens(files: ModelFiles, tokenizer: Any) -> tuple[int, ...]:
    """Tokens at which a model ends what it writes: those of its generation config, else of its config and tokenizer."""
    from largemerge.checkpoint.index import read_json

    path = files.checkpoint.folder / "generation_config.json"
    settings = read_json(path, files.name) if path.is_file() else {}
    found = settings.get("eos_token_id", files.checkpoint.config.get("eos_token_id"))
    ends = list(found) if isinstance(found, list) else [found]
    return tuple(sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)}))
