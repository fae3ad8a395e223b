"""vLLM as the engine: runs ``vllm serve`` as a supervised child process.

::

    make_command(folder) ──> vllm serve, on loopback, with its own API key ──> UpstreamBackend
    it exits or hangs ──> restarted with the same adapters, each time after a longer pause
    this process ends, even killed ──> lifeline.py ends vLLM
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from halfbyte.environment import API_KEYS, UPSTREAM_KEY
from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve import lifeline
from halfbyte.serve.adapters import check_is_loaded
from halfbyte.serve.backend import Call, Event, Load
from halfbyte.serve.config import AnswerLimits
from halfbyte.serve.upstream import UpstreamBackend
from halfbyte.serve.upstream_hosts import Host

logger = logging.getLogger(__name__)

LOG_LINES_KEPT = 40
"""Last lines of output, shown if vLLM does not start."""
ADAPTER_SECONDS = 300.0
"""Timeout for loading an adapter."""
RUNTIME_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""vLLM warns about this variable because the call takes a path; only this process can call it."""
INT8_ACTIVATIONS = "VLLM_CPU_INT4_W4A8"
"""On a CPU with AMX, vLLM rounds the inputs of 4-bit layers to 8 bits unless this variable is 0.
That changes the logits six times as much as bfloat16 does, so the evaluated model is not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Timeouts and intervals of a supervised process, in seconds."""

    start_timeout: float = 900.0
    check_interval: float = 2.0
    check_timeout: float = 10.0
    hang_timeout: float = 60.0
    """Time without a successful health check after which it is restarted."""
    first_pause: float = 1.0
    """Before the first restart; the pause doubles each time."""
    max_pause: float = 60.0
    stop_timeout: float = 30.0
    """From SIGTERM to SIGKILL."""


