"""The examples of docs/how-to/serve.md, run as they stand against a server of a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import httpx2
import pytest
from tests.cli.test_serve import model, running  # noqa: F401 - a fixture
from tests.docs.test_docs import ROOT, code_blocks

PAGE = ROOT / "docs" / "how-to" / "serve.md"
ADDRESS = "http://localhost:8000"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):  # noqa: F811
    template = model.parent / "template.jinja"
    with running(model, "--served-name", "smol-4bit", "--chat-template", template) as found:
        yield found[1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_examples(server):
    blocks = [block for block in code_blocks(PAGE, "sh") if block.startswith("curl")]
    # That of the adapters needs one; tests/serve/test_adapters_over_http.py loads them.
    blocks = [block for block in blocks if "$KEY" not in block]
    assert len(blocks) == 2
    for block in blocks:
        assert ADDRESS in block
        script = block.replace(ADDRESS, server).replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        if '"stream": true' in block:
            assert done.stdout.rstrip().endswith("data: [DONE]")
            assert done.stdout.startswith("data: {")
        else:
            assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_python_example(server, capsys):
    (snippet,) = code_blocks(PAGE, "python")
    exec(compile(snippet.replace(ADDRESS, server), str(PAGE), "exec"), {})
    assert re.search(r"\n\d+\n\Z", capsys.readouterr().out)


def test_every_path_of_the_table_is_served(server):
    paths = re.findall(r"\| `(?:GET|POST) ([^`]+)`(?:, `([^`]+)`)?", PAGE.read_text())
    flat = [path for pair in paths for path in pair if path]
    assert len(flat) == 10
    for path in flat:
        method = "POST" if "complet" in path or "token" in path else "GET"
        reply = httpx2.request(method, server + path)
        assert reply.status_code == (200 if method == "GET" else 415), path
