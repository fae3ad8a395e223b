"""The verb `serve`."""

from __future__ import annotations

import argparse
import asyncio
import logging
from typing import TYPE_CHECKING

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args
from halfbyte.cli.output import err_console
from halfbyte.errors import require_extra
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.quality_config import QualityConfig

if TYPE_CHECKING:
    import socket

    from halfbyte.serve.assembly import Service
    from halfbyte.serve.routing.attempt import Route

HELP = "serve a model with an OpenAI-compatible API, or act as a gateway for other servers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a model, quantized or not, or store:NAME@ALIAS; omit it with --upstream",
    )
    add_dataclass_options(parser, ServeConfig)
    add_dataclass_options(parser, EngineConfig)
    add_dataclass_options(parser, QualityConfig)


def run(args: argparse.Namespace) -> int:
    """Load the model and serve until a signal stops the server."""
    config = dataclass_from_args(ServeConfig, args)
    engine = dataclass_from_args(EngineConfig, args)
    quality = dataclass_from_args(QualityConfig, args)

    with require_extra("starlette", "serve", "halfbyte serve"):
        from halfbyte.serve.assembly import open_service, read_keys
    with require_extra("uvicorn", "serve", "halfbyte serve"):
        from halfbyte.serve.running import bind, run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("httpx2", "httpcore2", "uvicorn", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    keys = read_keys(config)
    # Before the model is loaded, which may take minutes: the port may be in use.
    with bind(config.host, config.port) as bound:
        service = open_service(args.model, config, engine, quality, keys)
        asyncio.run(
            run_server(
                service.gateway,
                bound,
                start=service.start,
                stop=service.stop,
                on_ready=lambda _: _announce(service, bound),
            )
        )
    err_console.print("Stopped.")
    return 0


def _name(route: Route) -> str:
    """Return the models of a route, if its server has reported them, and where they run."""
    models = ", ".join(route.backend.models)
    return f"{models} at {route.name}" if models not in ("", route.name) else route.name


def _announce(service: Service, bound: socket.socket) -> None:
    """Print the server's address and what it serves."""
    config = service.gateway.config
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    keys = len(service.gateway.keys.hashes)
    access = (
        f"{keys} API key{'s' if keys > 1 else ''}" if keys else "no API keys: this machine only"
    )
    models = ", ".join(service.gateway.models) or "no model yet"
    url = f"http://{shown}:{port}"
    err_console.print(f"Serving {models} at {url}/v1, dashboard at {url}/dashboard", soft_wrap=True)
    others = [f"{route.role}: {_name(route)}" for route in service.quality.router.routes[1:]]
    for line in (
        service.description,
        *others,
        f"{access}; at most {config.max_requests} requests at once, {config.request_timeout:g} s "
        "each; Ctrl-C finishes running requests and stops",
    ):
        err_console.print(line, soft_wrap=True, style="dim")
