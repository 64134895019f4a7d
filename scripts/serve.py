"""`transformers serve` for a Blueberry: the same arguments, the same OpenAI-compatible endpoints.

python scripts/serve.py results/demo --port 8000      (needs: pip install "transformers[serving]")

transformers 5.23 serves only architectures that it finds under their names in its own namespace, not remote code.
"""

import sys

import transformers
from transformers.cli.transformers import main

from blueberry import BlueberryForCausalLM

if __name__ == "__main__":
    transformers.BlueberryForCausalLM = BlueberryForCausalLM
    sys.argv[1:1] = ["serve"]
    main()
