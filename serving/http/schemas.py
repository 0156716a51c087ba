"""Request schemas: OpenAI's chat request and our feedback request, with strict types.

Unknown and advisory fields (`store`, `metadata`, `service_tier`, ...) are ignored, as OpenAI-compatible servers do; an
unsupported field that would change the answer is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from components.agent.turn_grammar import ANY_OBJECT, TurnOptions
from serving.http.content_parts import Content, MediaPart, RefusalPart, TextPart, Wire, text_or_list, type_of

MAX_STOPS = 4
MAX_TOOLS = 128


def _refused(value: Any) -> None:
    """Null, false, zero and empty values have no effect; any other would be ignored silently."""
    if value:
        raise PydanticCustomError("unsupported_parameter", "not supported by this endpoint; leave it out")


Unsupported = Annotated[
    Any, AfterValidator(_refused), WithJsonSchema({"type": "null", "description": "Not supported."})
]


Stop = Annotated[
    Annotated[str, Field(min_length=1), Tag("~string")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), Tag("~list")],
    text_or_list(f"expected a string or a list of at most {MAX_STOPS} strings"),
]


def _object_or_cut(arguments: Any) -> Any:
    """`{}` for no arguments in any spelling; a truncated call stays as it is."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return "{}"
    return arguments


class CalledFunction(Wire):
    name: str
    arguments: Annotated[str, BeforeValidator(_object_or_cut)]
    """A JSON object as text; empty and null mean `{}`. Invalid JSON is of a truncated call, and stays text."""

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CalledFunction:
        try:
            invalid = not isinstance(pydantic_core.from_json(self.arguments), dict)
        except ValueError as error:
            invalid = "recursion limit" in str(error)
        if invalid:
            raise ValueError("arguments: expected a JSON object as text")
        return self


class ToolCall(Wire):
    id: str
    type: Literal["function"]
    function: CalledFunction


def _function_call(call: Any) -> Any:
    custom = call.get("custom") if isinstance(call, dict) and call.get("type") == "custom" else None
    if not isinstance(custom, dict):
        return call
    function = {"name": custom.get("name"), "arguments": pydantic_core.to_json({"input": custom.get("input")}).decode()}
    return {"id": call.get("id"), "type": "function", "function": function}


