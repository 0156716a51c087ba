"""The agent in four steps: take the instruction, let the model decide, call the tools, answer in words.

It is a coroutine that knows no model: it yields prompts and is sent what was generated, so
that evaluation drives hundreds side by side and serving drives each through its engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.agent.saved_tools import load_tools, read_agent
from components.agent.tools import Tool, call
from components.agent.turn_grammar import Rules, TurnOptions, followable, lenient_rules
from components.config.params import InputError
from components.inference.sampling import Constraint
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.response_format import format_message
from components.tokenization.tool_calls import Call, Turn, openai_call

Message = Mapping[str, Any]
Step = dict[str, Any]
FinishReason = Literal["stop", "length", "tool_calls"]

GAVE_UP = "I could not finish this within {steps} steps."
MAX_RESULT_CHARACTERS = 2_000
MAX_STEPS = 6
"""Turns for one answer of a model whose folder does not say how many."""
DEFAULT_OPTIONS = TurnOptions()


class ContextTooLong(InputError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True)
class Answer:
    """What the agent said, and how it got there."""

    content: str
    steps: tuple[Step, ...]
    """In order: `{"type": "call", "name", "arguments"}` and `{"type": "result", "name", "content"}`."""
    finish_reason: FinishReason
    tool_calls: tuple[Call, ...]
    """Calls of the client's own tools, for the client to run."""
    prompt_tokens: int
    """Of the last prompt, which holds all that came before."""
    completion_tokens: int
    """Over all turns of the model."""


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue, and what its continuation is held to."""

    ids: list[int]
    constraint: Constraint | None = None


Conversation = Generator[Prompt, Sequence[int], Answer]
"""Yields the next prompt, is sent the generated ids (with the end token when one was reached)."""


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
        """Those that it was trained on, and knows without being told."""
        self.external_tools = external_tools
        """Tools of others that are there now; while there are any, each prompt declares all tools."""
        self.forms = forms
        """Whether it was taught to be told the form of an answer (`components/tokenization/response_format.py`)."""
        self.max_steps = max_steps
        self.context_len = context_len
        self._usual: tuple[tuple[Tool, ...], Rules] | None = None
        """The rules of most answers, and the tools that they are of."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        return (*self.own_tools, *self.external_tools())

    @classmethod
    def load(cls, folder: Path, context_len: int, external_tools: Callable[[], Sequence[Tool]] = tuple) -> Agent:
        """The agent of a model folder: its tokenizer and its tools, whose code is run from the folder.

        Raises: InputError when a file is missing, names an unknown tool, or is not what was saved.
        """
        tokenizer, settings = load_chat_tokenizer(folder), read_agent(folder)
        max_steps, forms = settings.get("max_steps", MAX_STEPS), bool(settings.get("forms"))
        return cls(tokenizer, load_tools(folder), max_steps, context_len, external_tools, forms)

    def rules(self, tools: Sequence[Mapping[str, Any]] | None = None, options: TurnOptions = DEFAULT_OPTIONS) -> Rules:
        """What the turns of an answer may be; `tools` are the client's. Takes milliseconds, and less when asked again.

        Raises: InputError when a schema is wrong or cannot be held to.
        """
        if tools:
            return lenient_rules(self.tokenizer, tools, options, runs_tools=False)
        if (known := self.known_rules(tools, options)) is not None:
            return known
        own = self.tools
        rules = lenient_rules(self.tokenizer, followable(self.tokenizer, own), options, runs_tools=True)
        if options == DEFAULT_OPTIONS:
            self._usual = own, rules
        return rules

    def known_rules(self, tools: Sequence[Mapping[str, Any]] | None, options: TurnOptions) -> Rules | None:
        """The `rules` of most answers, once they were made; takes no time."""
        if tools or options != DEFAULT_OPTIONS or self._usual is None or self._usual[0] != self.tools:
            return None
        return self._usual[1]

    def answer(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        steps: list[Step] | None = None,
        rules: Rules | None = None,
    ) -> Conversation:
        """Answer the last message.

        `tools` are the client's (OpenAI's list): then the model's calls are handed back instead of run.
        Steps are appended to `steps` as they happen. Every turn keeps to the `rules`, where there are any; where they
        want words of a form, a call that finds no end is forgotten and the next turn is the answer.

        Raises: ContextTooLong at the first prompt that leaves no room for an answer.
        """
        said = [*([format_message(rules.keys)] if self.forms and rules and rules.structured else []), *messages]
        steps = [] if steps is None else steps
        written = 0
        declared = tools or self._declared()
        endless = False
        for turns_left in reversed(range(self.max_steps)):
            prompt = self._prompt(said, declared)
            last = endless or not turns_left
            constraint = rules.constraint(last) if rules else None
            generated = yield Prompt(prompt, constraint)
            written += len(generated)
            turn = self.tokenizer.parse_turn(generated)
            ended = self.tokenizer.end_id in generated and not (constraint is not None and constraint.cut)
            if rules and rules.structured and turn.calls and not (ended or tools or last):
                endless = True
                continue
            if not turn.calls or not ended or tools or last:
                return self._finish(turn, ended, tools, steps, len(prompt), written)
            said += self._call(turn, steps)
        raise AssertionError("the last turn returns")

    def _declared(self) -> list[dict[str, Any]] | None:
        """What a prompt says of the tools: nothing, as the model was trained, unless some are not its own."""
        external_tools = self.external_tools()
        return [tool.declaration() for tool in (*self.own_tools, *external_tools)] if external_tools else None

    def _prompt(self, messages: Sequence[Message], tools: Any) -> list[int]:
        ids, _ = self.tokenizer.encode_chat(messages, tools, add_generation_prompt=True)
        if len(ids) >= self.context_len:
            raise ContextTooLong(
                f"messages: {len(ids)} tokens do not fit the model's context of {self.context_len} with room to answer;"
                " send fewer or shorter messages"
            )
        return ids

    def _call(self, turn: Turn, steps: list[Step]) -> list[Message]:
        """Run the calls of a turn; a tool's error is shown to the model like any result."""
        calls = []
        results = []
        for wanted in turn.calls:
            steps.append({"type": "call", "name": wanted.name, "arguments": wanted.arguments})
            content = call(self.tools, wanted.name, wanted.arguments)[:MAX_RESULT_CHARACTERS]
            steps.append({"type": "result", "name": wanted.name, "content": content})
            number = f"call_{len(steps) // 2}"
            calls.append(openai_call(wanted, number))
            results.append({"role": "tool", "tool_call_id": number, "name": wanted.name, "content": content})
        return [{"role": "assistant", "content": turn.content, "tool_calls": calls}, *results]

    def _finish(
        self, turn: Turn, ended: bool, tools: Any, steps: list[Step], prompt_tokens: int, written: int
    ) -> Answer:
        content, calls = turn.content, turn.calls if tools and ended else ()
        reason: FinishReason = "tool_calls" if calls else "stop" if ended else "length"
        if turn.calls and ended and not calls:
            content = turn.content or GAVE_UP.format(steps=self.max_steps)
        return Answer(content, tuple(steps), reason, calls, prompt_tokens, written)
