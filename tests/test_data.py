"""Sources, the split and `prepare_data` as a whole: nothing of validation is seen in training."""

import hashlib
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from transformers import HfArgumentParser

from blueberry.errors import UsageError
from blueberry.training import tokenization
from blueberry.training.data import DataArguments, PreparedData, prepare_data, unigram_loss
from blueberry.training.reading import Corpus, read_corpus
from blueberry.training.splitting import choose_validation, split_corpus, survey

WORDS = ["whale", "sea", "ship", "captain", "white", "harpoon", "storm", "island", "sailor", "wave"]
pytestmark = pytest.mark.usefixtures("data_caches")
LIMITS = {"vocab_size": 300, "max_positions": 32}


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of 40 words."""
    rng = np.random.default_rng(seed)
    return [f"{seed}-{index} " + " ".join(rng.choice(WORDS, 40)) for index in range(count)]


TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def sotu_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("sotu")


@pytest.fixture(scope="module")
def sotu(sotu_cache) -> PreparedData:
    """The default path, once, with a small vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLUEBERRY_CACHE", str(sotu_cache))
        return prepare_data(DataArguments(), vocab_size=1024, max_positions=256)


def prepare(dataset, **options) -> PreparedData:
    return prepare_data(DataArguments(dataset=str(dataset), **options), **LIMITS)


def windows_of(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def text_of(data: PreparedData, rows) -> str:
    return data.tokenizer.decode([token for window in windows_of(rows) for token in window])


def hashes_of(rows) -> set[str]:
    windows = np.array(rows.with_format("numpy")["input_ids"][:])
    return {hashlib.sha256(window.tobytes()).hexdigest() for window in windows}


# The default corpus


def word_13_grams(texts: list[str]) -> list[np.ndarray]:
    """64-bit hashes of runs of 13 words of each text: one in eight, chosen by hash, so alike in all texts."""
    rng, numbers = np.random.default_rng(0), {}
    ids = [np.array([numbers.setdefault(word, len(numbers)) for word in text.split()]) for text in texts]
    words = rng.integers(2**63, size=len(numbers), dtype=np.uint64)
    places = rng.integers(2**63, size=13, dtype=np.uint64) | np.uint64(1)
    hashes = [np.lib.stride_tricks.sliding_window_view(words[row], 13) @ places for row in ids]
    return [row[row >> np.uint64(61) == 0] for row in hashes]


def shared_share(grams: list[np.ndarray], chosen: np.ndarray) -> float:
    """Share of the validation 13-grams that training holds too."""
    train = np.concatenate([row for row, held_out in zip(grams, chosen, strict=True) if not held_out])
    validation = np.unique(np.concatenate([row for row, held_out in zip(grams, chosen, strict=True) if held_out]))
    return float(np.isin(validation, train).mean())


def test_sotu_by_year_shares_few_13_grams_and_by_speech_many():
    corpus = read_corpus("sotu")
    grams = word_13_grams(corpus.documents["text"][:])
    by_year = survey(corpus.documents, "text", "year")
    by_speech = survey(corpus.documents, "text")
    budget = 0.05 * by_year.size.sum()
    years = shared_share(grams, choose_validation(by_year.group, by_year.size, budget))
    speeches = shared_share(grams, choose_validation(by_speech.group, by_speech.size, budget))
    assert years < 0.003  # 0.0020 here, 0.0015 over all 13-grams: phrases of the genre
    assert speeches > 0.006  # 0.0097 here, 0.0090 over all: the bound above can fail


def test_sotu_holds_all_249_documents_and_no_year_on_both_sides(sotu):
    assert sotu.documents + sotu.validation_documents == 249
    corpus = read_corpus("sotu")
    found = survey(corpus.documents, "text", "year")
    chosen = choose_validation(found.group, found.size, 0.05 * found.size.sum())
    years = np.array(corpus.documents["year"][:])
    assert chosen.sum() == sotu.validation_documents
    assert not set(years[chosen]) & set(years[~chosen])
    assert 0.03 < found.size[chosen].sum() / found.size.sum() < 0.08


def test_sotu_validation_windows_never_occur_in_training(sotu):
    assert not hashes_of(sotu.train) & hashes_of(sotu.validation)


def test_sotu_windows_are_whole_and_labelled_with_themselves(sotu):
    assert sotu.train_tokens == len(sotu.train) * 256
    assert sotu.validation_tokens == len(sotu.validation) * 256
    row = sotu.train[0]
    assert row["input_ids"].shape == (256,)
    assert (row["input_ids"] == row["labels"]).all()
    assert text_of(sotu, [row]).startswith("Fellow-Citizens of the Senate and House")
    assert "249" not in sotu.description and "sotu" in sotu.description


def test_sotu_figures_follow_from_the_validation_windows(sotu):
    targets = np.array(sotu.validation.with_format("numpy")["input_ids"][:])[:, 1:]
    assert sotu.unigram_loss == pytest.approx(entropy(np.bincount(targets.ravel())), rel=1e-12)
    text = text_of(sotu, sotu.validation).replace(tokenization.END_OF_TEXT, "")
    # all documents against whole windows: they differ by the tail
    assert sotu.bytes_per_token == pytest.approx(len(text.encode()) / sotu.validation_tokens, rel=1e-3)


def test_second_call_neither_trains_a_tokenizer_nor_packs(sotu, sotu_cache, monkeypatch, no_network):
    monkeypatch.setenv("BLUEBERRY_CACHE", str(sotu_cache))
    monkeypatch.setattr(tokenization, "train_bpe", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("blueberry.training.packing.windows", lambda **_: pytest.fail("packed again"))
    again = prepare_data(DataArguments(), vocab_size=1024, max_positions=256)
    assert again.description == sotu.description
    assert again.train.cache_files == sotu.train.cache_files


# The split


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 50)), min_size=2), st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_groups_stay_whole_and_both_sides_get_one(documents, fraction):
    group, size = (np.array(column) for column in zip(*documents, strict=True))
    if len(set(group)) < 2:
        with pytest.raises(UsageError, match="needs two different documents"):
            choose_validation(group, size, fraction * size.sum())
        return
    chosen = choose_validation(group, size, fraction * size.sum())
    assert set(group[chosen])
    assert set(group[~chosen])
    assert not set(group[chosen]) & set(group[~chosen])


