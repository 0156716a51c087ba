"""The routes that read texts: labels in our shape, embeddings in OpenAI's."""

from __future__ import annotations

import base64
import struct
from collections.abc import Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from components.inference.classifier import LabelPrediction, TextEmbedding
from serving.engine.classifier_worker import ClassifierWorker, Overloaded
from serving.http.errors import ERRORS, ApiError
from serving.http.schemas import Wire
from serving.models.state import DirectRoute, Running, Serving, who

R = TypeVar("R", LabelPrediction, TextEmbedding)

router = APIRouter(route_class=DirectRoute, responses=ERRORS)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty_text", "an empty text; send words")
    return text


def _input_tag(value: Any) -> str | None:
    """Told apart by hand, so that token ids, which OpenAI takes, are refused by name."""
    if isinstance(value, str):
        return "~string"
    if not isinstance(value, list):
        return None
    return "~tokens" if value and not isinstance(value[0], str) else "~list"


def _refuse_tokens(value: Any) -> Any:
    if isinstance(value[0], int | list):
        raise PydanticCustomError("unsupported_parameter", "token ids are not supported; send texts")
    raise PydanticCustomError("wrong_type", "expected texts")


Words = Annotated[str, AfterValidator(_not_blank)]
Input = Annotated[
    Annotated[Words, Tag("~string")]
    | Annotated[list[Words], Field(min_length=1), Tag("~list")]
    | Annotated[list[Any], AfterValidator(_refuse_tokens), Tag("~tokens")],
    Discriminator(_input_tag, "wrong_type", "expected a text or a list of texts"),
]


class TextsRequest(Wire):
    input: Input
    """A text, or a list of texts."""
    model: str | None = None
    """An id of `GET /v1/models`, or its name without the version; without it, the served model."""
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


class ClassifyRequest(TextsRequest):
    """Body of `POST /v1/classify`."""


class EmbeddingsRequest(TextsRequest):
    """Body of `POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    """base64: 32-bit floats, little-endian."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Only the model's own number."""


class Result(BaseModel):
    label: str
    scores: dict[str, float]
    truncated: bool


class Classification(BaseModel):
    """One result for each text, in order; `truncated` where only the beginning of a text was read."""

    model: str
    results: list[Result]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


# Answers are given as they are: FastAPI would walk through every number of them again.
@router.post("/v1/classify", response_model=None, responses={200: {"model": Classification}})
async def classify(body: ClassifyRequest, serving: Running, request: Request) -> JSONResponse:
    """The label of each text, with the probability of every label."""
    reader = _reader(body, serving, request)
    found = await _read(serving, "/v1/classify", reader.classify(body.texts))
    results = [{"label": one.label, "scores": one.scores, "truncated": one.truncated} for one in found]
    return JSONResponse({"model": reader.name, "results": results})


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": Embeddings}})
async def embeddings(body: EmbeddingsRequest, serving: Running, request: Request) -> JSONResponse:
    """OpenAI's embeddings: a vector of length 1 for each text."""
    reader = _reader(body, serving, request)
    width = reader.texts.embed_dim
    if body.dimensions not in (None, width):
        message = f"dimensions: {body.dimensions}: {reader.name} has {width}; send that or leave it out"
        raise ApiError(400, message, "unsupported_parameter", "dimensions")
    found = await _read(serving, "/v1/embeddings", reader.embed(body.texts))
    packed = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(one.vector) if packed else one.vector}
        for index, one in enumerate(found)
    ]
    tokens = sum(one.tokens for one in found)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": reader.name, "data": data, "usage": usage})


def _reader(body: TextsRequest, serving: Serving, request: Request) -> ClassifierWorker:
    limit = serving.config.max_texts
    if len(body.texts) > limit:
        message = f"input: {len(body.texts)} texts; send at most {limit} (serve.max_texts)"
        raise ApiError(413, message, "request_too_large", "input")
    return serving.choose(serving.classifiers, body.model, who(request, body.user))


async def _read(serving: Serving, route: str, reading: Awaitable[list[R]]) -> list[R]:
    """The results, counted.

    Raises: ApiError when too many texts wait.
    """
    try:
        found = await reading
    except Overloaded as full:
        raise ApiError(429, str(full), "queue_full", headers={"Retry-After": "1"}) from None
    serving.metrics.texts.labels(route).inc(len(found))
    serving.metrics.truncated.labels(route).inc(sum(one.truncated for one in found))
    return found


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
