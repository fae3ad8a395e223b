"""What a server is asked to do; the command line is made from the fields."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from halfbyte.config_fields import check_choice, check_least, check_positive, option
from halfbyte.errors import ConfigError

ENGINES = ("embedded", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLimits:
    """How much an answer may have."""

    default_tokens: int | None = None
    """Of a chat where the client sets no limit."""
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Where the server listens, who may ask, and how much."""

    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on; 0: any that is free", metavar="N")
    api_keys: tuple[str, ...] = field(
        default=(),
        repr=False,
        metadata={
            "help": "a key that clients must give, as NAME:SECRET; may be given again. Others on "
            "this machine can read command lines: --api-key-file and HALFBYTE_API_KEYS are better",
            "flag": "--api-key",
            "metavar": "KEY",
        },
    )
    api_key_file: Path | None = option(
        None, "a file of keys, one NAME:SECRET a line", metavar="FILE"
    )
    engine: str = option("embedded", "what runs the model", choices=ENGINES)
    vllm_command: str = option(
        "vllm", "with --engine vllm: the program, in an environment of its own", metavar="PATH"
    )
    vllm_args: tuple[str, ...] = option(
        (),
        "with --engine vllm: a further argument of `vllm serve`, such as "
        "--vllm-arg=--tensor-parallel-size=2; may be given again",
        flag="--vllm-arg",
        metavar="ARG",
    )
    upstreams: tuple[str, ...] = option(
        (),
        "an OpenAI-compatible address, up to and with /v1, that answers instead of a model here; "
        "may be given again, or several with commas: they take turns. Its key is read from "
        "HALFBYTE_UPSTREAM_KEY",
        flag="--upstream",
        metavar="URL",
    )
    served_name: str | None = option(
        None, "the model's name for clients (default: that of its folder)", metavar="NAME"
    )
    adapters: Path | None = option(
        None,
        "folder of adapters: each of its folders can be loaded under its own name",
        metavar="FOLDER",
    )
    chat_template: Path | None = option(
        None, "file with a chat template in place of the model's own", metavar="FILE"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "a further name under which clients without a key may address this server; may be given "
        "again",
        flag="--allowed-host",
        metavar="NAME",
    )
    default_tokens: int | None = option(
        None,
        "tokens of a chat's answer where the client sets no limit (default: 1024 of a model here; "
        "other servers choose)",
        metavar="N",
    )
    most_tokens: int | None = option(
        None, "most tokens that an answer may have (default: the model's context)", metavar="N"
    )
    most_choices: int = option(128, "most choices of one request, prompts times n", metavar="N")
    body_bytes: int = option(4_000_000, "largest request body", metavar="BYTES")
    body_seconds: float = option(
        30.0, "time in which a request body must arrive", metavar="SECONDS"
    )
    request_seconds: float = option(
        600.0, "time for an answer, waiting included", metavar="SECONDS"
    )
    most_requests: int = option(512, "requests at once, waiting ones included", metavar="N")
    key_requests: int = option(
        128, "requests at once of one API key, waiting ones included", metavar="N"
    )
    key_tokens: int | None = option(
        None, "tokens a minute, prompts and answers, of one API key (default: any)", metavar="N"
    )
    drain_seconds: float = option(
        30.0, "time for running answers to finish when the server is stopped", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535.")
        check_choice(self, "engine", ENGINES)
        least = {"default_tokens": 1, "most_choices": 1, "most_requests": 1}
        least |= {"key_requests": 1, "body_bytes": 1024, "most_tokens": 1, "key_tokens": 1}
        for name, allowed in least.items():
            check_least(self, name, allowed)
        for name in ("body_seconds", "request_seconds", "drain_seconds"):
            check_positive(self, name)

    @property
    def answer_limits(self) -> AnswerLimits:
        """How much an answer may have."""
        return AnswerLimits(default_tokens=self.default_tokens, most_tokens=self.most_tokens)

    @property
    def upstream_addresses(self) -> tuple[str, ...]:
        """Each once, whether given with commas or one by one."""
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


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only.

    Args:
        host: A name or an address, without a port.

    Returns:
        Whether it is; a name other than localhost counts as one that others reach.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
