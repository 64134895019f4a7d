"""The `evaluate` module token_accuracy; load it by the path of this folder."""
