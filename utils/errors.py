"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A problem that the user can solve.

    The message says in one or two lines what is wrong, where, and what to do next. `utils.cli.run`
    prints it without a traceback and exits with status 2.
    """
