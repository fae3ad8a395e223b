"""Serves models from a version store: resolves references, and switches when an alias moves."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.environment import STORE, read_variable
from halfbyte.errors import ConfigError, HalfbyteError, StoreError
from halfbyte.serve.backend import Backend, Call, Event, Load
from halfbyte.serve.rollout.adapter_transfer import transfer_adapters
from halfbyte.store.checkout import checkout
from halfbyte.store.store import CHAMPION, SCHEME, SHORT, Store

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
IDLE_POLL_SECONDS = 0.05

Connect = Callable[[str], Backend]
"""Creates a backend for a folder or an address. May take minutes; is called in a worker thread."""
Report = Callable[[str, str], None]
"""Called with the name of an event and a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreModel:
    """One version of a model, checked out to a folder."""

    store: Store
    name: str
    version: str
    folder: Path
    alias: str | None
    """The requested alias, which may move; None if a fixed version was requested."""

    @property
    def reference(self) -> str:
        """The version's permanent reference."""
        return f"{self.name}@{self.version[:SHORT]}"


def is_store_reference(text: str) -> bool:
    """Return whether a text is a reference to a model in a store."""
    return text.startswith(SCHEME)


def resolve_store_model(text: str, *, location: str | None = None) -> StoreModel:
    """Resolve a reference to a version, and check out its files.

    Args:
        text: ``store:NAME``, ``store:NAME@ALIAS`` or ``store:NAME@VERSION``.
        location: The store; None: the one of the environment variable.

    Returns:
        The version in a folder inside the store, with all files verified against their digests.

    Raises:
        ConfigError: No store is configured.
    """
    location = location or read_variable(STORE)
    if not location:
        raise ConfigError(
            f"Cannot open '{text}': no store is configured. Set {STORE.name} to the store's folder "
            "or bucket."
        )
    return _open(Store(location), text.removeprefix(SCHEME))


def _open(store: Store, reference: str) -> StoreModel:
    name, version = store.resolve(reference)
    aliases = store.history(name).aliases
    point = reference.partition("@")[2] or CHAMPION
    return StoreModel(
        store=store,
        name=name,
        version=version,
        folder=checkout(store, f"{name}@{version}"),
        alias=point if point in aliases else None,
    )


