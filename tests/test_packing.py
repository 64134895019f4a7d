"""Windows: nothing twice, nothing lost but the tail; the same windows from disk and from a stream."""

import pickle

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from blueberry.errors import UsageError
from blueberry.training.packing import RowChecker, TextEncoder, pack, pack_stream, pack_to_disk, token_arrays
from blueberry.training.tokenization import END_OF_TEXT, train_bpe

TEXTS = ["the whale is white and the sea is wide", "call me Ishmael", "", None, "a whale, a sea, a ship " * 30]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = train_bpe([text for text in TEXTS if text], 300)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TextEncoder.of(tokenizer)


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=12), st.integers(2, 7))
@settings(max_examples=100, deadline=None)
def test_windows_are_the_tokens_in_order_without_the_tail(documents, max_length):
    tokens = [token for document in documents for token in document]
    windows = list(pack((np.array(document, dtype=np.int32) for document in documents), max_length))
    assert all(window.shape == (max_length,) for window in windows)
    packed = [token for window in windows for token in window]
    assert packed == tokens[: len(tokens) // max_length * max_length]


def test_documents_are_joined_with_the_end_of_text_token(tokenizer, encoder):
    expected = []
    for text in TEXTS:
        if text:
            expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = np.concatenate(list(token_arrays(Dataset.from_dict({"text": TEXTS}), encoder)))
    assert found.tolist() == expected


def test_a_control_token_written_in_a_document_is_text(tokenizer, encoder):
    text = f"a whale{END_OF_TEXT} a sea"
    for same in (encoder, pickle.loads(pickle.dumps(encoder))):
        *ids, end = same({"text": [text]}).tolist()
        assert end == tokenizer.eos_token_id and end not in ids
        assert tokenizer.decode(ids) == text


def test_workers_encode_after_the_threads_of_the_tokenizer_were_lost_in_their_fork(encoder, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    rows = pack_stream(Dataset.from_dict({"text": TEXTS * 10}).to_iterable_dataset(), encoder, 16)
    here = [row["input_ids"] for row in rows]  # starts the threads
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=30)
    assert [row["input_ids"] for row in loader] == here


def test_truncation_in_the_tokenizers_file_cuts_no_document(tokenizer):
    short = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT)
    short.backend_tokenizer.enable_truncation(4)
    found = TextEncoder.of(short)({"text": [TEXTS[0]]})
    short.backend_tokenizer.no_truncation()
    assert found.tolist() == [*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]
    assert len(found) > 5


def test_stream_and_disk_give_the_same_windows(encoder, tmp_path):
    documents = Dataset.from_dict({"text": TEXTS * 10})
    on_disk = pack_to_disk(documents, "content", encoder, 16, str(tmp_path))
    stream = pack_stream(documents.to_iterable_dataset(), encoder, 16)
    assert len(on_disk) > 10
    assert list(stream) == list(on_disk)
    assert list(stream) == list(on_disk)  # a stream can be read again
    assert on_disk["labels"][:] == on_disk["input_ids"][:]


def test_batching_does_not_change_the_tokens(encoder, monkeypatch):
    documents = Dataset.from_dict({"text": TEXTS * 40})
    whole = np.concatenate(list(token_arrays(documents, encoder)))
    monkeypatch.setattr("blueberry.training.packing.BATCH_SIZE", 1)
    parts = list(token_arrays(documents, encoder))
    assert len(parts) > 1
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_packed_windows_are_memory_mapped_and_made_once(encoder, tmp_path, monkeypatch):
    documents = Dataset.from_dict({"text": TEXTS * 10})
    first = pack_to_disk(documents, "content", encoder, 16, str(tmp_path))
    assert first.cache_files
    monkeypatch.setattr("blueberry.training.packing.token_arrays", lambda *_: pytest.fail("packed again"))
    again = pack_to_disk(documents, "content", encoder, 16, str(tmp_path))
    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize("change", ["content", "max_length", "encoder"])
def test_cache_is_not_used_for_something_else(encoder, tmp_path, change):
    documents = Dataset.from_dict({"text": TEXTS * 10})
    first = pack_to_disk(documents, "content", encoder, 16, str(tmp_path))
    other_encoder = TextEncoder(encoder.backend, eos_token_id=5) if change == "encoder" else encoder
    content = "other" if change == "content" else "content"
    documents = Dataset.from_dict({"text": TEXTS * 9}) if change == "content" else documents
    second = pack_to_disk(documents, content, other_encoder, 8 if change == "max_length" else 16, str(tmp_path))
    assert second.to_dict() != first.to_dict()


def test_tokenized_rows_are_concatenated_as_they_are():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6, 7, 8]]})
    assert np.concatenate(list(token_arrays(rows, RowChecker(10)))).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_labels_of_rows_without_ids_are_skipped_with_them():
    ids, labels = [[1, 2, 3], None, [4]], [[1, 2, 3], [9], [4]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    assert np.concatenate(list(token_arrays(rows, RowChecker(10)))).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("row", "labels", "message"),
    [
        ([1, 12], [1, 12], "token id 12 is outside the model's vocabulary of 10"),
        ([1, -3], [1, -3], "token id -3"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], r"5 tokens, the model 4 positions; --max_length 4"),
        ([1, 2], [-100, 2], "labels differ from input_ids"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(row, labels, message, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2], row], "labels": [[1, 2], labels]})
    checker = RowChecker(10, max_row=4)
    with pytest.raises(UsageError, match=message):
        pack_to_disk(rows, message, checker, 2, str(tmp_path))
    with pytest.raises(UsageError, match=message):
        list(pack_stream(rows.to_iterable_dataset(), checker, 2))
