"""The one exception a user's mistake ends in."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the caller: one line that names the value and the remedy.

    The command line prints the line and exits with status 2; library users may catch it as
    a ``ValueError``.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; a user's mistake ends it in one line on stderr and status 2."""
    try:
        main()
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