class StoreBackend:
    """A backend that switches to another version when the alias moves.

    Running requests finish on the version that they started with, which is closed after the last.
    """

    def __init__(
        self,
        model: StoreModel,
        backend: Backend,
        connect: Connect,
        *,
        report: Report | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Serve a version.

        Args:
            model: The version.
            backend: The backend for its folder.
            connect: Creates backends for further versions.
            report: Called when versions were switched, or one cannot be opened.
            poll_seconds: Interval at which the alias is checked.
        """
        self.model = model
        self._backend = backend
        self._connect = connect
        self.report = report or (lambda name, message: None)
        self._poll_seconds = poll_seconds
        self._refused: str | None = None
        """A version that could not be opened; not tried again before the alias has moved."""
        self._poller: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._running: Counter[int] = Counter()
        """Number of running requests, by `id` of their backend."""
        self.switch_lock = asyncio.Lock()
        """Held while this process moves the alias, so that the poller does not react to it."""

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return self._backend.name

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model and its adapters."""
        return self._backend.models

    @property
    def version(self) -> str:
        """The version's digest in the store."""
        return self.model.version

    @property
    def current(self) -> Backend:
        """The backend that takes new requests."""
        return self._backend

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer with the current version."""
        backend = self._backend
        self._running[id(backend)] += 1
        try:
            async with aclosing(backend.stream(call)) as events:
                async for event in events:
                    yield event
        finally:
            self._running[id(backend)] -= 1

    async def is_ready(self) -> bool:
        """Return whether requests would be answered now."""
        return await self._backend.is_ready()

    def load(self) -> Load:
        """Return the current version's load."""
        return self._backend.load()

    def __getattr__(self, name: str) -> Any:
        # Methods beyond the Backend protocol, such as tokenize.
        return getattr(self._backend, name)

    async def start(self) -> None:
        """Start to follow the alias, if there is one. Needs a running event loop."""
        if self.model.alias is not None:
            self._poller = asyncio.create_task(self._poll_forever())

    async def close(self) -> None:
        """Stop following, and close every version."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._backend.close()

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.poll()
            except (HalfbyteError, OSError) as error:
                # The current version stays in use; the store may be reachable again later.
                log.warning("cannot check the alias of %s: %s", self.model.name, error)

    async def poll(self) -> bool:
        """Check once whether the alias has moved, and switch to its version.

        Returns:
            Whether another version is served now.
        """
        async with self.switch_lock:
            return await self._poll()

    async def _poll(self) -> bool:
        model = self.model
        reference = f"{model.name}@{model.alias}"
        _, version = await asyncio.to_thread(model.store.resolve, reference)
        if version == model.version:
            # A version that was refused is tried again when the alias comes back to it.
            self._refused = None
        if version in (model.version, self._refused):
            return False
        try:
            next_model = await asyncio.to_thread(_open, model.store, reference)
            backend = await asyncio.to_thread(self._connect, str(next_model.folder))
        except Exception as error:
            log.exception("cannot serve %s@%s", model.name, version[:SHORT])
            self._refused = version
            self.report("version refused", f"{model.name}@{version[:SHORT]}: {error}")
            return False
        for name, reason in (await transfer_adapters(self._backend, backend)).items():
            self.report("adapter lost", f"{name}: {reason}")
        self.switch(next_model, backend)
        return True

    def switch(self, model: StoreModel, backend: Backend) -> None:
        """Serve another version from now on; the previous one is closed when it is idle."""
        old, self._backend = self._backend, backend
        previous, self.model = self.model, model
        self.report("version changed", f"{previous.reference} -> {model.reference}")
        task = asyncio.get_running_loop().create_task(self._retire(old))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retire(self, old: Backend) -> None:
        """Close a version after its last request."""
        while self._running[id(old)]:
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await old.close()


def find_current(backend: Backend) -> Backend:
    """Return the backend that takes new requests: of a model in a store, its current version."""
    return backend.current if isinstance(backend, StoreBackend) else backend


class OpenModels:
    """Opens a server's further models (fallbacks, candidates, base), and closes them with it."""

    def __init__(self, connect: Connect, report: Report) -> None:
        """Start with no model.

        Args:
            connect: Creates a backend for an address or a folder.
            report: Called on events of models in a store, such as a version switch.
        """
        self._connect = connect
        self._report = report
        self.owned: list[Backend] = []

    def open(self, location: str, model: StoreModel | None = None) -> Backend:
        """Open a model.

        Args:
            location: An address, a folder, or a store reference.
            model: The resolved store reference, if it is known.

        Returns:
            The backend.
        """
        backend: Backend
        if is_store_reference(location):
            model = model or resolve_store_model(location)
            inner = self._connect(str(model.folder))
            backend = StoreBackend(model, inner, self._connect, report=self._report)
        else:
            backend = self._connect(location)
        self.owned.append(backend)
        return backend

    def release(self, backend: Backend) -> Backend:
        """Transfer ownership of a model: the caller must close it."""
        self.owned.remove(backend)
        return backend

    async def close(self) -> None:
        """Close all owned models."""
        for backend in self.owned:
            await backend.close()


def record_verdict(
    model: StoreModel, evidence: Mapping[str, Any], *, promote_to: str | None
) -> None:
    """Attach a trial's evidence to a version as its verdict, and promote the version if requested.

    Args:
        model: The candidate.
        evidence: The evidence, with a key "verdict".
        promote_to: The alias to move to the version; None: no alias.

    Raises:
        StoreError: The store rejects the verdict or the promotion.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdict.json"
        files = model.store.manifest(model.version).files
        digests = {name: record.sha256 for name, record in files.items()}
        content = {**evidence, "candidate_files": digests}
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
        reference = f"{model.name}@{model.version}"
        judged = model.store.judge(reference, path)
        if promote_to is None:
            return
        if judged != "pass":
            raise StoreError(
                f"Cannot promote {model.reference}: the verdict of its trial is {judged}."
            )
        model.store.promote(reference, promote_to)
