"""The errors that a user can cause, each with the exit code it ends in.

Every message is one sentence that says what is wrong and what to do.
"""


class SinkquantError(Exception):
    """Something failed while the work was being done: a full disk, a broken file, numbers that are not finite."""

    exit_code = 1


class RequestError(SinkquantError):
    """The request itself is wrong: a recipe key, an argument, a model that is not supported."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
