"""The error that a user can mend, and how scripts show it."""

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """Bad input: one line that names the value and the remedy. Scripts print it and exit with code 2."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a UsageError becomes one line on stderr and exit code 2, Ctrl-C one line and 130.

    A KeyboardInterrupt may carry what to tell the user.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(" ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(130)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
