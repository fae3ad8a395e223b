"""The store: add, resolve, judge, promote, roll back and verify versions."""

from __future__ import annotations

import hashlib
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
    check_name,
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

CHAMPION, CANDIDATE = "champion", "candidate"
SHORT = 12
SCHEME = "store:"
THESE_FILES, UNNAMED_FILES = "these files", "files that are not named"
"""Which files a verdict is about, as the log records it."""


class Store:
    """Versions of quantized models in one place."""

    def __init__(self, place: str | Path) -> None:
        self.backend: Backend = open_backend(place)

    def names(self) -> list[str]:
        """List the names of all models, sorted."""
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
            name: The model's name in the store, which must differ from the base's.
            base: Id and revision of the base; None: from the model card.
            base_folder: Folder of the base model, for its digest.
            verdict: ``report.json`` of ``compare``, or JSON with a key "verdict".
            like: The version that this one is a conversion of; its base, recipe, calibration and
                tools are taken over.
            parent: The version that this one replaces; None: the champion, if there is one.

        Returns:
            The manifest. It has a time, so adding the same content again makes another version.

        Raises:
            StoreError: The folder cannot be added, or the name is that of the base.
            CheckpointError: A file is a link to nowhere or elsewhere, or a shard is missing.
        """
        check_name(name)
        folder = Path(folder)
        files = list_files(folder)
        base = base or read_base(folder)
        if base.id is not None and name == base.id:
            raise StoreError(
                f"'{name}' is the name of the base model. Choose another, such as {name}-4bit."
            )
        if base_folder is not None:
            digest = _digest_base(Path(base_folder))
            base = BaseModel(id=base.id, revision=base.revision, digest=digest)
        recipe, calibration, tools = read_recipe(folder)
        if like is not None:
            origin = self.manifest(self.resolve(like)[1])
            base, recipe = origin.base, {**origin.recipe, "converted_from": origin.version}
            calibration, tools = origin.calibration, dict(origin.tools)
        with self.backend.lock(exclusive=False):
            records = self._put_files(folder, files, base)
            judged, details = None, {}
            if verdict is not None:
                details = self._keep_verdict(Path(verdict), records, base)
                judged = Verdict(verdict=details["verdict"], sha256=details["sha256"])
            if parent is None:
                parent = read_history(self.backend, name).aliases.get(CHAMPION)
            manifest = Manifest(
                name=name,
                created=now(),
                parent=parent,
                files=records,
                base=base,
                recipe=recipe,
                calibration=calibration,
                tools=tools,
                verdict=judged,
            )
            self._record(manifest, details)
        return manifest

    def _put_files(
        self, folder: Path, files: Mapping[str, Path], base: BaseModel
    ) -> dict[str, FileRecord]:
        """Store the files of a folder; the model card is completed with the base."""
        card = make_card(folder, base)
        if card is None:
            return {path: put_blob(self.backend, file) for path, file in files.items()}
        others = {path: file for path, file in files.items() if path != CARD_FILE}
        records = {path: put_blob(self.backend, file) for path, file in others.items()}
        return {**records, CARD_FILE: put_bytes(self.backend, card)}

    def _keep_verdict(
        self, path: Path, files: Mapping[str, FileRecord], base: BaseModel
    ) -> dict[str, str]:
        """Check and store a verdict's file; return the details for the log."""
        judgement = read_judgement(path)
        check_judgement(judgement, str(path), files, base)
        of = THESE_FILES if judgement.candidate_files else UNNAMED_FILES
        digest = put_blob(self.backend, path).sha256
        return {"verdict": judgement.verdict, "sha256": digest, "of": of}

    def _record(self, manifest: Manifest, details: Mapping[str, str]) -> None:
        """Write the manifest, then the log entry that makes the version exist.

        An existing version gets another entry only if its verdict from elsewhere has changed.
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
                ``name@version``, where the first few digits suffice. A prefix "store:" is ignored.

        Returns:
            Name and version.

        Raises:
            StoreError: No version matches, or more than one.
        """
        name, _, point = reference.removeprefix(SCHEME).partition("@")
        history = self.history(name)
        versions, aliases = history.versions, history.aliases
        if not point:
            if CHAMPION in aliases:
                return name, aliases[CHAMPION]
            if versions:
                return name, versions[-1]
            raise StoreError(f"'{name}' has no version any more: all were removed. Add one first.")
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
            version: All 64 digits.

        Returns:
            The manifest.

        Raises:
            StoreError: It is missing, or its content does not match its name.
        """
        key = f"manifests/{version}.json"
        content = self.backend.read(key)
        if hashlib.sha256(content).hexdigest() != version:
            raise StoreError(f"{key} is damaged: its sha256 is not the one in its name.")
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
            StoreError: The file holds no verdict, or one about other files than the version's.
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
        """Point an alias to a version.

        Args:
            reference: The version.
            alias: "champion", "candidate", or any other name.
            force_reason: Why the alias may move without a passing verdict; goes into the log.

        Returns:
            The log entry.

        Raises:
            StoreError: There is no passing verdict and no reason, or the version is damaged.
        """
        check_name(alias)
        name, version = self.resolve(reference)
        judged = self.verdict(name, version)
        # A candidate needs no verdict: it serves no traffic, and is there to be compared.
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
        """Point an alias to the version that it pointed to before.

        Args:
            name: The model.
            alias: The alias.
            reason: Goes into the log.

        Returns:
            The log entry.

        Raises:
            StoreError: There is no earlier version, or it was removed.
        """

        def decide(history: History) -> Entry:
            past = history.past_of(alias)
            if len(past) < 2:
                raise StoreError(
                    f"Cannot roll back {name}@{alias}: it has no earlier version. Promote another "
                    "version instead."
                )
            if past[-2] not in history.versions:
                raise StoreError(
                    f"Cannot roll back {name}@{alias}: {past[-2][:SHORT]} is removed. Promote "
                    "another version instead."
                )
            return Entry(event="rollback", version=past[-2], alias=alias, reason=reason)

        self.history(name)
        with self.backend.lock(exclusive=False):
            entry = append_entry(self.backend, name, decide)
        assert entry is not None
        return entry

    def verify(self, reference: str | None = None) -> list[str]:
        """Verify the digest of every file of a version, or of all versions.

        Args:
            reference: The version; None: all versions of all models.

        Returns:
            The versions that were verified.

        Raises:
            StoreError: A file is missing or damaged; names version and file.
        """
        targets: list[str] = []
        if reference is not None:
            targets.append(self.resolve(reference)[1])
        else:
            for name in self.names():
                history = self.history(name)
                targets += history.versions
                if removed := set(history.aliases.values()) - set(history.versions):
                    raise StoreError(
                        f"An alias of '{name}' points to {removed}, which was removed."
                    )
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
        raise StoreError(f"The base model {folder} has no .safetensors weights. Check the path.")
    return digest_weights(files)
