"""Images, by real image processors: upright, in colour, and what is said of wrong ones."""

from __future__ import annotations

import io
import json

import datasets
import pytest
import torch
from PIL import Image

from largemerge.calibration import image_settings, load_calibration, outline_calibration
from largemerge.calibration.image_settings import check_processor_files
from largemerge.errors import CalibrationError, CheckpointError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_center_crop": None}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    for name, colour in {"a.png": RED, "b.bmp": GREEN, "c.webp": BLUE}.items():
        Image.new("RGB", (12, 10), colour).save(path / name, **({"lossless": True} if name == "c.webp" else {}))
    return path


@pytest.fixture
def vision_checkpoint(tmp_path, save_image_processor):
    return save_image_processor(tmp_path / "vision")


@pytest.fixture
def load(make_config, vision_checkpoint, vision_signature):
    def run(data, signature=vision_signature, checkpoint=vision_checkpoint, **settings):
        return load_calibration(make_config(data, **settings), "cars", checkpoint, signature)

    return run


@pytest.fixture
def complaint(load):
    def find(data, *arguments, **settings):
        with pytest.raises(CalibrationError) as caught:
            load(data, *arguments, **settings)
        assert all("candidate 'cars'" in problem for problem in caught.value.problems)
        return "\n".join(caught.value.problems)

    return find


def solid(*colours):
    """Images of one colour, as the processor scales them: 0..255 to -1..1."""
    return torch.tensor(colours, dtype=torch.float32).div(127.5).sub(1)[:, :, None, None].expand(-1, 3, 8, 8)


def pixels(calibration):
    return torch.cat([batch.inputs["pixel_values"] for batch in calibration.batches])


