from __future__ import annotations

import asyncio
import json
import random
import re
import time
import urllib.request
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from tests.helpers.browser import CHROMIUM, DRIVER, WHY_NOT, open_browser
from tests.serve.helpers_quality import Clock, ScriptedBackend, answer, collect, failure, make_call
from tests.serve.helpers_servers import serving

import halfbyte.serve.dashboard as dashboard
from halfbyte.errors import ServeError
from halfbyte.serve.dashboard.routes import DATA, OPEN_PATHS, dashboard_routes
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig

KEY = "secret-of-the-test"
NASTY = '<img src=x onerror="document.title=1">'
LOOP = answer("again and again " + "so it goes " * 12)


def make_quality(tmp_path):
    """A server's quality after some minutes with all features, with a fake clock."""
    clock = Clock(50_000.0)
    rng = random.Random(3)

    def primary(call):
        clock.now += rng.uniform(0.1, 0.6)
        if rng.random() < 0.05:
            return [failure()]
        return LOOP if rng.random() < 0.3 else answer("a good answer of several words", entropy=1.5)

    places = {
        "large": ScriptedBackend("large", answer("larger"), models=(NASTY,), version="f" * 64),
        "new": ScriptedBackend("new", lambda call: primary(call), models=("candidate",)),
        "shade": ScriptedBackend("shade", answer("a good answer"), models=("shadowed",)),
    }
    (tmp_path / "probes.jsonl").write_text('{"id": "p", "prompt": "a", "answer": "b"}\n')
    config = QualityConfig(
        fallback=("large",), canary="new", shadow="shade", shadow_share=0.5,
        probes=str(tmp_path / "probes.jsonl"), breaker_failures=1000, canary_alpha=0.001,
    )  # fmt: skip
    quality = Quality(
        ScriptedBackend("small", primary, models=("smol-4bit",), version="a" * 64),
        config,
        places.get,
        clock=clock,
    )
    quality.metrics.set_plan(weights=80_000_000, cache=200_000_000, total=900_000_000)
    quality.metrics.count_rejection("queue")

    async def run():
        for _ in range(900):
            tags = ["critical"] if rng.random() < 0.05 else []
            await collect(quality.router, make_call(tags=tags))
            clock.now += rng.uniform(0.0, 0.6)
            await asyncio.sleep(0)
        await quality.probes.ask_all()
        quality.router.routes[-1].backend.script = [failure()]
        try:
            while True:
                await collect(quality.router, make_call())
        except ServeError:
            pass
        await quality.close()

    asyncio.run(run())
    return quality


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    return make_quality(tmp_path_factory.mktemp("dashboard"))


class Guard:
    """Require the key for all but the open paths, as the server does."""

    def __init__(self, app):
        self.app, self.asked = app, []

    async def __call__(self, scope, receive, send):
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        self.asked.append(scope["path"])
        if scope["path"] in OPEN_PATHS or key == f"Bearer {KEY}":
            return await self.app(scope, receive, send)
        return await JSONResponse({"error": {}}, status_code=401)(scope, receive, send)


def test_snapshot_is_plain_and_complete(quality):
    found = json.loads(json.dumps(quality.snapshot(), allow_nan=False))
    assert {one["role"] for one in found["backends"]} >= {"primary", "fallback"}
    assert found["fallbacks"]["check:repetition"] > 100
    assert found["rejections"] == {"queue": 1}
    assert found["monitors"]["answers"] > 900
    assert 0.2 < found["monitors"]["last_rates"]["repetition"] < 0.4
    assert "repetition" in [alert["name"] for alert in found["alerts"]]
    assert found["canary"]["arms"]["primary"]["requests"] > 700
    assert found["shadow"]["counts"]["compared"] > 100
    assert sum(v is not None for v in found["series"]["whole"]["p95"]) > 20
    assert found["totals"]["request_failure"] == 1


