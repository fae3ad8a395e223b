"""Sign a version's files with the model-signing package; the private key stays outside the store.

The signature is detached and follows the OpenSSF Model Signing specification, so other tools can
verify it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from halfbyte.errors import StoreError, require_extra
from halfbyte.store.blobs import blob_key, put_blob
from halfbyte.store.checkout import checkout
from halfbyte.store.store import SHORT, Store

SIGNATURE = "model.sig"


def sign(store: Store, reference: str, private_key: Path) -> str:
    """Sign a version.

    Args:
        store: The store.
        reference: The version.
        private_key: An elliptic-curve key in PEM, without a password.

    Returns:
        The digest of the signature, which the store keeps.

    Raises:
        MissingExtraError: The model-signing package is not installed.
        StoreError: The key cannot be used.
    """
    with require_extra("model_signing", "sign", "Signing a version"):
        from model_signing import signing
    _check_key(private_key)
    name, version = store.resolve(reference)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkout(store, f"{name}@{version}", Path(temporary) / "model")
        path = Path(temporary) / SIGNATURE
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.sign(folder, path)
        except (ValueError, OSError, TypeError) as error:
            raise StoreError(f"Cannot sign with {private_key}: {_format_error(error)}") from error
        return _attach(store, name, version, path)


def verify_signature(store: Store, reference: str, public_key: Path) -> None:
    """Verify the newest signature of a version.

    Args:
        store: The store.
        reference: The version.
        public_key: In PEM.

    Raises:
        MissingExtraError: The model-signing package is not installed.
        StoreError: There is no signature, or the key or the files do not match it.
    """
    with require_extra("model_signing", "sign", "Verifying a signature"):
        from model_signing import verifying
    _check_key(public_key)
    name, version = store.resolve(reference)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkout(store, f"{name}@{version}", Path(temporary) / "model")
        path = Path(temporary) / SIGNATURE
        _fetch(store, name, version, path)
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
            config.verify(folder, path)
        except (ValueError, OSError, TypeError) as error:
            raise StoreError(
                f"The signature of {name}@{version[:SHORT]} does not hold for {public_key}: "
                f"{_format_error(error)}"
            ) from error


def _attach(store: Store, name: str, version: str, signature: Path) -> str:
    with store.backend.lock(exclusive=False):
        digest = put_blob(store.backend, signature).sha256
        store.append(name, version, "sign", details={"sha256": digest})
    return digest


def _fetch(store: Store, name: str, version: str, output: Path) -> None:
    """Copy the newest signature of a version to a local path."""
    entries = store.history(name).entries
    found = [e for e in entries if e.event == "sign" and e.version == version]
    if not found:
        raise StoreError(f"{name}@{version[:SHORT]} is not signed. Sign it with `store sign`.")
    store.backend.fetch(blob_key(found[-1].details["sha256"]), output)


def _format_error(error: Exception) -> str:
    """Return an error's message with exactly one full stop at its end."""
    return str(error).rstrip(" .?") + "."


def _check_key(path: Path) -> None:
    """Raise a clear error for a missing key file, before anything is copied."""
    if not path.is_file():
        raise StoreError(
            f"There is no key {path}. Create a private key with: openssl ecparam -name prime256v1 "
            "-genkey -noout -out key.pem; and its public key with: openssl ec -in key.pem -pubout "
            "-out key.pub"
        )
