"""Models out of a store of versions: what a reference means now, and following it when it moves."""

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
"""Makes a backend of a folder; may take long, and runs in a thread of its own."""
Tell = Callable[[str, str], None]
"""Called with a name and a message when something happened that people should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreModel:
    """One version of a model, as a folder."""

    store: Store
    name: str
    version: str
    folder: Path
    alias: str | None
    """That was asked for and may move; None: a fixed version was."""

    @property
    def reference(self) -> str:
        """Names the version for good."""
        return f"{self.name}@{self.version[:SHORT]}"


def is_store_reference(text: str) -> bool:
    """Tell whether a text means a model in a store."""
    return text.startswith(SCHEME)


def resolve_store_model(text: str, *, place: str | None = None) -> StoreModel:
    """Find the version that a reference means, and its files.

    Args:
        text: ``store:NAME``, ``store:NAME@ALIAS`` or ``store:NAME@VERSION``.
        place: The store; None: what the environment variable says.

    Returns:
        The version in a folder inside the store, each file compared with its digest.

    Raises:
        ConfigError: No store is named.
    """
    place = place or read_variable(STORE)
    if not place:
        raise ConfigError(f"'{text}' is in a store, and no store is named. Set {STORE.name}.")
    return _open(Store(place), text.removeprefix(SCHEME))


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
    """A backend of one version that becomes one of the next version when the alias moves.

    Requests on their way stay with the version that they began with; it is closed after the last.
    """

    def __init__(
        self,
        model: StoreModel,
        backend: Backend,
        connect: Connect,
        *,
        tell: Tell | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Serve a version.

        Args:
            model: The version.
            backend: Of its folder.
            connect: Makes backends of further versions.
            tell: Told of swaps, and of versions that cannot be opened.
            poll_seconds: Between two looks at the alias.
        """
        self.model = model
        self._backend = backend
        self._connect = connect
        self.tell = tell or (lambda name, message: None)
        self._poll_seconds = poll_seconds
        self._refused: str | None = None
        """A version that could not be opened; it is not tried again."""
        self._poller: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._running: Counter[int] = Counter()
        """Requests by the identity of the backend that they began with."""
        self.changing = asyncio.Lock()
        """Held while the alias is moved by this process, so that nobody follows it half way."""

    @property
    def name(self) -> str:
        """Of the backend."""
        return self._backend.name

    @property
    def models(self) -> tuple[str, ...]:
        """Names that it answers to."""
        return self._backend.models

    @property
    def version(self) -> str:
        """Of the store."""
        return self.model.version

    @property
    def current(self) -> Backend:
        """The backend that takes new requests."""
        return self._backend

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer by the version of now."""
        backend = self._backend
        self._running[id(backend)] += 1
        try:
            async with aclosing(backend.stream(call)) as events:
                async for event in events:
                    yield event
        finally:
            self._running[id(backend)] -= 1

    async def is_ready(self) -> bool:
        """Tell whether it could answer now."""
        return await self._backend.is_ready()

    def load(self) -> Load:
        """Tell how busy it is."""
        return self._backend.load()

    def __getattr__(self, name: str) -> Any:
        # What the server's other parts ask of a model beyond the protocol, such as to tokenize.
        return getattr(self._backend, name)

    async def start(self) -> None:
        """Begin to follow the alias, where one was asked for. Needs a running event loop."""
        if self.model.alias is not None:
            self._poller = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and close every version."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._backend.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.look()
            except (HalfbyteError, OSError) as error:
                # The version in use goes on; a store that is away may come back.
                log.warning("cannot follow %s: %s", self.model.name, error)

    async def look(self) -> bool:
        """Look once whether the alias has moved, and follow it.

        Returns:
            Whether another version is served now.
        """
        async with self.changing:
            return await self._look()

    async def _look(self) -> bool:
        model = self.model
        reference = f"{model.name}@{model.alias}"
        _, version = await asyncio.to_thread(model.store.resolve, reference)
        if version in (model.version, self._refused):
            return False
        try:
            found = await asyncio.to_thread(_open, model.store, reference)
            backend = await asyncio.to_thread(self._connect, str(found.folder))
        except Exception as error:
            log.exception("cannot serve %s@%s", model.name, version[:SHORT])
            self._refused = version
            self.tell("version refused", f"{model.name}@{version[:SHORT]}: {error}")
            return False
        for name, reason in (await transfer_adapters(self._backend, backend)).items():
            self.tell("adapter lost", f"{name}: {reason}")
        self.adopt(found, backend)
        return True

    def adopt(self, model: StoreModel, backend: Backend) -> None:
        """Serve another version from now on; the one before is closed when it is idle."""
        old, self._backend = self._backend, backend
        before, self.model = self.model, model
        self.tell("version changed", f"{before.reference} -> {model.reference}")
        task = asyncio.get_running_loop().create_task(self._retire(old))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _retire(self, old: Backend) -> None:
        """Close a version after its last request: one on its way to it must not find it closed."""
        while self._running[id(old)]:
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await old.close()


def find_current(backend: Backend) -> Backend:
    """Return the backend that takes new requests: of a model in a store, its current version."""
    return backend.current if isinstance(backend, StoreBackend) else backend


class OpenModels:
    """The models that a server opened beside its own, to be closed with it."""

    def __init__(self, connect: Connect, tell: Tell) -> None:
        """Start with none.

        Args:
            connect: Makes a backend of an address or a folder.
            tell: Told what happens to versions of a store.
        """
        self._connect = connect
        self._tell = tell
        self.owned: list[Backend] = []

    def open(self, place: str, model: StoreModel | None = None) -> Backend:
        """Open a model.

        Args:
            place: An address, a folder, or a reference to a store.
            model: What the reference means, where that is known.

        Returns:
            The backend.
        """
        backend: Backend
        if is_store_reference(place):
            model = model or resolve_store_model(place)
            inner = self._connect(str(model.folder))
            backend = StoreBackend(model, inner, self._connect, tell=self._tell)
        else:
            backend = self._connect(place)
        self.owned.append(backend)
        return backend

    def release(self, backend: Backend) -> Backend:
        """Leave a model to somebody else to close; gives it."""
        self.owned.remove(backend)
        return backend

    async def close(self) -> None:
        """Close all of them."""
        for backend in self.owned:
            await backend.close()


def record_verdict(
    model: StoreModel, evidence: Mapping[str, Any], *, promote_to: str | None
) -> None:
    """Attach a trial's evidence to a version, and promote it where the trial says so.

    Args:
        model: The candidate.
        evidence: With a key "verdict".
        promote_to: The alias to move; None: none.

    Raises:
        StoreError: The store does not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdict.json"
        served = model.store.manifest(model.version).files
        digests = {name: record.sha256 for name, record in served.items()}
        content = {**evidence, "candidate_files": digests}
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
        reference = f"{model.name}@{model.version}"
        judged = model.store.judge(reference, path)
        if promote_to is None:
            return
        if judged != "pass":
            raise StoreError(f"{model.reference} is not promoted: its trial says {judged}.")
        model.store.promote(reference, promote_to)
