"""What a merged checkpoint has beside its weights: config, tokenizer, model card, report."""

from __future__ import annotations

import json
from pathlib import Path

from largemerge.checkpoint.metadata import copy_side_files, find_processor, find_tokenizer, model_card, output_config
from largemerge.environment import versions
from largemerge.merge_plan import Preparation
from largemerge.quantization import quantization_settings
from largemerge.report import MergeReport, config_yaml


def config_text(preparation: Preparation) -> str:
    """The text of the output's `config.json`."""
    dtype = preparation.plan.output_dtype
    settings = quantization_settings(preparation.plan.config.output, dtype)
    return output_config(preparation.inputs.reference, dtype, settings)


def write_side_files(path: Path, preparation: Preparation, report: MergeReport) -> None:
    """Writes everything but weights, index and `config.json` into a folder."""
    inputs, config = preparation.inputs, preparation.plan.config
    folders = {checkpoint.name: checkpoint.folder for checkpoint in inputs.candidates}
    if inputs.base is not None:
        folders["base"] = inputs.base.folder
    preferred = [folders["base" if inputs.base is not None else inputs.candidates[0].name], *folders.values()]
    source = config.tokenizer_source
    tokenizer = find_tokenizer(*preferred) if source is None else folders[source]
    processor = find_processor(*preferred)
    copy_side_files(path, inputs.reference.folder, tokenizer, processor, with_code=config.trust_remote_code)
    yaml_text = config_yaml(config)
    (path / "largemerge_config.yaml").write_text(yaml_text, encoding="utf-8")
    (path / "README.md").write_text(
        model_card(
            method=config.merge_method,
            class_name=preparation.plan.class_name,
            models=[
                {
                    "name": candidate.label,
                    "model": candidate.model,
                    "weight": candidate.parameters.weight,
                    "data": Path(candidate.calibration.data).name if candidate.calibration else "",
                }
                for candidate in config.models
            ],
            base=config.base_model,
            config_yaml=yaml_text,
            version=versions()["largemerge"],
        ),
        encoding="utf-8",
    )
    (path / "merge_report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
