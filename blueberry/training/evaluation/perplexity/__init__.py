"""The `evaluate` module perplexity; load it by the path of this folder."""
