"""The routes of texts: classification in our format, embeddings in OpenAI's."""

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
from serving.http.content_parts import Wire
from serving.http.errors import ERRORS, ApiError
from serving.http.routes import DirectRoute, Running, requesting_user
from serving.models.state import Serving

R = TypeVar("R", LabelPrediction, TextEmbedding)

router = APIRouter(route_class=DirectRoute, responses=ERRORS)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty_text", "an empty text; send words")
    return text


def _input_tag(value: Any) -> str | None:
    """Tags of the union, so that token ids, which OpenAI accepts, are refused by name."""
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
    """The model's own dimension only."""


class Result(BaseModel):
    label: str
    scores: dict[str, float]
    truncated: bool


class Classification(BaseModel):
    """One result per text, in order; `truncated` where a text was longer than the model's context."""

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


# JSONResponse: with a response model FastAPI would validate every number again.
@router.post("/v1/classify", response_model=None, responses={200: {"model": Classification}})
async def classify(body: ClassifyRequest, serving: Running, request: Request) -> JSONResponse:
    """The label of each text, with the probability of every label."""
    classifier = _classifier(body, serving, request)
    predictions = await _counted(serving, "/v1/classify", classifier.classify(body.texts))
    return JSONResponse({"model": classifier.name, "results": [vars(prediction) for prediction in predictions]})


@router.post("/v1/embeddings", response_model=None, responses={200: {"model": Embeddings}})
async def embeddings(body: EmbeddingsRequest, serving: Running, request: Request) -> JSONResponse:
    """OpenAI's embeddings: a vector for each text, of length 1 unless the model's pooling does not normalize."""
    classifier = _classifier(body, serving, request)
    embed_dim = classifier.texts.embed_dim
    if body.dimensions not in (None, embed_dim):
        message = f"dimensions: {body.dimensions}: {classifier.name} has {embed_dim}; send that or leave it out"
        raise ApiError(400, message, "unsupported_parameter", "dimensions")
    results = await _counted(serving, "/v1/embeddings", classifier.embed(body.texts))
    vectors: list[list[float] | str] = [embedding.vector for embedding in results]
    if body.encoding_format == "base64":
        vectors = [base64.b64encode(struct.pack(f"<{embed_dim}f", *each.vector)).decode() for each in results]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    tokens = sum(embedding.tokens for embedding in results)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": classifier.name, "data": data, "usage": usage})


def _classifier(body: TextsRequest, serving: Serving, request: Request) -> ClassifierWorker:
    limit = serving.config.max_texts
    if len(body.texts) > limit:
        message = f"input: {len(body.texts)} texts; send at most {limit} (serve.max_texts)"
        raise ApiError(413, message, "request_too_large", "input")
    return serving.choose(serving.classifiers, body.model, requesting_user(request, body.user))


async def _counted(serving: Serving, route: str, results: Awaitable[list[R]]) -> list[R]:
    """The results, counted in the metrics.

    Raises: ApiError when the queue is full.
    """
    try:
        answers = await results
    except Overloaded as full:
        raise ApiError(429, str(full), "queue_full", headers={"Retry-After": "1"}) from None
    serving.metrics.texts.labels(route).inc(len(answers))
    serving.metrics.truncated.labels(route).inc(sum(result.truncated for result in answers))
    return answers
