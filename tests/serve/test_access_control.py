"""Access control, and limits on requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time

import httpx2
import pytest
from starlette.requests import Request
from tests.serve.helpers_gateway import CHAT, HEAD, JSON, SECRET, bearer, make_gateway
from tests.serve.helpers_server import serve

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.api import connection
from halfbyte.serve.api.request_body import read_body
from halfbyte.serve.api.request_schemas import ChatRequest
from halfbyte.serve.assembly import read_keys
from halfbyte.serve.config import ServeConfig, is_loopback
from halfbyte.serve.keys import ApiKeys, KeyFile, read_key_file


def test_every_path_but_health_needs_a_key(caplog):
    gateway, _ = make_gateway(keys=[f"ann:{SECRET}", "bob:another-secret"])
    with serve(gateway) as server:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/version"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/tokenize"),
            ("GET", "/no/such/path"),
        ):
            for headers in ({}, bearer("wrong-secret"), {"Authorization": f"Basic {SECRET}"}):
                reply = httpx2.request(method, server.address + path, headers=headers)
                assert reply.status_code == 401, path
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{server.address}/health").status_code == 200
        assert httpx2.get(f"{server.address}/ready").status_code == 200
        for secret in (SECRET, "another-secret"):
            reply = httpx2.get(f"{server.v1}/models", headers=bearer(secret))
            assert reply.status_code == 200
        reply = httpx2.get(f"{server.address}/metrics", headers=bearer(SECRET))
        assert reply.text == "metric 1\n"
    assert SECRET not in caplog.text


def test_engine_gets_the_keys_name_but_not_the_secret():
    gateway, engine = make_gateway(keys=[f"ann:{SECRET}"])
    with serve(gateway) as server:
        httpx2.post(f"{server.v1}/chat/completions", json=CHAT, headers=bearer(SECRET))
    assert engine.requests[-1].key == "ann"
    assert SECRET not in repr(gateway)


def test_without_keys_only_local_host_names_are_accepted():
    with serve(make_gateway(ServeConfig(allowed_hosts=("box.lan",)))[0]) as server:
        port = server.address.rpartition(":")[2]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            (f"localhost:{port}", 200),
            (f"[::1]:{port}", 200),
            ("BOX.lan", 200),
            ("evil.example", 421),
            (f"evil.example:{port}", 421),
            ("127.0.0.1.evil.example", 421),
            ("", 421),
        ):
            reply = httpx2.get(f"{server.v1}/models", headers={"Host": host})
            assert reply.status_code == status, host


def test_cross_site_post_is_rejected():
    with serve(make_gateway()[0]) as server:
        for media in ("text/plain", "application/x-www-form-urlencoded", ""):
            reply = httpx2.post(
                f"{server.v1}/chat/completions",
                content=json.dumps(CHAT),
                headers={"Content-Type": media},
            )
            assert reply.status_code == 415, media


def test_key_entries():
    digest = hashlib.sha256(b"secret-of-carl").hexdigest()
    hashed = f"sha256:{digest.upper()}"
    keys = ApiKeys.parse([f"ann:{SECRET}", "loose-secret", f"carl:{hashed}"])
    assert keys.find("secret-of-carl") == "carl"
    assert [name for name, _ in keys.hashes] == ["ann", "key2", "carl"]
    assert keys.find(SECRET) == "ann"
    assert keys.find("loose-secret") == "key2"
    assert keys.find(hashed) is keys.find("") is keys.find("\udcff") is None
    assert SECRET not in repr(keys)
    for entries, said in (
        (["ann:short"], "'ann' has 5 characters; it must have at least 8"),
        (["a/b:long-enough-secret"], "API key 1 has an invalid name"),
        (["ann:long-enough-1", "ann:long-enough-2"], "Two API keys are named 'ann'"),
        (["ann:with a space"], "contains a space"),
        ([f"ann:sha256:{'ab' * 31}"], "followed by 64 hexadecimal digits, found 62 characters"),
        ([f"ann:SHA256:{'xy' * 32}"], "followed by 64 hexadecimal digits, found 64 characters"),
        ([f"sha256:{'ab' * 32}"], "API key 1 is a hash without a name"),
    ):
        with pytest.raises(ConfigError) as caught:
            ApiKeys.parse(entries)
        assert said in str(caught.value)
        assert "enough" not in str(caught.value)


def test_key_file_and_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# who\nann:{SECRET}\n\n  bob:another-secret  \n")
    path.chmod(0o600)
    monkeypatch.setenv("HALFBYTE_API_KEYS", "carl:third-secret, dora:fourth-secret")
    keys = read_keys(ServeConfig(api_key_file=path, api_keys=("eve:fifth-secret",)))
    assert {name for name, _ in keys.hashes} == {"ann", "bob", "carl", "dora", "eve"}
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 644\). Run: chmod 600"):
        read_key_file(path)
    with pytest.raises(ConfigError, match="Cannot read the API keys"):
        read_key_file(tmp_path / "none")


def test_keys_of_a_file_are_added_and_revoked_while_the_server_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("HALFBYTE_API_KEYS", raising=False)
    path = tmp_path / "keys.txt"

    def write(text, mode=0o600):
        path.write_text(text)
        path.chmod(mode)

    write("ann:first-secret\n")
    config = ServeConfig(api_key_file=path, api_keys=("eve:fifth-secret",))
    keys = read_keys(config)
    file = KeyFile(path, keys, lambda: read_keys(config))

    def find(*secrets):
        file.poll()
        return [keys.find(secret) for secret in secrets]

    assert find("first-secret", "fifth-secret") == ["ann", "eve"]
    write("bob:second-secret\n")
    assert find("first-secret", "second-secret", "fifth-secret") == [None, "bob", "eve"]
    write("ann:short\n")
    assert find("second-secret") == ["bob"]
    assert "The API keys stay as they are: The secret of API key 'ann' has 5" in caplog.text
    write("ann:first-secret\n", mode=0o644)
    assert find("first-secret", "second-secret") == [None, "bob"]
    path.chmod(0o600)
    assert find("first-secret", "second-secret") == ["ann", None]
    path.unlink()
    assert find("first-secret") == ["ann"]
    # A server that has only the file's keys must not be left without any.
    config = ServeConfig(api_key_file=path)
    write("# none\n")
    assert find("first-secret") == ["ann"]
    assert f"The API keys stay as they are: '{path}' has none." in caplog.text


def test_public_address_requires_a_key(monkeypatch):
    monkeypatch.delenv("HALFBYTE_API_KEYS", raising=False)
    for host in ("0.0.0.0", "::", "box.lan"):
        with pytest.raises(ConfigError, match=f"Cannot listen on {host} without an API key"):
            read_keys(ServeConfig(host=host))
    assert read_keys(ServeConfig(host="0.0.0.0", api_keys=(f"ann:{SECRET}",)))
    assert SECRET not in repr(ServeConfig(api_keys=(f"ann:{SECRET}",)))
    assert [is_loopback(h) for h in ("localhost", "127.3.2.1", "::1", "10.0.0.1", "x")] == (
        [True, True, True, False, False]
    )


def raw(server, *packets, wait=5.0):
    """Send raw packets; return what is received until the server closes or `wait` seconds pass."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as client:
        for number, packet in enumerate(packets):
            time.sleep(0.2 * bool(number))
            client.sendall(packet)
        reply = b""
        try:
            while part := client.recv(65536):
                reply += part
        except (TimeoutError, ConnectionResetError):
            # The second: it closed with some of the text not read.
            pass
    return reply


