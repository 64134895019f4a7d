"""Tokenize and pack a data set once, save the windows, and share them if you like.

python scripts/prepare_data.py --dataset sotu --tokenizer results/demo --max_length 256 --output_dir data/sotu-256
python scripts/prepare_data.py ... --push_to_hub USER/NAME [--private]

`--dataset data/sotu-256` or `--dataset USER/NAME` then trains on them without tokenizing again. The same command again
goes on with the windows that are there.
"""

import argparse
import json
from pathlib import Path

from blueberry.errors import OneLineParser, UsageError, run_script

RECORD = "prepared.json"  # beside the windows: what they were made from, and what came out


def parse_arguments() -> argparse.Namespace:
    usage, _, more = __doc__.partition("\n\n")
    parser = OneLineParser(description=usage, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="sotu", help="as for train_llm.py")
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--text_column", help="column of the text")
    parser.add_argument("--tokenizer", required=True, help="Hub id or folder")
    parser.add_argument("--max_length", type=int, required=True, help="tokens per window")
    parser.add_argument("--validation_fraction", type=float, default=0.05)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the windows go; a new folder")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="also push them")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    named = ("dataset", "dataset_config", "text_column", "tokenizer", "max_length", "validation_fraction")
    source = {name: getattr(settings, name) for name in named}
    destination = destination_of(settings)
    description = earlier(settings.output_dir, source) or prepare(settings.output_dir, source)
    print(f"{description}\nwindows in {settings.output_dir}")
    if destination:
        print(f"pushed to {share(settings.output_dir, destination, description, settings.tokenizer)}")


def destination_of(settings: argparse.Namespace):
    """Where to push, once it is known that the Hub will take it; None if nowhere."""
    if settings.push_to_hub is None:
        return None
    from hub.push import Destination, reserve

    destination = Destination(settings.push_to_hub, kind="dataset", private=settings.private, argument="--push_to_hub")
    reserve(destination)
    return destination


def earlier(folder: Path, source: dict) -> str | None:
    """The description of windows that the same arguments made in `folder`; None if there is no folder."""
    if not folder.exists():
        return None
    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}
    if record.get("source") != source:
        raise UsageError(f"--output_dir {folder} exists and holds no windows of these arguments: name a new folder")
    return record["description"]


def prepare(folder: Path, source: dict) -> str:
    """Make the windows; the folder gets its name when all of them are there."""
    import tempfile

    from datasets import DatasetDict

    from blueberry.training.data import DataArguments, prepare_data
    from blueberry.training.tokenization import load_tokenizer

    vocab_size = len(load_tokenizer(source["tokenizer"]))
    data = prepare_data(DataArguments(**source), vocab_size=vocab_size, max_positions=None)
    splits = {"train": data.train, "validation": data.validation}
    windows = DatasetDict(
        {name: split.with_format(None).select_columns("input_ids") for name, split in splits.items()}
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        windows.save_to_disk(f"{scratch}/windows")
        record = {"source": source, "description": data.description}
        Path(scratch, "windows", RECORD).write_text(json.dumps(record, indent=2))
        Path(scratch, "windows").rename(folder)
    return data.description


def share(folder: Path, destination, description: str, tokenizer: str) -> str:
    """One commit with one parquet file for each split, and a card; its address."""
    import tempfile

    from datasets import load_from_disk

    from hub.bundle import check_clean
    from hub.merging import merged
    from hub.push import CARD, push
    from hub.scrub import Scrubber

    scrub = Scrubber(folder, public=destination.account)
    card = card_of(destination.repo_id, description, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name, split in load_from_disk(str(folder)).items():
            path = files[f"data/{name}-00000-of-00001.parquet"] = Path(scratch) / f"{name}.parquet"
            split.to_parquet(path)
        check_clean({**files, CARD: card.encode()}, scrub)
        commit = push(
            destination, files, "Upload windows", replaces=lambda path: path.startswith("data/"),
            card=lambda theirs: merged(card, theirs),
        )  # fmt: skip
    return commit.commit_url


def card_of(repo_id: str, description: str, tokenizer: str) -> str:
    name = repo_id.split("/")[-1]
    tokenizer = Path(tokenizer).name if Path(tokenizer).is_dir() else tokenizer
    return (
        f"---\npretty_name: {name}\ntags:\n- blueberry\n- tokenized\n---\n\n# {name}\n\n{description}. Windows of "
        f"token ids of the tokenizer `{tokenizer}`, made by `scripts/prepare_data.py` of Blueberry: "
        f"`--dataset {repo_id}` trains on them.\n"
    )


if __name__ == "__main__":
    run_script(main)
