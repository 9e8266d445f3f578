"""JSON bodies in and out: how a request's body is read and checked, and the one form of every answer and error."""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from quart import Response, request

from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.wire.encode import HTTP_STATUS, dumps, error_fields
from bamboo.wire.schemas import decode_object

JSON: Final = "application/json"


class Answer(NamedTuple):
    """A whole HTTP answer, for where there is no app to make one."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def error_answer(error: BambooError) -> Answer:
    """The status and the envelope of an error, on every path that can answer one."""
    body = dumps({"error": error_fields(error)})
    headers = [
        (b"Content-Type", JSON.encode()),
        (b"Content-Length", b"%d" % len(body)),
        (b"Cache-Control", b"no-store"),
    ]
    if error.retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.code is ErrorCode.UNAUTHORIZED:
        headers.append((b"WWW-Authenticate", b"Bearer"))
    return Answer(HTTP_STATUS[error.code], headers, body)


def error_response(error: BambooError) -> Response:
    answer = error_answer(error)
    response = Response(answer.body, status=answer.status)
    for name, value in answer.headers:
        response.headers[name.decode()] = value.decode()
    return response


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(dumps(value), status=status, content_type=JSON)
    response.headers["Cache-Control"] = "no-store"
    response.headers.update(headers or {})
    return response


async def read_object(*, optional: bool = False) -> dict[str, Any]:
    """The request's body, a JSON object; `optional`: none at all is an empty one.

    Raises ClientError: `unsupported_media_type`, then `invalid_request`. A body over the limit is werkzeug's
    RequestEntityTooLarge, which comes between the two; more than the limit is never held.
    """
    headers = request.headers
    if optional and "Transfer-Encoding" not in headers and headers.get("Content-Length", "0") == "0":
        return {}
    if request.mimetype != JSON:
        raise ClientError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"the body must have Content-Type: {JSON}")
    body = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    if optional and not body:
        return {}
    return decode_object(body)


def query_int(name: str, default: int, maximum: int) -> int:
    """A number from 1 to `maximum` from the query. Raises ClientError `invalid_request`."""
    text = request.args.get(name)
    if text is None:
        return default
    if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= maximum:
        return int(text)
    raise ClientError(ErrorCode.INVALID_REQUEST, f"{name}: a whole number from 1 to {maximum}")
