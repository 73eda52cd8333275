"""Errors that a user can mend: shown as one line, without a traceback."""


class UserError(Exception):
    """Something in the configuration, the files or the machine that the user can mend.

    The message is one line that names the file, row or key, the value found, and what to do.
    """
