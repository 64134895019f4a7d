"""Share a finished run on the Hub: model, code, tokenizer, card, curves, spectra; one commit.

python scripts/push_to_hub.py --run results/NAME --repo_id USER/NAME
python scripts/push_to_hub.py --run results/NAME_1,results/NAME_2 --repo_id USER/NAME   (seeds: intervals in the card)
python scripts/push_to_hub.py --run results/NAME --repo_id USER/NAME --dry_run          (what would go)

The token is that of `hf auth login`, or $HF_TOKEN. What you change in the card on the Hub stays there in later pushes.
"""

import argparse
from pathlib import Path

from blueberry.errors import OneLineParser, UsageError, run_script


def parse_arguments() -> argparse.Namespace:
    usage, _, more = __doc__.partition("\n\n")
    parser = OneLineParser(description=usage, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder; other seeds of it after commas")
    parser.add_argument("--repo_id", help="USER/NAME on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights (default: 5GB)")
    parser.add_argument("--dry_run", action="store_true", help="list what would go, and stop")
    parser.add_argument("--card_only", action="store_true", help="write README.md and figures/ into --run, and stop")
    settings = parser.parse_args()
    if settings.repo_id is None and not settings.card_only:
        raise UsageError("--repo_id is missing: write --repo_id USER/NAME")
    return settings


def main() -> None:
    settings = parse_arguments()
    from hub.card import loading
    from hub.publish import publish
    from hub.push import Destination
    from hub.run import Run

    whole = Path(settings.run)  # whose name may hold a comma
    folders = [whole] if whole.is_dir() else [Path(folder) for folder in settings.run.split(",")]
    if settings.card_only:
        return write_card(folders, settings)
    destination = Destination(
        settings.repo_id, revision=settings.revision, private=settings.private, create_pr=settings.create_pr
    )
    if settings.dry_run:
        return show(folders, settings)
    commit = publish(folders, destination, licence=settings.license, max_shard_size=settings.max_shard_size)
    print(f"pushed to {commit.pr_url or commit.commit_url}")
    print(f"load it: {loading(Run.read(folders[0]), settings.repo_id)}")
    return None


def show(folders: list[Path], settings: argparse.Namespace) -> None:
    """What would go, without asking the Hub for anything."""
    from hub.bundle import table
    from hub.publish import prepare
    from hub.push import CARD, LISTING, listing
    from hub.run import Run

    runs = [Run.read(folder) for folder in folders]
    bundle, card = prepare(runs, settings.repo_id, settings.license, settings.max_shard_size)
    names = len(listing([*bundle.files, CARD]))
    print("\n".join(table(bundle.sizes() | {CARD: len(card(None).encode()), LISTING: names})))


def write_card(folders: list[Path], settings: argparse.Namespace) -> None:
    """The card as a file of the run, with what was edited in the one that is there."""
    from hub.card import FIGURES
    from hub.publish import prepare
    from hub.push import CARD
    from hub.run import Run

    runs = [Run.read(folder) for folder in folders]
    repo_id = settings.repo_id or f"USER/{folders[0].resolve().name}"
    bundle, card = prepare(runs, repo_id, settings.license, settings.max_shard_size)
    path = folders[0] / CARD
    path.write_text(card(None), "utf-8")
    for name in FIGURES.keys() & set(bundle.figures):
        (folders[0] / "figures").mkdir(exist_ok=True)
        (folders[0] / "figures" / name).write_bytes(bundle.files[f"figures/{name}"].read_bytes())
    print(f"card {path}")


if __name__ == "__main__":
    run_script(main)
