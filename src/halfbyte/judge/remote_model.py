"""A model behind an OpenAI-compatible server: generates text; its logits are not available."""

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
"""Environment variable of the API key, the same as for OpenAI's client."""
TIMEOUT_SECONDS = 120.0
MAX_CONCURRENT_REQUESTS = 8
MAX_STOP_SEQUENCES = 4
"""OpenAI's servers reject more; the others are applied here."""


def is_address(name: str) -> bool:
    """Return whether a model's name is an http address instead of a folder."""
    return name.startswith(("http://", "https://"))


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same server only, because the request carries the API key."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Reject another server."""
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            raise ModelError(
                f"{req.full_url} redirects to another server, {newurl}. The redirect is not "
                "followed, because that server would get the API key. If it is the right server, "
                "give its address instead."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SameServer)


class RemoteModel:
    """A served model that answers questions with generated text."""

    def __init__(self, address: str, *, model: str | None = None) -> None:
        """Connect to the server and select a model.

        Args:
            address: Up to and including ``/v1``.
            model: Name of the model; None: the only one.

        Raises:
            ModelError: The server cannot be reached or does not answer as OpenAI's does.
            ConfigError: It serves several models, or not the requested one.
        """
        self.address = address.rstrip("/")
        served = [entry["id"] for entry in self._call("/models").get("data", [])]
        if model is None and len(served) != 1:
            raise ConfigError(
                f"{self.address} serves {len(served)} models ({', '.join(served[:5])}). Select one "
                f"by its name: {self.address}#NAME."
            )
        if model is not None and model not in served:
            raise ConfigError(
                f"{self.address} does not serve '{model}'. It serves: {', '.join(served[:10])}."
            )
        self.model = model or served[0]
        self.name = f"{self.address}#{self.model}"

    @classmethod
    def open(cls, name: str) -> RemoteModel:
        """Open an address, optionally followed by ``#`` and the name of a model."""
        address, _, model = name.partition("#")
        return cls(address, model=model or None)

    @property
    def takes_padding(self) -> bool:
        """Always true: the server does its own batching."""
        return True

    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Not supported: few servers return the log-likelihood of a given text."""
        raise ModelError(
            f"{self.name} cannot score choices: servers do not return log-likelihoods. Use items "
            "without choices."
        )

    def write(
        self, questions: list[Question], *, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Generate a continuation of each prompt, by concurrent requests.

        Args:
            questions: Sent as text, or as messages for a chat.
            temperature: 0: greedy.
            seed: Passed to the server.

        Returns:
            The generated text, in order.
        """
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
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
            body["stop"] = list(item.stop[:MAX_STOP_SEQUENCES])
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
                f"{self.name} answered item '{item.name}' without choices[0]: "
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
                f"{self.address}{path} answered with HTTP status {error.code}: {text} The API key "
                f"is read from {KEY_VARIABLE}."
            ) from error
        except (OSError, ValueError) as error:
            raise ModelError(
                f"Cannot reach {self.address}{path}: {error}. Check that the server is running and "
                "that the address ends in /v1."
            ) from error
        if not isinstance(value, dict):
            raise ModelError(f"{self.address}{path} did not answer with a JSON object.")
        return value
