"""Sections of `params.yaml` by which people are heard, learned from and answered."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from components.config.model_settings import Section, TrainConfig


class FeedbackConfig(Section):
    """Taking in what people said."""

    max_items: int = Field(ge=1)
    """Items that one ingestion takes, into one partition; the rest waits for the next."""
    max_items_per_user: int = Field(ge=1)
    """Items that one user (or API key) may send in 24 hours; the rest is quarantined."""
    improve_after: int = Field(ge=1)
    """Accepted items that no model learned from at which ingestion asks for an improvement."""
    keep_days: int | None = Field(ge=1)
    """Days that a request without feedback stays on record; null: for ever."""


class CurateConfig(Section):
    """From what people said to rows to learn from."""

    held_out_share: float = Field(gt=0, lt=0.9)
    """Share of prompts with feedback that are never trained on: the gate asks them."""
    feedback_share: float = Field(gt=0, lt=1)
    """Share of the learned conversations that are people's; the others are told again from earlier training."""
    noise: float = Field(ge=0, le=1)
    """Share of a correction's repetitions with random tokens in the names and results that it copies."""
    replay: int = Field(ge=1)
    """Conversations of the model's earlier training told again, so that old skills stay."""
    min_corrections: int = Field(ge=1)
    """Corrections from which a skill's wording is people's, not its suite's: the old wording is no longer replayed."""


class AlignConfig(TrainConfig):
    """Learning from people: corrections by instruction tuning, preferences by DPO, unpaired labels by KTO."""

    trained_share: float = Field(gt=0, le=1)
    """Share of the blocks that learn, the last ones; below 1 the embeddings stay too. Fewer change old skills less."""
    beta: float = Field(gt=0)
    """Strength of the tie to the frozen reference model in DPO and KTO."""
    replay_weight: float = Field(gt=0)
    """How many learned tokens one token of an earlier conversation counts for in the mean loss."""
    preference_weight: float = Field(ge=0)
    """How many learned tokens one preference counts for in the mean loss."""


class JudgeConfig(Section):
    """The gate between a candidate and the champion."""

    max_questions: int = Field(ge=1)
    """Held-out questions per suite at most."""
    false_promotion_rate: float = Field(gt=0, lt=0.5)
    """Chance that a candidate no better than the champion passes, over all skills together."""
    min_corrected: float = Field(ge=0, le=1)
    """Share of a skill's held-out corrections to be answered as corrected before they count as learned."""
    max_fall: float = Field(ge=0, lt=1)
    """Share of a skill's held-out questions that may be lost without more ado."""
    fall_rate: float = Field(gt=0, lt=0.5)
    """Error rate of the test that calls a larger fall real."""


ModelTool = Literal["classifier", "summarizer"]
"""Registered models that can be tools of the agent."""


class McpServer(Section):
    """An MCP server whose tools the agent may call: started here by `command`, or reached at `url`."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
    """Its tools are called NAME_TOOL."""
    command: str | None = None
    """Program to start, that speaks on its standard input and output."""
    args: list[str] | None = None
    """The program's arguments."""
    env: dict[str, str] | None = None
    """Environment of the program beside PATH, HOME and the like; $NAME stands for a variable of ours."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Address of a server that speaks streamable HTTP."""

    @model_validator(mode="after")
    def _one_way(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError(f"{self.name}: give either command (with args, env) or url")
        if self.url is not None and (self.args or self.env):
            raise ValueError(f"{self.name}: args and env belong to command, not to url")
        return self


class ServeConfig(Section):
    """The prediction endpoint."""

    backend: Literal["engine", "openai"]
    """Who makes the tokens: the engine in this process, or another server that speaks OpenAI's chat API."""
    int8: bool
    """Round the weights to int8 on a CPU, where the model passes for itself rounded; faster from some millions of
    parameters on."""
    backend_url: str | None
    """Of that server, up to and with `/v1`; its key, where it wants one, is in `LOOPWRIGHT_BACKEND_KEY`."""
    backend_model: str | None
    """What that server calls the model."""
    max_body_bytes: int = Field(ge=1024)
    """Larger request bodies are answered with 413."""
    max_new_tokens: int = Field(ge=1)
    """Tokens per model turn where the request sets no limit."""
    max_steps: int = Field(ge=1)
    """Model turns per answer; the last one may not call a tool."""
    max_running: int = Field(ge=1)
    """Requests that are answered at the same time, a step of the model for all of them."""
    max_waiting: int = Field(ge=1)
    """Requests that may wait for a slot before 429."""
    request_seconds: float = Field(gt=0)
    """Time for one answer: one that has no slot by then is answered with 503, one that is being written ends there."""
    follow_seconds: float = Field(gt=0)
    """Time between looks at the registry alias."""
    model_tools: list[ModelTool]
    """Registered models that the agent may call, each while it has a champion."""
    mcp_servers: list[McpServer]
    """Servers whose tools the agent may call beside its own; needs the extra `mcp`."""
    mcp_call_seconds: float = Field(gt=0)
    """Longest wait for a tool of theirs; then the model is told so."""
    max_texts: int = Field(ge=1)
    """Texts of one request to classify or embed; more are answered with 413."""
    max_correction_characters: int = Field(ge=1)
    """Longer corrections and comments are answered with 413."""
    max_prompt_characters: int = Field(ge=1)
    """Longer conversations are refused before anything is made of them."""
    requests_per_minute: int = Field(ge=1)
    """Requests that one API key may send, where the key has no limit of its own; more are answered with 429."""
    allowed_origins: list[str]
    """Web pages of these origins (`https://host`) may call the endpoint from a browser; others may not."""
    traces: Literal["off", "mlflow"]
    """Where the steps of answers are traced, beside their record in the store."""
    trace_share: float = Field(ge=0, le=1)
    """Share of the answers that are traced."""
