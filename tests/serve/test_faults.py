"""Fault injection with real processes: no valid request may be lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone
SERVER = Path(__file__).with_name("fake_model_server.py")
SMALL, LARGE = "small", "large"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A server in a child process."""

    def __init__(self, command, port, ready, env=None):
        self.command, self.port, self.ready_path, self.env = command, port, ready, env
        self.address = f"http://127.0.0.1:{port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command, env={**os.environ, **(self.env or {})}, stderr=subprocess.PIPE
        )
        for _ in range(600):
            if self.answers():
                return
            assert self.process.poll() is None, self.process.stderr.read().decode()
            time.sleep(0.05)
        pytest.fail(f"{self.command} is not ready")

    def answers(self):
        try:
            urllib.request.urlopen(self.address + self.ready_path, timeout=5).read()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def kill(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.communicate(timeout=30)

    def post(self, path, body):
        request = urllib.request.Request(self.address + path, data=body)
        return urllib.request.urlopen(request, timeout=30).read()


class Model(Process):
    """A server of one fake model."""

    def __init__(self, name):
        port = free_port()
        super().__init__([sys.executable, str(SERVER), str(port), name], port, "/v1/models")

    def set(self, mode):
        self.post("/mode", mode.encode())

    @property
    def requests(self):
        return self.state["requests"]

    @property
    def state(self):
        return json.loads(urllib.request.urlopen(self.address + "/count").read())


def open_gateway(small, large, *options, env=None):
    port = free_port()
    command = [
        sys.executable, "-m", "halfbyte", "serve", "--port", str(port),
        "--upstream", small.address + "/v1", "--fallback", large.address + "/v1",
        "--first-token-timeout", "2.5", "--idle-timeout", "1.5", "--breaker-seconds", "0.5",
        *options,
    ]  # fmt: skip
    return Process(command, port, "/health", env)


def ask(gateway, *, stream=False, **body):
    """Return the text and which model answered."""
    values = {"model": SMALL, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    request = urllib.request.Request(
        gateway.address + "/v1/chat/completions",
        data=json.dumps(values | body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        content, headers = reply.read().decode(), dict(reply.headers)
    if not stream:
        return json.loads(content)["choices"][0]["message"]["content"], headers
    text = ""
    for line in content.splitlines():
        if line.startswith("data: {"):
            found = json.loads(line.removeprefix("data: "))
            assert "error" not in found, found
            text += "".join(c["delta"].get("content") or "" for c in found["choices"])
    assert "data: [DONE]" in content
    return text, headers


def ask_many(gateway, count=16):
    """Send concurrent requests, every other one streamed; return which model answered each."""
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda n: ask(gateway, stream=n % 2 == 0)[0], range(count)))
    assert set(answers) <= {f"this is the answer of {name} to you" for name in (SMALL, LARGE)}
    return [SMALL if SMALL in text else LARGE for text in answers]


@pytest.fixture(scope="module")
def models():
    both = [Model(SMALL), Model(LARGE)]
    yield both
    for model in both:
        if model.process.poll() is None:
            model.kill()


@pytest.fixture(scope="module")
def gateway(models):
    gateway = open_gateway(*models)
    yield gateway
    gateway.kill(signal.SIGTERM)


@pytest.fixture
def small(models, gateway):
    """The first model, reset before and after."""
    wait_for_small(gateway)
    yield models[0]
    models[0].set("good")
    wait_for_small(gateway)


def wait_for_small(gateway):
    for _ in range(100):
        if SMALL in ask(gateway)[0]:
            return
        time.sleep(0.1)
    pytest.fail("the model is well again, and is not asked")


@pytest.mark.parametrize("mode", ["error", "html", "garbage", "cut", "hang", "stall", "memory"])
def test_misbehaving_model_loses_no_request(gateway, small, mode):
    assert ask_many(gateway) == [SMALL] * 16
    small.set(mode)
    for _ in range(3):
        assert ask_many(gateway) == [LARGE] * 16
    # And it is found again by itself: the fixture waits for that.


def test_headers_say_which_model_answered_and_why(gateway, small):
    _, headers = ask(gateway)
    assert headers["x-halfbyte-model"] == SMALL
    small.set("error")
    _, headers = ask(gateway, stream=True)
    assert headers["x-halfbyte-model"] == LARGE
    assert headers["x-halfbyte-reason"] in ("error", "breaker")


def test_slow_model_does_not_time_out_while_tokens_arrive(gateway, small):
    small.set("slow")
    assert ask_many(gateway, 4) == [SMALL] * 4


@pytest.mark.parametrize("how", ["killed", "dies"])
def test_killed_model_loses_no_request_and_is_used_again_later(gateway, small, how):
    if how == "dies":
        small.set("die")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask_many, gateway, 32)
        if how == "killed":
            time.sleep(0.05)
            small.kill()
        assert len(under_way.result()) == 32
    assert ask_many(gateway) == [LARGE] * 16
    if how == "dies":
        small.process.communicate(timeout=10)
    small.start()


def test_hung_model_is_skipped_after_some_failures(gateway, small):
    small.set("hang")
    ask_many(gateway)
    before = small.requests
    start = time.perf_counter()
    for _ in range(10):
        ask(gateway)
    # Each would have waited 2.5 s; only what the breaker lets try does.
    assert small.requests - before <= 3
    assert time.perf_counter() - start < 12


def test_without_a_fallback_the_error_says_what_happened(models):
    port = free_port()
    command = [
        sys.executable, "-m", "halfbyte", "serve", "--port", str(port),
        "--upstream", models[0].address + "/v1", "--first-token-timeout", "0.3",
    ]  # fmt: skip
    gateway = Process(command, port, "/health")
    models[0].set("hang")
    try:
        with pytest.raises(urllib.error.HTTPError) as found:
            ask(gateway)
        assert found.value.code == 504
        message = json.loads(found.value.read())["error"]["message"]
        assert "waiting for the first token from the model behind" in message
        assert "more than 0.3 s" in message
    finally:
        models[0].set("good")
        gateway.kill(signal.SIGTERM)


def test_unsure_answer_of_an_upstream_falls_back_without_logprobs_for_the_client(models, tmp_path):
    threshold = {"form": 1, "statistic": "mean_logprob", "threshold": -1.0, "first_tokens": 4}
    (tmp_path / "confidence.json").write_text(json.dumps(threshold))
    gateway = open_gateway(*models, "--confidence", str(tmp_path / "confidence.json"))
    try:
        for stream in (False, True):
            models[0].set("good")
            assert SMALL in ask(gateway, stream=stream)[0]
            assert models[0].state["logprobs"] is True
            models[0].set("unsure")
            text, headers = ask(gateway, stream=stream)
            assert (LARGE in text, headers["x-halfbyte-reason"]) == (True, "confidence")
            assert not models[1].state["logprobs"]
        models[0].set("good")
        body = {"model": SMALL, "messages": [{"role": "user", "content": "Hi"}]}
        raw = json.loads(post(gateway, body))
        assert raw["choices"][0]["logprobs"] is None
        raw = json.loads(post(gateway, body | {"logprobs": True}))
        assert [t["logprob"] for t in raw["choices"][0]["logprobs"]["content"]][:2] == [-0.1, -0.1]
    finally:
        models[0].set("good")
        gateway.kill(signal.SIGTERM)


def post(gateway, body):
    request = urllib.request.Request(
        gateway.address + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=30).read()


def test_full_disk_for_the_log_fails_no_request(models, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        gateway = open_gateway(*models, "--request-log", str(place / "log.sqlite"))
        try:
            long = [{"role": "user", "content": "word " * 4000}]
            for _ in range(60):
                assert SMALL in ask(gateway, messages=long)[0]
            dropped = 0.0
            for _ in range(100):
                text = urllib.request.urlopen(gateway.address + "/metrics").read().decode()
                found = [line for line in text.splitlines() if "dropped_total{" in line]
                dropped = float(found[0].split()[-1]) if found else 0.0
                if dropped:
                    break
                time.sleep(0.1)
            assert dropped > 0
        finally:
            gateway.kill(signal.SIGTERM)
        kept = sqlite3.connect(place / "log.sqlite")
        assert kept.execute("pragma integrity_check").fetchone() == ("ok",)
        kept.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def canary_of(gateway):
    with urllib.request.urlopen(gateway.address + "/dashboard/data", timeout=30) as reply:
        return json.loads(reply.read())["canary"]


@pytest.mark.parametrize("mode", ["good", "garbage"])
def test_trial_over_http_survives_a_kill_and_is_decided_correctly(models, tmp_path, mode):
    new = Model("new")
    new.set(mode)
    options = (
        "--canary", new.address + "/v1", "--canary-share", "0.4", "--canary-margin", "0.05",
        "--evidence", str(tmp_path), "--breaker-failures", "1000",
    )  # fmt: skip
    texts = set()
    try:
        gateway = open_gateway(*models, *options)
        # Some requests, then a kill that gives no time to write anything.
        for _ in range(6):
            texts.add(ask(gateway)[0])
        time.sleep(5.5)
        texts.add(ask(gateway)[0])
        time.sleep(0.3)
        seen = canary_of(gateway)["requests"]
        gateway.kill()
        gateway.start()
        assert canary_of(gateway)["requests"] == seen == 7
        while canary_of(gateway)["status"] == "running":
            texts |= {ask(gateway)[0] for _ in range(20)}
        found = canary_of(gateway)
        time.sleep(0.5)
        after = {ask(gateway, stream=n % 2 == 0)[0] for n in range(20)}
        gateway.kill(signal.SIGTERM)
    finally:
        new.kill()
    kept = json.loads((tmp_path / "canary.json").read_text())
    if mode == "good":
        assert found["status"] == kept["status"] == "promoted"
        assert after == {"this is the answer of new to you"}
    else:
        assert found["status"] == kept["status"] == "rolled back"
        assert found["requests"] <= 60
        assert after | texts == {f"this is the answer of {SMALL} to you"}


JUMPING = """
import time
_real, _count = time.time, [0]
def jumping():
    _count[0] += 1
    return _real() + (86_400.0 if _count[0] % 2 else -86_400.0)
time.time = jumping
"""


def test_clock_jump_changes_nothing(models, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    gateway = open_gateway(
        *models, "--fallback-requests-per-minute", "1000", env={"PYTHONPATH": path}
    )
    try:
        assert ask_many(gateway) == [SMALL] * 16
        models[0].set("hang")
        start = time.perf_counter()
        assert ask_many(gateway) == [LARGE] * 16
        assert 2 < time.perf_counter() - start < 20
        models[0].set("good")
        wait_for_small(gateway)
    finally:
        models[0].set("good")
        gateway.kill(signal.SIGTERM)


def test_stopped_gateway_finishes_running_requests(models):
    gateway = open_gateway(*models)
    models[0].set("slow")
    try:
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(ask, gateway, stream=True) for _ in range(4)]
            time.sleep(0.5)
            gateway.process.send_signal(signal.SIGTERM)
            assert all(SMALL in future.result()[0] for future in running)
        gateway.process.communicate(timeout=30)
        assert gateway.process.returncode == 0
    finally:
        models[0].set("good")
