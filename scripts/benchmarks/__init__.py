"""One module for each benchmark; `scripts/benchmark.py` runs them."""
