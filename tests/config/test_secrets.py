"""What leaves the process holds no secret: parameters, addresses, log lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from components.config.params import Params, load_params
from components.config.secrets import environment_secrets, hidden, literal_secrets, redacted, redacted_tags
from tests.pages import ROOT

SERVER: dict[str, Any] = {
    "name": "shop",
    "command": "shop-mcp",
    "args": [
        "--token",
        "s3cret-args",
        "--password=s3cret-option",
        "--api-key",
        "s3cret-key",
        "--port",
        "80",
        "--key-file",
        "k.pem",
    ],
    "env": {"TOKEN": "s3cret-env", "MARK": "$SHOP_MARK", "OTHER": "${OTHER}"},
}
WEB: dict[str, Any] = {
    "name": "web",
    "url": "https://user:s3cret-url@host/mcp?api_key=s3cret-query&page=2",
    "headers": {"Authorization": "Bearer s3cret-header", "X-Key": "Token $WEB_KEY"},
}


def test_literal_secrets_are_replaced_and_references_stay() -> None:
    values = {"serve": {"mcp_servers": [SERVER, WEB], "backend_url": "http://:s3cret-backend@host/v1", "max_steps": 4}}
    shown = redacted(values)
    assert "s3cret" not in json.dumps(shown)
    shop, web = shown["serve"]["mcp_servers"]
    assert shop["env"] == {"TOKEN": "$TOKEN", "MARK": "$SHOP_MARK", "OTHER": "${OTHER}"}
    assert shop["args"] == [
        "--token",
        "[hidden]",
        "--password=[hidden]",
        "--api-key",
        "[hidden]",
        "--port",
        "80",
        "--key-file",
        "k.pem",
    ]
    assert web["headers"] == {"Authorization": "$AUTHORIZATION", "X-Key": "Token $WEB_KEY"}
    assert web["url"] == "https://[hidden]@host/mcp?api_key=[hidden]&page=2"
    assert literal_secrets(values) == [
        "serve.mcp_servers.shop.args.1",
        "serve.mcp_servers.shop.args.2",
        "serve.mcp_servers.shop.args.4",
        "serve.mcp_servers.shop.env.TOKEN",
        "serve.mcp_servers.web.url",
        "serve.mcp_servers.web.headers.Authorization",
        "serve.backend_url",
    ]
    assert literal_secrets(shown) == [], "what is redacted is not redacted again"


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--header", "Authorization: Bearer s3cret"], ["--header", "Authorization: [hidden]"]),
        (
            ["--header", "Authorization:s3cret", "-H", "X-Any: s3cret"],
            ["--header", "[hidden]", "-H", "X-Any: [hidden]"],
        ),
        (["--header=Authorization: Bearer s3cret"], ["--header=Authorization: [hidden]"]),
        (["Authorization: Bearer s3cret", "https://host/mcp"], ["Authorization: [hidden]", "https://host/mcp"]),
        (["--auth", "s3cret", "-p", "s3cret", "-ps3cret1"], ["--auth", "[hidden]", "-p", "[hidden]", "-p[hidden]"]),
        (["--bearer=s3cret", "--db-pass", "s3cret"], ["--bearer=[hidden]", "--db-pass", "[hidden]"]),
        (["-u", "bob:s3cret", "bob:s3cret@host/db"], ["-u", "[hidden]", "[hidden]"]),
        (["run", "-e", "ANY=s3cret", "TOKEN=s3cret", "-i"], ["run", "-e", "ANY=[hidden]", "TOKEN=[hidden]", "-i"]),
        (["--dsn", "postgresql://u:s3cret@db/x"], ["--dsn", "[hidden]"]),
        (["--to=https://u:s3cret@h/a?x=s3cret#y=s3cret"], ["--to=https://[hidden]@h/a?x=[hidden]#y=[hidden]"]),
        (["https://h/s/s3cret0123456789abc/mcp"], ["https://h/s/[hidden]/mcp"]),
        (["--any", "s3cret0123456789abc", "--any=s3cret0123456789a"], ["--any", "[hidden]", "--any=[hidden]"]),
        (['{"headers": {"Authorization": "s3cret"}, "n": 1}'], ['{"headers": {"Authorization": "[hidden]"}, "n": 1}']),
    ],
)
def test_arguments_that_could_be_secrets_are_hidden(args: list[str], shown: list[str]) -> None:
    assert redacted({"args": args}) == {"args": shown}
    assert redacted({"args": shown}) == {"args": shown}, "what is redacted is not redacted again"


@pytest.mark.parametrize(
    "args",
    [
        [
            "--header",
            "Authorization: Bearer $TOKEN",
            "--header",
            "Authorization:${TOKEN}",
            "--token=$TOKEN",
            "-p",
            "$PW",
        ],
        ["-e", "TOKEN", "-e", "TOKEN=$TOKEN", "https://${USER}:$PW@host/${TOKEN_0123456789}/mcp?key=$KEY&page=2"],
        ["-m", "shop_server", "-y", "@scope/server-files", "-u", "server.py", "-p", "8080:80", "--max-tokens", "100"],
        ["--key-file", "k.pem", "--auth-type", "oauth", "--no-auth", "stdio", "--verbose", "-it", "-t", "-i"],
        ["/opt/servers/shop_server_2024/main_server_2.py", "--mode=stdio", '{"headers": {"Authorization": "$T"}}'],
    ],
)
def test_references_and_harmless_arguments_stay(args: list[str]) -> None:
    assert redacted({"args": args}) == {"args": args}


def test_the_path_of_a_server_s_address_can_be_its_key() -> None:
    server = {"url": "https://u:s3cret@h/api/s/s3cretZ0123456789/mcp?profile=s3cret&v=2&k=$K"}
    assert redacted(server) == {"url": "https://[hidden]@h/api/s/[hidden]/mcp?profile=[hidden]&v=2&k=$K"}


def test_the_project_s_own_parameters_pass_unchanged() -> None:
    values = load_params(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    assert redacted(values) == values
    assert set(values) == {field.alias or name for name, field in Params.model_fields.items()}


def test_tags_of_earlier_releases_are_redacted() -> None:
    tags = {"params": json.dumps({"serve": {"mcp_servers": [SERVER]}}), "gate": "passed"}
    assert "s3cret" not in json.dumps(redacted_tags(tags))
    assert redacted_tags({"gate": "passed"}) == {"gate": "passed"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://loop:p@ss@db/x failed", "postgresql://loop:***@db/x failed"),
        ("https://hf_token@host/a and http://a:b@c", "https://[hidden]@host/a and http://a:***@c"),
        ("https://$USER:$PASSWORD@host/mcp", "https://$USER:$PASSWORD@host/mcp"),
        ("GET http://host/a?token=abc&x=1 by a@b.c", "GET http://host/a?token=[hidden]&x=1 by a@b.c"),
        ("http://127.0.0.1:3000/v1", "http://127.0.0.1:3000/v1"),
    ],
)
def test_addresses_are_shown_without_passwords(text: str, shown: str) -> None:
    assert hidden(text) == shown


def test_secrets_of_the_environment_are_known_by_name() -> None:
    environment = {
        "LOOPWRIGHT_API_KEYS": "open-sesame, other-key",
        "AWS_SECRET_ACCESS_KEY": "aws-secret",
        "HF_TOKEN": "hf_token1",
        "PREFECT_API_AUTH_STRING": "admin:prefect",
        "LOOPWRIGHT_DATABASE_URL": "postgresql://u:database-password@h/x",
        "PATH": "/usr/bin",
        "TOKENIZERS_PARALLELISM": "parallel",
        "MONKEY": "banana-split",
    }
    assert set(environment_secrets(environment)) == {
        *("open-sesame, other-key", "open-sesame", "other-key", "aws-secret", "hf_token1", "admin:prefect"),
        "database-password",
    }