@given(st.lists(st.integers(1, 20), min_size=40, max_size=80))
@settings(max_examples=50, deadline=None)
def test_validation_holds_the_share_asked_for_up_to_one_group(sizes):
    size = np.array(sizes)
    group = np.random.default_rng(0).permutation(len(size))
    budget = 0.2 * size.sum()
    chosen = choose_validation(group, size, budget)
    assert budget <= size[chosen].sum() < budget + size.max()


def test_split_depends_on_the_documents_and_not_on_their_order():
    corpora = [Corpus("texts", Dataset.from_dict({"text": texts})) for texts in (TEXTS, TEXTS[::-1])]
    first, second = (split_corpus(corpus, 0.2, 10**6) for corpus in corpora)
    assert 2 < len(first.validation) < 20
    assert set(first.validation["text"]) == set(second.validation["text"])
    assert set(first.train["text"]) == set(TEXTS) - set(first.validation["text"])


def test_copies_of_a_document_land_on_one_side(tmp_path):
    Dataset.from_dict({"text": TEXTS * 3}).save_to_disk(tmp_path / "copies")
    data = prepare(tmp_path / "copies", validation_fraction=0.3)
    train, validation = (
        set(text_of(data, rows).split(tokenization.END_OF_TEXT)[:-1]) for rows in (data.train, data.validation)
    )
    assert len(train) > 20
    assert not train & validation


def test_own_validation_split_is_used_and_its_copies_leave_training(tmp_path):
    own = make_texts(5, seed=1)
    splits = {"train": Dataset.from_dict({"text": TEXTS + own[:2]}), "validation": Dataset.from_dict({"text": own})}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    data = prepare(tmp_path / "splits")
    assert (data.documents, data.validation_documents) == (40, 5)
    assert text_of(data, data.validation).startswith(own[0])
    assert "1-0 " not in text_of(data, data.train)


def test_validation_is_bounded(tmp_path):
    Dataset.from_dict({"text": make_texts(100)}).save_to_disk(tmp_path / "many")
    data = prepare(tmp_path / "many", validation_fraction=0.5, max_validation_tokens=200)
    assert 96 < data.validation_tokens <= 200
    own = {"train": Dataset.from_dict({"text": TEXTS}), "validation": Dataset.from_dict({"text": make_texts(50, 1)})}
    DatasetDict(own).save_to_disk(tmp_path / "own")
    assert 96 < prepare(tmp_path / "own", max_validation_tokens=200).validation_tokens <= 200


