"""Load a trained model in a fresh process and let it write.

python scripts/generate.py --model results/demo --prompt "My fellow citizens,"
"""

import argparse
from pathlib import Path

from blueberry.errors import UsageError, run_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a run, or Hub id")
    parser.add_argument("--prompt", default="My fellow citizens,")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.prompt.strip():
        raise UsageError("--prompt is empty: give the words to go on from")
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {arguments.max_new_tokens} writes nothing: give a positive number")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed {arguments.seed}: must be at least 0 and below 2**32")
    from transformers import set_seed

    from blueberry.training.summary import sample

    model, tokenizer = load(arguments.model)
    set_seed(arguments.seed)
    print(sample(model, tokenizer, arguments.prompt, arguments.max_new_tokens))


def load(name: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from blueberry.training.hub_access import hub_or_cache

    folder = Path(name)
    if not folder.is_dir():
        hub_or_cache()
    elif not (folder / "config.json").is_file():
        raise UsageError(f"--model {name} holds no config.json: name the folder of a finished run")
    elif not any(folder.glob("tokenizer*")):
        raise UsageError(f"--model {name} has no tokenizer: it was trained on token ids, save one in the folder")
    try:
        return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    run_script(main)