class VllmBackend:
    """A ``vllm serve`` process that this process starts and supervises."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        model: str,
        limits: AnswerLimits | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        """Prepare the command; nothing is started yet.

        Args:
            command: ``vllm`` with its arguments; host, port and API key are added.
            model: The model's name for clients.
            limits: This server's limits on answers.
            supervision: Timeouts and intervals.
        """
        self._supervision = supervision or Supervision()
        self._port = _find_port()
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self._port)]
        # Without a key, every user of this machine could bypass the gateway's API keys.
        key = secrets.token_urlsafe(32)
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if name not in (API_KEYS.name, UPSTREAM_KEY.name)
        } | {"VLLM_API_KEY": key}
        self._environment.setdefault(INT8_ACTIVATIONS, "0")
        if "--enable-lora" in command:
            self._environment[RUNTIME_ADAPTERS] = "1"
        self._upstream = UpstreamBackend(
            hosts=[Host(f"http://127.0.0.1:{self._port}/v1")],
            key=key,
            model=model,
            limits=limits or AnswerLimits(),
            name="vllm",
            isolates_keys=True,
        )
        self._lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        """Write end of a pipe; when this process ends, even killed, it closes and vLLM ends."""
        self._supervisor: asyncio.Task[None] | None = None
        self._is_up = False
        self.adapter_folders: dict[str, str] = {}
        """Folder of each loaded adapter, by name."""
        self.missing_adapters: dict[str, str] = {}
        """Adapters of the model that this one replaced which could not be loaded, and why."""
        self.restarts = 0

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return "vllm"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model and its loaded adapters."""
        return self._upstream.models

    async def start(self) -> None:
        """Start vLLM, and wait until it is ready.

        Raises:
            ConfigError: It exited, or was not ready in time; with its last output.
        """
        await self._spawn()
        if not await self._wait_until_ready():
            output = "\n".join(self._lines) or "(none)"
            await self._stop_process()
            raise ConfigError(f"vLLM did not start. Its last output:\n{output}")
        self._supervisor = asyncio.create_task(self._supervise())

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer a call.

        Args:
            call: The call.

        Yields:
            The answer's events.

        Raises:
            ServeError: 503: vLLM is being restarted.
        """
        if not self._is_up:
            raise ServeError(
                "vLLM is being restarted. Try again later.",
                status=503,
                kind="server_error",
                code="engine_restarting",
                retry_after=15.0,
            )
        async with contextlib.aclosing(self._upstream.stream(call)) as events:
            async for event in events:
                yield event

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize."""
        return await self._upstream.tokenize(body)

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /detokenize."""
        return await self._upstream.detokenize(body)

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter. The caller has checked that the folder may be served."""
        await self._change_adapter("load", name, folder)
        self.adapter_folders[name] = folder
        self.missing_adapters.pop(name, None)
        self._upstream.adapters = tuple(self.adapter_folders)

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter.

        Args:
            name: Its name; if no such adapter is loaded, a ServeError with status 404 is raised.
        """
        check_is_loaded(name, self.adapter_folders)
        # Even while vLLM is down: after a restart it gets the adapters that are listed here.
        del self.adapter_folders[name]
        self._upstream.adapters = tuple(self.adapter_folders)
        if self._is_up:
            await self._change_adapter("unload", name)

    async def _change_adapter(self, action: str, name: str, folder: str | None = None) -> None:
        """Let vLLM load or unload an adapter."""
        body = {"lora_name": name} | ({} if folder is None else {"lora_path": folder})
        url = f"http://127.0.0.1:{self._port}/v1/{action}_lora_adapter"
        headers = {"Authorization": f"Bearer {self._environment['VLLM_API_KEY']}"}
        try:
            async with httpx2.AsyncClient(trust_env=False, timeout=ADAPTER_SECONDS) as client:
                response = await client.post(url, json=body, headers=headers)
        except httpx2.HTTPError as error:
            raise ServeError(
                f"Cannot {action} the adapter '{name}': vLLM does not answer. Try again later.",
                status=503,
                kind="server_error",
                code="engine_restarting",
                retry_after=15.0,
            ) from error
        if response.status_code != 200:
            # Clients must not see paths of this machine.
            text = response.text if folder is None else response.text.replace(folder, name)
            logger.error("vLLM did not %s the adapter %s: %s", action, name, text[:1000])
            raise ServeError(
                f"Cannot {action} the adapter '{name}': vLLM says: {text[:300]}",
                code="invalid_adapter",
                param="lora_name",
            )

    async def _reload_adapters(self) -> None:
        """Load the adapters of the previous process into the new one."""
        for name, folder in list(self.adapter_folders.items()):
            try:
                await self._change_adapter("load", name, folder)
            except ServeError:
                logger.exception("The adapter %s is not available any more", name)
                self.adapter_folders.pop(name, None)
        self._upstream.adapters = tuple(self.adapter_folders)

    async def is_ready(self) -> bool:
        """Return whether vLLM is ready."""
        return self._is_up

    def load(self) -> Load:
        """Return the number of running requests."""
        return self._upstream.load()

    async def close(self) -> None:
        """Stop vLLM."""
        self._is_up = False
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await self._upstream.close()
        await self._stop_process()

    async def _spawn(self) -> None:
        read_end, self._lifeline = os.pipe()
        seconds = str(self._supervision.stop_timeout)
        # -I and -S: the user's environment and packages are not imported.
        run = (sys.executable, "-I", "-S", lifeline.__file__, str(read_end), seconds)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *run,
                *self._command,
                pass_fds=(read_end,),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment,
                # Ctrl-C must reach only the gateway, which finishes running answers first.
                start_new_session=True,
            )
        except OSError as error:
            self._close_lifeline()
            raise ConfigError(f"Cannot start '{self._command[0]}': {error}.") from error
        finally:
            os.close(read_end)
        self._reader = asyncio.create_task(self._log_output(self._process))

    async def _log_output(self, process: asyncio.subprocess.Process) -> None:
        """Log the process's output; if nobody read the pipe, the process would block."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # line longer than the stream's limit; the rest follows
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self._lines.append(text)
            logger.info("vllm: %s", text)

    async def _wait_until_ready(self) -> bool:
        """Wait for a successful health check; return False if vLLM exited or took too long."""
        deadline = time.monotonic() + self._supervision.start_timeout
        while time.monotonic() < deadline:
            if self._process is None or self._process.returncode is not None:
                await self._reader
                return False
            if await self._is_healthy():
                await self._reload_adapters()
                self._is_up = True
                return True
            await asyncio.sleep(min(1.0, self._supervision.check_interval))
        return False

    async def _is_healthy(self) -> bool:
        url = f"http://127.0.0.1:{self._port}/health"
        try:
            async with httpx2.AsyncClient(trust_env=False) as client:
                response = await client.get(url, timeout=self._supervision.check_timeout)
        except httpx2.HTTPError:
            return False
        return bool(response.status_code == 200)

    async def _supervise(self) -> None:
        """Restart vLLM whenever it exits or hangs."""
        pause = self._supervision.first_pause
        while True:
            reason = await self._wait_for_failure()
            self._is_up = False
            self.restarts += 1
            logger.error("vLLM %s. It is restarted in %g s.", reason, pause)
            await self._stop_process()
            await asyncio.sleep(pause)
            start = time.monotonic()
            with contextlib.suppress(ConfigError):
                await self._spawn()
                await self._wait_until_ready()
            pause = min(self._supervision.max_pause, pause * 2)
            if self._is_up:
                logger.warning("vLLM is ready again after %.1f s.", time.monotonic() - start)
                pause = self._supervision.first_pause

    async def _wait_for_failure(self) -> str:
        """Wait until vLLM exits or hangs; return which, as a predicate for the log."""
        healthy_at = time.monotonic()
        while True:
            process = self._process
            if process is None or not self._is_up:
                return "did not start"
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(process.wait(), self._supervision.check_interval)
                return f"exited with code {code}"
            if await self._is_healthy():
                healthy_at = time.monotonic()
            elif time.monotonic() - healthy_at > self._supervision.hang_timeout:
                return f"has not answered for {self._supervision.hang_timeout:g} s"

    async def _stop_process(self) -> None:
        """Terminate the process group, and kill it if it does not exit in time."""
        process, self._process = self._process, None
        if process is None:
            return
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), self._supervision.stop_timeout)
                break
        # A worker may outlive its parent, and so does the lifeline's watcher.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._close_lifeline()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