# The sources


def write_sources(folder):
    """The same 40 documents in every format: name -> path."""
    folder.mkdir()
    paths = {name: folder / name for name in ("many", "saved")}
    paths["many"].mkdir()
    for index, text in enumerate(TEXTS):
        (paths["many"] / f"{index:02}.txt").write_text(text)
    for name, content in {
        "paragraphs.txt": "\n\n".join(TEXTS),
        "lines.txt": "\n".join(TEXTS),
        "rows.jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
    }.items():
        paths[name] = folder / name
        paths[name].write_text(content)
    (paths["many"] / "folder.txt").mkdir()  # a folder is no document
    paths["rows[1].jsonl"] = folder / "rows[1].jsonl"
    paths["rows[1].jsonl"].write_text(paths["rows.jsonl"].read_text())
    rows = Dataset.from_dict({"text": TEXTS, "other": TEXTS, "number": range(40)})
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(paths["saved"])
    return paths | {"glob": folder / "many" / "*.txt", "rows.parquet": folder / "rows.parquet"}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_local_source_gives_the_same_documents_without_network(tmp_path, no_network, streaming):
    for name, path in write_sources(tmp_path / "sources").items():
        corpus = read_corpus(str(path), streaming=streaming)
        assert [row["text"] for row in corpus.documents] == TEXTS, name


def test_prepared_from_local_files_without_network(tmp_path, no_network):
    paths = write_sources(tmp_path / "sources")
    data = prepare(paths["rows.jsonl"], validation_fraction=0.2)
    assert data.name == "rows.jsonl"
    documents = text_of(data, data.train).split(tokenization.END_OF_TEXT)
    assert len(documents) > 20
    assert set(documents[:-1]) <= set(TEXTS)
    assert data.description.startswith("rows.jsonl: training on ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ""),
        (["train-0.jsonl", "train-1.jsonl", "dev-0.jsonl", "eval.jsonl"], ""),
        (["wiki.train.jsonl", "wiki.valid.jsonl", "wiki.test.jsonl"], "*.jsonl"),
        (["train/a.jsonl", "val/a.jsonl", "testing/a.jsonl"], "**"),
    ],
)
def test_a_folder_is_split_by_the_names_of_its_files_as_load_dataset_does(
    names, pattern, streaming, tmp_path, no_network
):
    folder = tmp_path / "test" / "files"  # what lies above says nothing
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": TEXTS[index]}))
    corpus = read_corpus(str(folder / pattern), streaming=streaming)
    expected = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in corpus.documents] == expected["train"]["text"][:]
    assert [row["text"] for row in corpus.validation] == expected["validation"]["text"][:]


def test_one_file_is_for_training_whatever_its_name(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": TEXTS[0]}))
    assert read_corpus(str(tmp_path / "test.jsonl")).documents["text"][:] == TEXTS[:1]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column_is_known_by_its_type_where_the_first_row_is_null(tmp_path, streaming):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in [None, *TEXTS]))
    corpus = read_corpus(str(tmp_path / "rows.jsonl"), streaming=streaming)
    assert [row["text"] for row in corpus.documents] == [None, *TEXTS]


def test_one_document_is_not_called_documents(tmp_path):
    own = {"train": Dataset.from_dict({"text": TEXTS}), "validation": Dataset.from_dict({"text": TEXTS[:1]})}
    DatasetDict(own).save_to_disk(tmp_path / "splits")
    assert " of 1 document (the dataset's own" in prepare(tmp_path / "splits").description


def test_stream_holds_out_its_first_documents_and_trains_on_the_rest(tmp_path, no_network):
    path = tmp_path / "rows.jsonl"
    texts = [*TEXTS, TEXTS[0], TEXTS[1]]  # copies of what validation takes
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = prepare(path, streaming=True, max_validation_tokens=200)
    held_out = data.validation_documents
    assert 1 <= held_out < 10
    assert (data.train_tokens, data.documents) == (None, None)
    expected = tokenization.END_OF_TEXT.join(TEXTS[held_out:]) + tokenization.END_OF_TEXT
    found = text_of(data, data.train)
    assert expected.startswith(found)
    assert len(expected) - len(found) < 400  # the tail of less than a window
    assert TEXTS[0].startswith(text_of(data, data.validation)[:50])


