"""A model behind an OpenAI-compatible address: what it writes can be judged, its logits cannot."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from halfbyte.errors import ConfigError, ModelError
from halfbyte.judge.answers import Answer
from halfbyte.judge.local_model import cut_at
from halfbyte.judge.questions import Question

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable of the key, the same as OpenAI's own client reads."""
TIMEOUT_SECONDS = 120.0
REQUESTS_AT_ONCE = 8
STOPS_ALLOWED = 4
"""More stop texts are refused by OpenAI's servers; the rest is cut here."""


def is_address(name: str) -> bool:
    """Tell an address from a folder."""
    return name.startswith(("http://", "https://"))


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within one server only: the key goes along."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Refuse another server."""
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            raise ModelError(
                f"{req.full_url} sends on to another server, {newurl}, which is not asked: it "
                "would get the key. Give its address instead, if it is the right one."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SameServer)


class RemoteModel:
    """A served model that answers questions by text."""

    def __init__(self, address: str, *, model: str | None = None) -> None:
        """Ask the server which models it has.

        Args:
            address: Up to and with ``/v1``.
            model: Which of its models; None: the only one.

        Raises:
            ModelError: The server does not answer as OpenAI's does.
            ConfigError: It has several models, or not the one that was asked for.
        """
        self.address = address.rstrip("/")
        served = [entry["id"] for entry in self._call("/models").get("data", [])]
        if model is None and len(served) != 1:
            raise ConfigError(
                f"{self.address} serves {len(served)} models ({', '.join(served[:5])}). Say which: "
                f"{self.address}#NAME."
            )
        if model is not None and model not in served:
            raise ConfigError(
                f"{self.address} does not serve '{model}'. It serves: {', '.join(served[:10])}."
            )
        self.model = model or served[0]
        self.name = f"{self.address}#{self.model}"

    @classmethod
    def open(cls, name: str) -> RemoteModel:
        """Open an address, which may name the model behind a ``#``."""
        address, _, model = name.partition("#")
        return cls(address, model=model or None)

    @property
    def takes_padding(self) -> bool:
        """The server batches as it likes."""
        return True

    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Refuse: likelihoods of given texts are not part of what every server gives."""
        raise ModelError(f"{self.name} is served: it cannot rate choices.")

    def write(
        self, questions: list[Question], *, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Let the server write on after each prompt, several at a time.

        Args:
            questions: Sent as text; a chat as its messages.
            temperature: 0: the likeliest token.
            seed: Sent along.

        Returns:
            What was written, in order.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(lambda q: self._write_one(q, temperature, seed), questions))

    def _write_one(self, question: Question, temperature: float, seed: int) -> Answer:
        item = question.item
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": item.max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if item.stop:
            body["stop"] = list(item.stop[:STOPS_ALLOWED])
        if item.messages:
            reply = self._call(
                "/chat/completions", body | {"messages": [dict(m) for m in item.messages]}
            )
        else:
            reply = self._call("/completions", body | {"prompt": item.prompt})
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if item.messages else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError(
                f"{self.name} answered item '{item.name}' without a choice: "
                f"{json.dumps(reply)[:200]}."
            ) from error
        return Answer(text=cut_at(text or "", item.stop))

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as reply:
                value = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            text = error.read(500).decode("utf-8", "replace")
            raise ModelError(
                f"{self.address}{path} answered {error.code}: {text} "
                f"A key is read from {KEY_VARIABLE}."
            ) from error
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot reach {self.address}{path}: {error}. Is the server running, and does the "
                "address end in /v1?"
            ) from error
        if not isinstance(value, dict):
            raise ModelError(f"{self.address}{path} answered no JSON object.")
        return value
