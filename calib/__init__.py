"""The calibration engine: text in, a model walked block by block, statistics and gradients out."""

from __future__ import annotations

MAX_MESSAGE = 1000  # characters of a message


def one_line(message: str) -> str:
    """Put a message on one line of a terminal, shortened where it is long: files and their names may hold anything."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return shown if len(shown) <= MAX_MESSAGE else f"{shown[: MAX_MESSAGE - 305]} ... {shown[-300:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


class BadInput(ValueError):
    """The user's input cannot be used; one line says what is wrong, where, and what to do about it."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class Failed(RuntimeError):
    """A job cannot go on, and would come to the same point again."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class Damaged(Failed):
    """A job has done what it was asked to, and the model is much worse for it.  Its journal stays, so that the user may
    take the result all the same without doing the work again."""


class Unstored(Damaged):
    """A job is done, and the format that it was to be stored in cannot hold what came of it.  Its journal stays, so
    that another format may."""


class Diverged(RuntimeError):
    """The loss or a gradient is no longer a number.  The journal keeps the last good state."""


class Recovered(RuntimeError):
    """A quantized model knows again what was forgotten.  The journal keeps the work."""


class NoSpace(OSError):
    """The disk is full; the job can go on once there is room."""
