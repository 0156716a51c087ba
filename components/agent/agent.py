"""The agent: instruction, decision of the model, tool calls, answer.

A conversation is a generator that yields prompts and is sent the generated ids; it runs no model itself. Evaluation
drives hundreds of conversations in one batch, serving each through its engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.agent.saved_tools import load_tools, read_agent
from components.agent.tool_policy import OPEN, ToolPolicy, ToolSession, offered
from components.agent.tools import Tool
from components.agent.turn_grammar import Rules, TurnOptions, followable, lenient_rules
from components.config.params import InputError
from components.inference.sampling import Constraint
from components.media.messages import pictures_of
from components.media.pictures import Picture
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.response_format import format_message
from components.tokenization.tool_calls import Call, Turn, openai_call

Message = Mapping[str, Any]
Step = dict[str, Any]
FinishReason = Literal["stop", "length", "tool_calls"]

GAVE_UP = "I could not finish this within {steps} steps."
MAX_STEPS = 6
"""Turns per answer of a model whose folder sets none."""
DEFAULT_OPTIONS = TurnOptions()
MAX_TOOL_SETS = 64
"""Sets of offered tools whose rules are kept."""


class ContextTooLong(InputError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True)
class Answer:
    content: str
    steps: tuple[Step, ...]
    """In order: `{"type": "call", "name", "arguments"}` and `{"type": "result", "name", "content"}`."""
    finish_reason: FinishReason
    tool_calls: tuple[Call, ...]
    """Calls of the client's tools, for the client to run; or of the agent's, for a person to confirm."""
    prompt_tokens: int
    """Of the last prompt, which includes all earlier turns."""
    completion_tokens: int
    """Over all turns of the model."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the constraint of its completion."""

    ids: list[int]
    constraint: Constraint | None = None
    pictures: Sequence[Picture] = ()
    """Those of the image tokens, in order."""


Conversation = Generator[Prompt, Sequence[int], Answer]
"""Yields the next prompt, is sent the generated ids (including the end token when it was generated)."""


