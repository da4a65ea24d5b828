"""The one exception a user's mistake ends in."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the caller: one line that names the value and the remedy.

    The command line prints the line and exits with status 2; library users may catch it as
    a ``ValueError``.
    """
