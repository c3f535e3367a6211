"""The one exception that a user is meant to see, and text that no terminal obeys."""


class UserError(Exception):
    """A problem that the user can solve.

    The message says in one or two lines what is wrong, where, and what to do next. `utils.cli.run`
    prints it without a traceback and exits with status 2.
    """


def printable(text: object, keep: str = "") -> str:
    """Return `text` with a ? for every character that a terminal would obey or could not show, but those in `keep`.

    Names of files come from outside. They may hold escape sequences, line ends, or bytes that are no
    UTF-8, which Python keeps as lone surrogates.
    """
    return "".join(
        character if character.isprintable() or character in keep else "?"
        for character in str(text)
    )