class Message(Wire):
    """A message of any role; the fields that its role requires are validated below."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    refusal: str | None = None
    """In place of an earlier answer's content."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _convert_deprecated_fields(cls, value: Any) -> Any:
        """Convert deprecated `function_call`, its result of role `function`, and custom tools to function calls."""
        if not isinstance(value, dict):
            return value
        calls, name = value.get("tool_calls"), value.get("name")
        if value.get("role") == "function" and isinstance(name, str):
            value = {**value, "role": "tool", "tool_call_id": f"call_{name}"}
        if value.get("role") == "assistant" and isinstance(function := value.get("function_call"), dict) and not calls:
            call_id = f"call_{function.get('name')}"
            value = {**value, "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
        if value.get("role") == "assistant" and isinstance(calls, list):
            value = {**value, "tool_calls": [_function_call(call) for call in calls]}
        return value

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of role 'assistant'")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.role != "user" and self.media:
            raise ValueError("pictures and clips belong to messages of role 'user'")
        return self

    @property
    def media(self) -> list[tuple[int, MediaPart]]:
        """Its pictures and clips, each with its index among the content parts."""
        parts = self.content if isinstance(self.content, list) else []
        return [(index, part) for index, part in enumerate(parts) if isinstance(part, MediaPart)]

    def plain(self) -> dict[str, Any]:
        """The message for the chat template, without its pictures and clips."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content if isinstance(part, TextPart | RefusalPart))
        content = content or self.refusal or ""
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        plain |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return plain


class Function(Wire):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object; without it the function has no parameters."""
    strict: bool | None = None
    """Refuse an unsupported schema, instead of enforcing it as far as possible."""

    @model_validator(mode="after")
    def _properties_are_valid(self) -> Function:
        properties = (self.parameters or {}).get("properties")
        properties = {} if properties is None else properties
        if not isinstance(properties, dict):
            raise ValueError("parameters.properties: expected an object")
        for key, schema in properties.items():
            if not isinstance(schema, dict | bool):
                raise ValueError(f"parameters.properties.{key}: expected a JSON schema")
            if isinstance(schema, dict) and not isinstance(schema.get("description"), str | None):
                raise ValueError(f"parameters.properties.{key}.description: expected a string")
        return self


class ClientTool(Wire):
    """A tool that the client runs."""

    type: Literal["function"]
    function: Function


class StreamOptions(Wire):
    include_usage: bool | None = None
    """Send one more chunk with the token counts before `[DONE]`."""


class PlainFormat(Wire):
    """Text, the default, or any JSON object."""

    type: Literal["text", "json_object"]


class AnswerSchema(Wire):
    model_config = ConfigDict(validate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """JSON schema of the answer; without it, any JSON object."""
    strict: bool | None = None
    """Refuse an unsupported schema, instead of enforcing it as far as possible."""


class SchemaFormat(Wire):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: AnswerSchema


def _format_tag(value: Any) -> str | None:
    kind = type_of(value)
    return "~schema" if kind == "json_schema" else "~plain" if kind in ("text", "json_object") else None


ResponseFormat = Annotated[
    Annotated[PlainFormat, Tag("~plain")] | Annotated[SchemaFormat, Tag("~schema")],
    Discriminator(_format_tag, "wrong_type", "expected an object of type 'text', 'json_object' or 'json_schema'"),
]


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    """The tool to call."""

    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str | None:
    return "~mode" if isinstance(value, str) else "~tool" if isinstance(value, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~mode")] | Annotated[NamedTool, Tag("~tool")],
    Discriminator(
        _choice_tag, "wrong_type", "expected 'none', 'auto', 'required' or {'type': 'function', 'function': {'name'}}"
    ),
]


class ChatRequest(Wire):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    """An id of `GET /v1/models`, or its name without the version; by default the served model."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Generated tokens at most, tool calls included; `max_completion_tokens` overrides it."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0, the default, is greedy decoding."""
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    n: Literal[1] | None = None
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS)] | None = None
    """Tools that the client runs. Without any, the agent calls its own."""
    confirmed_tool_calls: list[str] | None = None
    """Ids of calls in the last message, an answer with finish_reason tool_calls, that a person confirmed: the agent
    runs them and goes on; the message's other calls are declined."""
    tool_choice: ToolChoice | None = None
    """auto, the default: text or calls. none: text. required: calls. Or the tool to call."""
    parallel_tool_calls: bool | None = None
    """Allow several calls in one answer, the default."""
    response_format: ResponseFormat | None = None
    """Format of the answer's text."""
    user: str | None = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None
    logprobs: Unsupported = None
    top_logprobs: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed with stream true")
        return self

    @field_validator("tools")
    @classmethod
    def _tools_have_unique_names(cls, tools: list[ClientTool] | None) -> list[ClientTool] | None:
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name; give each its own")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_a_tool(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if choice == "required" and not names:
            raise ValueError("needs tools; send them, or leave it out")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"is not one of the tools; sent are {names}")
        return choice

    @field_validator("confirmed_tool_calls")
    @classmethod
    def _confirmed_are_of_the_last_message(cls, confirmed: list[str] | None, info: ValidationInfo) -> list[str] | None:
        messages: list[Message] = info.data.get("messages") or []
        calls = messages[-1].tool_calls or [] if messages else []
        if confirmed is not None and (not calls or set(confirmed) - {call.id for call in calls}):
            raise ValueError("no such calls in the last message; send the answer whose calls are confirmed last")
        return confirmed

    @property
    def has_media(self) -> bool:
        """Whether a message has a picture or a clip."""
        return any(message.media for message in self.messages)

    @property
    def options(self) -> TurnOptions:
        """Tool choice and response format."""
        tool = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        calls = self.tool_choice if isinstance(self.tool_choice, str) else "required" if tool else "auto"
        strict = isinstance(self.response_format, SchemaFormat) and self.response_format.json_schema.strict is True
        return TurnOptions(calls, tool, self.parallel_tool_calls is not False and tool is None, self._schema(), strict)

    def _schema(self) -> dict[str, Any] | None:
        if isinstance(self.response_format, SchemaFormat):
            schema = self.response_format.json_schema.json_schema
            return ANY_OBJECT if schema is None else schema
        return ANY_OBJECT if self.response_format and self.response_format.type == "json_object" else None

    @property
    def characters(self) -> int:
        """Approximate length of the rendered prompt; a message without text counts too."""
        return sum(len(str(message.plain())) for message in self.messages) + sum(map(len, map(str, self.tools or ())))

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class FeedbackRequest(Wire):
    """Body of `POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid")

    completion_id: str
    rating: Literal["up", "down"]
    correction: Annotated[str, Field(min_length=1)] | None = None
    """The answer that it should have been."""
    comment: str | None = None
