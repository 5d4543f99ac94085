"""Refusals, in the form that the clients of each API read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope

OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = OPENAI_TYPES | {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
ANTHROPIC_TYPES |= {504: "timeout_error"}
REFUSAL = {  # of either API, for the description of the service
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}},
    "required": ["error"],
}


class ApiError(HTTPException):
    """A request that is not answered: what came, what was expected, what to do, in one line.

    param: the field that is at fault. code: a word for programs. retry_after: seconds. headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        wait = {} if retry_after is None else {"retry-after": str(max(1, ceil(retry_after)))}
        super().__init__(status, " ".join(message.split()), {**wait, **(headers or {})})
        self.param, self.code = param, code


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that would never be answered."""
    return ApiError(400, message, param=param, code=code)


def speaks_anthropic(scope: Scope) -> bool:
    """Which of the two APIs a request is for."""
    return scope["path"].startswith("/v1/messages") or "anthropic-version" in Headers(scope=scope)


def error_body(error: HTTPException, anthropic: bool) -> dict[str, Any]:
    """The JSON of an error, also for the inside of a stream."""
    status, message = error.status_code, str(error.detail)
    fallback = "invalid_request_error" if status < 500 else "api_error" if anthropic else "server_error"
    kind = (ANTHROPIC_TYPES if anthropic else OPENAI_TYPES).get(status, fallback)
    if anthropic:
        return {"type": "error", "error": {"type": kind, "message": message}}
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException, scope: Scope) -> JSONResponse:
    """The whole answer to a request that is refused."""
    return JSONResponse(error_body(error, speaks_anthropic(scope)), error.status_code, error.headers)


def field_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong in a body, the first of it."""
    first = errors[0]
    place = ".".join(str(key) for key in first["loc"] if key != "body")
    if first["type"] == "missing":
        return invalid(f"{place or 'the body'}: missing, and it is needed", param=place or None)
    return invalid(f"{place or 'the body'}: {first['msg']}, got {_shown(first.get('input'))}", param=place or None)


def _shown(value: object) -> str:
    if isinstance(value, (list, dict, bytes)):
        return {list: "a list", dict: "an object", bytes: "bytes without 'content-type: application/json'"}[type(value)]
    shown = repr(value[:60] if isinstance(value, str) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
