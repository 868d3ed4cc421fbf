"""Errors as HTTP answers in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``.

A message is one sentence: what happened, and why. It has no traceback and nothing about this machine.
"""

from __future__ import annotations

from typing import Any

from ..errors import (
    BusyError,
    CapabilityError,
    InputError,
    IvlError,
    TimeLimitError,
    TooLargeError,
    UsageError,
)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


class HttpError(Exception):
    """An answer that is not 200.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the entry of the request that is at fault: ``input[2]``.
        code: a word for programs.
        retry_after: seconds after which the request may be accepted; None: there is no use in trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    """A request that cannot be right."""
    return HttpError(400, message, param, code)


def http_error(error: Exception, param: str | None = None) -> HttpError:
    """The answer for ``error``; ``param`` is the entry of the request that it is about."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, TimeLimitError):
        return out_of_time()
    if isinstance(error, BusyError):
        return HttpError(429, sentence(error), code="overloaded", retry_after=1)
    if isinstance(error, TooLargeError):
        return HttpError(413, sentence(error), param, "too_large")
    if isinstance(error, InputError | UsageError | CapabilityError):
        return HttpError(400, sentence(error), param)
    return HttpError(500, "The server failed to answer this request.", code="internal_error")


def out_of_time() -> HttpError:
    """The answer to a request whose time is over."""
    return HttpError(504, "The request was not done in its time.", code="timeout")


def sentence(error: IvlError) -> str:
    """What happened and why, as one sentence."""
    why = error.why.strip().rstrip(".")
    return f"{error.what.strip().rstrip('.')}: {why}." if why else f"{error.what.strip().rstrip('.')}."
