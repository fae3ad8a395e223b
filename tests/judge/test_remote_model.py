"""Tests with a real HTTP server on loopback that implements the used part of OpenAI's API."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.judge.conftest import noise

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.loading import open_subject
from halfbyte.judge.compare import compare
from halfbyte.judge.local_model import LocalModel
from halfbyte.judge.questions import Question, make_question
from halfbyte.judge.remote_model import RemoteModel
from halfbyte.judge.tasks import Item


@pytest.fixture
def serve():
    """Serve a function of (path, body); returns the address and the list of requests."""
    servers = []

    def start(reply, models=("tiny",)):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def _send(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self._send(200, {"data": [{"id": name} for name in models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, body, self.headers.get("Authorization")))
                self._send(*reply(self.path, body))

            def log_message(self, *args):
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_redirect_to_another_server_is_not_followed(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    there, _ = serve(completion("x"))

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", there + self.path.removeprefix("/v1"))
            self.end_headers()

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ModelError, match=f"redirects to another server, {there}/models"):
            RemoteModel(f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        server.shutdown()
        server.server_close()


def completion(text):
    return lambda path, body: (200, {"choices": [{"text": text, "message": {"content": text}}]})


def test_prompts_and_chats_use_their_own_endpoints(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    address, seen = serve(completion("4; and more"))
    model = RemoteModel.open(address)
    chat = Item(name="c", messages=({"role": "user", "content": "hi"},), max_new_tokens=9)
    plain = Item(name="p", prompt="2 + 2 =", stop=(";",), max_new_tokens=5)
    answers = model.write([Question(item=plain, ids=()), Question(item=chat, ids=())])
    assert [a.text for a in answers] == ["4", "4; and more"]
    by_path = {path: (body, key) for path, body, key in seen}
    body, key = by_path["/v1/completions"]
    assert key == "Bearer key"
    assert body == {
        "model": "tiny",
        "max_tokens": 5,
        "temperature": 0.0,
        "seed": 0,
        "stop": [";"],
        "prompt": "2 + 2 =",
    }
    assert by_path["/v1/chat/completions"][0]["messages"] == [{"role": "user", "content": "hi"}]


def test_requested_model_must_be_served(serve):
    address, _ = serve(completion(""), models=("a", "b"))
    assert RemoteModel.open(f"{address}#b").model == "b"
    with pytest.raises(ConfigError, match=r"serves 2 models \(a, b\)"):
        RemoteModel.open(address)
    with pytest.raises(ConfigError, match=r"does not serve 'c'. It serves: a, b"):
        RemoteModel.open(f"{address}#c")


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (lambda p, b: (401, {"error": "no"}), "HTTP status 401.*OPENAI_API_KEY"),
        (lambda p, b: (200, {"choices": []}), r"without choices\[0\]"),
        (lambda p, b: (200, [1]), "did not answer with a JSON object"),
    ],
)
def test_server_with_an_unexpected_reply_is_named(serve, reply, part):
    address, _ = serve(reply)
    model = RemoteModel.open(address)
    with pytest.raises(ModelError, match=part):
        model.write([Question(item=Item(name="x", prompt="p"), ids=())])


def test_unreachable_server_is_named():
    with pytest.raises(ModelError, match=r"Cannot reach http://127.0.0.1:9/v1/models"):
        RemoteModel.open("http://127.0.0.1:9/v1")


def test_served_candidate_is_compared_by_generated_text_only(
    serve, base, items, config, tmp_path, make_candidate
):
    subject = open_subject(make_candidate(noise(3.0)))
    model = LocalModel(subject)
    lock = threading.Lock()

    def answer(path, body):
        item = Item(
            name="x",
            prompt=body["prompt"],
            max_new_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
        )
        with lock:
            (found,) = model.write([make_question(subject.tokenizer, item)])
        return 200, {"choices": [{"text": found.text}]}

    address, seen = serve(answer)
    result = compare(base, address, items=items, config=config, cache=tmp_path / "cache")
    assert result.overall.flips.num_items == 20
    assert result.overall.flips.harmful > 5
    assert (result.text, result.layers) == (None, None)
    assert "items with choices, left out: 20" in result.notes[0]
    asked = len(seen)
    assert asked == 20
    compare(base, address, items=items, config=config, cache=tmp_path / "cache", resume=True)
    assert len(seen) == asked
