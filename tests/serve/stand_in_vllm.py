"""Stands in for the program `vllm`: a small server that can be made to fail; imports nothing.

It writes what it was given into the folder that STAND_IN_FOLDER names, asks for the key in
VLLM_API_KEY, and does what the prompt says: "crash" ends the process, "hang" answers nothing more.
A file `refuse` there keeps it from starting, `stubborn` from ending when asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ANSWER = "An answer of vLLM's."
ADAPTERS = {}
"""Folders of the loaded adapters, by name."""


class Handler(BaseHTTPRequestHandler):
    """One request at a time, so that a hung one hangs everything."""

    def do_GET(self):
        self.send("application/json", b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.send("application/json", b'{"error": {"message": "no key"}}', 401)
            return
        if self.path.endswith("_lora_adapter"):
            self.change_adapter(body)
            return
        said = json.dumps(body["messages"])
        if "crash" in said:
            os._exit(3)
        if "hang" in said:
            time.sleep(600)
        answer = f"{ANSWER} By {body['model']}." if body["model"] in ADAPTERS else ANSWER
        chunks = [
            {"choices": [{"index": 0, "delta": {"content": word}}]} for word in answer.split(" ")
        ]
        for chunk in chunks[:-1]:
            chunk["choices"][0]["delta"]["content"] += " "
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
        lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"]
        self.send("text/event-stream", "".join(f"data: {line}\n\n" for line in lines).encode())

    def change_adapter(self, body):
        """Reply like vLLM, whose success response is not JSON."""
        name, path = body["lora_name"], body.get("lora_path")
        if "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in os.environ or "--enable-lora" not in sys.argv:
            self.send("application/json", b"{}", 404)
        elif path is None:
            del ADAPTERS[name]
            self.send("text/plain", b"Success")
        elif not (Path(path) / "adapter_model.safetensors").exists():
            error = {"error": {"message": f"{path} doesn't contain tensors", "code": 500}}
            self.send("application/json", json.dumps(error).encode(), 500)
        else:
            ADAPTERS[name] = path
            self.send("text/plain", b"Success")

    def send(self, media, content, status=200):
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        return


def main():
    folder = Path(os.environ["STAND_IN_FOLDER"])
    starts = len(list(folder.glob("start-*")))
    seen = {
        "argv": sys.argv[1:],
        "keys": sorted(k for k in os.environ if "HALFBYTE" in k),
        "int8": os.environ.get("VLLM_CPU_INT4_W4A8"),
    }
    (folder / f"start-{starts}").write_text(json.dumps(seen))
    if (folder / "refuse").exists():
        sys.exit("ValueError: this model is not supported")
    if (folder / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    known, _ = parser.parse_known_args()
    HTTPServer(("127.0.0.1", known.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
