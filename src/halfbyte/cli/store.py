"""The verb `store`: keep versions of quantized models, and record which one is in use."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.environment import STORE, read_variable
from halfbyte.errors import ConfigError, StoreError
from halfbyte.units import format_bytes

if TYPE_CHECKING:
    from halfbyte.store.log import Entry
    from halfbyte.store.store import Store

HELP = "keep versions of quantized models: add, judge, promote, roll back"
REFERENCE = "NAME, NAME@ALIAS or NAME@VERSION"
VERDICT_FILE = "report.json of `compare`, or JSON with a key 'verdict'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_version_actions(actions)
    _add_alias_actions(actions)
    _add_hub_actions(actions)
    for action in actions.choices.values():
        action.add_argument(
            "--store",
            metavar="PLACE",
            help=f"folder, or a bucket such as s3://bucket/path (default: ${STORE.name})",
        )
        action.add_argument("--json", action="store_true", help="print JSON")


def _add_version_actions(actions: Any) -> None:
    add = _action(actions, "add", "add a folder as a version")
    add.add_argument("folder", type=Path, metavar="FOLDER", help="a quantized model")
    add.add_argument("--name", required=True, help="the model's name in the store")
    add.add_argument(
        "--base-id", metavar="ID", help="name of the base model (default: from the model card)"
    )
    add.add_argument("--base-revision", metavar="REV", help="revision of the base model")
    add.add_argument(
        "--base", type=Path, metavar="FOLDER", help="folder of the base model, to record its digest"
    )
    add.add_argument(
        "--like",
        metavar="VERSION",
        help="version that this is a conversion of: same base and recipe",
    )
    add.add_argument("--verdict", type=Path, metavar="FILE", help=VERDICT_FILE)
    show_all = _action(actions, "list", "list models, or the versions of one")
    show_all.add_argument("name", nargs="?", metavar="NAME", help="a model (default: all)")
    show = _action(actions, "show", "show the files, base, recipe, verdict and log of a version")
    show.add_argument("reference", metavar="VERSION", help=REFERENCE)
    diff = _action(actions, "diff", "show the differences between two versions")
    diff.add_argument("reference", metavar="BEFORE", help=REFERENCE)
    diff.add_argument("other", metavar="AFTER", help=REFERENCE)
    verify = _action(actions, "verify", "check every file against its digest")
    verify.add_argument(
        "reference", nargs="?", metavar="VERSION", help=f"{REFERENCE} (default: all)"
    )
    verify.add_argument("--public-key", type=Path, metavar="PEM", help="also check the signature")
    get = _action(actions, "get", "copy a version into a folder, and verify it")
    get.add_argument("reference", metavar="VERSION", help=REFERENCE)
    get.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="new folder")
    bom = _action(actions, "bom", "print a CycloneDX bill of materials")
    bom.add_argument("reference", metavar="VERSION", help=REFERENCE)
    sign = _action(actions, "sign", "sign a version with a private key, which is not stored")
    sign.add_argument("reference", metavar="VERSION", help=REFERENCE)
    sign.add_argument("--private-key", type=Path, required=True, metavar="PEM", help="EC key")


def _add_alias_actions(actions: Any) -> None:
    judge = _action(actions, "judge", "attach a comparison's verdict to a version")
    judge.add_argument("reference", metavar="VERSION", help=REFERENCE)
    judge.add_argument("--verdict", type=Path, required=True, metavar="FILE", help=VERDICT_FILE)
    promote = _action(actions, "promote", "point an alias to a version")
    promote.add_argument("reference", metavar="VERSION", help=REFERENCE)
    promote.add_argument(
        "--to", default="champion", metavar="ALIAS", help="the alias (default: champion)"
    )
    promote.add_argument(
        "--force", metavar="REASON", help="promote without a passing verdict; the reason is logged"
    )
    rollback = _action(actions, "rollback", "point an alias back to its previous version")
    rollback.add_argument("name", metavar="NAME", help="the model, or NAME@ALIAS")
    rollback.add_argument("--alias", help="the alias (default: champion)")
    rollback.add_argument("--reason", help="reason for the log")
    collect = _action(
        actions, "gc", "garbage collection: remove versions that no alias needs, and unused files"
    )
    collect.add_argument(
        "--keep",
        type=int,
        default=3,
        metavar="N",
        help="newest versions of each model to keep (default: 3)",
    )
    collect.add_argument(
        "--no-other-writers",
        action="store_true",
        help="for a bucket: confirm that no other process writes",
    )


def _add_hub_actions(actions: Any) -> None:
    push = _action(actions, "push", "upload a version and its verdict to the Hugging Face Hub")
    push.add_argument("reference", metavar="VERSION", help=REFERENCE)
    push.add_argument("repository", metavar="OWNER/NAME", help="repository on the Hub")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument(
        "--replace", action="store_true", help="push even if files that no store pushed are deleted"
    )
    pull = _action(actions, "pull", "download a version that was pushed, and verify it")
    pull.add_argument("repository", metavar="OWNER/NAME", help="repository on the Hub")
    pull.add_argument("--revision", metavar="REV", help="commit, branch or tag")
    for action in (push, pull):
        action.add_argument(
            "--endpoint", metavar="URL", help="address of another server than the Hub"
        )


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the subcommand, print its result, and return the exit code.

    Args:
        args: From the parser.

    Returns:
        0.

    Raises:
        ConfigError: No store is given.
        StoreError: The store does not exist, and the subcommand does not create one.
    """
    place = args.store or read_variable(STORE)
    if not place:
        raise ConfigError(f"No store is given. Use --store, or set {STORE.name}.")
    from halfbyte.cli.output import console, print_json
    from halfbyte.store.store import Store

    store = Store(place)
    if args.action not in CREATES_STORE and not store.backend.is_there():
        raise StoreError(
            f"There is no store {place}. Check --store and {STORE.name}; `store add` creates one."
        )
    result, lines = ACTIONS[args.action](store, args)
    if args.json or args.action == "bom":
        print_json(result)
    else:
        for line in lines:
            console.print(line, soft_wrap=True)
    return 0


