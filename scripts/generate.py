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
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from blueberry.training.summary import sample

    if Path(arguments.model).is_dir() and not (Path(arguments.model) / "config.json").is_file():
        raise UsageError(f"--model {arguments.model} holds no config.json: name the folder of a finished run")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    except OSError as error:
        raise UsageError(f"--model {arguments.model}: {' '.join(str(error).split())}") from error
    set_seed(arguments.seed)
    print(sample(model, tokenizer, arguments.prompt, arguments.max_new_tokens))


if __name__ == "__main__":
    run_script(main)