def test_files_load_nothing_external_and_have_a_security_policy(quality):
    app = Starlette(routes=dashboard_routes(quality.snapshot))
    with serving(app) as address:
        for path in (*OPEN_PATHS, DATA):
            with urllib.request.urlopen(address + path) as reply:
                text, headers = reply.read().decode(), reply.headers
            if path == DATA:
                assert headers["Cache-Control"] == "no-store"
                continue
            assert "default-src 'none'" in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            outside = set(re.findall(r"https?://[^\"' )]+", text)) - {"http://www.w3.org/2000/svg"}
            assert not outside
            assert "innerHTML" not in text
            assert "eval(" not in text


def test_page_is_served_with_a_trailing_slash(quality):
    app = Starlette(routes=dashboard_routes(quality.snapshot))
    app.router.redirect_slashes = False  # as the server has it
    with (
        serving(app) as address,
        urllib.request.urlopen(address + "/dashboard") as plain,
        urllib.request.urlopen(address + "/dashboard/") as slash,
    ):
        assert slash.read() == plain.read()
    assert "/dashboard/" in OPEN_PATHS


def test_files_are_in_the_package():
    names = {path.name for path in Path(dashboard.__file__).parent.iterdir()}
    assert {"page.html", "page.css", "page.js", "routes.py"} <= names


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=WHY_NOT)
def test_page_asks_for_the_key_shows_data_and_recovers_from_an_outage(quality, tmp_path):
    snapshots = [quality.snapshot]
    app = Guard(Starlette(routes=dashboard_routes(lambda: snapshots[0]())))
    with serving(app) as address, open_browser() as browser:
        browser.look(width=1200)
        browser.call("url", url=address + "/dashboard")
        wait(browser, "!document.getElementById('key-form').hidden")
        enter(browser, "wrong")
        wait(browser, "document.getElementById('state').textContent.includes('rejected')")
        enter(browser, KEY)
        wait(browser, "!document.getElementById('main').hidden")
        text = browser.value("document.body.innerText")
        for part in (
            "smol-4bit", NASTY, "Tokens per second", "check:repetition", "critical", "Canary",
            "as good", "shade", "of 900 MB", "aaaaaaaaaaaa", "ffffffffffff", "0 of 1",
            "answers fail the check repetition",
        ):  # fmt: skip
            assert part in text, part
        assert browser.value("document.querySelectorAll('svg path').length") >= 6
        # Live: what changes on the server changes on the page.
        snapshots[0] = lambda: {**quality.snapshot(), "fallbacks": {"one-of-a-kind": 7}}
        wait(browser, "document.getElementById('fallbacks').innerText.includes('one-of-a-kind')")
        snapshots[0] = lambda: 1 / 0
        wait(browser, "document.getElementById('state').textContent.includes('Retrying')")
        snapshots[0] = quality.snapshot
        wait(browser, "!document.getElementById('state').classList.contains('lost')")
        for width, dark in ((1200, False), (1200, True), (390, False), (390, True)):
            browser.look(width=width, dark=dark)
            time.sleep(0.3)
            assert browser.value("document.documentElement.scrollWidth") <= width
            shot = tmp_path / f"dashboard-{width}-{'dark' if dark else 'light'}.png"
            browser.screenshot(shot)
            assert shot.stat().st_size > 20_000
        complaints = [e["message"] for e in browser.log() if "favicon" not in e["message"]]
        assert not [m for m in complaints if "status of 401" not in m and "status of 500" not in m]
        assert browser.value("document.title").endswith("halfbyte")
    assert set(app.asked) <= {*OPEN_PATHS, DATA, "/favicon.ico"}


def wait(browser, expression):
    for _ in range(100):
        if browser.value(expression):
            return
        time.sleep(0.1)
    pytest.fail(f"never true: {expression}\n{browser.value('document.body.innerText')}")


def enter(browser, key):
    browser.value(
        f"document.getElementById('key').value = {json.dumps(key)};"
        "document.querySelector('#key-form button').click()"
    )
