"""What cannot be trained on is refused in one line that names it and the remedy."""

import json

import datasets
import pytest
from datasets import Dataset
from test_data import TEXTS, prepare, write_sources

from blueberry.errors import UsageError

pytestmark = pytest.mark.usefixtures("data_caches")


@pytest.fixture(scope="module")
def bad_sources(tmp_path_factory):
    """A folder of what cannot be trained on."""
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "broken.jsonl": '{"text": "a"}\n{"text": ',
        "empty.txt": "",
        "blank.jsonl": '{"text": " "}\n{"text": ""}',
        "table.csv": "text\na",
        "two.jsonl": '{"title": "a", "story": "b"}',
        "number.jsonl": '{"id": 1}',
        "one.jsonl": json.dumps({"text": TEXTS[0]}),
        "short.jsonl": '{"text": "a"}\n{"text": "b"}',
        "later.jsonl": '{"text": "a"}\n{"text": 5}',
        "nested/deeper/a.jsonl": '{"text": "a"}',
        "test/test.jsonl": '{"text": "a"}',
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00" * 9)
    (folder / "folder").mkdir()
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("a")
    (folder / "mixed" / "b.jsonl").write_text("{}")
    rows = {"input_ids": [[1, 2, 3] * 20, [4, 5, 6] * 20]}
    Dataset.from_dict(rows).save_to_disk(folder / "long")
    columns = {
        "ids": [[1, 2], [3, 900]],
        "floats": [[1.0, 2.0]],
        "strings": [["1", "2"]],
        "scalars": [1, 2],
        "tables": [[[1], [2]]],
        "nulls": [[1, None], [2, None]],
        "damaged": [[1, 2]],
        "rowless": [],
    }
    for name, ids in columns.items():
        Dataset.from_dict({"input_ids": ids * 20}).save_to_disk(folder / name)
    next((folder / "damaged").glob("*.arrow")).unlink()
    Dataset.from_dict({"input_ids": [[1, 2]] * 9, "labels": [1] * 9}).save_to_disk(folder / "classes")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.jsonl", "cannot be read as json, mend or remove the file"),
        ("binary.txt", "cannot be read as text, mend or remove the file"),
        ("empty.txt", "is empty"),
        ("blank.jsonl", "has no document with text"),
        ("table.csv", r"unknown file type '.csv'; convert it to one of .txt, .json"),
        ("two.jsonl", r"which column is the text\? name it with --text_column \(columns: title, story\)"),
        ("number.jsonl", r"columns: id"),
        ("one.jsonl", "needs two different documents"),
        ("short.jsonl", "training text is shorter than one window of 32 tokens; lower --max_length"),
        ("folder", "no .txt, .json, .jsonl, .parquet file in it"),
        ("*.zip", "no .txt, .json, .jsonl, .parquet file in it"),
        ("mixed", "mixes .jsonl, .txt files"),
        ("absent.txt", "no file or folder of this name; check the path"),
        ("absent", "no file or folder of this name; check the path"),
        ("long", "has 60 tokens, the model 32 positions; --max_length 32"),
        ("ids", "token id 900 is outside the model's vocabulary of 300"),
        ("later.jsonl", r"column 'text' is Json\(decode=True\), not text in every row"),
        ("nested", r"its files lie deeper, name them as in '.*/nested/\*\*/\*.jsonl'"),
        ("test", "holds files for validation and test only; name one file"),
        ("floats", r"column 'input_ids' is List\(Value\('float64'\)\), not a list of integers in every row"),
        ("strings", r"column 'input_ids' is List\(Value\('string'\)\), not a list of integers"),
        ("scalars", r"column 'input_ids' is Value\('int32'\), not a list of integers"),
        ("tables", r"column 'input_ids' is List\(List\(Value\('int32'\)\)\), not a list of integers"),
        ("classes", r"column 'labels' is Value\('int64'\), not a list of integers"),
        ("nulls", r"a row of token ids holds float64 values \(nulls\?\), not integers"),
        ("damaged", "is damaged, save it again with save_to_disk: .*No such file"),
        ("rowless", "is empty, or one of its splits; save it with rows"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_in_one_line(bad_sources, no_network, caplog, name, message):
    with pytest.raises(UsageError, match=message) as caught:
        prepare(bad_sources / name)
    assert "\n" not in str(caught.value)
    assert not caplog.records  # of the libraries


def test_no_dataset_is_not_the_working_directory():
    with pytest.raises(UsageError, match="--dataset is empty"):
        prepare("")


@pytest.mark.parametrize("variable", ["BLUEBERRY_CACHE", "HF_HOME"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(variable, tmp_path, monkeypatch):
    path = write_sources(tmp_path / "sources")["rows.jsonl"]
    if variable == "HF_HOME":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path / "cache"))
    else:
        monkeypatch.setenv(variable, str(path / "cache"))
    with pytest.raises(UsageError, match=rf"cannot be written \(Not a directory\): set {variable} to a folder"):
        prepare(path)


def test_unknown_hub_dataset_is_refused_in_one_line():
    with pytest.raises(UsageError, match="no file or folder of this name, and the Hub did not give it") as caught:
        prepare("someone/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.0}, "--validation_fraction 0.0: must lie between 0 and 1"),
        ({"validation_fraction": 1.0}, "--validation_fraction 1.0"),
        ({"max_length": 33}, "--max_length 33: must lie between 2 and the model's 32 positions"),
        ({"max_length": 1}, "--max_length 1"),
        ({"max_validation_tokens": 0}, "--max_validation_tokens 0"),
        ({"text_column": "absent"}, "no text column 'absent'; name it with --text_column"),
        ({"streaming": True}, "validation takes all 40 documents of the stream"),
        ({"tokenizer": "./absent"}, "no such folder"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, options, message):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "rows")
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path / "rows", **options)


def test_streaming_the_corpus_in_memory_is_refused():
    with pytest.raises(UsageError, match="leave --streaming out"):
        prepare("sotu", streaming=True)
