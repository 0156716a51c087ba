"""Sections of `params.yaml` for ingestion, curation, alignment, evaluation, the promotion gate and serving."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.model_settings import FromBaseConfig, Section


class FeedbackConfig(Section):
    """Ingestion of user feedback."""

    max_items: int = Field(ge=1)
    """Items of one ingestion, into one partition; the rest waits for the next."""
    max_items_per_user: int = Field(ge=1)
    """Items of one user (API key, or user name) within 24 hours; those above are quarantined."""
    improve_after: int = Field(ge=1)
    """Accepted items that no model is trained on at which ingestion triggers an improvement."""


class KeepConfig(Section):
    """Retention: what `loopwright prune` and the schedules leave; null: nothing of that kind is ever removed.

    What an alias names, a server serves or kept lineage refers to always stays.
    """

    request_days: int | None = Field(ge=1)
    """Days that a request without feedback is stored."""
    versions: int | None = Field(ge=1)
    """Newest versions of each model that keep their weights; older ones keep their tags, metrics and lineage."""
    runs: int | None = Field(ge=1)
    """Newest MLflow runs of each name."""
    traces: int | None = Field(ge=1)
    """Newest traces of answers in MLflow (`serve.traces: mlflow`)."""
    bentos: int | None = Field(ge=0)
    """Newest built Bentos of each model, beside those of versions with an alias."""
    cache_days: float | None = Field(ge=0)
    """Days since it was written that DVC's cache keeps what no dvc.lock, branch, tag or kept version refers to."""
    log_megabytes: int | None = Field(ge=1)
    """Size of a log file above which its beginning is cut off."""
    flow_runs: int | None = Field(ge=1)
    """Newest ended flow runs of each flow in Prefect."""
    upgrades: int | None = Field(ge=1)
    """Newest backups that `loopwright upgrade` made."""


class RunConfig(Section):
    """How stages are started; no result becomes out of date, though rounding and dropout are others."""

    launcher: Literal["local", "torchrun", "ray"]
    """torchrun: stages that train run as `processes` ranks of this machine; ray: of a Ray cluster; local: each stage is
    one process."""
    processes: int = Field(ge=1, le=1024)
    """Ranks of a training: one for each GPU."""
    address: str | None = Field(min_length=1)
    """ray: the cluster, `ray://HOST:10001`; or the dashboard of its head, `http://HOST:8265`, which takes stages that
    train alone; null: a Ray on this machine for the stage alone."""
    workers: int = Field(ge=1, le=1024)
    """Processes that stages of data divide their shards among; with launcher ray, tasks at a time of the cluster that
    RAY_ADDRESS names, else that at `address`."""


class CurateConfig(Section):
    """Curation of user feedback into training rows."""

    held_out_share: float = Field(gt=0, lt=0.9)
    """Share of prompts with feedback that are held out of training for the gate."""
    feedback_share: float = Field(gt=0, lt=1)
    """Share of feedback among the training conversations; the others are replayed from earlier training."""
    noise: float = Field(ge=0, le=1)
    """Share of a correction's repetitions with random tokens in the names and results that it copies."""
    replay: int = Field(ge=1)
    """Conversations replayed from the model's earlier training, against forgetting."""
    min_corrections: int = Field(ge=1)
    """Corrections of a skill from which its earlier wording is superseded and no longer replayed."""


class AlignConfig(FromBaseConfig):
    """Training on feedback: corrections by instruction tuning, preferences by DPO, unpaired labels by KTO.

    Settings follow from the base of a champion that is an adapter.
    """

    lora_rank: int = Field(ge=0)
    """Rank of the new adapter of a champion that is none, whose own weights are trained at 0; an adapter goes on."""
    trained_share: float = Field(gt=0, le=1)
    """Share of the blocks that are trained, the last ones; below 1 the embeddings are frozen too. Fewer forget less."""
    beta: float = Field(gt=0)
    """Weight of the KL term towards the frozen reference model in DPO and KTO."""
    replay_weight: float = Field(gt=0)
    """Weight of a token of a replayed conversation in the mean loss, in tokens of feedback."""
    preference_weight: float = Field(ge=0)
    """Weight of a preference in the mean loss, in tokens of feedback."""


