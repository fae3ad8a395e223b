"""Push versions to the Hugging Face Hub, and pull them.

A repository holds a version's files, its manifest and, where this store has one, its verdict. The
verdict is informational: the store that pulls it records it as somebody else's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from halfbyte.checkpoint.identity import MANIFEST_FILE, VERDICT_FILE, digest_file
from halfbyte.errors import StoreError, first_line
from halfbyte.store.checkout import checkout
from halfbyte.store.manifest import Manifest
from halfbyte.store.store import SHORT, Store
from halfbyte.store.verdicts import (
    check_judgement,
    find_verdict,
    parse_judgement,
    summarize_verdict,
)

HUB_FILES = (".gitattributes",)
"""Files that the Hub itself puts into a new repository."""


def push(
    store: Store,
    reference: str,
    repository: str,
    *,
    private: bool = True,
    replace: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a version, with this store's verdict if it names its files, as one commit.

    Args:
        store: The store.
        reference: The version.
        repository: ``owner/name``; created if it does not exist.
        private: Whether a repository that is created is private.
        replace: Push even if the repository holds files that did not come from a store; they are
            deleted.
        endpoint: Address of another server than the Hub.
        token: Access token; None: the one that huggingface_hub finds.

    Returns:
        The commit's id.

    Raises:
        StoreError: The upload failed, the verdict's report is damaged, or the repository is that of
            the base model or holds files that were not pushed from a store.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, version = store.resolve(reference)
    manifest = store.manifest(version)
    if repository.lower() == (manifest.base.id or "").lower():
        raise StoreError(
            f"Refusing to push over the base model {repository}. Choose another repository."
        )
    api = HfApi(endpoint=endpoint, token=token)
    # The base class is the error of whichever HTTP client huggingface_hub uses.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkout(store, f"{name}@{version}", Path(temporary) / "model")
        (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
        _write_verdict(store, name, manifest, folder)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            if not replace:
                _check_pushed(repository, api.list_repo_files(repository))
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"{manifest.name}@{version[:SHORT]}",
                delete_patterns=["*"],
            )
        except (client_error, OSError, RuntimeError) as error:
            raise StoreError(f"Cannot push to {repository}: {first_line(error)}.") from error
    return str(commit.oid)


def pull(
    store: Store,
    repository: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> Manifest:
    """Download a version, check every file against its manifest, and add it unchanged.

    A verdict that was pushed along is checked against the files and recorded as one from elsewhere.

    Args:
        store: The store to add it to.
        repository: ``owner/name``, filled by :func:`push`.
        revision: Commit, branch or tag; None: the newest commit of the default branch.
        endpoint: Address of another server than the Hub.
        token: Access token; None: the one that huggingface_hub finds.

    Returns:
        The manifest; the version is the same as in the store that it was pushed from.

    Raises:
        StoreError: The download failed, has no manifest, a file differs from it, or the verdict is
            not one of these files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = Path(api.snapshot_download(repository, revision=revision, local_dir=temporary))
        except RevisionNotFoundError as error:
            raise StoreError(
                f"Cannot pull {repository}: it has no commit, branch or tag '{revision}'."
            ) from error
        except RepositoryNotFoundError as error:
            raise StoreError(
                f"Cannot pull {repository}: there is no such repository, or it is private. Check "
                "the name, or log in with: hf auth login"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise StoreError(f"Cannot pull {repository}: {first_line(error)}.") from error
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise StoreError(
                f"{repository} has no {MANIFEST_FILE}: it was not pushed from a store. Download it "
                "yourself and add it with `store add`."
            )
        manifest = Manifest.from_bytes(path.read_bytes(), f"{MANIFEST_FILE} of {repository}")
        for name, record in manifest.files.items():
            file = folder / name
            if not file.is_file() or digest_file(file) != record.sha256:
                found = "has another sha256" if file.is_file() else "is missing"
                raise StoreError(
                    f"Cannot pull {repository}: {name} {found}, so it is not what was pushed. Push "
                    "the version again."
                )
        verdict = _read_verdict(manifest, folder, repository)
        store.adopt(manifest, folder, repository, verdict=verdict)
    return manifest


def _write_verdict(store: Store, name: str, manifest: Manifest, folder: Path) -> None:
    """Write this store's own verdict beside a version's files, if it may be published."""
    verdict = find_verdict(store.backend, store.history(name), manifest)
    summary = None if verdict is None else summarize_verdict(store.backend, verdict)
    if summary is not None and VERDICT_FILE not in manifest.files:
        (folder / VERDICT_FILE).write_bytes(summary)


def _read_verdict(manifest: Manifest, folder: Path, repository: str) -> str | None:
    """Read the verdict that was pushed along with a version; refuse one of other files."""
    path = folder / VERDICT_FILE
    if VERDICT_FILE in manifest.files or not path.is_file():
        return None
    source = f"{VERDICT_FILE} of {repository}"
    judgement = parse_judgement(path.read_bytes(), source)
    check_judgement(judgement, source, manifest.files, manifest.base)
    return judgement.verdict if judgement.candidate_files else None


def _check_pushed(repository: str, files: Sequence[str]) -> None:
    """Refuse a repository that was not filled from a store: pushing would delete its files."""
    found = [name for name in files if name not in HUB_FILES]
    if found and MANIFEST_FILE not in found:
        raise StoreError(
            f"Refusing to push to {repository}: its files ({', '.join(found[:3])}) were not pushed "
            "from a store and would be deleted. Choose another repository, or pass --replace."
        )
