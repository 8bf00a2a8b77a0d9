"""Refuse invalid requests, in the form that OpenAI's clients expect.

transformers' server does not check the values in a request: `"max_tokens": "many"` ends in
"500 Internal Server Error", and so does a chat with a model that has no chat template. Here each
body is checked before it reaches the server, and all errors get OpenAI's form:

    {"error": {"message": "...", "type": "invalid_request_error", "param": "max_tokens", ...}}

Only values that would make the server fail are refused. Which fields exist is left to the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, FiniteFloat, Json, StrictStr, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

NO_TEMPLATE = (
    "This model has no chat template: it was not trained to chat. Use /v1/completions to continue "
    "a text, or add a chat_template.jinja to the model's folder."
)
MESSAGE_LENGTH = 500  # most characters of an error message, which quotes the invalid value
Tokens = Annotated[int, Field(ge=1)]
Text = Annotated[StrictStr, Field(min_length=1)]


class Sampling(BaseModel):
    """Fields of every request. Fields that are not listed are not checked."""

    stream: bool | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    generation_config: Json[dict[str, Any]] | None = None


class Completion(Sampling):
    prompt: Text
    max_tokens: Tokens | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(gt=-1)] | None = None  # penalty = 1 + this
    stop: Text | Annotated[list[Text], Field(min_length=1)] | None = None


class Piece(BaseModel):
    type: StrictStr
    text: StrictStr = ""


class Message(BaseModel):
    role: StrictStr
    content: StrictStr | list[Piece] | None = None


class Conversation(Sampling):
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class Chat(Conversation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(gt=-1)] | None = None
    stop: Text | Annotated[list[Text], Field(min_length=1)] | None = None


class Answer(Conversation):
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_output_tokens: Tokens | None = None


BODIES: dict[str, type[Sampling]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/v1/responses": Answer,
}


def check_requests(app: FastAPI, *, chats: bool) -> None:
    """Make a server refuse invalid requests. Call this before it starts.

    Args:
        app: the application of transformers' server.
        chats: whether the model has a chat template.
    """

    async def check(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        body = BODIES.get(request.url.path) if request.method == "POST" else None
        if body is not None:
            if not chats and issubclass(body, Conversation):
                return refusal(400, NO_TEMPLATE)
            try:
                body.model_validate_json(await request.body())
            except ValidationError as error:
                return refusal(400, *_first(error.errors()))
        return await answer(request)

    app.middleware("http")(check)
    app.add_exception_handler(HTTPException, _respond)
    app.add_exception_handler(RequestValidationError, _respond)
    app.add_exception_handler(Exception, _respond)  # the traceback is logged too


def refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error response in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return JSONResponse({"error": error}, status)


async def _respond(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return refusal(400, *_first(error.errors()))
    return refusal(500, f"{type(error).__name__}: {error}")


def _first(errors: Any) -> tuple[str, str | None]:
    """Message and field of the first validation error."""
    error = errors[0]
    where = ".".join(map(str, error["loc"]))
    message = f"{where or 'body'}: {error['msg']}. Got {error['input']!r}"
    return message[:MESSAGE_LENGTH], str(error["loc"][0]) if where else None
