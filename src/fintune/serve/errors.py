"""Errors in OpenAI's shape."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ApiError(HTTPException):
    """A refusal with its HTTP status and OpenAI's code."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, {"Retry-After": "1"} if status == 429 else None)
        self.code, self.param = code, param


def error_body(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if code == "server_error" else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """Any exception as a response; what is no fault of the client's says nothing of itself."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    if isinstance(error, ApiError):
        body = error_body(error.detail, error.code, error.param)
        return JSONResponse(body, error.status_code, error.headers)
    if isinstance(error, HTTPException):
        code = "too_large" if error.status_code == 413 else "invalid_request"
        return JSONResponse(error_body(error.detail, code), error.status_code, error.headers)
    if isinstance(error, TimeoutError):
        return JSONResponse(error_body("the answer took too long", "timeout"), 408)
    return JSONResponse(error_body("a defect of the server", "server_error"), 500)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first field that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", "invalid_json")
    where = ".".join(map(str, first["loc"][1:]))[:100]
    if where == "model" and isinstance(first.get("input"), str):
        return ApiError(404, "no such model; there are base and adapter", "model_not_found", where)
    message = f"{where or 'the body'}: {first['msg']}"[:300]
    return ApiError(400, message.encode("utf-8", "replace").decode(), "invalid_value", where)
