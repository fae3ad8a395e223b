"""What a server is asked to do; the command line is made from the fields."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError

ENGINES = ("embedded", "vllm")


def _option(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Where the server listens, who may ask, and how much."""

    host: str = _option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = _option(8000, "port to listen on; 0: any that is free", metavar="N")
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
    api_key_file: Path | None = field(
        default=None,
        metadata={"help": "a file of keys, one NAME:SECRET a line", "metavar": "FILE"},
    )
    engine: str = _option("embedded", "what runs the model", choices=ENGINES)
    vllm_command: str = _option(
        "vllm", "with --engine vllm: the program, in an environment of its own", metavar="PATH"
    )
    vllm_args: tuple[str, ...] = _option(
        (),
        "with --engine vllm: a further argument of `vllm serve`, such as "
        "--vllm-arg=--tensor-parallel-size=2; may be given again",
        flag="--vllm-arg",
        metavar="ARG",
    )
    upstreams: tuple[str, ...] = _option(
        (),
        "an OpenAI-compatible address, up to and with /v1, that answers instead of a model here; "
        "may be given again, or several with commas: they take turns. Its key is read from "
        "HALFBYTE_UPSTREAM_KEY",
        flag="--upstream",
        metavar="URL",
    )
    served_name: str | None = _option(
        None, "the model's name for clients (default: that of its folder)", metavar="NAME"
    )
    adapters: Path | None = field(
        default=None,
        metadata={
            "help": "folder of adapters: each of its folders can be loaded under its own name",
            "metavar": "FOLDER",
        },
    )
    chat_template: Path | None = field(
        default=None,
        metadata={
            "help": "file with a chat template in place of the model's own",
            "metavar": "FILE",
        },
    )
    allowed_hosts: tuple[str, ...] = _option(
        (),
        "a further name under which clients without a key may address this server; may be given "
        "again",
        flag="--allowed-host",
        metavar="NAME",
    )
    default_tokens: int = _option(
        1024, "tokens of a chat's answer where the client sets no limit", metavar="N"
    )
    most_tokens: int | None = _option(
        None, "most tokens that an answer may have (default: the model's context)", metavar="N"
    )
    most_choices: int = _option(128, "most choices of one request, prompts times n", metavar="N")
    body_bytes: int = _option(4_000_000, "largest request body", metavar="BYTES")
    body_seconds: float = _option(
        30.0, "time in which a request body must arrive", metavar="SECONDS"
    )
    request_seconds: float = _option(
        600.0, "time for an answer, waiting included", metavar="SECONDS"
    )
    most_requests: int = _option(512, "requests at once, waiting ones included", metavar="N")
    key_requests: int = _option(
        128, "requests at once of one API key, waiting ones included", metavar="N"
    )
    key_tokens: int | None = _option(
        None, "tokens a minute, prompts and answers, of one API key (default: any)", metavar="N"
    )
    drain_seconds: float = _option(
        30.0, "time for running answers to finish when the server is stopped", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be 0 to 65535.")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine is '{self.engine}'; allowed are {', '.join(ENGINES)}.")
        least = {"default_tokens": 1, "most_choices": 1, "most_requests": 1}
        least |= {"key_requests": 1, "body_bytes": 1024, "most_tokens": 1, "key_tokens": 1}
        for name, allowed in least.items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise ConfigError(f"{name} is {value}; it must be {allowed} or more.")
        for name in ("body_seconds", "request_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0.")

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
