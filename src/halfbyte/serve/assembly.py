"""A whole server out of its settings.

::

    MODEL ──open_engine──> EmbeddedBackend ─┐
    --engine vllm ──> VllmBackend ──────────┼─> open_quality ──> Router ──> Gateway
    --upstream URL ──> UpstreamBackend ─────┘
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoint.identity import name_folder
from halfbyte.environment import API_KEYS, UPSTREAM_KEY, read_variable
from halfbyte.errors import ConfigError, require_extra
from halfbyte.serve.adapters import AdapterFolder
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.backend import Backend
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.dashboard.routes import OPEN_PATHS as DASHBOARD_PATHS
from halfbyte.serve.dashboard.routes import dashboard_routes
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys, read_key_file
from halfbyte.serve.quality import Quality, open_quality
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.store_models import (
    StoreBackend,
    is_store_reference,
    resolve_store_model,
)
from halfbyte.serve.routing.router import Router
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
    """What runs the model, and how much room it has."""
    starts: list[Step] = field(default_factory=list)
    """Done before the first request, in this order."""

    async def start(self) -> None:
        """Begin what runs beside the requests."""
        for step in self.starts:
            await step()
        await self.quality.start()

    async def stop(self) -> None:
        """End all of it, and free the model."""
        await self.quality.close()
        await self.gateway.backend.close()


def read_keys(config: ServeConfig) -> ApiKeys:
    """Gather the API keys, and see that there are some where there must be.

    Args:
        config: Its own keys, and the file's.

    Returns:
        Those of the settings, the file and the environment.

    Raises:
        ConfigError: Others can reach the server and there is no key.
    """
    entries = list(config.api_keys)
    if config.api_key_file is not None:
        entries += read_key_file(config.api_key_file)
    entries += [entry for entry in (read_variable(API_KEYS) or "").split(",") if entry.strip()]
    keys = ApiKeys.parse(entries)
    if not keys and not config.is_loopback:
        raise ConfigError(
            f"Not listening on {config.host} without an API key: whoever reaches this machine "
            f"could use the model. Set keys by --api-key-file or {API_KEYS.name}, or listen on "
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
    """Load and connect everything.

    Args:
        model: A folder, or ``store:NAME@ALIAS``; None: others answer.
        config: Of the server.
        engine: Of the embedded engine.
        quality: Of fallback, monitors and rollouts.
        keys: Of the clients.

    Returns:
        The service; nothing listens yet.
    """
    _check(model, config, keys)
    if model is None:
        return _open_gateway(config, engine, quality, keys)
    if config.engine == "vllm":
        return _open_vllm(model, config, engine, quality, keys)
    stored = resolve_store_model(model) if is_store_reference(model) else None
    name = config.served_name or (stored.name if stored else name_folder(model))

    def load(place: str) -> EmbeddedBackend:
        return open_embedded(Path(place), config, engine, name=name)

    embedded = load(model if stored is None else str(stored.folder))
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
    if config.adapters is not None:
        service.gateway.adapters = AdapterFolder(config.adapters, lambda: service.gateway.current)
    return service


def _check(model: str | None, config: ServeConfig, keys: ApiKeys) -> None:
    addresses = config.upstream_addresses
    if (model is None) != bool(addresses):
        raise ConfigError(
            "Either a MODEL is served here or those at --upstream are; "
            + ("none of them was given." if model is None else "both were given.")
        )
    for option, value in (
        ("--adapters", config.adapters),
        ("--served-name", config.served_name),
        ("--chat-template", config.chat_template),
    ):
        if addresses and value is not None:
            raise ConfigError(
                f"{option} needs a MODEL; servers at --upstream have adapters, names and templates "
                "of their own."
            )
    if config.adapters is None:
        return
    if not keys:
        raise ConfigError(
            "--adapters needs an API key: loading and unloading is not for everybody. Set keys by "
            f"--api-key-file or {API_KEYS.name}."
        )
    if config.engine == "embedded":
        with require_extra("peft", "finetune", "--adapters"):
            import peft  # noqa: F401 - the engine loads adapters with it


def _open_gateway(
    config: ServeConfig, engine: EngineConfig, quality: QualityConfig, keys: ApiKeys
) -> Service:
    """Connect to servers that run already."""
    upstream = _connect_upstream(config.upstream_addresses, config)
    service = _wrap(upstream, config, engine, quality, keys)
    service.description = f"answers come from {', '.join(host.name for host in upstream.hosts)}"
    service.starts.append(partial(_greet, upstream))
    return service


def _open_vllm(
    model: str,
    config: ServeConfig,
    engine: EngineConfig,
    quality: QualityConfig,
    keys: ApiKeys,
) -> Service:
    """Let vLLM run the model, beside this process."""
    import torch

    from halfbyte.serve.vllm import VllmBackend
    from halfbyte.serve.vllm_command import check_for_vllm, make_command

    stored = resolve_store_model(model) if is_store_reference(model) else None
    folder = Path(model) if stored is None else stored.folder
    tokenizer = load_tokenizer(folder)
    check_for_vllm(folder, has_gpu=torch.cuda.is_available())
    name = config.served_name or (stored.name if stored else name_folder(folder))
    file = config.chat_template
    own = getattr(tokenizer, "chat_template", None)
    command = make_command(
        folder,
        executable=config.vllm_command,
        name=name,
        template=own if file is None else read_template(file),
        template_file=file,
        context=engine.context,
        dtype=engine.dtype,
        adapters=config.adapters,
        more=config.vllm_args,
    )
    backend = VllmBackend(command, model=name, limits=config.answer_limits)
    service = _wrap(backend, config, engine, quality, keys)
    service.description = f"vLLM runs it: {' '.join(command)}"
    service.starts.append(backend.start)
    if config.adapters is not None:
        service.gateway.adapters = AdapterFolder(config.adapters, lambda: service.gateway.current)
    return service


def open_embedded(
    folder: Path, config: ServeConfig, engine: EngineConfig, *, name: str
) -> EmbeddedBackend:
    """Load a model into this process.

    Args:
        folder: Of the model.
        config: For the limits.
        engine: How it runs.
        name: That clients call it by.

    Returns:
        The backend, ready.
    """
    # Torch and Transformers: a gateway before other servers does without their seconds.
    from halfbyte.serve.embedded import EmbeddedBackend
    from halfbyte.serve.engine.loading import open_engine

    template = config.chat_template
    # Before the engine, whose plan counts what the process has by then.
    tokenizer = load_tokenizer(folder)
    return EmbeddedBackend(
        open_engine(folder, engine),
        tokenizer,
        model=name,
        config=config,
        chat_template=None if template is None else read_template(template),
    )


def load_tokenizer(folder: Path) -> Any:
    """Load a model's tokenizer.

    Args:
        folder: Of the model.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: There is no such folder, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ConfigError(f"'{folder}' is no model folder: it has no config.json.")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot load the tokenizer of '{folder}': {error}") from error


