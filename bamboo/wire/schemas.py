"""Every request body and frame that comes in, checked once, at the edge (pydantic), and turned into the values of
`bamboo.core.types`.

Strict: a number is not a string, an unknown field is ignored (later versions may add some), a wrong one is named in the
error. No error echoes what it was given.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from bamboo.core.types import (
    MAX_JSON_DEPTH,
    SESSION_ID_PATTERN,
    Chat,
    Content,
    Cursor,
    ImagePart,
    OnBusy,
    RunId,
    SessionId,
    TextPart,
    is_too_deep,
)
from bamboo.errors import ClientError, ErrorCode, run_not_found

DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 500
"""Messages, sessions or runs in one answer."""

SessionIdText = Annotated[str, StringConstraints(pattern=f"^{SESSION_ID_PATTERN.pattern}\\z", max_length=128)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=256)]


MAX_JSON_VALUES: Final = 10_000
"""Lists, objects and what is in them, all told, in one object of a client's that is kept: each is looked at here, and
again whenever the object is read or sent."""


def _encodable(value: dict[str, Any]) -> dict[str, Any]:
    if _has_too_many(value):
        raise PydanticCustomError("too_many", f"Input should not have more than {MAX_JSON_VALUES} values")
    if is_too_deep(value):
        raise PydanticCustomError("too_deep", f"Input should not be nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _has_too_many(value: dict[str, Any]) -> bool:
    values = 0
    containers: list[dict[Any, Any] | list[Any]] = [value]
    while containers:
        container = containers.pop()
        values += len(container)
        if values > MAX_JSON_VALUES:
            return True
        children = container.values() if isinstance(container, dict) else container
        containers += [child for child in children if isinstance(child, dict | list)]
    return False


AnyObject = Annotated[dict[str, Any], AfterValidator(_encodable)]
"""An object that is kept as it is, and can be sent again."""


class Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class TextPartSchema(Schema):
    type: Literal["text"]
    text: Annotated[str, StringConstraints(min_length=1)]


class ImageUrlSchema(Schema):
    url: Annotated[str, StringConstraints(pattern=r"^(https?://|data:image/)", min_length=8)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePartSchema(Schema):
    type: Literal["image_url"]
    image_url: ImageUrlSchema


def _part_type(part: object) -> object:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return kind if isinstance(kind, str) else None


# A discriminator by name would quote what it was given.
PartSchema = Annotated[
    Annotated[TextPartSchema, Tag("text")] | Annotated[ImagePartSchema, Tag("image_url")],
    Discriminator(
        _part_type,
        custom_error_type="part_type",
        custom_error_message="Input should be an object with the type 'text' or 'image_url'",
    ),
]
ContentSchema = (
    Annotated[str, StringConstraints(min_length=1)] | Annotated[list[PartSchema], Field(min_length=1, max_length=256)]
)


class CancelAfter(Schema):
    cancel_after_s: Annotated[float, Field(ge=0, le=7 * 86400)]


class ChatOptions(Schema):
    """The fields that a chat has on every transport."""

    session_id: SessionIdText | None = None
    model: Name | None = None
    provider: Name | None = None
    on_busy: OnBusy = "enqueue"
    on_disconnect: Literal["continue"] | CancelAfter = "continue"
    system_prompt: str | None = None
    params: AnyObject | None = None
    client_message_id: Key | None = None
    metadata: AnyObject | None = None

    def chat(self, content: "str | list[PartSchema]", *, idempotency_key: str | None = None) -> Chat:
        cancel_after_s = self.on_disconnect.cancel_after_s if isinstance(self.on_disconnect, CancelAfter) else None
        return Chat(
            content=to_content(content),
            session_id=None if self.session_id is None else SessionId(self.session_id),
            model=self.model,
            provider=self.provider,
            on_busy=self.on_busy,
            cancel_after_s=cancel_after_s,
            system_prompt=self.system_prompt,
            params=self.params,
            client_message_id=self.client_message_id,
            idempotency_key=idempotency_key if idempotency_key is not None else self.client_message_id,
            metadata=self.metadata,
        )


class ChatRequest(ChatOptions):
    """`POST /api/v1/chat`."""

    message: ContentSchema


class StopRequest(Schema):
    """`POST /api/v1/stop/{session_id}`; the body may be missing."""

    run_id: Name | None = None


class SessionPatch(Schema):
    """`PATCH /api/v1/sessions/{id}`: a field that is null is unset, one that is missing stays."""

    title: Annotated[str, StringConstraints(max_length=512)] | None = None
    model: Name | None = None
    provider: Name | None = None
    system_prompt: str | None = None
    params: AnyObject | None = None
    metadata: AnyObject | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "SessionPatch":
        if not self.model_fields_set:
            names = ", ".join(type(self).model_fields)
            raise PydanticCustomError("no_change", f"nothing to change: give at least one of {names}")
        return self

    def changes(self) -> Mapping[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


def to_content(content: "str | list[PartSchema]") -> Content:
    if isinstance(content, str):
        return (TextPart(content),)
    return tuple(
        TextPart(part.text)
        if isinstance(part, TextPartSchema)
        else ImagePart(part.image_url.url, part.image_url.detail)
        for part in content
    )


def decode_object(body: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises ClientError `invalid_request` for anything else: bad UTF-8, a lone surrogate, NaN, another
    type."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ClientError(
            ErrorCode.INVALID_REQUEST, f"the body is not JSON: {error.msg} at character {error.pos}"
        ) from error
    if not isinstance(value, dict):
        raise ClientError(ErrorCode.INVALID_REQUEST, "the body must be a JSON object")
    return value


SchemaT = TypeVar("SchemaT", bound=Schema)


def validate(schema: type[SchemaT], value: Mapping[str, Any]) -> SchemaT:
    """`value` as a `schema`. Raises ClientError `invalid_request` naming the wrong fields, without what was in them."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        problems = _problems(error.errors(include_input=False, include_url=False), value)
        raise ClientError(ErrorCode.INVALID_REQUEST, "; ".join(problems[:_MAX_PROBLEMS])) from error


