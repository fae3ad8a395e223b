"""A store in S3, by the protocol: s3fs against moto's server."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs
from tests.helpers.stores import check_store, kill_while_at_work, write_folder
from tests.serve.helpers_quality import ScriptedBackend, answer, collect, make_call

from halfbyte.errors import StoreError
from halfbyte.serve.backend import Served
from halfbyte.serve.rollout.store_models import StoreBackend, resolve_store_model
from halfbyte.serve.routing.router import Router
from halfbyte.store.checkout import checkout
from halfbyte.store.garbage import collect_garbage
from halfbyte.store.store import Store

PLACE = "s3://bucket/store"


@pytest.fixture
def serve(monkeypatch):
    """Start a stand-in of some kind with an empty bucket, and let all of AWS's clients ask it."""
    started = []

    def start(mode="exact"):
        command = [sys.executable, "-m", "tests.helpers.s3_server", mode]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(server)
        settings = {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")

    yield start
    for server in started:
        server.kill()
        server.communicate()


def test_the_life_of_a_model(serve, tmp_path):
    serve()
    store = Store(PLACE)
    with pytest.raises(StoreError, match="has no model 'm'; it has: none yet"):
        store.promote("m")
    versions = [store.add(write_folder(tmp_path / f"{n}", n), "m").version for n in range(3)]
    for version in versions:
        store.promote(f"m@{version}", force_reason="test")
    assert store.rollback("m").version == versions[1]
    assert Store(PLACE).resolve("m@champion") == ("m", versions[1])
    assert store.verify() == versions
    folder = checkout(store, "m", tmp_path / "out")
    assert (folder / "config.json").read_bytes() == (tmp_path / "1" / "config.json").read_bytes()
    with pytest.raises(StoreError, match="Confirm that with --no-other-writers"):
        collect_garbage(store, keep=0)
    collected = collect_garbage(store, keep=0, no_other_writers=True)
    assert collected.versions == (versions[2],)
    check_store(store, tmp_path / "again")


def test_lost_response_makes_no_second_entry(serve, tmp_path):
    """The driver asks again and hears that the object exists: it is its own."""
    serve("forgetful")
    store = Store(PLACE)
    versions = [store.add(write_folder(tmp_path / f"{n}", n), "m").version for n in range(3)]
    for version in versions:
        store.promote(f"m@{version}", force_reason="test")
    assert store.rollback("m").version == versions[1]
    events = [entry.event for entry in store.history("m").entries]
    assert events == ["add"] * 3 + ["promote"] * 3 + ["rollback"]


def test_a_server_that_overwrites_is_refused_before_anything_is_lost(serve, tmp_path):
    serve("careless")
    store = Store(PLACE)
    with pytest.raises(StoreError, match=r"it overwrites an object .* so two writers would lose"):
        store.add(write_folder(tmp_path / "m"), "m")
    assert store.names() == []


def test_only_one_of_many_concurrent_creates_succeeds(serve):
    serve()
    stores = [Store(PLACE) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        put = lambda n: stores[n].backend.put_new("logs/m/1", b"%d" % n)  # noqa: E731
        made = list(pool.map(put, range(4)))
    assert sum(made) == 1
    assert stores[0].backend.read("logs/m/1") == b"%d" % made.index(True)


def test_missing_credentials_are_reported(serve, monkeypatch):
    serve()
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"Cannot list logs of s3://nowhere/x: .* the credentials"):
        Store("s3://nowhere/x").names()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"Cannot read a of s3://bucket/store: .* the network"):
        Store(PLACE).backend.read("a")


def test_serving_from_a_bucket_follows_the_alias(serve, tmp_path, monkeypatch):
    """Requests on their way stay with their version; the next one is copied out and verified."""
    serve()
    monkeypatch.setenv("HALFBYTE_STORE", PLACE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = Store(PLACE)
    first, second = (store.add(write_folder(tmp_path / f"{n}", n), "m").version for n in range(2))
    store.promote(f"m@{first}", force_reason="test")
    model = resolve_store_model("store:m@champion")
    assert model.folder == tmp_path / "cache" / "halfbyte" / "checkouts" / first
    old = ScriptedBackend("old", [0.2, *answer("old answer")])
    opened = []

    def connect(folder):
        opened.append(folder)
        return ScriptedBackend("new", answer("new answer"))

    backend = StoreBackend(model, old, connect, poll_seconds=0.02)
    router = Router(backend)

    async def run():
        await backend.start()
        begun = asyncio.ensure_future(collect(router, make_call()))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(store.promote, f"m@{second}", force_reason="test")
        served = Served()
        while served.version != second:
            text, served = await collect(router, make_call(), Served())
        early = await begun
        await backend.close()
        return early[0], text

    assert asyncio.run(run()) == ("old answer", "new answer")
    content = (tmp_path / "1" / "model.safetensors").read_bytes()
    assert (Path(opened[0]) / "model.safetensors").read_bytes() == content
    blob = store.manifest(first).files["model.safetensors"].sha256
    s3fs.S3FileSystem().pipe_file(f"bucket/store/blobs/{blob[:2]}/{blob}", b"changed")
    assert resolve_store_model(f"store:m@{first}").folder == model.folder, "copied out before"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(StoreError, match=r"model.safetensors of .* is damaged: its sha256 differs"):
        resolve_store_model(f"store:m@{first}")


@pytest.mark.parametrize(("part", "rounds"), [(0, 2), pytest.param(1, 10, marks=pytest.mark.slow)])
def test_killed_processes_leave_a_consistent_bucket(serve, tmp_path, part, rounds):
    """Without garbage collection, which a bucket allows only while nobody writes."""
    serve()
    folders = [write_folder(tmp_path / f"model{n}", n) for n in range(3)]
    store = Store(PLACE)
    first = store.add(folders[0], "m").version
    store.promote("m", force_reason="test")
    rng = random.Random(part)
    # Further rounds for a busy machine, where the processes may not get to write in the first ones.
    for number in range(rounds + 20):
        if number >= rounds and len(store.history("m").entries) > 2:
            break
        seeds = [f"{part}{number}{n}" for n in range(2)]
        acts = "add add promote promote rollback"
        kill_while_at_work(PLACE, acts, seeds, folders, rng.uniform(0.5, 3))
        check_store(store, tmp_path / f"out{number}")
        if number % 4 == 1:
            collect_garbage(store, keep=2, no_other_writers=True)
            check_store(store, tmp_path / f"collected{number}")
    assert store.history("m").entries[0].version == first
    assert len(store.history("m").entries) > 2, "nobody was at work when killed"
