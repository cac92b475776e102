"""Rows of the input embedding, averaged by how often their tokens occur in each model's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as tf
from cases import Case, MakeCase, load_merged, report_of, weights_in, write_case
from processes import assert_agree, make_uneven_case, merging, run_ranks
from tokenized import CODE, ENGLISH, train, write_model
from transformers import AutoTokenizer

import largemerge
from largemerge import LargemergeError

SOLVE = ["blocks", "embeddings"]


def expected_rows(case: Case, prior: float) -> torch.Tensor:
    """The formula, in float64, token after token."""
    rows = [model.get_input_embeddings().weight.double() for model in case.models]
    shares = [weight / sum(case.weights) for weight in case.weights]
    counts = []
    for inputs in case.inputs:
        names = [name for name in inputs if name.endswith("input_ids")]
        kept = [inputs[name][inputs[name.replace("input_ids", "attention_mask")].bool()] for name in names]
        counts.append(torch.bincount(torch.cat(kept), minlength=len(rows[0])).double())
    total = sum(float(each.sum()) for each in counts)
    scaled = [share * total * each / each.sum() for share, each in zip(shares, counts, strict=True)]
    average = sum(share * each for share, each in zip(shares, rows, strict=True))
    weighted = sum(own[:, None] * each for own, each in zip(scaled, rows, strict=True))
    return (prior * average + weighted) / (prior + sum(scaled))[:, None]


@pytest.mark.parametrize(("architecture", "prior"), [("llama", 1.0), ("llama_tied", 8.0), ("t5", 0.5), ("bert", 1.0)])
def test_rows_are_weighted_by_their_tokens(make_case: MakeCase, architecture: str, prior: float) -> None:
    case = make_case(architecture, method="regmean", solve=SOLVE, embedding_prior=prior, weights=[2.0, 1.0])
    for inputs in case.inputs:
        assert any(name.endswith("attention_mask") and (mask == 0).any() for name, mask in inputs.items())
    largemerge.merge(case.config, case.folder / "merged")
    merged = load_merged(case, case.folder / "merged").get_input_embeddings().weight.double()
    assert torch.allclose(merged, expected_rows(case, prior), rtol=1e-5, atol=1e-6)
    largemerge.merge({**case.config, "parameters": {}}, case.folder / "average")
    plain = load_merged(case, case.folder / "average").get_input_embeddings().weight.double()
    assert not torch.allclose(merged, plain, atol=1e-3)
    told = [report_of(case.folder / name)["plan"]["not_solved"].values() for name in ("merged", "average")]
    assert [sum("how often their tokens" in each["reason"] for each in reasons) for reasons in told] == [1, 0]


def test_a_token_that_no_data_has_keeps_the_average(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", solve=SOLVE)
    seen = torch.cat([inputs["input_ids"][inputs["attention_mask"].bool()] for inputs in case.inputs]).unique()
    largemerge.merge(case.config, case.folder / "merged")
    largemerge.merge({**case.config, "parameters": {}}, case.folder / "average")
    merged, plain = (weights_in(case.folder / name)["model.embed_tokens.weight"] for name in ("merged", "average"))
    unseen = torch.ones(len(plain), dtype=torch.bool)
    unseen[seen] = False
    assert unseen.any() and torch.equal(merged[unseen], plain[unseen])
    assert (merged[~unseen] != plain[~unseen]).any(1).all()


def test_identical_candidates_give_themselves_back(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", solve=SOLVE)
    case.config["models"][1]["model"], case.config["models"][1]["name"] = case.config["models"][0]["model"], "again"
    largemerge.merge(case.config, case.folder / "merged")
    merged = load_merged(case, case.folder / "merged").get_input_embeddings().weight
    assert torch.equal(merged, case.models[0].get_input_embeddings().weight)


def test_rows_are_matched_by_token_where_vocabularies_differ(tmp_path: Path) -> None:
    english: tokenizers.Tokenizer = train("BPE", ENGLISH)
    config: dict[str, Any] = {"merge_method": "regmean", "models": [], "tokenizer_source": "union"}
    for seed, (name, texts, tokenizer) in enumerate([("a", ENGLISH, english), ("b", CODE, train("BPE", CODE, 320))]):
        write_model(tmp_path / name, seed, tokenizer)
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts[:8]))
        config["models"].append(
            {"model": str(tmp_path / name), "calibration": {"data": str(tmp_path / f"{name}.txt"), "max_length": 24}}
        )
    largemerge.merge({**config, "parameters": {"solve": SOLVE, "embedding_prior": 1e-6}}, tmp_path / "merged")
    found, own = AutoTokenizer.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "b")
    merged = weights_in(tmp_path / "merged")["model.embed_tokens.weight"]
    rows = weights_in(tmp_path / "b")["model.embed_tokens.weight"]
    ids = {token for text in CODE[:8] for token in own(text)["input_ids"][:24]}
    english_ids = {token for text in ENGLISH[:8] for token in found(text)["input_ids"]} | set(found.all_special_ids)
    alone = [token for token in own.convert_ids_to_tokens(ids) if found.convert_tokens_to_ids(token) not in english_ids]
    assert alone
    for token in alone:  # of the data of b alone: b's own rows
        there, here = found.convert_tokens_to_ids(token), own.convert_tokens_to_ids(token)
        assert torch.allclose(merged[there], rows[here], atol=1e-4), token


@pytest.mark.parametrize(
    ("architecture", "solve", "mentions"),
    [
        ("llama_tied", ["blocks", "head", "embeddings"], ["'head' and 'embeddings'", "tied"]),
        ("vit", SOLVE, ["embedding of tokens", "found none"]),
    ],
)
def test_what_cannot_be_is_told_first(
    make_case: MakeCase, architecture: str, solve: list[str], mentions: list[str]
) -> None:
    case = make_case(architecture, method="regmean", solve=solve)
    with pytest.raises(LargemergeError) as error:
        largemerge.merge(case.config, case.folder / "merged")
    assert all(mention in str(error.value) for mention in mentions)
    assert not (case.folder / "merged").exists()


def test_without_data_tokens_cannot_be_counted(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", solve=SOLVE)
    largemerge.gram(case.config, case.folder / "grams")
    for index, model in enumerate(case.config["models"]):
        model["calibration"] = {"grams": str(case.folder / "grams" / f"model{index}")}
    with pytest.raises(LargemergeError, match=r"model0, model1 has not here; expected 'solve' without it"):
        largemerge.merge(case.config, case.folder / "merged")


def test_two_ranks_count_the_same_tokens(tmp_path: Path) -> None:
    case = make_uneven_case(tmp_path, "llama", "regmean_plusplus")
    case.config["parameters"] = {"solve": SOLVE}
    case.write_yaml()
    run_ranks(merging(case, tmp_path / "two"), tmp_path, 2)
    largemerge.merge(case.config, tmp_path / "one")
    assert_agree(tmp_path / "two", tmp_path / "one")
    rows = [weights_in(tmp_path / name)["model.embed_tokens.weight"] for name in ("one", "two")]
    assert torch.equal(*rows)


def test_a_decoders_own_embedding_is_another_and_is_averaged(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    made = tf.MarianConfig(
        **sizes,
        decoder_vocab_size=40,
        decoder_start_token_id=0,
        eos_token_id=1,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
    )
    models, inputs = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(tf.MarianMTModel(made))
        ids, targets = torch.randint(6, 40, (4, 6)), torch.randint(6, 40, (4, 6))
        (ids if seed == 0 else targets)[:, 0] = 5  # read by the encoder in one, in the other by the decoder
        inputs.append({"input_ids": ids, "decoder_input_ids": targets})
    case = write_case(tmp_path, models, inputs, method="regmean", solve=SOLVE, embedding_prior=1e-6)
    report = largemerge.merge(case.config, tmp_path / "merged")
    merged = load_merged(case, tmp_path / "merged").state_dict()
    rows = [model.state_dict() for model in models]
    name = "model.encoder.embed_tokens.weight"
    assert torch.allclose(merged[name][5], rows[0][name][5], atol=1e-5)
    name = "model.decoder.embed_tokens.weight"
    assert torch.allclose(merged[name], (rows[0][name] + rows[1][name]) / 2, atol=1e-6)
    assert any("the decoder's own embedding is averaged plainly" in note for note in report.plan.notes)


def test_a_prior_without_embeddings_is_refused(make_case: MakeCase) -> None:
    case = make_case("llama", method="regmean", embedding_prior=5.0)
    with pytest.raises(LargemergeError, match="embedding_prior: is for 'solve"):
        largemerge.plan(case.config)
