"""Cards that two have written, and texts without what they told about a machine."""

from pathlib import Path

import pytest
import yaml

from blueberry.errors import UsageError
from hub.merging import merged, split
from hub.scrub import Scrubber

CARD = (
    "---\nlicense: apache-2.0\ntags: [muon]\n---\n\n# name\n\n"
    "## Use\n\nold\n\n## Results\n\n1.0\n\n## Licence\n\nfree\n"
)
NEW = CARD.replace("1.0", "2.0").replace("[muon]", "[muon, moe]").replace("old", "new")


def test_a_card_that_nobody_edited_becomes_the_new_one():
    assert merged(NEW, merged(CARD, None)) == merged(NEW, None)
    assert merged(NEW, merged(CARD, None).replace("\n", "\r\n")) == merged(NEW, None)  # as browsers send it


def test_edited_pieces_stay_and_the_others_are_new():
    edited = merged(CARD, None).replace("old", "mine").replace("apache-2.0", "mit")
    metadata, sections = split(merged(NEW, edited))
    assert metadata == {"license": "mit", "tags": ["muon", "moe"]}
    assert "mine" in sections["Use"] and "2.0" in sections["Results"]


def test_deleted_pieces_stay_deleted_and_own_ones_keep_their_place():
    theirs = (
        merged(CARD, None).replace("## Use\n\nold\n\n", "").replace("## Licence", "## Thanks\n\nall\n\n## Licence")
    )
    for _ in range(2):  # and in the push after that
        theirs = merged(NEW, theirs)
    assert list(split(theirs)[1]) == ["", "Results", "Thanks", "Licence"]


@pytest.mark.parametrize("added", ["\n## My notes\n\nMine.\n", "Mine.\n", "\r\n\r\nMine."])
def test_text_at_the_bottom_stays_and_hinders_no_later_card(added):
    theirs = merged(CARD, None) + added
    for number in ("2.0", "3.0"):
        theirs = merged(CARD.replace("1.0", number), theirs)
        assert number in theirs and theirs.count("Mine.") == 1
        assert theirs.count("<!-- blueberry") == 1 and theirs.rstrip().endswith("-->")


def test_new_pieces_come_after_those_that_they_follow():
    more = NEW.replace("## Licence", "## Spectra\n\nsigma\n\n## Licence")
    assert list(split(merged(more, merged(CARD, None)))[1]) == ["", "Use", "Results", "Spectra", "Licence"]


def test_a_card_of_another_origin_is_kept_whole():
    theirs = "---\nlicense: mit\n---\n\nMine.\n\n## Use\n\n```\n## no heading\n```\n"
    metadata, sections = split(merged(CARD, theirs))
    assert metadata == {"license": "mit", "tags": ["muon"]} and "Mine." in sections[""]
    assert "## no heading" in sections["Use"] and "1.0" in sections["Results"]


def test_a_card_that_nobody_wrote_is_replaced():
    automatic = "<!-- generated automatically according to the information the Trainer had access to -->\n# run"
    assert merged(CARD, automatic) == merged(CARD, None)


def test_metadata_that_is_none_is_refused():
    with pytest.raises(UsageError, match="is no YAML"):
        merged(CARD, "---\na: [\n---\n")
    with pytest.raises(UsageError, match="must map names"):
        merged(CARD, "---\n- a\n---\n")


