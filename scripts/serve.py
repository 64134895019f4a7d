"""`transformers serve` for a Blueberry: the same arguments, the same OpenAI-compatible endpoints.

python scripts/serve.py results/demo --port 8000      (needs: pip install "transformers[serving]")

transformers 5.23 serves only architectures that it finds under their names in its own namespace, not remote code.
"""

import sys
from pathlib import Path

from blueberry.errors import UsageError, run_script


def main() -> None:
    import transformers
    from huggingface_hub import constants
    from transformers.cli.transformers import main as transformers_main

    from blueberry import BlueberryForCausalLM
    from blueberry.training.reading import is_local_path

    for model in sys.argv[1:2]:
        if is_local_path(model) and not Path(model).is_dir():
            raise UsageError(f"{model}: no such folder; name that of a model, or a Hub id")
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # which /v1/models lists
    transformers.BlueberryForCausalLM = BlueberryForCausalLM
    sys.argv[1:1] = ["serve"]
    transformers_main()


if __name__ == "__main__":
    run_script(main)
