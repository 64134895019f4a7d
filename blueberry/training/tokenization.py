"""The tokenizer: loaded by name, or a byte-level BPE trained on the training split and cached by content."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from blueberry.errors import UsageError
from blueberry.training.cache import cache_folder
from blueberry.training.hub_access import hub_or_cache
from blueberry.training.reading import id_and_revision, is_local_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
RECIPE = "byte-level-bpe-1"  # part of the cache key: raise it when `train_bpe` changes its result
TRAINING_BYTES = 50_000_000
SMALLEST_VOCABULARY = 257  # 256 bytes and END_OF_TEXT


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, on bytes as in GPT-2).

    Deterministic: the same texts give the same vocabulary. Id 0 is `<|endoftext|>`; small corpora give fewer
    than `vocab_size` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),  # without a terminal the bar is blank lines
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_positions: int | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first 50 MB of `texts`, from the cache when the same texts were seen before.

    Args:
        texts: training documents.
        vocab_size: at most this many entries (257 or more).
        max_positions: becomes `model_max_length`; None for no limit.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level BPE needs more entries than vocab_size {vocab_size}: set --vocab_size to "
            f"{SMALLEST_VOCABULARY} or more, or name a --tokenizer"
        )
    head = _first_bytes(texts, TRAINING_BYTES)
    folder = cache_folder("tokenizers") / _cache_key(head, vocab_size)
    if not folder.is_dir():
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        bpe = train_bpe(head, vocab_size)
        _save_atomically(PreTrainedTokenizerFast(tokenizer_object=bpe, **special), folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if max_positions is not None:
        tokenizer.model_max_length = max_positions
    return tokenizer


def _first_bytes(texts: Iterable[str], limit: int) -> list[str]:
    """Leading documents, until they hold `limit` UTF-8 bytes; the last one is cut, at a whole character."""
    head, room = [], limit
    for text in texts:
        data = text.encode()
        head.append(data[:room].decode(errors="ignore"))
        room -= len(data)
        if room <= 0:
            break
    return head


def _cache_key(texts: list[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{RECIPE} {vocab_size}\n".encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _save_atomically(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write beside `folder` and rename: a reader sees all or nothing, and of two writers the first wins."""
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        tokenizer.save_pretrained(scratch)
        scratch.replace(folder)
    except OSError:
        if not folder.is_dir():  # not a lost race
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already when it was renamed


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the Hub (ID@REVISION), with an end-of-text token to set documents apart.

    Raises:
        UsageError: not found, without a fast version, or without `eos_token`.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if is_local_path(id_and_revision(name)[0]) and not folder.is_dir():
        raise UsageError(f"--tokenizer {name}: no such folder; check the path")
    if not folder.is_dir():
        hub_or_cache()
    where, revision = (folder, "main") if folder.is_dir() else id_and_revision(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--tokenizer {name}: neither a folder with a tokenizer nor on the Hub ({reason})") from error
    if not tokenizer.is_fast:
        raise UsageError(f"--tokenizer {name}: has no fast version (tokenizer.json); choose another")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--tokenizer {name}: has no eos_token to set documents apart; add one or choose another")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Every id of `tokenizer` must have a row in the model's embedding."""
    entries = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if entries > vocab_size:
        raise UsageError(
            f"the model's vocab_size {vocab_size} is smaller than the tokenizer's {entries} entries; "
            f"set --vocab_size to {entries} or more, or choose a smaller --tokenizer"
        )