def content(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("changes", [{}, VIT, {"image_processor_type": "CLIPImageProcessorFast"}])
def test_folder_of_images(load, folder, tmp_path, save_image_processor, changes):
    calibration = load(folder, checkpoint=save_image_processor(tmp_path / "other", **changes))

    torch.testing.assert_close(pixels(calibration), solid(RED, GREEN, BLUE), atol=1e-6, rtol=0)
    assert [set(batch.inputs) for batch in calibration.batches] == [{"pixel_values"}] * 2
    assert [batch.num_samples for batch in calibration.batches] == [2, 1]
    assert all(
        batch.inputs["pixel_values"].is_contiguous() and batch.loss_mask is None for batch in calibration.batches
    )


def test_images_are_drawn_by_the_seed(load, folder):
    order = torch.randperm(3, generator=torch.Generator().manual_seed(5)).tolist()
    expected = solid(*([RED, GREEN, BLUE][index] for index in order[:2]))
    torch.testing.assert_close(pixels(load(folder, num_samples=2, seed=5)), expected, atol=1e-6, rtol=0)


def test_images_come_upright_and_in_colour(load, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("L", (9, 9), 255).save(folder / "grey.png")
    Image.new("RGBA", (9, 9), (*RED, 255)).save(folder / "transparent.png")
    turned = Image.new("RGB", (8, 8), RED)
    turned.paste(Image.new("RGB", (8, 4), BLUE), (0, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(folder / "turned.png", exif=exif)

    grey, transparent, upright = pixels(load(folder))

    torch.testing.assert_close(grey, torch.ones(3, 8, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(transparent, solid(RED)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        upright, torch.cat([solid(BLUE)[0, :, :4], solid(RED)[0, :, :4]], dim=1), atol=1e-6, rtol=0
    )


def test_processor_of_grey_images(load, folder, tmp_path, save_image_processor):
    grey = save_image_processor(tmp_path / "grey", image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
    assert pixels(load(folder, checkpoint=grey)).shape == (3, 1, 8, 8)


def test_column_of_paths(load, folder, write_jsonl):
    rows = [{"picture": "images/b.bmp"}, {"picture": str(folder / "a.png")}]
    found = pixels(load(write_jsonl(rows), image_field="picture"))
    torch.testing.assert_close(found, solid(GREEN, RED), atol=1e-6, rtol=0)


def test_columns_of_images_and_of_bytes(load, tmp_path):
    values = [{"bytes": content(colour), "path": None} for colour in (RED, GREEN)]
    table = datasets.Dataset.from_dict({"raw": [content(RED), content(GREEN)], "image": values})
    table.to_parquet(tmp_path / "plain.parquet")
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "typed.parquet")
    for name, settings in (("plain", {}), ("typed", {}), ("plain", {"image_field": "raw"})):
        found = pixels(load(tmp_path / f"{name}.parquet", **settings))
        torch.testing.assert_close(found, solid(RED, GREEN), atol=1e-6, rtol=0)


def test_folder_with_captions(load, folder, clip_signature, vision_checkpoint, save_tokenizer, ids):
    save_tokenizer(vision_checkpoint)
    captions = {"a.png": "cat", "b.bmp": "the cat sat", "c.webp": "a mat"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    calibration = load(folder, clip_signature, batch_size=3)

    inputs = calibration.batches[0].inputs
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].tolist() == [ids("the cat sat"), [*ids("a mat"), 3], [*ids("cat"), 3, 3]]
    torch.testing.assert_close(inputs["pixel_values"], solid(GREEN, BLUE, RED), atol=1e-6, rtol=0)


def test_image_and_target(load, folder, seq2seq_signature, vision_checkpoint, save_tokenizer, write_jsonl, ids):
    save_tokenizer(vision_checkpoint)
    arguments = frozenset({"pixel_values", "decoder_input_ids", "decoder_attention_mask"})
    signature = type(seq2seq_signature)(arguments, True, 1, None)
    path = write_jsonl([{"image": "images/a.png", "words": "the cat"}])

    inputs = load(path, signature, target_field="words").batches[0].inputs

    assert inputs["decoder_input_ids"].tolist() == [ids("<s> the")]
    assert inputs["pixel_values"].shape == (1, 3, 8, 8) and "input_ids" not in inputs


def test_outline(folder, make_config, vision_checkpoint, vision_signature, clip_signature, save_tokenizer):
    def outline(data, signature=vision_signature, **settings):
        return outline_calibration(make_config(data, **settings), "cars", vision_checkpoint, signature)

    assert outline(folder).inputs == {"pixel_values": ((3, 8, 8), torch.float32)}
    assert outline(folder).num_samples == 3 and outline(folder, num_samples=2).num_samples == 2
    assert outline("owner/images").inputs == {"pixel_values": ((3, 8, 8), torch.float32)}
    save_tokenizer(vision_checkpoint)
    assert outline("owner/pairs", clip_signature).inputs == {
        "input_ids": ((16,), torch.int64),
        "attention_mask": ((16,), torch.int64),
        "pixel_values": ((3, 8, 8), torch.float32),
    }


def test_outline_with_a_broken_first_image(folder, make_config, vision_checkpoint, vision_signature):
    (folder / "a.png").write_bytes(b"x")
    with pytest.raises(CalibrationError, match=r"candidate 'cars'.*a\.png cannot be opened"):
        outline_calibration(make_config(folder), "cars", vision_checkpoint, vision_signature)


# Mistakes


def test_broken_images_are_told_at_once(complaint, folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(b"no image")
    (folder / "c.webp").write_bytes(b"")
    (folder / "d.png").write_bytes(whole[: len(whole) - 20])
    problem = complaint(folder)
    assert f"row 0: the image {folder / 'a.png'} cannot be opened: it is none of PNG, JPEG" in problem
    assert f"row 2: the image {folder / 'c.webp'} cannot be opened" in problem
    assert f"row 3: the image {folder / 'd.png'} cannot be opened" in problem


def test_images_that_are_not_there(complaint, write_jsonl, tmp_path):
    problem = complaint(write_jsonl([{"image": "a.png"}]))
    assert f"row 0: the image a.png does not exist (looked for {tmp_path / 'a.png'})" in problem


def test_values_that_are_no_images(complaint, write_jsonl):
    problem = complaint(write_jsonl([{"image": 5}, {"image": None}]))
    assert "row 0: 'image': expected an image or the path of one, found 5 (int)" in problem
    assert "row 1: 'image': expected an image or the path of one, found nothing" in problem


def test_empty_image(complaint, tmp_path):
    table = datasets.Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    assert "row 0: the image cannot be opened" in complaint(tmp_path / "a.parquet")


def test_no_image_processor(complaint, folder, tmp_path):
    problem = complaint(folder, checkpoint=tmp_path)
    assert f"no image processor in {tmp_path}; put the model's preprocessor_config.json there" in problem


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "preprocessor_config.json is not readable JSON"),
        ("[]", "preprocessor_config.json holds a list, expected an object"),
        ('{"image_processor_type": "NoSuchProcessor"}', "the image processor in "),
    ],
)
def test_broken_image_processor(complaint, folder, vision_checkpoint, text, told):
    (vision_checkpoint / "preprocessor_config.json").write_text(text)
    problem = complaint(folder)
    assert told in problem and str(vision_checkpoint) in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": {"height": 10**6, "width": 10**6}}, "size.height: expected a whole number from 1 to 16,384"),
        ({"size": {"height": 16384, "width": 16384}}, "size: expected 67,108,864 pixels at most, found 16384 x 16384"),
        ({"size": 20000}, "size: expected a whole number from 1 to 8,192, found 20000"),
        ({"size": {"shortest_edge": 0}}, "size.shortest_edge: expected a whole number from 1 to 8,192, found 0"),
        ({"size": "big"}, "size: expected a whole number from 1 to 8,192, found 'big'"),
        ({"size": {}}, "size: expected a size such as {'height': 224, 'width': 224}, found {}"),
        ({"crop_size": [8, True]}, "crop_size[1]: expected a whole number from 1 to 16,384, found True"),
        ({"image_std": [0, 0, 0]}, "image_std: expected a number from 1e-06 to 1e+06 for each colour, found [0, 0, 0]"),
        ({"image_std": 1e-320}, "image_std: expected a number from 1e-06 to 1e+06, or one a colour, found 1e-320"),
        ({"image_mean": NAN}, "image_mean: expected finite numbers, found nan"),
        ({"image_mean": [0, 0, 0, 0]}, "image_mean: expected 3 numbers, one a colour (or 1 for grey images), found 4"),
        ({"image_mean": [0.5]}, "image_mean, image_std: expected as many numbers in both, found 1 and 3"),
        ({"rescale_factor": INFINITY}, "rescale_factor: expected finite numbers, found inf"),
        ({"rescale_factor": 0}, "rescale_factor: expected a number from 1e-06 to 1e+06, found 0"),
        ({"resample": 99}, "resample: expected the number of one of Pillow's filters, 0 to 5, found 99"),
        ({"do_resize": "no"}, "do_resize: expected true or false, found 'no'"),
        ({"image_processor_type": 5}, "image_processor_type: expected the name of a class, found 5"),
        ({"auto_map": None}, "auto_map: expected names of classes by their kinds, found None"),
        ({"merge_size": 0}, "merge_size: expected 1 to 67,108,864, found 0"),
        ({"patch_size": 0}, "patch_size: expected a whole number from 1 to 8,192, found 0"),
    ],
)
def test_settings_of_the_processor_are_checked_before_it_loads(changes, told, tmp_path, save_image_processor):
    save_image_processor(tmp_path, **changes)
    with pytest.raises(CheckpointError) as caught:
        check_processor_files(tmp_path)
    assert f"{tmp_path / 'preprocessor_config.json'}: {told}" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": [224, 224], "image_mean": 0.5, "image_std": 0.5, "resample": None},
        {"size": {"shortest_edge": 3136, "longest_edge": 47_040_000}, "merge_size": 2, "patch_size": 14},
        {"size": {"min_pixels": 262_144, "max_pixels": 1_048_576}},
        {"size": {"max_height": 800, "max_width": 1333}, "patch_size": {"height": 16, "width": 16}},
        {"do_normalize": False, "image_mean": [0, 0, 0], "image_std": [0, 0, 0]},
        {"do_rescale": False, "rescale_factor": 0, "image_mean": [103.5, 116.3, 123.7]},
    ],
)
def test_settings_of_real_processors_are_right(changes, tmp_path, save_image_processor):
    check_processor_files(save_image_processor(tmp_path, **changes))