def read_template(path: Path) -> str:
    """Read a chat template.

    Args:
        path: Of a file with Jinja source.

    Returns:
        The source.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the chat template '{path}': {error}.") from error


def describe_engine(backend: EmbeddedBackend) -> str:
    """Say in a line what runs a model, and how much room it has.

    Args:
        backend: Over its engine.

    Returns:
        The line.
    """
    info = backend.engine_info
    tokens = info.cache_bytes // info.bytes_per_token if info.bytes_per_token else 0
    return (
        f"{info.runner}; weights {format_bytes(info.weight_bytes)}, cache "
        f"{format_bytes(info.cache_bytes)} = {tokens} tokens, {info.context} in one request"
    )


def _wrap(
    backend: Backend,
    config: ServeConfig,
    engine: EngineConfig,
    quality: QualityConfig,
    keys: ApiKeys,
) -> Service:
    """Put quality and interface around the model that is asked first."""
    others: list[UpstreamBackend] = []

    def connect(place: str) -> Backend:
        if place.startswith(("http://", "https://")):
            others.append(_connect_upstream([place], config))
            return others[-1]
        folder = Path(place)
        return open_embedded(folder, config, engine, name=name_folder(folder))

    watched = open_quality(backend, quality, connect)
    gateway = Gateway(
        backend=backend,
        config=config,
        keys=keys,
        router=watched.router,
        primary=partial(_find_current, watched.router),
        metrics=watched.metrics.render,
        refused=watched.metrics.count_rejection,
        routes=dashboard_routes(watched.snapshot),
        open_paths=DASHBOARD_PATHS,
    )
    # Or nobody would hear of a wrong address before the day when it is needed.
    greetings: list[Step] = [partial(_greet, other) for other in others]
    return Service(gateway=gateway, quality=watched, description="", starts=greetings)


def _connect_upstream(addresses: Sequence[str], config: ServeConfig) -> UpstreamBackend:
    return UpstreamBackend.open(
        addresses, key=read_variable(UPSTREAM_KEY), limits=config.answer_limits
    )


def _find_current(router: Router) -> Backend:
    """Give the model that is asked first, as the version that it is now."""
    backend = router.routes[0].backend
    return backend.current if isinstance(backend, StoreBackend) else backend


async def _greet(upstream: UpstreamBackend) -> None:
    for reason in await upstream.start():
        logger.warning("%s", reason)
