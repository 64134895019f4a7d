"""A run of Blueberry -> a page on the Hub."""

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo

from .bundle import Bundle, bundle_of, check_clean, is_of_a_run
from .card import card_of
from .merging import merged
from .push import CARD, Destination, push, read_card
from .run import Run
from .scrub import Scrubber

LICENCE = "apache-2.0"
CardMaker = Callable[[str | None], str]  # from the card that is there


def prepare(
    runs: Sequence[Run], repo_id: str, licence: str = LICENCE, max_shard_size: str = "5GB", token: str | None = None
) -> tuple[Bundle, CardMaker]:
    """What can be done, and can fail, without the Hub: the files, and what makes a card from the one that is there."""
    paths = [path for run in runs for path in run.local_paths]
    scrub = Scrubber(*(run.folder for run in runs), public=repo_id.split("/")[0], tokens=(token,), paths=paths)
    bundle = bundle_of(runs[0], scrub, max_shard_size)
    generated = card_of(runs, repo_id, licence, bundle.figures)
    local = runs[0].folder / CARD
    own = read_card(local) if local.is_file() else None

    def card(theirs: str | None) -> str:
        text = merged(generated, own if theirs is None else theirs)
        check_clean({CARD: text.encode()}, scrub)
        return text

    return bundle, card


def publish(
    runs: Sequence[Path],
    destination: Destination,
    *,
    licence: str = LICENCE,
    max_shard_size: str = "5GB",
    message: str | None = None,
) -> CommitInfo:
    """Push the final model of the first run, with everything that explains it, as one commit.

    runs: folders of the run and of its other seeds. What a user changed in the card on the Hub stays; while there is
    none, the README.md of the run folder takes its place.
    """
    read = [Run.read(folder) for folder in runs]
    bundle, card = prepare(read, destination.repo_id, licence, max_shard_size, destination.token)
    return push(
        destination,
        bundle.files,
        message or f"Upload {read[0].folder.resolve().name}, trained with Blueberry",
        replaces=is_of_a_run,
        card=card,
    )