class AssessConfig(Section):
    """Evaluation of classifier and summarizer."""

    max_texts: int = Field(ge=1)
    """Most held-out texts per suite."""
    beams: int = Field(ge=1)
    """Beams of the summarizer's beam search; 1: greedy."""


class EvaluateConfig(Section):
    """Evaluation of the agent."""

    batch_size: int = Field(ge=1)
    """Questions per batch."""
    max_questions: int = Field(ge=1)
    """Most questions per suite."""
    max_new_tokens: int = Field(ge=8)
    """Most tokens per model turn."""
    documents_tokens: int = Field(ge=256)
    """Held-out tokens read for bits per byte."""
    shots: list[Annotated[int, Field(ge=0)]]
    """Numbers of few-shot examples before a question with which the agent is evaluated too."""
    shot_questions: int = Field(ge=0)
    """Few-shot questions per suite; 0: none."""


class JudgeConfig(Section):
    """The gate between a candidate and the champion."""

    max_questions: int = Field(ge=1)
    """Most held-out questions per suite."""
    false_promotion_rate: float = Field(gt=0, lt=0.5)
    """Probability that a candidate no better than the champion passes, over all skills together."""
    min_corrected: float = Field(ge=0, le=1)
    """Share of a skill's held-out corrections that must be answered as corrected for a gain."""
    max_fall: float = Field(ge=0, lt=1)
    """Largest drop in a skill's share of right answers that is accepted without a test."""
    fall_rate: float = Field(gt=0, lt=0.5)
    """Significance level of the test that a larger drop is a regression."""


ModelTool = Literal["classifier", "summarizer"]
"""Registered models that can be tools of the agent."""


