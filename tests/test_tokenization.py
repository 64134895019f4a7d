"""The byte-level BPE: any text comes back, the same text gives the same vocabulary, the cache is safe."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blueberry.errors import UsageError
from blueberry.training import tokenization
from blueberry.training.tokenization import END_OF_TEXT, check_vocabulary, load_tokenizer, train_bpe, train_tokenizer

TEXTS = ["the whale is white and the sea is wide", "call me Ishmael, some years ago", "naïve café, 白鲸"] * 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLUEBERRY_CACHE", str(tmp_path))
    return tmp_path / "tokenizers"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_any_unicode_text_comes_back(bpe, text):
    assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == text


def test_same_texts_give_the_same_vocabulary(bpe):
    assert train_bpe(TEXTS, 300).to_str() == bpe.to_str()


def test_vocabulary_has_the_size_asked_for(bpe):
    assert bpe.get_vocab_size() == 300
    assert bpe.token_to_id(END_OF_TEXT) == 0


def test_other_text_gives_another_vocabulary(bpe):
    assert train_bpe(["zebra zebu zeppelin"] * 9, 300).to_str() != bpe.to_str()


def test_special_tokens_and_length_are_set_and_survive_saving(cache, tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 64)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (loaded.eos_token_id, loaded.model_max_length) == (0, 64)


def test_second_call_reads_the_cache(cache, monkeypatch):
    first = train_tokenizer(TEXTS, 300, 64)
    monkeypatch.setattr(tokenization, "train_bpe", lambda *_: pytest.fail("trained again"))
    assert train_tokenizer(TEXTS, 300, 128).get_vocab() == first.get_vocab()


@pytest.mark.parametrize(
    ("texts", "vocab_size"), [(TEXTS[:-1], 300), (TEXTS, 299), ([*TEXTS[:-2], "".join(TEXTS[-2:])], 300)]
)
def test_cache_is_keyed_by_text_and_size(cache, texts, vocab_size):
    train_tokenizer(TEXTS, 300, 64)
    train_tokenizer(texts, vocab_size, 64)
    assert len(list(cache.iterdir())) == 2


def test_only_the_head_of_the_text_is_read(cache, monkeypatch):
    monkeypatch.setattr(tokenization, "TRAINING_BYTES", 50)

    def endless():
        while True:
            yield "0123456789é"

    assert len(train_tokenizer(endless(), 257, 64)) == 257


def test_the_head_is_measured_in_bytes_and_cut_at_a_character():
    assert tokenization._first_bytes(["ab", "ééé", "x"], 5) == ["ab", "é"]
    assert tokenization._first_bytes(["ab", "ééé", "x"], 9) == ["ab", "ééé", "x"]


def test_losing_the_race_keeps_the_winner_and_leaves_nothing(cache, bpe):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    cache.mkdir()
    tokenization._save_atomically(tokenizer, cache / "key")
    before = (cache / "key" / "tokenizer.json").stat().st_ino
    tokenization._save_atomically(tokenizer, cache / "key")
    assert (cache / "key" / "tokenizer.json").stat().st_ino == before
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_interrupted_writing_is_not_taken_for_a_tokenizer(cache, monkeypatch):
    def interrupted(self, folder):
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        train_tokenizer(TEXTS, 300, 64)
    assert list(cache.iterdir()) == []
    assert len(train_tokenizer(TEXTS, 300, 64)) == 300


def test_vocabulary_too_small_for_bytes_is_refused(cache):
    with pytest.raises(UsageError, match=r"vocab_size 256: set --vocab_size to 257 or more"):
        train_tokenizer(TEXTS, 256, 64)


def test_model_vocabulary_smaller_than_the_tokenizers_is_refused(bpe):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    check_vocabulary(tokenizer, 300)
    with pytest.raises(UsageError, match="vocab_size 299 is smaller than the tokenizer's 300"):
        check_vocabulary(tokenizer, 299)


def test_missing_tokenizers_are_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="--tokenizer someone/nothing: neither a folder"):
        load_tokenizer("someone/nothing")


def test_tokenizer_without_an_end_of_text_token_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))