def test_stream_and_disk_train_on_the_same_windows(tmp_path):
    own = {"train": Dataset.from_dict({"text": TEXTS}), "validation": Dataset.from_dict({"text": make_texts(9, 1)})}
    DatasetDict(own).save_to_disk(tmp_path / "splits")
    disk, stream = prepare(tmp_path / "splits"), prepare(tmp_path / "splits", streaming=True)
    assert windows_of(disk.train) == windows_of(stream.train)
    assert windows_of(disk.validation) == windows_of(stream.validation)


def test_prepared_windows_can_be_saved_and_read_back(tmp_path):
    path = write_sources(tmp_path / "sources")["saved"]
    first = prepare(path, validation_fraction=0.2)
    DatasetDict(train=first.train, validation=first.validation).save_to_disk(tmp_path / "packed")
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = prepare(tmp_path / "packed", tokenizer=str(tmp_path / "tokenizer"))
    assert again.max_length == 32
    assert windows_of(again.train) == windows_of(first.train)
    assert windows_of(again.validation) == windows_of(first.validation)
    assert again.bytes_per_token == pytest.approx(first.bytes_per_token, rel=0.05)  # first counts the cut tail too
    assert prepare(tmp_path / "packed").bytes_per_token is None


def test_tokenized_rows_need_no_tokenizer(tmp_path):
    rows = np.random.default_rng(0).integers(0, 300, (20, 16))
    Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(tmp_path / "rows")
    data = prepare(tmp_path / "rows")
    assert data.tokenizer is None
    assert data.max_length == 16
    assert sorted(windows_of(data.train) + windows_of(data.validation)) == sorted(rows.tolist())
    assert prepare(tmp_path / "rows", max_length=8).train_tokens == data.train_tokens


def test_null_rows_of_tokens_are_skipped(tmp_path):
    rows = np.random.default_rng(0).integers(0, 300, (20, 16)).tolist()
    Dataset.from_dict({"input_ids": [None, *rows, None, []]}).save_to_disk(tmp_path / "rows")
    data = prepare(tmp_path / "rows")
    assert sorted(windows_of(data.train) + windows_of(data.validation)) == sorted(rows)


def test_masked_labels_are_refused_though_the_windows_of_the_same_ids_are_cached(tmp_path):
    rows = np.random.default_rng(0).integers(0, 300, (20, 16)).tolist()
    Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(tmp_path / "rows")
    held_out = windows_of(prepare(tmp_path / "rows").validation)
    masked = [row if row in held_out else [-100, *row[1:]] for row in rows]
    Dataset.from_dict({"input_ids": rows, "labels": masked}).save_to_disk(tmp_path / "masked")
    with pytest.raises(UsageError, match="labels differ from input_ids"):
        prepare(tmp_path / "masked")


def test_text_column_is_the_named_one_or_text_or_the_only_one(tmp_path):
    rows = Dataset.from_dict({"text": TEXTS, "story": TEXTS[::-1], "id": range(40)})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.remove_columns("text").to_parquet(tmp_path / "b.parquet")
    assert read_corpus(str(tmp_path / "a.parquet")).documents["text"][:] == TEXTS
    assert read_corpus(str(tmp_path / "a.parquet"), text_column="story").documents["text"][:] == TEXTS[::-1]
    assert read_corpus(str(tmp_path / "b.parquet")).documents["text"][:] == TEXTS[::-1]


def test_arguments_are_read_from_the_command_line():
    line = "--dataset a.txt --streaming true --max_length 64 --validation_fraction 0.1"
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(line.split())
    assert args == DataArguments("a.txt", streaming=True, max_length=64, validation_fraction=0.1)
    assert all(field.metadata["help"] for field in DataArguments.__dataclass_fields__.values())


def test_unigram_loss_of_equally_frequent_targets_is_the_log_of_their_number():
    assert unigram_loss(np.array([[9, 0, 1], [9, 2, 3]])) == pytest.approx(np.log(4), rel=1e-15)
