"""The error that a user can mend, and how scripts show it."""

import argparse
import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota used up, file too large


class UsageError(ValueError):
    """Bad input: one line that names the value and the remedy. Scripts print it and exit with code 2."""


class OneLineParser(argparse.ArgumentParser):
    """Of a script: a wrong argument is a UsageError, and no argument may be abbreviated."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a UsageError or a full disk becomes one line on stderr and exit code 2, Ctrl-C one line
    and 130.

    A KeyboardInterrupt may carry what to tell the user.
    """
    try:
        main()
    except KeyboardInterrupt as interrupt:
        # on a line of its own: a progress bar may have left its open
        print("\n" + " ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(130)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        print(f"error: {error.filename or 'a file'} could not be written: {error.strerror}; make room and run the "
              "command again", file=sys.stderr)  # fmt: skip
        sys.exit(2)
