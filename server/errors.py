"""The exception tree. Each class has an HTTP status and an OpenAI error type; ``str(error)`` is what the client reads.

SlimserveError
├── InvalidRequest 400      the request is wrong; ``param`` names the field
├── Unauthorized 401
├── ModelNotFound 404
├── RequestTimeout 408      the body did not arrive in time
├── BodyTooLarge 413
├── Overloaded 503          with Retry-After: try again later
├── EngineUnavailable 503   the model's worker is starting, restarting or failed
├── InternalError 500       our own fault; the details are in the log only
├── CommandFailed           on the command line: printed without a traceback, exit status 1
└── UsageError              on the command line: printed without a traceback, exit status 2
"""

from __future__ import annotations


class SlimserveError(Exception):
    """``message`` is for the client and quotes no path of the machine; ``log`` (default: the same) is for our log."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, log: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.log = log or message
        self.retry_after = retry_after
        """Seconds, for the Retry-After header."""


class InvalidRequest(SlimserveError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(SlimserveError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(SlimserveError):
    status = 404
    type = "not_found_error"
    code = "model_not_found"


class RequestTimeout(SlimserveError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(SlimserveError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(SlimserveError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"


class EngineUnavailable(SlimserveError):
    status = 503
    type = "engine_unavailable"
    code = "engine_unavailable"


class InternalError(SlimserveError):
    pass


class CommandFailed(SlimserveError):
    """What was asked on the command line is right, but cannot be done now: a port in use, a download that broke."""


class UsageError(SlimserveError):
    """A mistake on the command line or in a configuration file."""