class McpServer(Section):
    """An MCP server whose tools the agent may call: started here by `command`, or reached at `url`."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
    """Its tools are called NAME_TOOL."""
    command: str | None = None
    """Program to start, a server on standard input and output."""
    args: list[str] | None = None
    """The program's arguments; in these, `env`, `url` and `headers`, $NAME stands for a variable of this process."""
    env: dict[str, str] | None = None
    """Environment of the program beside PATH, HOME and the like."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Address of a streamable HTTP server."""
    headers: dict[str, str] | None = None
    """Headers of each request to it, such as `Authorization: Bearer $SHOP_TOKEN`."""

    @model_validator(mode="after")
    def _one_way(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError(f"{self.name}: give either command (with args, env) or url")
        if self.url is not None and (self.args or self.env):
            raise ValueError(f"{self.name}: args and env belong to command, not to url")
        if self.command is not None and self.headers:
            raise ValueError(f"{self.name}: headers belong to url, not to command")
        return self


DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")]


class ServeConfig(Section):
    """The prediction endpoint."""

    backend: Literal["engine", "openai"]
    """What generates the tokens: the engine in this process, or another server with OpenAI's chat API."""
    int8: bool
    """Quantize the weights to int8 on a CPU, where the quantized model agrees with the original; faster from some
    millions of parameters on."""
    backend_url: str | None
    """Address of that server, including `/v1`; its API key, if any, is in `LOOPWRIGHT_BACKEND_KEY`."""
    backend_model: str | None
    """Name of the model on that server; of the base where a version is an adapter, which is loaded there."""
    backend_sees_pictures: bool
    """Whether that model reads pictures (`image_url` parts)."""
    adapter_root: str | None
    """Path at which that server sees the state folder, to load adapters from it; null: the path that it has here."""
    max_body_bytes: int = Field(ge=1024)
    """Larger request bodies are answered with 413."""
    header_seconds: float = Field(gt=0)
    """Time limit of a request's line and headers; then its connection is closed."""
    body_seconds: float = Field(gt=0)
    """Time limit of a request's body; then it is answered with 408."""
    write_seconds: float = Field(gt=0)
    """Time within which a client reads all that was written to it; then its connection is closed."""
    max_held_bytes: int = Field(ge=1024)
    """Bytes of all request bodies that are held at once; more are answered with 503. And bytes that clients have not
    read; with more, the connections that have waited longest for their client are closed."""
    max_connections: int = Field(ge=1)
    """Open connections. One more closes that which waits longest for its client, or is answered with 503."""
    max_connections_per_client: int = Field(ge=1)
    """That limit for one address; behind a proxy, whose address all clients have, as high as `max_connections`."""
    max_picture_body_bytes: int = Field(ge=1024)
    """That limit for chats while a model that sees pictures is served, and of a file that is fetched for one."""
    max_pictures: int = Field(ge=1)
    """Pictures of one request, the frames of its clips included; more are answered with 400."""
    allowed_image_hosts: list[str]
    """Hosts, `name` or `name:port`, from which pictures of a request are fetched; a private address only where an
    address, or `localhost`, is named. Others are answered with 400."""
    max_new_tokens: int = Field(ge=1)
    """Tokens per model turn where the request sets no limit."""
    max_steps: int = Field(ge=1)
    """Model turns per answer; the last turn may not call a tool."""
    devices: Literal["auto"] | Annotated[list[DeviceName], Field(min_length=1)]
    """Devices with a copy of the chat model and a batch each, all of one kind; auto: each CUDA device that is visible,
    else the CPU. A CPU that is named twice computes two batches, with its threads divided."""
    max_running: int = Field(ge=1)
    """Requests that are decoded in one batch, of which each device has one."""
    max_context_tokens: int | None = Field(ge=256)
    """Tokens of a prompt and its answer; as many as the model takes and memory holds where null."""
    max_waiting: int = Field(ge=1)
    """Requests that may wait for a slot, of any device, before 429."""
    request_seconds: float = Field(gt=0)
    """Time limit of an answer: a request without a slot by then gets 503, a running one is cut off."""
    follow_seconds: float = Field(gt=0)
    """Seconds between polls of the registry alias; more, up to a minute, while the registry does not answer."""
    handover_seconds: float = Field(ge=0)
    """Seconds after a promotion, once every replica has the new champion, for which conversations that the old one
    began stay with it; 0: none."""
    notice_seconds: float = Field(ge=0)
    """Seconds from SIGTERM, when `/readyz` turns 503, for which requests are still taken: until balancers notice."""
    drain_seconds: float = Field(ge=0)
    """Longest wait, after that, for running requests; new ones are answered with 503."""
    model_tools: list[ModelTool]
    """Registered models that the agent may call, each while it has a champion."""
    mcp_servers: list[McpServer]
    """Servers whose tools the agent may call beside its own; needs the extra `mcp`."""
    allow_writes: list[str]
    """Tools that change something, as their declarations say, and are run without a person's confirmation."""
    mcp_call_seconds: float = Field(gt=0)
    """Timeout of a call to such a tool; the model then gets an error as its result."""
    max_texts: int = Field(ge=1)
    """Texts of one request to classify or embed; more are answered with 413."""
    max_correction_characters: int = Field(ge=1)
    """Longer corrections and comments are answered with 413."""
    max_prompt_characters: int = Field(ge=1)
    """Longer conversations are refused before they are tokenized."""
    requests_per_minute: int = Field(ge=1)
    """Requests of one API key without a limit of its own; more are answered with 429."""
    allowed_origins: list[str]
    """Origins (`https://host`) whose web pages may call the endpoint from a browser (CORS)."""
    traces: Literal["off", "mlflow", "otlp"]
    """Where traces of answers are written, beside their record in the store: `otlp` (extra `otel`) sends them to
    `OTEL_EXPORTER_OTLP_ENDPOINT`."""
    trace_share: float = Field(ge=0, le=1)
    """Share of the answers that are traced."""
