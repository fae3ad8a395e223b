"""Configuration of the server; the command-line options are generated from its fields."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from halfbyte.config_fields import check_choice, check_least, check_positive, option
from halfbyte.errors import ConfigError

ENGINES = ("embedded", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLimits:
    """Limits on the length of an answer."""

    default_max_tokens: int | None = None
    """Limit of a chat's answer if the client sets none."""
    max_tokens: int | None = None
    """Highest limit that a client may set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the server, its models and limits."""

    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0 selects a free one", metavar="N")
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={
            "help": "an API key that clients may use, as NAME:SECRET; repeatable. Other users of "
            "this machine can read command lines: prefer --api-key-file or HALFBYTE_API_KEYS",
            "flag": "--api-key",
            "metavar": "KEY",
        },
    )
    api_key_file: Path | None = option(
        None, "a file of API keys, one NAME:SECRET per line", metavar="FILE"
    )
    engine: str = option("embedded", "inference engine that runs the model", choices=ENGINES)
    vllm_command: str = option(
        "vllm", "with --engine vllm: the vllm program, from its own environment", metavar="PATH"
    )
    vllm_args: tuple[str, ...] = option(
        (),
        "with --engine vllm: an extra argument for `vllm serve`, such as "
        "--vllm-arg=--tensor-parallel-size=2; repeatable",
        flag="--vllm-arg",
        metavar="ARG",
    )
    upstreams: tuple[str, ...] = option(
        (),
        "URL of an OpenAI-compatible server, up to and including /v1, to use instead of a local "
        "MODEL; repeatable or comma-separated, requests alternate between them. Their API key is "
        "read from HALFBYTE_UPSTREAM_KEY",
        flag="--upstream",
        metavar="URL",
    )
    served_name: str | None = option(
        None, "model name for clients (default: the name of the model's folder)", metavar="NAME"
    )
    adapters: Path | None = option(
        None,
        "folder of adapters; each subfolder can be loaded under its name",
        metavar="FOLDER",
    )
    chat_template: Path | None = option(
        None, "file with a chat template to use instead of the model's own", metavar="FILE"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "an additional host name under which a server without API keys may be addressed; "
        "repeatable",
        flag="--allowed-host",
        metavar="NAME",
    )
    default_max_tokens: int | None = option(
        None,
        "max tokens of a chat answer if the client sets no limit (default: 1024 for a local model; "
        "other servers use their own)",
        metavar="N",
    )
    max_tokens: int | None = option(
        None,
        "highest token limit that a client may set (default: the model's context)",
        metavar="N",
    )
    max_choices: int = option(
        128, "max choices per request: the number of prompts times n", metavar="N"
    )
    max_body_bytes: int = option(4_000_000, "max size of a request body", metavar="BYTES")
    body_timeout: float = option(30.0, "timeout for receiving a request body", metavar="SECONDS")
    request_timeout: float = option(
        600.0, "timeout for an answer, including its time in the queue", metavar="SECONDS"
    )
    max_requests: int = option(512, "max concurrent requests, including queued ones", metavar="N")
    max_requests_per_key: int = option(
        128, "max concurrent requests per API key, including queued ones", metavar="N"
    )
    tokens_per_minute_per_key: int | None = option(
        None,
        "max tokens per minute and API key, prompts and answers together (default: no limit)",
        metavar="N",
    )
    drain_timeout: float = option(
        30.0, "time for running answers to finish when the server shuts down", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535.")
        check_choice(self, "engine", ENGINES)
        for name in (
            "default_max_tokens",
            "max_choices",
            "max_requests",
            "max_requests_per_key",
            "max_tokens",
            "tokens_per_minute_per_key",
        ):
            check_least(self, name, 1)
        check_least(self, "max_body_bytes", 1024)
        for name in ("body_timeout", "request_timeout", "drain_timeout"):
            check_positive(self, name)

    @property
    def answer_limits(self) -> AnswerLimits:
        """The limits on an answer's length."""
        return AnswerLimits(default_max_tokens=self.default_max_tokens, max_tokens=self.max_tokens)

    @property
    def upstream_addresses(self) -> tuple[str, ...]:
        """The upstream URLs, with comma-separated values split."""
        return tuple(
            address.strip().rstrip("/")
            for entry in self.upstreams
            for address in entry.split(",")
            if address.strip()
        )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_http_address(text: str) -> bool:
    """Return whether a text is an http or https address with a host, and a valid port if any."""
    try:
        parts = urlsplit(text)
        has_valid_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_valid_port


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only.

    Args:
        host: A host name or IP address, without a port.

    Returns:
        True for localhost and loopback addresses; False for any other name.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
