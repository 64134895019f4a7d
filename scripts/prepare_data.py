"""Tokenize and pack a data set once, save the windows, and share them if you like.

python scripts/prepare_data.py --dataset sotu --tokenizer results/demo --max_length 256 --output_dir data/sotu-256
python scripts/prepare_data.py ... --push_to_hub USER/NAME [--private]

`--dataset data/sotu-256` or `--dataset USER/NAME` then trains on them without tokenizing again.
"""

import argparse
from pathlib import Path

from blueberry.errors import OneLineParser, UsageError, run_script


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
    settings = parser.parse_args()
    if settings.output_dir.exists():
        raise UsageError(f"--output_dir {settings.output_dir} exists: name a new folder")
    return settings


def main() -> None:
    settings = parse_arguments()
    from datasets import DatasetDict

    from blueberry.training.data import DataArguments, prepare_data
    from blueberry.training.tokenization import load_tokenizer

    data_args = DataArguments(
        dataset=settings.dataset, dataset_config=settings.dataset_config, text_column=settings.text_column,
        tokenizer=settings.tokenizer, max_length=settings.max_length, validation_fraction=settings.validation_fraction,
    )  # fmt: skip
    vocab_size = len(load_tokenizer(settings.tokenizer))
    data = prepare_data(data_args, vocab_size=vocab_size, max_positions=None)
    print(data.description)
    splits = {"train": data.train, "validation": data.validation}
    windows = DatasetDict(
        {name: split.with_format(None).select_columns("input_ids") for name, split in splits.items()}
    )
    windows.save_to_disk(str(settings.output_dir))
    print(f"windows in {settings.output_dir}")
    if settings.push_to_hub:
        print(f"pushed to {share(windows, data, settings)}")


def share(windows, data, settings: argparse.Namespace) -> str:
    """One commit with one parquet file for each split, and a card."""
    import tempfile

    from hub.merging import merged
    from hub.push import Destination, push

    destination = Destination(settings.push_to_hub, kind="dataset", private=settings.private)
    tokenizer = Path(settings.tokenizer).name if Path(settings.tokenizer).is_dir() else settings.tokenizer
    card = (
        "---\npretty_name: " + settings.push_to_hub.split("/")[-1] + "\ntags:\n- blueberry\n- tokenized\n---\n\n"
        f"# {settings.push_to_hub.split('/')[-1]}\n\n{data.description}. Windows of token ids of the tokenizer "
        f"`{tokenizer}`, made by `scripts/prepare_data.py` of Blueberry: `--dataset {settings.push_to_hub}` trains "
        "on them.\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name, split in windows.items():
            path = Path(scratch) / f"{name}.parquet"
            split.to_parquet(path)
            files[f"data/{name}-00000-of-00001.parquet"] = path
        commit = push(
            destination, files, "Upload windows", owned=("data/*",), card=lambda theirs: merged(card, theirs)
        )
    return commit.commit_url


if __name__ == "__main__":
    run_script(main)
