"""The store itself: add versions, find them, judge, promote, roll back, verify."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from halfbyte.checkpoint.front_matter import CARD_FILE
from halfbyte.checkpoint.identity import digest_files, digest_weights, is_weights
from halfbyte.errors import StoreError
from halfbyte.store.backend import Backend
from halfbyte.store.blobs import check_complete, put_blob, put_bytes, verify_blob
from halfbyte.store.bucket import open_backend
from halfbyte.store.card import make_card
from halfbyte.store.log import (
    ELSEWHERE,
    ORIGIN,
    Entry,
    History,
    append_entry,
    list_names,
    now,
    read_history,
)
from halfbyte.store.manifest import (
    BaseModel,
    FileRecord,
    Manifest,
    Verdict,
    read_base,
    read_recipe,
)
from halfbyte.store.members import list_files
from halfbyte.store.verdicts import check_judgement, find_verdict, read_judgement

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
CHAMPION, CANDIDATE = "champion", "candidate"
SHORT = 12
SCHEME = "store:"
THESE_FILES, UNNAMED_FILES = "these files", "files that are not named"
"""What a verdict is of, in the log."""


class Store:
    """Versions of quantized models in one place."""

    def __init__(self, place: str | Path) -> None:
        self.backend: Backend = open_backend(place)

    def names(self) -> list[str]:
        """List the models, sorted."""
        return list_names(self.backend)

    def history(self, name: str) -> History:
        """Read a model's log.

        Args:
            name: The model.

        Returns:
            The log.

        Raises:
            StoreError: There is no such model, or the log is damaged.
        """
        history = read_history(self.backend, check_name(name))
        if not history.entries:
            known = ", ".join(self.names()) or "none yet"
            raise StoreError(f"{self.backend.place} has no model '{name}'; it has: {known}.")
        return history

    def add(
        self,
        folder: str | Path,
        name: str,
        *,
        base: BaseModel | None = None,
        base_folder: str | Path | None = None,
        verdict: str | Path | None = None,
        like: str | None = None,
        parent: str | None = None,
    ) -> Manifest:
        """Add a folder as a version.

        Args:
            folder: A quantized model; it is copied.
            name: The model's name in the store; not the base's.
            base: Id and revision of the base; None: from the model card.
            base_folder: The base model, to take its digest.
            verdict: ``report.json`` of ``compare``, or JSON with a key "verdict".
            like: A version that this one is a conversion of: base, recipe, calibration and tools
                are its own.
            parent: The version that this one follows; None: the champion, if there is one.

        Returns:
            The manifest. Adding the same content again gives another version: it has a time.

        Raises:
            StoreError: The folder cannot be added, or the name is the base's.
            CheckpointError: A file is a link to nowhere or elsewhere, or a shard is missing.
        """
        check_name(name)
        folder = Path(folder)
        files = list_files(folder)
        found = base or read_base(folder)
        if found.id is not None and name == found.id:
            raise StoreError(
                f"'{name}' is the name of the base model. Choose another, such as {name}-4bit."
            )
        if base_folder is not None:
            digest = _digest_base(Path(base_folder))
            found = BaseModel(id=found.id, revision=found.revision, digest=digest)
        recipe, calibration, tools = read_recipe(folder)
        if like is not None:
            origin = self.manifest(self.resolve(like)[1])
            found, recipe = origin.base, {**origin.recipe, "converted_from": origin.version}
            calibration, tools = origin.calibration, dict(origin.tools)
        with self.backend.lock(exclusive=False):
            card = make_card(folder, found)
            if card is not None:
                files.pop(CARD_FILE, None)
            records = {path: put_blob(self.backend, file) for path, file in files.items()}
            if card is not None:
                records[CARD_FILE] = put_bytes(self.backend, card)
            judged, details = None, {}
            if verdict is not None:
                details = self._keep_verdict(Path(verdict), records, found)
                judged = Verdict(verdict=details["verdict"], sha256=details["sha256"])
            if parent is None:
                parent = read_history(self.backend, name).aliases.get(CHAMPION)
            manifest = Manifest(
                name=name,
                created=now(),
                parent=parent,
                files=records,
                base=found,
                recipe=recipe,
                calibration=calibration,
                tools=tools,
                verdict=judged,
            )
            self._record(manifest, details)
        return manifest

    def _keep_verdict(
        self, path: Path, files: Mapping[str, FileRecord], base: BaseModel
    ) -> dict[str, str]:
        """Check and keep a verdict's file; gives what the log says of it."""
        judgement = read_judgement(path)
        check_judgement(judgement, str(path), files, base)
        of = THESE_FILES if judgement.candidate_files else UNNAMED_FILES
        digest = put_blob(self.backend, path).sha256
        return {"verdict": judgement.verdict, "sha256": digest, "of": of}

    def _record(self, manifest: Manifest, details: Mapping[str, str]) -> None:
        """Make a version exist, once all its blobs do: the manifest, then the log entry.

        A version that exists gets an entry only for a verdict from elsewhere that is news.
        """
        version, elsewhere = manifest.version, details.get(ELSEWHERE)
        self.backend.put_new(f"manifests/{version}.json", manifest.to_bytes())

        def decide(history: History) -> Entry | None:
            is_known = elsewhere in (None, history.verdict_elsewhere(version))
            if version in history.versions and is_known:
                return None
            return Entry(event="add", version=version, details=details)

        append_entry(self.backend, manifest.name, decide)

    def resolve(self, reference: str) -> tuple[str, str]:
        """Find the version that a reference means.

        Args:
            reference: ``name`` (the champion, else the newest version), ``name@alias`` or
                ``name@version``, of which the first few digits are enough; "store:" may stand
                before it.

        Returns:
            Name and version.

        Raises:
            StoreError: There is none, or more than one.
        """
        name, _, point = reference.removeprefix(SCHEME).partition("@")
        history = self.history(name)
        versions, aliases = history.versions, history.aliases
        if not point:
            if CHAMPION in aliases:
                return name, aliases[CHAMPION]
            if versions:
                return name, versions[-1]
            raise StoreError(f"'{name}' has no version any more.")
        if point in aliases:
            return name, aliases[point]
        matching = [version for version in versions if version.startswith(point)]
        if len(matching) != 1:
            found = f"{len(matching)} versions begin with it" if matching else "no such version"
            known = ", ".join([*aliases, *(version[:SHORT] for version in versions)])
            raise StoreError(f"Cannot find {reference}: {found}. '{name}' has: {known}.")
        return name, matching[0]

    def manifest(self, version: str) -> Manifest:
        """Read a version's manifest.

        Args:
            version: In full.

        Returns:
            The manifest.

        Raises:
            StoreError: It is missing, or its content is not what its name says.
        """
        key = f"manifests/{version}.json"
        content = self.backend.read(key)
        if hashlib.sha256(content).hexdigest() != version:
            raise StoreError(f"{key} is not what its name says: its sha256 differs. It is damaged.")
        return Manifest.from_bytes(content, key)

    def verdict(self, name: str, version: str) -> str | None:
        """Return the newest verdict that this store was given for a version; None: it has none."""
        found = find_verdict(self.backend, self.history(name), self.manifest(version))
        return None if found is None else found.verdict

    def judge(self, reference: str, verdict: str | Path) -> str:
        """Attach a comparison's verdict to a version.

        Args:
            reference: The version.
            verdict: ``report.json`` of ``compare``, or JSON with a key "verdict".

        Returns:
            The verdict.

        Raises:
            StoreError: There is none, or it is of other files than the version's.
        """
        name, version = self.resolve(reference)
        manifest = self.manifest(version)
        with self.backend.lock(exclusive=False):
            details = self._keep_verdict(Path(verdict), manifest.files, manifest.base)
            self.append(name, version, "verdict", details=details)
        return details["verdict"]

    def promote(
        self, reference: str, alias: str = CHAMPION, *, force_reason: str | None = None
    ) -> Entry:
        """Let an alias point to a version.

        Args:
            reference: The version.
            alias: Champion, candidate, or any other word.
            force_reason: Why the champion may change without a passing verdict.

        Returns:
            The log entry.

        Raises:
            StoreError: There is no passing verdict and no reason, or the version is damaged.
        """
        check_name(alias)
        name, version = self.resolve(reference)
        judged = self.verdict(name, version)
        # Only what serves traffic is guarded: a candidate is there to be compared.
        if alias != CANDIDATE and judged != "pass" and not force_reason:
            elsewhere = self.history(name).verdict_elsewhere(version)
            claim = f" ('{elsewhere}' from elsewhere does not count)" if elsewhere else ""
            raise StoreError(
                f"Cannot promote {name}@{version[:SHORT]} to {alias}: its verdict is "
                f"{judged or 'missing'}{claim}, and 'pass' is needed. Attach one with `store "
                "judge`, or give a reason with --force."
            )
        with self.backend.lock(exclusive=False):
            check_complete(self.backend, self.manifest(version))
            return self.append(name, version, "promote", alias=alias, reason=force_reason)

    def rollback(self, name: str, alias: str = CHAMPION, *, reason: str | None = None) -> Entry:
        """Let an alias point to what it pointed to before.

        Args:
            name: The model.
            alias: The alias.
            reason: For the log.

        Returns:
            The log entry.

        Raises:
            StoreError: It never pointed to anything else, or that version is gone.
        """

        def decide(history: History) -> Entry:
            past = history.past_of(alias)
            if len(past) < 2:
                raise StoreError(f"Cannot roll back {name}@{alias}: it has no earlier version.")
            if past[-2] not in history.versions:
                raise StoreError(f"Cannot roll back {name}@{alias}: {past[-2][:SHORT]} is removed.")
            return Entry(event="rollback", version=past[-2], alias=alias, reason=reason)

        self.history(name)
        with self.backend.lock(exclusive=False):
            entry = append_entry(self.backend, name, decide)
        assert entry is not None
        return entry

    def verify(self, reference: str | None = None) -> list[str]:
        """Compare every byte of a version, or of all, with its digest.

        Args:
            reference: The version; None: all of all models.

        Returns:
            The versions that were verified.

        Raises:
            StoreError: Something is missing or differs; names version and file.
        """
        targets: list[str] = []
        if reference is not None:
            targets.append(self.resolve(reference)[1])
        else:
            for name in self.names():
                history = self.history(name)
                targets += history.versions
                missing = set(history.aliases.values()) - set(history.versions)
                if missing:
                    raise StoreError(f"An alias of '{name}' points to {missing}, which is removed.")
        checked: set[str] = set()
        for version in targets:
            manifest = self.manifest(version)
            for path, record in manifest.files.items():
                if record.sha256 not in checked:
                    verify_blob(
                        self.backend, record, f"{path} of {manifest.name}@{version[:SHORT]}"
                    )
                    checked.add(record.sha256)
        return targets

    def adopt(
        self, manifest: Manifest, folder: Path, origin: str, *, verdict: str | None = None
    ) -> None:
        """Add a version that was made elsewhere, unchanged.

        Args:
            manifest: The version.
            folder: Its files, already checked against the manifest.
            origin: Where it comes from, for the log.
            verdict: What was judged there; it is recorded and does not count as one of this store.
        """
        check_name(manifest.name)
        with self.backend.lock(exclusive=False):
            for path in manifest.files:
                put_blob(self.backend, folder / path)
            details = {ORIGIN: origin} | ({} if verdict is None else {ELSEWHERE: verdict})
            self._record(manifest, details)

    def append(
        self,
        name: str,
        version: str,
        event: str,
        *,
        alias: str | None = None,
        reason: str | None = None,
        details: Mapping[str, str] | None = None,
    ) -> Entry:
        """Append an entry about a version that exists."""

        def decide(history: History) -> Entry:
            if version not in history.versions:
                raise StoreError(f"{name}@{version[:SHORT]} was removed meanwhile.")
            return Entry(
                event=event, version=version, alias=alias, reason=reason, details=details or {}
            )

        entry = append_entry(self.backend, name, decide)
        assert entry is not None
        return entry


def _digest_base(folder: Path) -> str:
    files = digest_files(folder)
    if not any(is_weights(name) for name in files):
        raise StoreError(f"The base model {folder} has no weights in safetensors. Check the path.")
    return digest_weights(files)


def check_name(name: str) -> str:
    """Check a model's name or an alias.

    Args:
        name: To be used in keys.

    Returns:
        The name.

    Raises:
        StoreError: It is not one plain word.
    """
    if not NAME.fullmatch(name):
        raise StoreError(
            f"'{name[:100]}' cannot be a name: letters, digits, '.', '_' and '-' are allowed, at "
            "most 96, and a letter or digit first."
        )
    return name