Outcome = tuple[Any, list[str]]
"""The value to print as JSON, and the lines to print otherwise."""


def _add(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.manifest import BaseModel, read_base

    base = read_base(args.folder) if args.folder.is_dir() else BaseModel()
    base = BaseModel(id=args.base_id or base.id, revision=args.base_revision)
    manifest = store.add(
        args.folder,
        args.name,
        base=base,
        base_folder=args.base,
        verdict=args.verdict,
        like=args.like,
    )
    what = f"{len(manifest.files)} files, {format_bytes(manifest.num_bytes)}"
    line = f"{args.name}@{manifest.version[:12]}: {what}"
    return {"version": manifest.version, "manifest": manifest}, [line]


def _list(store: Store, args: argparse.Namespace) -> Outcome:
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name in [args.name] if args.name else store.names():
        history = store.history(name)
        found[name] = {"versions": history.versions, "aliases": history.aliases}
        lines.append(name)
        for version in history.versions:
            aliases = [alias for alias, target in history.aliases.items() if target == version]
            words = [version[:12], *_describe_version(store, name, version), *aliases]
            lines.append("  " + "  ".join(words))
    return found, lines or [f"{store.backend.place} has no versions."]


def _describe_version(store: Store, name: str, version: str) -> list[str]:
    """Return date, size and verdict; an unreadable version does not stop the list."""
    try:
        manifest = store.manifest(version)
        verdict = _describe_verdict(store, name, version) or "no verdict"
    except StoreError as error:
        return [f"cannot be read: {error}"]
    return [manifest.created, format_bytes(manifest.num_bytes), verdict]


def _describe_verdict(store: Store, name: str, version: str) -> str | None:
    """Return this store's verdict, else the one that came with a pulled version."""
    verdict = store.verdict(name, version)
    elsewhere = store.history(name).verdict_elsewhere(version)
    if verdict is None and elsewhere is not None:
        return f"not judged here (elsewhere: {elsewhere})"
    return verdict


def _show(store: Store, args: argparse.Namespace) -> Outcome:
    name, version = store.resolve(args.reference)
    manifest, history = store.manifest(version), store.history(name)
    base = manifest.base
    events = [entry for entry in history.entries if entry.version == version]
    lines = [
        f"{name}@{version}",
        f"created  {manifest.created}, parent {(manifest.parent or 'none')[:12]}",
        f"base     {base.id or 'unknown'}, revision {base.revision or 'unknown'}, digest "
        f"{(base.digest or 'unknown')[:12]}",
        f"recipe   {', '.join(f'{key} {value}' for key, value in manifest.recipe.items())}",
        f"verdict  {_describe_verdict(store, name, version) or 'none'}",
        *(
            f"file     {r.sha256[:12]}  {format_bytes(r.bytes):>9}  {p}"
            for p, r in manifest.files.items()
        ),
        *(
            f"log      {e.time}  {_describe_event(e)}  by {e.actor}"
            f"{': ' + e.reason if e.reason else ''}"
            for e in events
        ),
    ]
    return {"version": version, "manifest": manifest, "log": events}, lines


def _describe_event(entry: Entry) -> str:
    """Describe a log entry: the alias that moved, the verdict given, where a version came from."""
    from halfbyte.store.log import ELSEWHERE, ORIGIN

    details = entry.details
    judged = [details["verdict"], "of", details["of"]] if "of" in details else []
    origin = ["from", details[ORIGIN]] if ORIGIN in details else []
    elsewhere = [f"(judged {details[ELSEWHERE]} there)"] if ELSEWHERE in details else []
    return " ".join([entry.event, *filter(None, [entry.alias]), *judged, *origin, *elsewhere])


def _diff(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.differences import diff_versions

    found = diff_versions(store, args.reference, args.other)
    lines = [_describe_change(path, *sizes) for path, sizes in found["files"].items()]
    lines += [
        f"{kind:8} {key}: {before} -> {after}"
        for kind in ("recipe", "base", "tools")
        for key, (before, after) in found[kind].items()
    ]
    before, after = found["calibration"]
    if before != after:
        texts = " -> ".join((digest or "unknown")[:12] for digest in (before, after))
        lines.append(f"recipe   calibration text: {texts}")
    before, after = found["bytes"]
    if before != after:
        lines.append(f"size     {format_bytes(before)} -> {format_bytes(after)}")
    return found, lines or ["no difference"]


def _describe_change(path: str, before: int | None, after: int | None) -> str:
    """Describe how a file changed; the content may change while the size stays the same."""
    if before is None or after is None:
        kind = "new" if before is None else "gone"
        return f"{kind:8} {path}, {format_bytes(before or after or 0)}"
    sizes = dict.fromkeys([format_bytes(before), format_bytes(after)])
    return f"changed  {path}, {' -> '.join(sizes)}"


def _verify(store: Store, args: argparse.Namespace) -> Outcome:
    if args.public_key and args.reference is None:
        raise ConfigError("--public-key checks the signature of one version. Name the version.")
    reference = args.reference and "@".join(store.resolve(args.reference))
    versions = store.verify(reference)
    if not versions:
        raise StoreError(f"There is nothing to verify: {store.backend.place} has no versions.")
    count = f"{len(versions)} version{'' if len(versions) == 1 else 's'}"
    lines = [f"{count} verified, byte for byte"]
    if args.public_key:
        from halfbyte.store.signing import verify_signature

        verify_signature(store, reference, args.public_key)
        lines.append(f"the signature is valid for {args.public_key}")
    return {"verified": versions}, lines


def _get(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.checkout import checkout

    name, version = store.resolve(args.reference)
    folder = checkout(store, f"{name}@{version}", args.output)
    return {"folder": folder}, [f"{folder}: {version[:12]}, verified"]


def _bom(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.bom import make_bom

    name, version = store.resolve(args.reference)
    return make_bom(store.manifest(version), store.verdict(name, version)), []


def _sign(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.signing import sign

    digest = sign(store, args.reference, args.private_key)
    return {"signature": digest}, [f"signed: {digest[:12]}"]


def _judge(store: Store, args: argparse.Namespace) -> Outcome:
    verdict = store.judge(args.reference, args.verdict)
    return {"verdict": verdict}, [f"{args.reference}: {verdict}"]


def _promote(store: Store, args: argparse.Namespace) -> Outcome:
    entry = store.promote(args.reference, args.to, force_reason=args.force)
    return entry, [f"{entry.alias} is now {entry.version[:12]}"]


def _rollback(store: Store, args: argparse.Namespace) -> Outcome:
    name, _, alias = args.name.partition("@")
    entry = store.rollback(name, args.alias or alias or "champion", reason=args.reason)
    return entry, [f"{entry.alias} is back at {entry.version[:12]}"]


def _collect(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.garbage import collect_garbage

    found = collect_garbage(store, keep=args.keep, no_other_writers=args.no_other_writers)
    versions = f"{len(found.versions)} version{'' if len(found.versions) == 1 else 's'}"
    files = f"{found.blobs} file{'' if found.blobs == 1 else 's'}"
    line = f"removed {versions} and {files} ({format_bytes(found.num_bytes)})"
    return found, [line]


def _push(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.hub import push

    commit = push(
        store,
        args.reference,
        args.repository,
        private=not args.public,
        replace=args.replace,
        endpoint=args.endpoint,
    )
    return {"commit": commit}, [f"{args.repository}: commit {commit}"]


def _pull(store: Store, args: argparse.Namespace) -> Outcome:
    from halfbyte.store.hub import pull

    manifest = pull(store, args.repository, revision=args.revision, endpoint=args.endpoint)
    name, version = manifest.name, manifest.version
    verdict = _describe_verdict(store, name, version) or "no verdict"
    return {"version": version}, [f"{name}@{version[:12]}, verified; {verdict}"]


CREATES_STORE = ("add", "pull")
ACTIONS: dict[str, Callable[[Any, argparse.Namespace], Outcome]] = {
    "add": _add,
    "list": _list,
    "show": _show,
    "diff": _diff,
    "verify": _verify,
    "get": _get,
    "bom": _bom,
    "sign": _sign,
    "judge": _judge,
    "promote": _promote,
    "rollback": _rollback,
    "gc": _collect,
    "push": _push,
    "pull": _pull,
}
