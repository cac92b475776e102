"""Which tokenizer a candidate gets."""

from __future__ import annotations

from largemerge.calibration.columns import choose_fields
from largemerge.calibration.tokenizer import open_text_reader, shared_tokenizers


def test_candidates_with_the_same_files_share_a_tokenizer(
    make_config, write_jsonl, text_needs, tmp_path, save_tokenizer
):
    config = make_config(write_jsonl([{"text": "the cat"}]))
    folders = [save_tokenizer(tmp_path / name) for name in ("one", "two")]
    folders.append(save_tokenizer(tmp_path / "other", model_max_length=2))

    def reader(folder):
        fields = choose_fields(config, ("text",), text_needs, "here")
        return open_text_reader(folder, config, fields, text_needs, "here", trust_remote_code=False)

    with shared_tokenizers():
        one, two, other = (reader(folder) for folder in folders)
    assert one.tokenizer is two.tokenizer
    assert other.tokenizer is not one.tokenizer
    assert (one.max_length, other.max_length) == (config.max_length, 2)
    assert reader(folders[0]).tokenizer is not one.tokenizer  # it is not kept