def test_body_is_limited_while_it_is_read():
    config = ServeConfig(max_body_bytes=2000, body_timeout=0.5)
    with serve(make_gateway(config)[0]) as server:
        large = dict(CHAT, user="x" * 3000)
        reply = httpx2.post(f"{server.v1}/chat/completions", json=large)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        # No length announced: counted as it comes, and not read to its end.
        chunk = f"{1000:x}\r\n".encode() + b"x" * 1000 + b"\r\n"
        chunked = (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunk * 3
        assert b" 413 " in raw(server, chunked, wait=3).partition(b"\r\n")[0]
        # Announced and never sent.
        start = time.monotonic()
        slow = (HEAD + "Content-Length: 100\r\n\r\n{").encode()
        assert b" 408 " in raw(server, slow, wait=3).partition(b"\r\n")[0]
        assert time.monotonic() - start < 3
        reply = httpx2.post(f"{server.v1}/chat/completions", json=CHAT)
        assert reply.status_code == 200


def test_headers_are_limited_in_size_and_time(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    with serve(make_gateway()[0]) as server:
        one = b"X-Padding: " + b"x" * 1000 + b"\r\n"
        start, end = HEAD.encode(), b"Content-Length: 2\r\n\r\n{}"
        # As much as fits is read, and the body refused for what it is.
        assert b"model" in raw(server, start, one * 30, one * 30 + end, wait=1)
        refused = raw(server, start, *[one * 33] * 2, wait=5)
        assert refused.startswith(b"HTTP/1.1 400 ")
        assert refused.endswith(b"The request's headers have more than 65536 bytes.")
        for text in (b"", HEAD.encode(), b"POST"):
            begun = time.monotonic()
            assert raw(server, text, wait=10) == b""
            assert time.monotonic() - begun < 5
        reply = httpx2.post(f"{server.v1}/chat/completions", json=CHAT)
        assert reply.status_code == 200


def test_body_in_the_same_packet_is_not_counted_as_headers():
    with serve(make_gateway(ServeConfig(max_body_bytes=10**6))[0]) as server:
        body = json.dumps(dict(CHAT, user="x" * 200_000)).encode()
        head = HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        assert raw(server, head.encode() + body).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order():
    with serve(make_gateway()[0]) as server:
        body = json.dumps(CHAT).encode()
        one = (HEAD + f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        last = one.replace(b"Host:", b"Connection: close\r\nHost:")
        reply = raw(server, one + one + last)
        assert reply.count(b"HTTP/1.1 200 OK") == 3
        assert reply.count(b'"object":"chat.completion"') == 3


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(stream):
    with serve(make_gateway()[0]) as server:
        body = json.dumps(dict(CHAT, stream=stream)).encode()
        head = HEAD.replace("HTTP/1.1", "HTTP/1.0") + f"Content-Length: {len(body)}\r\n\r\n"
        reply = raw(server, head.encode() + body)  # read until the server closes
    head, _, text = reply.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert "connection: close" in head
    assert "chunked" not in head
    assert ("content-length" in head) == (not stream)
    if stream:
        events = [line.removeprefix("data: ") for line in text.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        assert len([json.loads(event) for event in events[:-2]]) > 1
    else:
        assert json.loads(text)["object"] == "chat.completion"


CHAT_START = json.dumps(CHAT).encode()[:-1]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"model": NaN}',
        b'{"model": "tiny", "messages": [], "x": Infinity}',
        b"\xff\xfe",
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "seed": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "n": ' + b"9" * 5000 + b"}",
        CHAT_START + b', "chat_template_kwargs": {"x": [1, 1e999]}}',
    ],
)
def test_no_body_breaks_the_server(body):
    with serve(make_gateway()[0]) as server:
        for path in ("chat/completions", "completions"):
            reply = httpx2.post(f"{server.v1}/{path}", content=body, headers=JSON)
            assert reply.status_code == 400, reply.text
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"field{i}": 1 for i in range(200_000)}, "Unrecognized request argument: 'field0'."),
        ({"messages": [{"role": "user", "content": "x"}] * 90_000}, "at most 10000 items"),
        ({"messages": [{"role": "usr", "content": "x"}] * 90_000}, "'role' should be system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 90_000}]},
            "at most 10000 items",
        ),
    ],
)
def test_body_with_very_many_errors_is_rejected_quickly(more, said):
    content = json.dumps({"model": "tiny", "messages": [], **more}).encode()

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    start = time.thread_time()
    with pytest.raises(ServeError, match=said):
        asyncio.run(read_body(request, ChatRequest, ServeConfig(max_body_bytes=10**7)))
    assert time.thread_time() - start < 1