_MAX_PROBLEMS: Final = 3
"""Told of one request: enough to go on with."""

_OBJECT_EXPECTED: Final = "Input should be an object"
_JSON_WORDS: Final = {
    "model_type": _OBJECT_EXPECTED,
    "model_attributes_type": _OBJECT_EXPECTED,
    "dict_type": _OBJECT_EXPECTED,
    "list_type": "Input should be a list",
}
"""For messages of pydantic's that speak of Python's types."""


def _problems(errors: Sequence[ErrorDetails], value: object) -> list[str]:
    """One `field: problem` for each error; of a field that may have several forms, only those of the form that fits
    best."""
    found = [(_path(error, value), _JSON_WORDS.get(error["type"], error["msg"])) for error in errors]
    return [
        f"{'.'.join(map(str, path)) or 'body'}: {problem}"
        for path, problem in found
        if not any(len(other) > len(path) > 0 and other[: len(path)] == path for other, _ in found)
    ]


def _path(error: ErrorDetails, value: Any) -> tuple[int | str, ...]:
    """Where the error is in what the client wrote: pydantic's location without the names of the forms that it tried."""
    path: list[int | str] = []
    *forms, last = error["loc"] or ("",)
    for step in (*forms, last):
        is_step = step in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(step, int)
        if is_step:
            value = value[step]
            path.append(step)
    if error["type"] == "missing":
        path.append(last)
    return tuple(path)


def parse_cursor(text: str) -> Cursor:
    """Raises ClientError `invalid_cursor`."""
    try:
        return Cursor.parse(text)
    except ValueError as error:
        raise ClientError(ErrorCode.INVALID_CURSOR, str(error)) from error


def parse_session_id(text: str) -> SessionId:
    """Raises ClientError `invalid_request` for what can be no session's id."""
    if SESSION_ID_PATTERN.fullmatch(text) is None:
        raise ClientError(ErrorCode.INVALID_REQUEST, "session_id: 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
    return SessionId(text)


def parse_run_id(text: str) -> RunId:
    """Raises ClientError `run_not_found` for what can be no run's id: none of ours looks like it."""
    if SESSION_ID_PATTERN.fullmatch(text) is None:
        raise run_not_found()
    return RunId(text)
