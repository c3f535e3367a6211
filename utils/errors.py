"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend: what is wrong, where, and what to do next, in one or two lines.

    `utils.cli.run` prints it without a traceback and exits with status 2.
    """