def test_edges_are_sides_but_where_the_processor_counts_pixels(complaint, folder, tmp_path, save_image_processor):
    sides = save_image_processor(tmp_path / "sides", size={"shortest_edge": 65_536, "longest_edge": 16_777_216})
    problem = complaint(folder, checkpoint=sides)
    assert "size.shortest_edge: expected a whole number from 1 to 8,192, found 65536" in problem


def test_settings_inside_the_processors_config_are_checked_too(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": -1, "resample": 9}}))
    with pytest.raises(CheckpointError) as caught:
        check_processor_files(tmp_path)
    first, second = caught.value.problems
    assert "processor_config.json: image_processor.size: expected a whole number" in first
    assert "image_processor.resample: expected the number" in second


def test_a_processor_that_scales_to_absurd_numbers(complaint, folder, vision_checkpoint, monkeypatch):
    monkeypatch.setattr(image_settings, "MAX_ABSOLUTE_PIXEL", 0.5)
    problem = complaint(folder)
    assert "numbers beyond 0.5 in 'pixel_values'" in problem and "image_std in preprocessor_config.json" in problem


def test_images_of_several_sizes(complaint, folder, tmp_path, save_image_processor):
    Image.new("RGB", (30, 10)).save(folder / "a2.png")
    as_they_are = save_image_processor(tmp_path / "raw", do_resize=False, do_center_crop=False)
    problem = complaint(folder, checkpoint=as_they_are)
    assert "CLIPImageProcessorPil cannot process images of sizes [(12, 10), (30, 10)] together" in problem


def test_processor_that_contradicts_itself(complaint, folder, tmp_path, save_image_processor):
    half = save_image_processor(tmp_path / "half", image_mean=[0.5, 0.5])
    assert "preprocessor_config.json: image_mean: expected 3 numbers" in complaint(folder, checkpoint=half)


def test_processor_that_makes_patches(complaint, folder, tmp_path, save_image_processor, vision_signature):
    patches = save_image_processor(
        tmp_path / "patches",
        image_processor_type="Qwen2VLImageProcessor",
        size={"shortest_edge": 3136, "longest_edge": 12544},
        crop_size=None,
        do_center_crop=None,
    )
    problem = complaint(folder, checkpoint=patches)
    assert "expected 'pixel_values' with one row per image" in problem
    assert "ready-made tensors in a .safetensors file" in problem
