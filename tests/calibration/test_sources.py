"""Files, folders and datasets, and what is said of those that cannot be read."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import datasets
import huggingface_hub.constants
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from largemerge.calibration import load_calibration
from largemerge.calibration.folders import IMAGE_SUFFIXES, folder_notes, list_images
from largemerge.calibration.sources import locate_data, open_source
from largemerge.errors import CalibrationError

SPLIT = {"train": ["a.png", "b.png"], "test": ["c.png"]}


@pytest.fixture
def open_data(make_config):
    def run(data, **settings):
        config = make_config(data, **settings)
        return open_source(config, *locate_data(config, "candidate 'math'"))

    return run


@pytest.fixture
def complaint(open_data):
    def find(data, **settings):
        with pytest.raises(CalibrationError) as caught:
            open_data(data, **settings)
        message = str(caught.value)
        assert "candidate 'math'" in message and str(data) in message
        return message

    return find


@pytest.fixture
def write(tmp_path):
    def run(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return run


def rows_of(source, *columns):
    table = source.select(columns or source.columns)
    return [dict(table[index]) for index in range(source.num_rows)]


# Tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": 1, "text": "x"}\n{"id": 2, "text": "y"}\n'),
        ("a.json", '[{"id": 1, "text": "x"}, {"id": 2, "text": "y"}]'),
        ("a.csv", "id,text\n1,x\n2,y\n"),
        ("A.CSV", "id,text\n1,x\n2,y\n"),
    ],
)
def test_tabular_text_files(open_data, write, name, content):
    path = write(name, content)
    source = open_data(path)
    assert source.columns == ("id", "text")
    assert rows_of(source) == [{"id": 1, "text": "x"}, {"id": 2, "text": "y"}]
    assert rows_of(source, "text") == [{"text": "x"}, {"text": "y"}]
    assert source.folder == path.parent


def test_parquet(open_data, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), path)
    assert rows_of(open_data(path)) == [{"text": "x"}, {"text": "y"}]


def test_csv_takes_words_literally(open_data, write):
    source = open_data(write("a.csv", "text,id\nnull,1\n,2\nNA,3\n"))
    assert [row["text"] for row in rows_of(source)] == ["null", "", "NA"]


def test_changed_file_is_read_again(open_data, write):
    for text in ("x", "y"):
        assert rows_of(open_data(write("a.jsonl", json.dumps({"text": text})))) == [{"text": text}]


def test_part_of_a_split(open_data, write):
    path = write("a.jsonl", '{"text": "x"}\n{"text": "y"}\n')
    assert rows_of(open_data(path, split="train[1:]")) == [{"text": "y"}]


def test_images_are_not_decoded(open_data, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    table = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
    path = tmp_path / "a.parquet"
    table.cast_column("image", datasets.Image()).to_parquet(path)
    assert rows_of(open_data(path))[0]["image"]["bytes"] == buffer.getvalue()


def test_no_progress_bars_and_nothing_left_switched_off(open_data, write, capfd):
    verbosity = datasets.logging.get_verbosity()
    open_data(write("a.jsonl", '{"text": "x"}'))
    with pytest.raises(CalibrationError):
        open_data(write("b.jsonl", "nonsense"))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not datasets.utils.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == verbosity


# Texts


def test_documents_are_separated_by_blank_lines(open_data, write):
    path = write("a.txt", "\n\none\ntwo\n\n  three\n \t\n\n\nfour\r\n\r\nfive")
    assert [row["text"] for row in rows_of(open_data(path))] == ["one\ntwo", "  three", "four", "five"]


def test_lines(open_data, write):
    path = write("a.txt", "one\ntwo\n\n  three\r\n")
    assert [row["text"] for row in rows_of(open_data(path, one_per="line"))] == ["one", "two", "  three"]


# Folders


def test_folder_of_images_is_sorted(open_data, tmp_path):
    names = ["b.png", "a/z.JPG", "a/c.webp", "d.jpeg", "e.bmp"]
    hidden = [".trash/f.png", "._b.png"]
    for name in [*names, *hidden, "notes.txt"]:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    source = open_data(tmp_path / "images")
    assert source.columns == ("image",)
    found = [row["image"].removeprefix(f"{tmp_path}/images/") for row in rows_of(source)]
    assert found == sorted(names)
    assert [str(path) for path in list_images(tmp_path / "images")] == [row["image"] for row in rows_of(source)]


def test_folder_of_data_files_is_a_dataset(open_data, write):
    folder = write("folder/train.jsonl", '{"text": "x"}').parent
    write("folder/test.jsonl", '{"text": "y"}\n{"text": "z"}')
    assert rows_of(open_data(folder)) == [{"text": "x"}]
    assert rows_of(open_data(folder, split="test")) == [{"text": "y"}, {"text": "z"}]


def test_subset_of_a_dataset(open_data, write):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    folder = write("folder/README.md", card).parent
    write("folder/a.jsonl", '{"text": "x"}')
    write("folder/b.jsonl", '{"text": "y"}')
    assert rows_of(open_data(folder, subset="b")) == [{"text": "y"}]


def test_images_with_metadata_are_a_dataset(open_data, write, tmp_path):
    folder = write("folder/metadata.jsonl", '{"file_name": "a.png", "text": "a cat"}').parent
    Image.new("RGB", (2, 2)).save(folder / "a.png")
    source = open_data(folder)
    assert set(source.columns) == {"image", "text"}
    assert rows_of(source)[0] == {"image": {"bytes": None, "path": str(folder / "a.png")}, "text": "a cat"}


# Mistakes


def test_no_such_file(complaint, write, tmp_path):
    write("math.jsonl", "{}")
    problem = complaint(tmp_path / "maths.jsonl")
    assert "no such file or folder; did you mean 'math.jsonl'?" in problem
    assert "no such file or folder" in complaint("nowhere/data.csv")
    assert "no such file or folder" in complaint("./nowhere")


def test_unknown_kind_of_file(complaint, write):
    problem = complaint(write("a.xlsx", "x"))
    assert "cannot read .xlsx; expected one of .safetensors, .jsonl, .json, .csv, .parquet, .txt" in problem
    assert "a file without suffix" in complaint(write("LICENSE", "x"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(complaint, write, name, content):
    assert "empty; expected at least one" in complaint(write(name, content))


def test_tables_without_rows(complaint, write):
    assert "empty; expected at least one sample" in complaint(write("a.csv", "text,id\n"))


def test_bad_json_line(complaint, write):
    problem = complaint(write("a.jsonl", '{"text": "x"}\n\n{"text": "y\n{"text": "z"}\n'))
    assert "line 3: not valid JSON: Invalid control character at at column 12" in problem


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"text": "x"},\n {"text": ', "line 2: not valid JSON: Expecting value at column 11"),
        ("b.jsonl", '{"text": "x"}\n5\n', 'line 2: expected an object such as {"text": ...}, found 5'),
        ("c.jsonl", b"\xff\xfe\x00", "not readable as UTF-8 text"),
        ("d.txt", b"\xff\xfe\x00", "not readable as UTF-8 text"),
        ("e.csv", "a,text\n1,x\n2,y,z,w\n", "line 3 has 4 cells, expected 2 as in the header"),
        ("f.parquet", "no parquet", "no whole Parquet file"),
    ],
)
def test_unreadable_files(complaint, write, name, content, expected):
    assert expected in complaint(write(name, content))


def test_a_split_of_a_folder_of_images_is_a_folder_in_it(open_data, complaint, tmp_path):
    for place in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png"):
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / place)
    (tmp_path / "images" / "LICENSE").write_text("free")
    found = {split: [row["image"] for row in rows_of(open_data(tmp_path / "images", split=split))] for split in SPLIT}
    assert {split: [Path(each).name for each in images] for split, images in found.items()} == SPLIT
    assert found["train"] == [row["image"] for row in rows_of(open_data(tmp_path / "images"))]
    told = complaint(tmp_path / "images", split="validation")
    assert told.endswith("split: 'validation' is none of the folder's splits; expected one of test, train")


def test_folders_of_labels_are_no_splits(open_data, tmp_path):
    for place in ("train/a.png", "plane/b.png"):
        (tmp_path / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / place)
    assert len(rows_of(open_data(tmp_path / "images"))) == 2


def test_split_that_is_not_there(complaint, write):
    path = write("a.jsonl", '{"text": "x"}')
    assert "split: 'test' is not there; expected one of ['train'], or a part" in complaint(path, split="test")
    assert "split: 'train[' is no split; expected a name, or a part such as" in complaint(path, split="train[")


@pytest.mark.parametrize(
    ("name", "table", "told"),
    [
        (
            "rows",
            {"text": pyarrow.array([], pyarrow.string())},
            "empty; expected at least one sample, found the columns ['text'], and no rows",
        ),
        ("columns", {}, "empty; expected at least one sample, found the columns [], and no rows"),
        ("twice", None, "the columns ['text'] stand twice; expected a name once"),
    ],
)
def test_parquet_files_without_a_use(complaint, tmp_path, name, table, told):
    pair = [pyarrow.array(["a"])] * 2
    made = pyarrow.table(table) if table is not None else pyarrow.Table.from_arrays(pair, names=["text", "text"])
    pyarrow.parquet.write_table(made, tmp_path / f"{name}.parquet")
    assert told in complaint(tmp_path / f"{name}.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / f"{name}.parquet").rename(tmp_path / "folder" / "part.parquet")
    assert f"part.parquet: {told[:10]}" in complaint(tmp_path / "folder")


def test_flipped_bits_of_a_parquet_file(complaint, write, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    contents = whole[:4] + bytes(byte ^ 255 for byte in whole[4:80]) + whole[80:]
    assert "a.parquet: cannot be read: it is damaged" in complaint(write("a.parquet", contents))
    footer = whole[:-100] + bytes(byte ^ 255 for byte in whole[-100:-8]) + whole[-8:]
    assert "a.parquet: no whole Parquet file" in complaint(write("a.parquet", footer))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
        ('{"text": "a", "n": {"m": 1, "m": 1}}', "the key 'm' stands twice in one object"),
        ('{"text": "a", "n": 1e999}', "the number 1e999 is too large; expected numbers up to 1.8e308"),
        ('{"text": "\\ud800"}', "'text': half of a character, \\ud800, stands in a text"),
        ('{"text": "a", "n": ["\\uDC00"]}', "'n': half of a character, \\udc00, stands in a text"),
    ],
)
def test_json_that_the_reader_refuses_names_its_line(complaint, write, content, told):
    good = '{"text": "\\ud83d\\ude00"}\n\n'
    assert f"a.jsonl: line 3: {told}" in complaint(write("a.jsonl", good + content))
    assert told in complaint(write("b.json", f"[{good},\n{content}]"))
    over_lines = f"{good.strip()} {content}".replace(': "', ':\n"', 1)
    assert f"line 2: {told}" in complaint(write("c.jsonl", over_lines))


def test_cells_of_csv(complaint, write):
    assert "the columns ['text'] stand twice" in complaint(write("a.csv", "text,text\na,b\n"))
    assert "a double quote opens in row 1 and is never closed" in complaint(write("b.csv", 'text\n"a\n'))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("x,text\n1,hello there\n2\n3,abc\n", "line 3 has 1 cell, expected 2 as in the header"),
        ('x,text\n1,"two\nlines"\n\n2,a\n3\n', "line 6 has 1 cell, expected 2"),
        ("x,text\n1,hello, there\n2,b, c\n", "line 2 has 3 cells, expected 2"),  # pandas would shift all columns
        ("x,text,y\n1,a,b\n2,c\n", "line 3 has 2 cells, expected 3"),
    ],
)
def test_lines_of_csv_with_too_few_or_too_many_cells(complaint, write, content, told):
    assert f"a.csv: {told}" in complaint(write("a.csv", content))
    write("folder/b.csv", "text\na\n")
    assert told in complaint(write("folder/a.csv", content).parent)


def test_a_card_says_how_cells_are_separated(open_data, write):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n  sep: ;\n---\n"
    folder = write("folder/README.md", card).parent
    write("folder/a.csv", "x;text\n1;one, two\n2;three\n")
    assert [row["text"] for row in rows_of(open_data(folder))] == ["one, two", "three"]


def test_blank_lines_and_empty_cells_of_csv(open_data, write):
    content = f'x,text\n\n1,a\n  \n2,\n"",{"long " * 40_000}\n3,"b ""q"" , c"\n\n'
    texts = [row["text"] for row in rows_of(open_data(write("a.csv", content))) if row["text"]]
    assert texts == ["a", "long " * 40_000, 'b "q" , c']


def test_a_cache_that_cannot_be_used_is_not_the_datas_fault(complaint, write, monkeypatch, tmp_path):
    path = write("a.jsonl", '{"text": "a"}')
    with monkeypatch.context() as patch:
        patch.setattr("datasets.builder.has_sufficient_disk_space", lambda *arguments, **options: False)
        found = complaint(path)
    cache = tmp_path / "datasets_cache"
    assert f"a.jsonl: {cache}, the cache that tables are converted into, cannot be used: Not enough disk space" in found
    assert "set HF_DATASETS_CACHE to a folder that has room and can be written" in found and "damaged" not in found
    for place, cause in (("/dev/null/cache", "Not a directory"), ("/proc/gone/cache", "No such file or directory")):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(place))
        assert f"{place}, the cache that tables are converted into, cannot be used: {cause}" in complaint(path)


def test_links_say_where_they_lead(complaint, tmp_path):
    (tmp_path / "q.jsonl").symlink_to("nowhere.jsonl")
    assert "q.jsonl: is a link to nowhere.jsonl, which does not exist; mend the link" in complaint(tmp_path / "q.jsonl")
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    assert "is a link that leads in a circle" in complaint(tmp_path / "circle.jsonl")


def test_what_a_folder_holds_and_cannot_be_read_is_told(complaint, tmp_path, write):
    Image.new("RGB", (2, 2)).save(write("images/a.png", ""))
    (tmp_path / "images" / "b.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "images" / "c.jpg")
    problem = complaint(tmp_path / "images")
    assert "b.png is a link to gone.png, which does not exist" in problem and "c.jpg is a named pipe" in problem
    write("tables/a.jsonl", '{"text": "x"}')
    (tmp_path / "tables" / "b.jsonl").symlink_to("gone.jsonl")
    assert "b.jsonl is a link to gone.jsonl" in complaint(tmp_path / "tables")


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"b.csv": "text\ny"}, "several formats, 1 .jsonl file, 1 .csv file"),
        ({"deep/b.txt": "y", "c.txt": "z"}, "several formats, 1 .jsonl file, 2 .txt files"),
        ({"b.jsonl.gz": b"\x1f\x8b"}, "several formats, 1 .jsonl file, 1 .gz file"),
    ],
)
def test_a_folder_of_several_formats_is_refused(complaint, write, others, told):
    folder = write("folder/a.jsonl", '{"text": "x"}').parent
    for name, content in others.items():
        write(f"folder/{name}", content)
    found = complaint(folder)
    assert all(part in found for part in told.split(", ")) and "leave files of one format in it" in found


def test_a_folder_of_json_and_what_is_no_data(open_data, write):
    folder = write("folder/a.jsonl", '{"text": "x"}').parent
    write("folder/b.json", '[{"text": "y"}]')
    write("folder/.hidden/c.csv", "text\nz")
    write("folder/README.md", "A dataset.")
    write("folder/notes.md", "Notes.")
    assert rows_of(open_data(folder)) == [{"text": "x"}, {"text": "y"}]


def test_a_card_says_which_of_several_formats_is_read(open_data, write):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n---\n"
    folder = write("folder/README.md", card).parent
    write("folder/a.jsonl", '{"text": "x"}')
    write("folder/b.csv", "text\ny")
    assert rows_of(open_data(folder)) == [{"text": "x"}]


def test_images_of_formats_that_are_not_read_are_told(complaint, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0 ftypheic")
    (tmp_path / "c.svg").write_text("<svg/>")
    found = complaint(tmp_path)
    assert (
        "1 .heic file" in found and "1 .svg file" in found and "beside images of formats that are read (.png" in found
    )


@pytest.mark.parametrize("suffix", [".eps", ".tga", ".DDS", ".npy", ".jp2", ".pcx"])
def test_images_that_only_pillow_knows_are_told(complaint, tmp_path, suffix):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / f"b{suffix}").write_bytes(b"x")
    assert f"1 {suffix.lower()} file beside images of formats that are read" in complaint(tmp_path)


def test_tables_and_documents_among_images_are_noted(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    for name in ("README.md", "LICENSE", ".hidden"):
        (tmp_path / name).write_text("x")
    assert folder_notes(tmp_path, "here") == ()
    (tmp_path / "deep").mkdir()
    for name in ("labels.csv", "metadata.json", "paper.pdf", "deep/metadata.csv"):
        (tmp_path / name).write_text("x")
    (note,) = folder_notes(tmp_path, "here")
    told = (
        "here: 4 files beside the images not read: deep/metadata.csv, labels.csv, metadata.json and 1 more. Of tables"
    )
    assert note.startswith(told)
    assert folder_notes(tmp_path / "labels.csv", "here") == () == folder_notes(None, "here")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_images_that_no_metadata_names_are_noted(open_data, tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (2, 2)).save(folder / f"{name}.png")
    table = pandas.DataFrame({"file_name": ["./b.png", "a.png"], "text": ["x", "y" * 200_000]})
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_text(table.to_csv(index=False) if kind == "csv" else table.to_json(orient="records", lines=True))
    assert open_data(folder).num_rows == 2
    (note,) = folder_notes(folder, "here")
    assert note == "warning: here: 2 images of 4 not used, for no metadata file names them: c.png, d.png"
    for name in ("c", "d"):
        (folder / f"{name}.png").unlink()
    assert folder_notes(folder, "here") == ()


def test_a_folder_of_gifs_and_tiffs_is_read(open_data, tmp_path):
    for name in ("a.gif", "b.tif", "c.TIFF", "d.ppm", "e.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    assert [row["image"] for row in rows_of(open_data(tmp_path))] == [str(path) for path in list_images(tmp_path)]
    assert len(list_images(tmp_path)) == 5


def test_files_of_a_folder_with_unlike_columns(complaint, tmp_path, write):
    write("tables/a.jsonl", '{"text": "x"}')
    write("tables/b.jsonl", '{"other": "x"}')
    assert "its files have other columns, or values of other types, than each other" in complaint(tmp_path / "tables")


def test_folder_with_nothing_to_read(complaint, write, tmp_path):
    (tmp_path / "void").mkdir()
    problem = complaint(tmp_path / "void")
    assert f"neither images ({', '.join(IMAGE_SUFFIXES)}) nor data files (.jsonl, .json, .csv, .parquet)" in problem


def test_hub_dataset_that_does_not_exist(complaint, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    problem = complaint("nobody/nothing-here", subset="small", split="test")
    assert "no such file or folder here, and the Hub has no such dataset that can be loaded" in problem
    assert "(id 'nobody/nothing-here', subset 'small', split 'test')" in problem


def test_settings_that_have_no_effect(complaint, write):
    problem = complaint(write("a.txt", "x"), subset="x", split="test")
    assert "subset: only datasets have subsets; remove it" in problem
    assert "split: 'test', but only datasets have splits; remove it" in problem
    problem = complaint(write("a.jsonl", '{"text": "x"}'), one_per="line")
    assert "one_per: 'line', but this is for .txt files; remove it" in problem


def test_a_path_is_no_pattern(make_config, tmp_path, checkpoint, text_signature):
    folder = tmp_path / "a [b] *"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"text": "hello world"}\n')
    config = make_config(folder / "data.jsonl")
    assert load_calibration(config, "math", checkpoint, text_signature).num_samples == 1


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path: Path, open_data) -> None:
    """Nor is a folder that was changed for what it was: `datasets` knows one whose card names its files by its name."""
    card = '---\nconfigs: [{config_name: default, data_files: [{split: train, path: "rows.jsonl"}]}]\n---\n'
    found = []
    for parent, text in (("math", "one"), ("code", "two"), ("code", "three and more")):
        folder = tmp_path / parent / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card)
        (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
        found.append(open_data(folder).select(("text",))[0]["text"])
    assert found == ["one", "two", "three and more"]


def test_only_rows_with_some_values_are_drawn(tmp_path: Path, open_data, complaint) -> None:
    rows = [
        {"text": f"{language} {number}", "language": language, "kind": number}
        for language in ("de", "fr")
        for number in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "rows.jsonl"

    def texts(**only: object) -> list[str]:
        source = open_data(path, only=only)
        table = source.select(("text",))
        return [table[index]["text"] for index in range(source.num_rows)]

    assert texts(language="fr") == ["fr 0", "fr 1", "fr 2"]
    assert texts(language="de", kind=2) == ["de 2"]
    assert "only: no column 'langauge'" in complaint(path, only={"langauge": "de"})
    assert "did you mean 'language'" in complaint(path, only={"langauge": "de"})
    assert "only: no row has {language: es}; the first has {'language': 'de'}" in complaint(
        path, only={"language": "es"}
    )


def test_only_labels_may_be_named(tmp_path: Path, open_data, complaint) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    folder = tmp_path / "animals"
    folder.mkdir()
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features)
    table.to_parquet(folder / "train.parquet")
    for dogs in (1, "dog"):
        source = open_data(folder, only={"label": dogs})
        assert [source.select(("text",))[index]["text"] for index in range(source.num_rows)] == ["a", "c"]
    assert "'label' has no label 'dgo'; did you mean 'dog'?" in complaint(folder, only={"label": "dgo"})


def test_ready_made_tensors_have_no_rows_to_choose(tmp_path: Path, complaint) -> None:
    save_file({"input_ids": torch.ones(2, 3, dtype=torch.long)}, tmp_path / "tokens.safetensors")
    assert "only: ready-made tensors have no columns" in complaint(tmp_path / "tokens.safetensors", only={"label": 0})