@pytest.fixture
def scrub(monkeypatch: pytest.MonkeyPatch) -> Scrubber:
    monkeypatch.setattr("socket.gethostname", lambda: "quarkbox.lab.example")
    monkeypatch.setattr("getpass.getuser", lambda: "wilhelmina")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/wilhelmina"))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    return Scrubber(Path("/srv/my runs/demo"), paths=["my data/corpus", "results/base"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"output_dir": "/srv/my runs/demo", "seed": 1', '"output_dir": "demo", "seed": 1'),
        ("/home/wilhelmina/text.txt and ~/text.txt", "text.txt and text.txt"),
        (r"C:\Users\wilhelmina\text.txt", "text.txt"),
        ("PYTHONPATH=lib:/data/alice/x file:///data/alice/corpus.txt", "PYTHONPATH=lib:x corpus.txt"),
        ("in ../alice/private/corpus and ./alice/b.txt", "in corpus and b.txt"),
        ('"model": "results/base", "dataset": "my data/corpus"', '"model": "base", "dataset": "corpus"'),
        ('"home": "/home/wilhelmina", "other": "/home/otto"', '"home": "~", "other": "~"'),
        ("ssh wilhelmina@quarkbox, http://quarkbox:6006", "ssh local@local, http://local:6006"),
        ("on quarkbox.lab.example", "on local"),
        ("events.out.tfevents.1700000000.quarkbox.12.0", "events.out.tfevents.1700000000.local.12.0"),
        ("runs/Nov30_00-05-05_quarkbox", "runs/Nov30_00-05-05_local"),
        ("https://huggingface.co/a/b and dW/W and </b> and 1 / 2", None),
        ("key 0123456789abcdef wJalrXUtnFEMI/K7MDENG", "key <token> <token>"),
        ("hf_abcdefghijklmnop hf_ZYXWVUTSRQPONMLK", "<token> <token>"),
        ("pip install hf_transfer hf_transformers", None),
    ],
)
def test_texts_lose_what_is_local_and_nothing_else(scrub, text, expected):
    assert scrub.text(text) == (text if expected is None else expected)
    assert scrub.leak(scrub.text(text).encode()) is None


def test_paths_in_settings_become_names(scrub):
    settings = {
        "dataset": "/data/with spaces/corpus",
        "files": ["~/a b/c.txt", "../a b/c.txt", "data/acme/c.txt"],
        "dataset_2": "org/data",
        "model": "results/base",
        "url": "file:///data/alice b/c.txt",
        "lr": 0.1,
    }
    scrubbed = {"dataset": "corpus", "files": ["c.txt"] * 3, "dataset_2": "org/data", "model": "base",
                "url": "c.txt", "lr": 0.1}  # fmt: skip
    assert scrub.value(settings) == scrubbed == yaml.safe_load(yaml.safe_dump(scrub.value(settings)))


def test_a_public_account_of_the_users_name_is_no_secret(scrub):
    assert Scrubber(public="wilhelmina").text("wilhelmina/model") == "wilhelmina/model"
    for leak in (b"x wilhelmina@quarkbox x", b"\x00/home/wilhelmina/x", b"on quarkbox.lab.example",
                 b"tfevents.1700000000.quarkbox.1", b"in /srv/my runs/demo/x", b"hf_QWERTYUIOPASDFGH"):  # fmt: skip
        assert scrub.leak(leak), leak


WORDS = b"""config {"model_type": "blueberry", "adam_beta1": 0.9, "scale": "adam"}, hidden_states, self.train()
from transformers import x. Keller Jordan, research, the union; 256: secret. model.layers.0.model
[ann/windows](https://huggingface.co/datasets/ann/windows) https://huggingface.co/models/ann
"""


@pytest.mark.parametrize("name", ["states", "train", "model", "adam", "transformers", "research", "Jordan", "union"])
def test_names_that_are_words_hinder_nothing(monkeypatch, name):
    """Neither user nor host, folder nor password: texts that hold them stay as they are, and pass."""
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setattr("getpass.getuser", lambda: name)
    monkeypatch.setattr(Path, "cwd", lambda: Path("/data"))
    monkeypatch.setattr(Path, "home", lambda: Path("/model"))
    monkeypatch.setenv("JUPYTER_TOKEN", "secret")
    monkeypatch.setenv("DB_PASSWORD", name)
    scrub = Scrubber()
    assert scrub.leak(WORDS) is None and scrub.text(WORDS.decode()) == WORDS.decode()
    assert scrub.leak(b'"/data/corpus.txt"') == "a local path"


def test_a_short_name_in_the_bytes_of_a_picture_is_chance_and_in_a_text_a_leak(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "vm")
    scrub = Scrubber()
    assert scrub.leak(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xbbvm@c\xff") is None
    assert scrub.leak(b"root@vm:/srv") == "the name of the user or the machine"


def test_a_user_without_an_entry_in_passwd_has_no_name(monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr("getpass.getuser", unknown)
    assert Scrubber().text("by ann") == "by ann"
