"""Send requests to an OpenAI-compatible server with litellm. Runs in its environment.

    python litellm_ask.py job.json

Fields of the job: address, model, key, out (JSON file for the answers).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Otherwise litellm first downloads a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    """Send each kind of request that users of litellm send; write the answers."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    place = {"api_base": job["address"], "api_key": job["key"], "model": f"openai/{job['model']}"}
    messages = [{"role": "user", "content": "hello"}]
    usual = {**place, "temperature": 0, "max_tokens": 20, "num_retries": 0}
    found = {}
    whole = litellm.completion(messages=messages, **usual)
    found["whole"] = whole.choices[0].message.content
    found["usage"] = whole.usage.total_tokens
    chunks = list(
        litellm.completion(
            messages=messages, stream=True, stream_options={"include_usage": True}, **usual
        )
    )
    found["streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    built = litellm.stream_chunk_builder(chunks, messages=messages)
    found["streamed_usage"] = built.usage.total_tokens
    called = litellm.completion(
        messages=messages,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "add"}},
        **{**usual, "max_tokens": 200, "temperature": 1, "seed": 4},
    )
    call = called.choices[0].message.tool_calls[0]
    found["call"] = [call.function.name, json.loads(call.function.arguments)]
    rated = litellm.completion(messages=messages, logprobs=True, top_logprobs=2, **usual)
    found["logprobs"] = len(rated.choices[0].logprobs.content)
    text = litellm.text_completion(
        prompt="abc", **{**usual, "model": f"text-completion-openai/{job['model']}"}
    )
    found["text"] = text.choices[0].text
    found["errors"] = [
        _error(messages=messages, **{**usual, "max_tokens": 10**6}),
        _error(messages=messages, **{**usual, "model": "openai/nobody"}),
        _error(messages=messages, **{**usual, "api_key": "wrong-key-of-all"}),
    ]
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")


def _error(**arguments: object) -> str:
    try:
        litellm.completion(**arguments)
    except Exception as error:  # noqa: BLE001 - the error's name is the result
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    main()
