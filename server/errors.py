"""The exception tree. Each class has an HTTP status and an OpenAI error type; ``str(error)`` is what the client reads.

SlimserveError
├── InvalidRequest 400      the request is wrong; ``param`` names the field
├── Unauthorized 401
├── Forbidden 403           the key is valid, but does not open this
├── ModelNotFound 404
├── RequestTimeout 408      the body did not arrive in time
├── Conflict 409            not now: a reload goes on
├── BodyTooLarge 413
├── RateLimited 429         the quota of a tenant is used up; with Retry-After
├── Overloaded 503          with Retry-After: try again later
├── QueueTimeout 504        the client's own timeout ran out before the first token
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
        self,
        message: str,
        *,
        param: str | None = None,
        log: str | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.log = log or message
        self.retry_after = retry_after
        """Seconds, for the Retry-After header."""
        self.reason = reason or self.code or self.type
        """Label of the counter of refusals: one of few words, finer than ``code``."""


class InvalidRequest(SlimserveError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(SlimserveError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(SlimserveError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class ModelNotFound(SlimserveError):
    status = 404
    type = "not_found_error"
    code = "model_not_found"


class RequestTimeout(SlimserveError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(SlimserveError):
    status = 409
    type = "conflict_error"
    code = "conflict"


class BodyTooLarge(SlimserveError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class RateLimited(SlimserveError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Overloaded(SlimserveError):
    """``queue_seconds`` is the predicted wait and ``predicted_ttft`` the predicted time to the first token."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(
        self,
        message: str,
        *,
        log: str | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
        queue_seconds: float | None = None,
        predicted_ttft: float | None = None,
    ) -> None:
        super().__init__(message, log=log, retry_after=retry_after, reason=reason)
        self.queue_seconds = queue_seconds
        self.predicted_ttft = predicted_ttft


class QueueTimeout(SlimserveError):
    status = 504
    type = "timeout_error"
    code = "timeout"


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
