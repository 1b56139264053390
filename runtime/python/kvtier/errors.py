"""What can go wrong, as exceptions that carry the library's own sentence.

The classes follow the status codes of ``kvtier.h``: they say what to do next, not which function
failed.
"""

from __future__ import annotations


class Error(Exception):
    """Base of all. ``status`` is the name of the status, ``"no_space"`` for example."""

    status = "internal"


class NotFound(Error, LookupError):
    """Nothing by that name or id: a freed sequence, an unknown selector."""

    status = "not_found"


class NoSpace(Error, MemoryError):
    """A bound is reached; the message has the figures."""

    status = "no_space"


class Busy(Error):
    """Another call is under way on the same runtime, or something is still open."""

    status = "busy"


class Cancelled(Error):
    """The call was cancelled."""

    status = "cancelled"


class IoError(Error, OSError):
    """A block could not be read from any tier. The output that was asked for is NaN."""

    status = "io_error"


class Corrupt(Error):
    """A block is damaged beyond repair. The output that was asked for is NaN."""

    status = "corrupt"


class Unsupported(Error, NotImplementedError):
    """This model, machine or build cannot do it; the message says what could."""

    status = "unsupported"


class InvalidArgument(Error, ValueError):
    """The message names the argument and what would be accepted."""

    status = "invalid_argument"


class Internal(Error):
    """No memory, or a defect of the library."""

    status = "internal"


class StockAttentionWarning(UserWarning):
    """A model that kvtier is attached to attended something with its stock attention."""


# By the numbers of `kvtier_status`.
BY_STATUS: dict[int, type[Error]] = {
    1: NotFound,
    2: NoSpace,
    3: Busy,
    4: Cancelled,
    5: IoError,
    6: Corrupt,
    7: Unsupported,
    8: InvalidArgument,
    9: Internal,
}
