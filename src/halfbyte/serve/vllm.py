"""vLLM as the engine: ``vllm serve`` started, watched, started again, and stopped.

::

    make_command(folder) ──> vllm serve, on loopback, with a key of its own ──> UpstreamBackend
    it ends, or does not answer any more ──> started again, each time after a longer pause,
                                             with the adapters that it had
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

LINES_KEPT = 40
ADAPTER_SECONDS = 300.0
"""For it to read an adapter."""
RUNTIME_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""vLLM warns of it, since its call takes a path; here only this process can call it."""
INT8_ACTIVATIONS = "VLLM_CPU_INT4_W4A8"
"""On a CPU with AMX vLLM rounds what goes into 4-bit layers to 8 bits, unless this is 0. That moves
its logits six times as far as bfloat16 does, and is another model than the one that was judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """How a process is watched; seconds."""

    starts_within: float = 900.0
    looks_every: float = 2.0
    answers_within: float = 10.0
    hung_after: float = 60.0
    """Without an answer to a look."""
    first_pause: float = 1.0
    longest_pause: float = 60.0
    ends_within: float = 30.0
    """After being asked to, until it is killed."""


class VllmBackend:
    """A ``vllm serve`` of our own."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        model: str,
        limits: AnswerLimits | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        """Take the command; nothing runs yet.

        Args:
            command: ``vllm`` with its arguments; host, port and key are added.
            model: The name that it is served by.
            limits: Of this server's answers.
            supervision: How it is watched.
        """
        self._supervision = supervision or Supervision()
        self._port = _find_port()
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self._port)]
        # Or everybody on this machine could go round the gateway's keys.
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
        )
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        """Ends with this process, killed or not, and vLLM with it."""
        self._watcher: asyncio.Task[None] | None = None
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
        """The one that it was started with, and its loaded adapters."""
        return self._upstream.models

    async def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            ConfigError: It ended, or did not answer in time; with its last words.
        """
        await self._spawn()
        if not await self._wait_until_up():
            words = "\n".join(self._lines) or "(nothing)"
            await self._end_process()
            raise ConfigError(f"vLLM did not start. The last that it said:\n{words}")
        self._watcher = asyncio.create_task(self._watch())

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer, where it is up.

        Args:
            call: What is asked.

        Yields:
            The events.

        Raises:
            ServeError: 503: it is being started again.
        """
        if not self._is_up:
            raise ServeError(
                "vLLM is being started again. Try again later.",
                status=503,
                kind="server_error",
                code="engine_restarting",
                retry_after=15.0,
            )
        async with contextlib.aclosing(self._upstream.stream(call)) as events:
            async for event in events:
                yield event

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Let it tell a text's token ids."""
        return await self._upstream.tokenize(body)

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Let it tell the text of token ids."""
        return await self._upstream.detokenize(body)

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve an adapter under its name; the caller has checked the folder's place."""
        await self._change_adapter("load", name, folder)
        self.adapter_folders[name] = folder
        self.missing_adapters.pop(name, None)
        self._upstream.adapters = tuple(self.adapter_folders)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away.

        Args:
            name: Of it; a ServeError of 404 where there is none of that name.
        """
        check_is_loaded(name, self.adapter_folders)
        # Also where vLLM is away: started again, it has those that are noted here.
        del self.adapter_folders[name]
        self._upstream.adapters = tuple(self.adapter_folders)
        if self._is_up:
            await self._change_adapter("unload", name)

    async def _change_adapter(self, what: str, name: str, folder: str | None = None) -> None:
        """Let it load or unload one."""
        body = {"lora_name": name} | ({} if folder is None else {"lora_path": folder})
        url = f"http://127.0.0.1:{self._port}/v1/{what}_lora_adapter"
        headers = {"Authorization": f"Bearer {self._environment['VLLM_API_KEY']}"}
        try:
            async with httpx2.AsyncClient(trust_env=False, timeout=ADAPTER_SECONDS) as client:
                reply = await client.post(url, json=body, headers=headers)
        except httpx2.HTTPError as error:
            raise ServeError(
                f"vLLM does not answer, so it cannot {what} the adapter '{name}'. Try again later.",
                status=503,
                kind="server_error",
                code="engine_restarting",
                retry_after=15.0,
            ) from error
        if reply.status_code != 200:
            told = reply.text if folder is None else reply.text.replace(folder, name)
            logger.error("vLLM did not %s the adapter %s: %s", what, name, told[:1000])
            raise ServeError(
                f"vLLM does not {what} the adapter '{name}': {told[:300]}",
                code="invalid_adapter",
                param="lora_name",
            )

    async def _load_adapters_again(self) -> None:
        """Give a new process what the last one had."""
        for name, folder in list(self.adapter_folders.items()):
            try:
                await self._change_adapter("load", name, folder)
            except ServeError:
                logger.exception("The adapter %s is not served any more", name)
                self.adapter_folders.pop(name, None)
        self._upstream.adapters = tuple(self.adapter_folders)

    async def is_ready(self) -> bool:
        """Tell whether it answers."""
        return self._is_up

    def load(self) -> Load:
        """Tell how many requests it has."""
        return self._upstream.load()

    async def close(self) -> None:
        """Stop it."""
        self._is_up = False
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._upstream.close()
        await self._end_process()

    async def _spawn(self) -> None:
        near, self._lifeline = os.pipe()
        wait = str(self._supervision.ends_within)
        # -I and -S: nothing of the user's is imported.
        run = (sys.executable, "-I", "-S", lifeline.__file__, str(near), wait)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *run,
                *self._command,
                pass_fds=(near,),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment,
                # Ctrl-C is for the gateway, which lets running answers finish first.
                start_new_session=True,
            )
        except OSError as error:
            self._let_go()
            raise ConfigError(f"Cannot start '{self._command[0]}': {error}.") from error
        finally:
            os.close(near)
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what it says: a pipe that nobody reads would stop it."""
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the stream's limit; the rest comes next
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self._lines.append(text)
            logger.info("vllm: %s", text)

    async def _wait_until_up(self) -> bool:
        """Wait for an answer; False where it ended before, or took too long."""
        end = time.monotonic() + self._supervision.starts_within
        while time.monotonic() < end:
            if self._process is None or self._process.returncode is not None:
                await self._reader
                return False
            if await self._answers():
                await self._load_adapters_again()
                self._is_up = True
                return True
            await asyncio.sleep(min(1.0, self._supervision.looks_every))
        return False

    async def _answers(self) -> bool:
        url = f"http://127.0.0.1:{self._port}/health"
        try:
            async with httpx2.AsyncClient(trust_env=False) as client:
                reply = await client.get(url, timeout=self._supervision.answers_within)
        except httpx2.HTTPError:
            return False
        return bool(reply.status_code == 200)

    async def _watch(self) -> None:
        """Start it again whenever it ends or hangs."""
        pause = self._supervision.first_pause
        while True:
            reason = await self._wait_for_trouble()
            self._is_up = False
            self.restarts += 1
            logger.error("vLLM %s. It is started again in %g s.", reason, pause)
            await self._end_process()
            await asyncio.sleep(pause)
            start = time.monotonic()
            with contextlib.suppress(ConfigError):
                await self._spawn()
                await self._wait_until_up()
            lasting = self._is_up and time.monotonic() - start > 0
            pause = min(self._supervision.longest_pause, pause * 2)
            if lasting:
                logger.warning("vLLM is up again after %.1f s.", time.monotonic() - start)
                pause = self._supervision.first_pause

    async def _wait_for_trouble(self) -> str:
        """Wait until it ends or does not answer any more; say which."""
        answered = time.monotonic()
        while True:
            process = self._process
            if process is None or not self._is_up:
                return "did not start"
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(process.wait(), self._supervision.looks_every)
                return f"ended with exit code {code}"
            if await self._answers():
                answered = time.monotonic()
            elif time.monotonic() - answered > self._supervision.hung_after:
                return f"has not answered for {self._supervision.hung_after:g} s"

    async def _end_process(self) -> None:
        """Ask it to end, then make it; its own children with it."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), self._supervision.ends_within)
                break
        # A worker may outlive its parent, and the lifeline's watcher does.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._let_go()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _let_go(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
