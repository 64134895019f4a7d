"""The error that a user can mend."""


class UsageError(ValueError):
    """Bad input: one line that names the value and the remedy. Scripts print it and exit with code 2."""