def test_choices_are_limited():
    with serve(make_gateway(ServeConfig(max_choices=4))[0]) as server:
        reply = httpx2.post(f"{server.v1}/chat/completions", json=dict(CHAT, n=5))
        assert reply.status_code == 400
        assert "5 choices" in reply.json()["error"]["message"]
        body = {"model": "tiny", "prompt": ["a", "b", "c"], "n": 2}
        reply = httpx2.post(f"{server.v1}/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_answer_is_cancelled_at_its_deadline(stream, monkeypatch):
    monkeypatch.setattr("halfbyte.serve.api.gateway.GRACE_SECONDS", 0.1)
    gateway, engine = make_gateway(ServeConfig(request_timeout=0.3), delay=0.1)
    with serve(gateway) as server:
        reply = httpx2.post(
            f"{server.v1}/chat/completions", json=dict(CHAT, stream=stream), timeout=20
        )
        assert "request_timeout" in reply.text
        assert reply.status_code == (200 if stream else 408)
        assert "[DONE]" not in reply.text
        assert engine.running == 0
        # A client may ask for less time, not for more.
        for header, status in (("0.2", 408), ("99", 408), ("soon", 400), ("-1", 400), ("nan", 400)):
            reply = httpx2.post(
                f"{server.v1}/chat/completions",
                json=CHAT,
                headers={"X-Halfbyte-Timeout": header},
                timeout=20,
            )
            assert reply.status_code == status, header


def test_adapters_load_by_name_from_their_folder_only(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "good" / "adapter_config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    gateway, engine = make_gateway(keys=["ann:first-secret"], adapters=tmp_path / "adapters")
    headers = bearer("first-secret")
    with serve(gateway) as server:

        def post(action, name, **extra):
            return httpx2.post(
                f"{server.v1}/{action}_lora_adapter",
                json={"lora_name": name, **extra},
                headers=headers,
            )

        assert httpx2.post(f"{server.v1}/load_lora_adapter", json={}).status_code == 401
        for name in ("bad", "none", "link", "..", "../outside", "good/..", "/etc", "good\x00"):
            assert post("load", name).status_code in (400, 404), name
        # vLLM takes a path here; this server does not.
        assert post("load", "good", lora_path="/etc").status_code == 400
        assert engine.adapters == ()
        assert post("load", "good").json() == {"status": "loaded", "id": "good"}
        assert post("load", "good").status_code == 409
        models = httpx2.get(f"{server.v1}/models", headers=headers).json()["data"]
        assert [model["id"] for model in models] == ["tiny", "good"]
        reply = httpx2.post(
            f"{server.v1}/chat/completions", json=dict(CHAT, model="good"), headers=headers
        )
        assert reply.json()["model"] == "good"
        assert engine.requests[-1].adapter == "good"
        assert post("unload", "good").status_code == 200
        assert post("unload", "good").status_code == 404


def test_internal_errors_reveal_no_details(caplog):
    gateway, _ = make_gateway(script={"hello": RuntimeError("secret path")})
    with serve(gateway) as server:
        reply = httpx2.post(f"{server.v1}/chat/completions", json=CHAT)
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        assert "secret path" not in reply.text
        streamed = httpx2.post(f"{server.v1}/chat/completions", json=dict(CHAT, stream=True))
        assert streamed.status_code == 500
    assert "secret path" in caplog.text
