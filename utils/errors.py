"""Errors that a user is meant to see, and text that is safe to print on a terminal."""


class UserError(Exception):
    """A problem that the user can solve.

    The message says in one or two lines what is wrong, where, and what to do next.
    `utils.cli.reporting` prints it without a traceback and exits with `status`.
    """

    status = 2


class CannotRunHere(UserError):  # noqa: N818 - says what happened
    """An engine that cannot run on this machine; the message lists the reasons.

    By its exit status, reproduce.py leaves the run out instead of calling it failed.
    """

    status = 69  # EX_UNAVAILABLE of sysexits.h
    PREFIX = "cannot run here: "

    def __str__(self) -> str:
        return self.PREFIX + super().__str__()


def printable(text: object, keep: str = "") -> str:
    """Return `text` with a ? for every character that is not printable, except those in `keep`.

    File names come from outside. They may hold escape sequences that a terminal would obey, line
    breaks, or bytes that are not UTF-8, which Python stores as lone surrogates.
    """
    return "".join(
        character if character.isprintable() or character in keep else "?"
        for character in str(text)
    )
