"""The `evaluate` module bits_per_byte; load it by the path of this folder."""
