"""Build a server from its configuration.

::

    MODEL ──open_engine──> EmbeddedBackend ─┐
    --engine vllm ──> VllmBackend ──────────┼─> Quality ──> Router ──> Gateway
    --upstream URL ──> UpstreamBackend ─────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.identity import name_folder
from halfbyte.checkpoint.labels import describe_missing_config
from halfbyte.environment import API_KEYS, UPSTREAM_KEY, read_variable
from halfbyte.errors import ConfigError, require_extra
from halfbyte.serve.adapters import AdapterFolder
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.backend import Backend
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.dashboard.routes import OPEN_PATHS as DASHBOARD_PATHS
from halfbyte.serve.dashboard.routes import dashboard_routes
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys, KeyFile, read_key_file
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.store_models import (
    StoreBackend,
    StoreModel,
    is_store_reference,
    resolve_store_model,
)
from halfbyte.serve.upstream import UpstreamBackend
from halfbyte.units import format_bytes

if TYPE_CHECKING:
    from halfbyte.serve.embedded import EmbeddedBackend

logger = logging.getLogger(__name__)

Step = Callable[[], Awaitable[None]]


@dataclass(kw_only=True)
class Service:
    """A server that is ready to run."""

    gateway: Gateway
    quality: Quality
    description: str
    """What runs the model, and its memory, for people."""
    startup_steps: list[Step] = field(default_factory=list)
    """Awaited in this order before the first request."""
    key_file: KeyFile | None = None
    _follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run the startup steps and start the background tasks."""
        for step in self.startup_steps:
            await step()
        if self.key_file is not None:
            self._follower = asyncio.create_task(self.key_file.follow())
        await self.quality.start()

    async def stop(self) -> None:
        """Stop the background tasks and free the model."""
        if self._follower is not None:
            self._follower.cancel()
        await self.quality.close()
        await self.gateway.backend.close()


def read_keys(config: ServeConfig) -> ApiKeys:
    """Collect the API keys from the configuration, the key file and the environment.

    Args:
        config: Contains keys and the path of the key file.

    Returns:
        All keys.

    Raises:
        ConfigError: There is no key although other machines can reach the server.
    """
    entries = list(config.api_keys)
    if config.api_key_file is not None:
        entries += read_key_file(config.api_key_file)
    entries += [entry for entry in (read_variable(API_KEYS) or "").split(",") if entry.strip()]
    keys = ApiKeys.parse(entries)
    if not keys and not config.is_loopback:
        raise ConfigError(
            f"Cannot listen on {config.host} without an API key: anyone who can reach this machine "
            f"could use the model. Set keys with --api-key-file or {API_KEYS.name}, or listen on "
            "127.0.0.1."
        )
    return keys


def open_service(
    model: str | None,
    config: ServeConfig,
    engine: EngineConfig,
    quality: QualityConfig,
    keys: ApiKeys,
) -> Service:
    """Load the model and connect all parts of the server.

    Args:
        model: A folder or ``store:NAME@ALIAS``; None to use the upstream servers.
        config: Configuration of the server.
        engine: Configuration of the embedded engine.
        quality: Configuration of fallback, monitors and rollouts.
        keys: API keys of the clients.

    Returns:
        The service; it does not listen yet.
    """
    _check(model, config, keys)
    if model is None:
        return _open_gateway(config, engine, quality, keys)
    if config.engine == "vllm":
        return _open_vllm(model, config, engine, quality, keys)
    stored, folder, name = _locate_model(model, config)

    def load(folder: str) -> EmbeddedBackend:
        return open_embedded(Path(folder), config, engine, name=name)

    embedded = load(str(folder))
    primary: Backend = embedded
    if stored is not None:
        primary = StoreBackend(stored, embedded, load)
    service = _wrap(primary, config, engine, quality, keys)
    service.description = describe_engine(embedded)
    info = embedded.engine_info
    service.quality.set_plan(
        weights=info.weight_bytes,
        cache=info.cache_bytes,
        total=info.planned_bytes,
    )
    _serve_adapters(service, config)
    return service


def _locate_model(model: str, config: ServeConfig) -> tuple[StoreModel | None, Path, str]:
    """Return the model's version in the store (None if it is a folder), its folder and its name."""
    stored = resolve_store_model(model) if is_store_reference(model) else None
    folder = Path(model) if stored is None else stored.folder
    name = name_folder(folder) if stored is None else stored.name
    return stored, folder, config.served_name or name


def _serve_adapters(service: Service, config: ServeConfig) -> None:
    if config.adapters is not None:
        service.gateway.adapters = AdapterFolder(
            config.adapters, lambda: service.gateway.router.primary
        )


def _check(model: str | None, config: ServeConfig, keys: ApiKeys) -> None:
    addresses = config.upstream_addresses
    if (model is None) != bool(addresses):
        raise ConfigError(
            "Give either a MODEL to serve or servers with --upstream; "
            + ("neither was given." if model is None else "both were given.")
        )
    for option, value in (
        ("--adapters", config.adapters),
        ("--served-name", config.served_name),
        ("--chat-template", config.chat_template),
    ):
        if addresses and value is not None:
            raise ConfigError(
                f"{option} needs a MODEL; it has no effect on servers given with --upstream, which "
                "have their own adapters, names and templates."
            )
    if config.adapters is None:
        return
    if not keys:
        raise ConfigError(
            "--adapters needs an API key, because clients can load and unload adapters. Set keys "
            f"with --api-key-file or {API_KEYS.name}."
        )
    if config.engine == "embedded":
        with require_extra("peft", "finetune", "--adapters"):
            import peft  # noqa: F401 - the engine loads adapters with it


