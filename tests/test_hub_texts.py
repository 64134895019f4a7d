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
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    return Scrubber(Path("/srv/my runs/demo"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"output_dir": "/srv/my runs/demo", "seed": 1', '"output_dir": "demo", "seed": 1'),
        ("/home/wilhelmina/text.txt and ~/text.txt", "text.txt and text.txt"),
        (r"C:\Users\wilhelmina\text.txt", "text.txt"),
        ("on quarkbox, by wilhelmina", "on local, by local"),
        ("https://huggingface.co/a/b and dW/W and </b> and 1 / 2", None),
        ("key 0123456789abcdef", "key <token>"),
        ("hf_abcdefghijklmnop hf_ZYXWVUTSRQ", "<token> <token>"),
    ],
)
def test_texts_lose_what_is_local_and_nothing_else(scrub, text, expected):
    assert scrub.text(text) == (text if expected is None else expected)
    assert scrub.leak(scrub.text(text).encode()) is None


def test_paths_in_settings_become_names(scrub):
    settings = {"dataset": "/data/with spaces/corpus", "files": ["~/a b/c.txt"], "dataset_2": "org/data", "lr": 0.1}
    scrubbed = {"dataset": "corpus", "files": ["c.txt"], "dataset_2": "org/data", "lr": 0.1}
    assert scrub.value(settings) == scrubbed == yaml.safe_load(yaml.safe_dump(scrub.value(settings)))


def test_a_public_account_of_the_users_name_is_no_secret(scrub):
    assert Scrubber(public="wilhelmina").text("wilhelmina/model") == "wilhelmina/model"
    assert scrub.leak(b"x wilhelmina x") and scrub.leak(b"in /srv/my runs/demo/x") and scrub.leak(b"hf_QWERTYUIOP")
