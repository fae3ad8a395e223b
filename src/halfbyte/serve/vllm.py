"""vLLM as the engine: ``vllm serve`` started, watched, started again, and stopped.

::

    flags_for(folder) ──> vllm serve, on loopback, with a key of its own ──> UpstreamBackend
    it ends, or does not answer any more ──> started again, each time after a longer pause
    this process ends, even killed ──> lifeline.py ends vLLM
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.environment import API_KEYS, UPSTREAM_KEY
from halfbyte.errors import CheckpointError, ConfigError, ServeError
from halfbyte.serve import lifeline
from halfbyte.serve.exchange import Call, Event, Load
from halfbyte.serve.text.tool_calls import HERMES, LLAMA, MISTRAL, find_form
from halfbyte.serve.upstream import Host, UpstreamBackend

logger = logging.getLogger(__name__)

PARSERS = {HERMES.name: "hermes", MISTRAL.name: "mistral", LLAMA.name: "llama3_json"}
"""Our names of the forms of tool calls -> vLLM's."""
LINES_KEPT = 40


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
        supervision: Supervision | None = None,
    ) -> None:
        """Take the command; nothing runs yet.

        Args:
            command: ``vllm`` with its arguments; host, port and key are added.
            model: The name that it is served by.
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
        self._upstream = UpstreamBackend(
            hosts=[Host(f"http://127.0.0.1:{self._port}/v1")], key=key, model=model, name="vllm"
        )
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        """Ends with this process, killed or not, and vLLM with it."""
        self._watcher: asyncio.Task[None] | None = None
        self._is_up = False
        self.restarts = 0

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return "vllm"

    @property
    def models(self) -> tuple[str, ...]:
        """The one that it was started with."""
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


def make_command(
    folder: Path,
    *,
    executable: str,
    name: str,
    template: str | None,
    template_file: Path | None = None,
    context: int | None = None,
    dtype: str = "auto",
    more: Sequence[str] = (),
) -> list[str]:
    """Write the command line of ``vllm serve`` for a checkpoint.

    Args:
        folder: Of the model.
        executable: ``vllm``, or where it is.
        name: That clients call it by.
        template: Source of its chat template; None: it has none.
        template_file: Where that takes the place of the model's own.
        context: Longest request in tokens; None: as long as the model has positions.
        dtype: To compute in.
        more: Arguments of the user, which come last.

    Returns:
        The words, without host and port.

    Raises:
        ConfigError: There is no such program.
    """
    found = shutil.which(executable)
    if found is None:
        raise ConfigError(
            f"There is no program '{executable}'. Install vLLM in an environment of its own, and "
            "say where it is: --vllm-command /path/to/vllm."
        )
    # The model's own sampling settings would not be OpenAI's defaults.
    words = [
        found,
        "serve",
        str(folder),
        "--served-model-name",
        name,
        "--generation-config",
        "vllm",
    ]
    if context is not None:
        words += ["--max-model-len", str(context)]
    if dtype != "auto":
        words += ["--dtype", dtype]
    if template_file is not None:
        words += ["--chat-template", str(template_file)]
    if template is not None and "tools" in template:
        parser = PARSERS[find_form(template).name]
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    return [*words, *more]


def check_for_vllm(folder: Path, *, has_gpu: bool) -> None:
    """Refuse a checkpoint that vLLM would refuse after a minute of loading.

    Args:
        folder: Of the model.
        has_gpu: Whether vLLM will run on one.

    Raises:
        ConfigError: None of vLLM's kernels takes it, with the reasons of each.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return  # Not GPTQ: vLLM knows more kinds of models than this program.
    kernels = ("vllm-marlin", "vllm-machete") if has_gpu else ("vllm-cpu",)
    verdicts = [
        verdict
        for verdict in check_consumers(checkpoint).verdicts
        if verdict.consumer in kernels and verdict.tensor_parallel == 1
    ]
    if any(verdict.loads for verdict in verdicts):
        return
    reasons = "; ".join(f"{verdict.label}: {', '.join(verdict.reasons)}" for verdict in verdicts)
    raise ConfigError(
        f"vLLM cannot load '{folder}': {reasons}. Serve it with --engine embedded, or quantize it "
        "again with 4 bits, symmetric, groups of 64."
    )


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