def _open_gateway(
    config: ServeConfig, engine: EngineConfig, quality: QualityConfig, keys: ApiKeys
) -> Service:
    """Use servers that are already running."""
    upstream = _connect_upstream(config.upstream_addresses, config)
    service = _wrap(upstream, config, engine, quality, keys)
    service.description = f"answers come from {', '.join(host.name for host in upstream.hosts)}"
    service.startup_steps.append(partial(_warn_if_unreachable, upstream))
    return service


def _open_vllm(
    model: str,
    config: ServeConfig,
    engine: EngineConfig,
    quality: QualityConfig,
    keys: ApiKeys,
) -> Service:
    """Run the model in vLLM, as a child process."""
    import torch

    from halfbyte.serve.vllm import VllmBackend
    from halfbyte.serve.vllm_command import check_for_vllm, make_command

    _, folder, name = _locate_model(model, config)
    tokenizer = load_tokenizer(folder)
    check_for_vllm(folder, has_gpu=torch.cuda.is_available())
    file = config.chat_template
    default_template = getattr(tokenizer, "chat_template", None)
    command = make_command(
        folder,
        executable=config.vllm_command,
        name=name,
        template=default_template if file is None else read_template(file),
        template_file=file,
        context=engine.context,
        dtype=engine.dtype,
        adapters=config.adapters,
        more=config.vllm_args,
    )
    backend = VllmBackend(command, model=name, limits=config.answer_limits)
    service = _wrap(backend, config, engine, quality, keys)
    service.description = f"running in vLLM: {' '.join(command)}"
    service.startup_steps.append(backend.start)
    _serve_adapters(service, config)
    return service


def open_embedded(
    folder: Path, config: ServeConfig, engine: EngineConfig, *, name: str
) -> EmbeddedBackend:
    """Load a model into this process.

    Args:
        folder: The model's folder.
        config: Contains the limits on answers.
        engine: Configuration of the engine.
        name: The model's name for clients.

    Returns:
        The backend, ready to answer.
    """
    # These import Torch and Transformers, which takes seconds and a pure gateway does not need.
    from halfbyte.serve.embedded import EmbeddedBackend
    from halfbyte.serve.engine.loading import open_engine

    template = config.chat_template
    # Before the engine, whose memory plan counts what the process uses already.
    tokenizer = load_tokenizer(folder)
    return EmbeddedBackend(
        open_engine(folder, engine, tokenizer=tokenizer),
        tokenizer,
        model=name,
        config=config,
        chat_template=None if template is None else read_template(template),
    )


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer.

    Args:
        folder: The model's folder.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: The folder is not a model folder, or its tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Cannot serve '{folder}': {describe_missing_config(folder)}. Give the folder of a "
            "model; --adapters FOLDER adds adapters."
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot load the tokenizer of '{folder}': {error}") from error


def read_template(path: Path) -> str:
    """Read a chat template.

    Args:
        path: Path of a file with Jinja source.

    Returns:
        The Jinja source.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the chat template '{path}': {error}.") from error


def describe_engine(backend: EmbeddedBackend) -> str:
    """Describe in one line what runs a model and its memory.

    Args:
        backend: The model's backend.

    Returns:
        The line.
    """
    info = backend.engine_info
    tokens = info.cache_bytes // info.bytes_per_token if info.bytes_per_token else 0
    return (
        f"{info.runner}; weights {format_bytes(info.weight_bytes)}, KV cache "
        f"{format_bytes(info.cache_bytes)} = {tokens} tokens, at most {info.context} per request"
    )


def _wrap(
    backend: Backend,
    config: ServeConfig,
    engine: EngineConfig,
    quality: QualityConfig,
    keys: ApiKeys,
) -> Service:
    """Add routing, monitoring and the gateway to the primary model."""
    others: list[UpstreamBackend] = []

    def connect(source: str) -> Backend:
        if source.startswith(("http://", "https://")):
            others.append(_connect_upstream([source], config))
            return others[-1]
        folder = Path(source)
        return open_embedded(folder, config, engine, name=name_folder(folder))

    watched = Quality(backend, quality, connect)
    gateway = Gateway(
        backend=backend,
        config=config,
        keys=keys,
        router=watched.router,
        metrics=watched.metrics.render,
        on_rejection=watched.metrics.count_rejection,
        routes=dashboard_routes(watched.snapshot),
        open_paths=DASHBOARD_PATHS,
    )
    # A wrong address of a fallback would otherwise show only when the fallback is needed.
    checks: list[Step] = [partial(_warn_if_unreachable, other) for other in others]
    service = Service(gateway=gateway, quality=watched, description="", startup_steps=checks)
    if config.api_key_file is not None:
        service.key_file = KeyFile(config.api_key_file, keys, partial(read_keys, config))
    return service


def _connect_upstream(addresses: Sequence[str], config: ServeConfig) -> UpstreamBackend:
    return UpstreamBackend.open(
        addresses, key=read_variable(UPSTREAM_KEY), limits=config.answer_limits
    )


async def _warn_if_unreachable(upstream: UpstreamBackend) -> None:
    for reason in await upstream.start():
        logger.warning("%s", reason)
