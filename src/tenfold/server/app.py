"""The routes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import Field
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from tenfold import __version__
from tenfold.server.anthropic_messages import CountRequest, MessageAnswer, MessagesRequest, count_tokens
from tenfold.server.backend import Engine
from tenfold.server.callers import Callers
from tenfold.server.errors import REFUSAL, ApiError, error_body, error_response, field_error, invalid
from tenfold.server.gate import Gate
from tenfold.server.metrics import Metrics
from tenfold.server.openai_chat import ChatAnswers, ChatMessage, ChatRequest, Tool
from tenfold.server.openai_completions import CompletionRequest, Completions, start_completion
from tenfold.server.openai_responses import ResponseAnswer, ResponsesRequest
from tenfold.server.sampling import Fields
from tenfold.server.service import Service
from tenfold.server.settings import Settings
from tenfold.server.stream import EventStream, caller_of, event, openai_failure, whole
from tenfold.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "page"
PROBES = frozenset({"/health", "/ready"})


class StrictRoute(APIRoute):
    """Reads JSON of bounded depth, in UTF-8, without NaN."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


class StrictRequest(Request):
    async def json(self) -> Any:
        """Raises ApiError."""
        try:
            return from_json(await self.body(), allow_inf_nan=False, cache_strings=False)
        except ValueError as error:
            raise invalid(f"the body is no JSON that can be read: {error}") from None


def _refusals(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": REFUSAL}}}


STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
router = APIRouter(
    route_class=StrictRoute,
    responses={"4XX": _refusals("The request is at fault"), "5XX": _refusals("The service is, or it is stopping")},
)


def create_app(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """The service before an engine. `app.state.service` is what its routes share."""
    if not settings.model_names or not settings.context_length:
        raise ValueError("the service needs a name and a context length for its model")
    metrics = Metrics(engine)
    app = FastAPI(title="Tenfold", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = Service(engine, tokenizer, settings, metrics)
    app.include_router(router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _misread)
    callers = None if settings.api_keys is None else Callers(settings.api_keys)
    app.add_middleware(Gate, settings=settings, callers=callers, metrics=metrics, public=PROBES | _page_paths())
    files = StaticFiles(directory=PAGE, html=True)
    for path in _page_paths():  # one by one: a mount at "/" would answer for every path and method that has no route
        app.router.routes.append(Route(path, files, methods=["GET"]))
    return app


def _page_paths() -> frozenset[str]:
    """Where the chat page's files are: they are for everyone, as a browser asks for them without a key."""
    files = (path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file())
    return frozenset(["/", *(f"/{file}" for file in files)])


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405) and not isinstance(error, ApiError):
        message = f"{request.method} {request.url.path[:100]} is not served here; /openapi.json lists what is"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error_response(error, request.scope)


async def _misread(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(field_error(error.errors()), request.scope)


def _service(request: Request) -> Service:
    return request.app.state.service


# ---- OpenAI ------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", response_model=None, responses=STREAMS)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    generation = await _service(request).start_chat(body.job(), caller_of(request))
    answers = ChatAnswers(_service(request), body, generation)
    if body.stream:
        return EventStream(answers.events(), generation, openai_failure)
    return JSONResponse(await whole(request, answers.whole(), generation))


@router.post("/v1/completions", response_model=None, responses=STREAMS)
async def completions(body: CompletionRequest, request: Request) -> Response:
    generation = await start_completion(_service(request), body, caller_of(request))
    answers = Completions(_service(request), body, generation)
    if body.stream:
        return EventStream(answers.events(), generation, openai_failure)
    return JSONResponse(await whole(request, answers.whole(), generation))


@router.post("/v1/responses", response_model=None, responses=STREAMS)
async def responses(body: ResponsesRequest, request: Request) -> Response:
    generation = await _service(request).start_chat(body.job(), caller_of(request))
    answer = ResponseAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation, answer.failure)
    return JSONResponse(await whole(request, answer.whole(), generation))


@router.post("/v1/embeddings", response_model=None)
async def embeddings() -> Response:
    raise invalid("this model writes text and gives no embeddings; ask a model that is made for them")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """In the form of OpenAI's list and of Anthropic's at once."""
    names = _service(request).settings.model_names
    data = [_model(request, name) for name in names]
    return {"object": "list", "data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    _service(request).check_model(name)
    return _model(request, name)


def _model(request: Request, name: str) -> dict[str, Any]:
    began = _service(request).began
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))
    context = _service(request).settings.context_length
    openai = {"id": name, "object": "model", "created": began, "owned_by": "tenfold", "max_model_len": context}
    return openai | {"type": "model", "display_name": name, "created_at": date}


# ---- Anthropic ---------------------------------------------------------------------------------------------


@router.post("/v1/messages", response_model=None, responses=STREAMS)
async def messages(body: MessagesRequest, request: Request) -> Response:
    generation = await _service(request).start_chat(body.job(), caller_of(request))
    answer = MessageAnswer(body, generation)
    if body.stream:
        return EventStream(answer.events(), generation, lambda error: event(error_body(error, True), "error"))
    return JSONResponse(await whole(request, answer.whole(), generation))


@router.post("/v1/messages/count_tokens")
async def messages_count(body: CountRequest, request: Request) -> dict[str, int]:
    return await count_tokens(_service(request), body)


# ---- tokens ------------------------------------------------------------------------------------------------


class TokenizeRequest(Fields):
    """Either a text, or messages, which are put through the chat template."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    model: str | None = None


class DetokenizeRequest(Fields):
    tokens: list[int]
    model: str | None = None


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service = _service(request)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either a prompt or messages")
    text = body.prompt
    if text is None:
        chat = ChatRequest(model="", messages=body.messages or [], tools=body.tools)
        text = service.chat.prompt(chat.conversation())
    tokens = await service.encode(text) if text else []
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.settings.context_length}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    service = _service(request)
    return {"prompt": service.tokenizer.decode(service.check_ids(body.tokens)) if body.tokens else ""}


# ---- the service itself ------------------------------------------------------------------------------------


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """Requests are taken."""
    if _service(request).draining:
        raise ApiError(503, "the service is stopping", retry_after=5)
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4")
