"""Load a trained model in a fresh process and let it write.

python scripts/generate.py --model results/demo --prompt "My fellow citizens,"
"""

import argparse
import math

from blueberry.errors import OneLineParser, UsageError, run_script

DEFAULT_LENGTH = 60  # tokens


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a run, or Hub id, ID@REVISION")
    parser.add_argument("--prompt", default="My fellow citizens,")
    parser.add_argument("--max_new_tokens", type=int, help=f"default: {DEFAULT_LENGTH}, less where they do not fit")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.prompt.strip():
        raise UsageError("--prompt is empty: give the words to go on from")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {arguments.max_new_tokens} writes nothing: give a positive number")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed {arguments.seed}: must be at least 0 and below 2**32")
    from transformers import set_seed

    from blueberry.training.loading import load_model, load_tokenizer
    from blueberry.training.summary import sample

    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    length = new_tokens(model, len(tokenizer(arguments.prompt)["input_ids"]), arguments.max_new_tokens)
    set_seed(arguments.seed)
    print(sample(model, tokenizer, arguments.prompt, length))


def new_tokens(model, prompt: int, asked: int | None) -> int:
    """How many tokens to write; with the prompt they must fit into the positions that the model was trained on."""
    from blueberry.training.model import positions

    longest = positions(model.config) or math.inf
    if prompt >= longest:
        raise UsageError(f"--prompt has {prompt} tokens, the model {longest} positions: give a shorter one")
    if asked is not None and asked > longest - prompt:
        raise UsageError(
            f"--max_new_tokens {asked}: after a prompt of {prompt} tokens the model has {longest - prompt} positions "
            "left, give no more than that"
        )
    return min(asked or DEFAULT_LENGTH, longest - prompt)


if __name__ == "__main__":
    run_script(main)