class Agent:
    """The agent of one model folder."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[Tool],
        max_steps: int,
        context_len: int,
        external_tools: Callable[[], Sequence[Tool]] = tuple,
        forms: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.own_tools = tuple(tools)
        """Tools that the model was trained on, and that prompts need not declare."""
        self.external_tools = external_tools
        """External tools available now; while there are any, each prompt declares all tools."""
        self.forms = forms
        """Whether it was trained with response format messages (`components/tokenization/response_format.py`)."""
        self.max_steps = max_steps
        self.context_len = context_len
        self._default_rules: dict[frozenset[str], tuple[tuple[Tool, ...], Rules]] = {}
        """The rules for default options and the tools that a key is offered, by their names."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        return (*self.own_tools, *self.external_tools())

    @classmethod
    def load(cls, folder: Path, context_len: int, external_tools: Callable[[], Sequence[Tool]] = tuple) -> Agent:
        """The agent of a model folder: its tokenizer and its tools, whose code is imported from the folder.

        Raises: InputError when a file is missing, names an unknown tool, or differs from what was saved.
        """
        tokenizer, settings = load_chat_tokenizer(folder), read_agent(folder)
        max_steps, forms = settings.get("max_steps", MAX_STEPS), bool(settings.get("forms"))
        return cls(tokenizer, load_tools(folder), max_steps, context_len, external_tools, forms)

    def rules(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TurnOptions = DEFAULT_OPTIONS,
        policy: ToolPolicy = OPEN,
    ) -> Rules:
        """Grammars of an answer's turns; `tools` are the client's. Takes milliseconds to compile, less from the cache.

        Raises: InputError when a schema is invalid or not supported.
        """
        if tools:
            return lenient_rules(self.tokenizer, tools, options, runs_tools=False)
        if (known := self.known_rules(tools, options, policy)) is not None:
            return known
        own = offered(self.tools, policy)
        rules = lenient_rules(self.tokenizer, followable(self.tokenizer, own), options, runs_tools=True)
        if options == DEFAULT_OPTIONS:
            if len(self._default_rules) >= MAX_TOOL_SETS:
                self._default_rules.clear()
            self._default_rules[frozenset(tool.name for tool in own)] = own, rules
        return rules

    def known_rules(
        self, tools: Sequence[Mapping[str, Any]] | None, options: TurnOptions, policy: ToolPolicy = OPEN
    ) -> Rules | None:
        """The `rules` for default options, once compiled; else None."""
        if tools or options != DEFAULT_OPTIONS:
            return None
        own = offered(self.tools, policy)
        known = self._default_rules.get(frozenset(tool.name for tool in own))
        return known[1] if known is not None and known[0] == own else None

    def answer(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        steps: list[Step] | None = None,
        rules: Rules | None = None,
        policy: ToolPolicy = OPEN,
    ) -> Conversation:
        """Answer the last message.

        `tools` are the client's (OpenAI's list): then the model's calls are returned instead of run. Steps are appended
        to `steps` as they occur. Every turn follows the `rules`, where there are any; where they require a response
        format, an unfinished call is dropped and the next turn is the answer. Calls that the `policy` does not let run
        without confirmation end the answer, and are returned.

        Raises: ContextTooLong at the first prompt that leaves no room for an answer.
        """
        conversation = [*([format_message(rules.keys)] if self.forms and rules and rules.structured else []), *messages]
        steps = [] if steps is None else steps
        written = 0
        declared = tools
        session = ToolSession(lambda: self.tools, policy)
        if not tools and (self.external_tools() or session.tools != self.own_tools):
            # The model knows its own tools from training; others have to be declared, and then all are.
            declared = [tool.declaration() for tool in session.tools] or None
        unfinished = False
        for turns_left in reversed(range(self.max_steps)):
            prompt = self._prompt(conversation, declared)
            last = unfinished or not turns_left
            constraint = (rules.last if last else rules.turn).constraint(rules.structured) if rules else None
            generated = yield Prompt(prompt, constraint, pictures_of(conversation))
            written += len(generated)
            turn = self.tokenizer.parse_turn(generated)
            ended = self.tokenizer.end_id in generated and not (constraint is not None and constraint.cut)
            if rules and rules.structured and turn.calls and not (ended or tools or last):
                unfinished = True
                continue
            if not turn.calls or not ended or tools or last:
                return self._finish(turn, ended, tools, steps, len(prompt), written)
            if session.needs_confirmation({each.name for each in turn.calls}):
                return Answer(turn.content, tuple(steps), "tool_calls", turn.calls, len(prompt), written)
            conversation += self._call(turn, steps, session)
        raise AssertionError("the last turn returns")

    def _prompt(self, messages: Sequence[Message], tools: Any) -> list[int]:
        ids, _ = self.tokenizer.encode_chat(messages, tools, add_generation_prompt=True)
        if len(ids) >= self.context_len:
            raise ContextTooLong(
                f"messages: {len(ids)} tokens do not fit the model's context of {self.context_len} with room to answer;"
                " send fewer or shorter messages"
            )
        return ids

    def _call(self, turn: Turn, steps: list[Step], session: ToolSession) -> list[Message]:
        """Run the calls of a turn; the model gets a tool's error as its result."""
        calls = []
        results = []
        for each in turn.calls:
            steps.append({"type": "call", "name": each.name, "arguments": each.arguments})
            content = session.call(each.name, each.arguments)
            steps.append({"type": "result", "name": each.name, "content": content})
            call_id = f"call_{len(steps) // 2}"
            calls.append(openai_call(each, call_id))
            results.append({"role": "tool", "tool_call_id": call_id, "name": each.name, "content": content})
        return [{"role": "assistant", "content": turn.content, "tool_calls": calls}, *results]

    def _finish(
        self, turn: Turn, ended: bool, tools: Any, steps: list[Step], prompt_tokens: int, written: int
    ) -> Answer:
        content, calls = turn.content, turn.calls if tools and ended else ()
        reason: FinishReason = "tool_calls" if calls else "stop" if ended else "length"
        if turn.calls and ended and not calls:
            content = turn.content or GAVE_UP.format(steps=self.max_steps)
        return Answer(content, tuple(steps), reason, calls, prompt_tokens, written)
