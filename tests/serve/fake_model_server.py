"""An OpenAI-compatible server that misbehaves on command.

python fake_model_server.py PORT NAME; POST /mode with a word changes what later requests get.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

NAME = sys.argv[2] if len(sys.argv) > 2 else "fake"
WORDS = f"this is the answer of {NAME} to you".split()
STATE = {"mode": "good", "requests": 0, "logprobs": None}
LIMIT_BYTES = 2_000_000_000


async def mode(request: Request) -> Response:
    STATE["mode"] = (await request.body()).decode()
    return PlainTextResponse("ok")


async def count(request: Request) -> Response:
    return JSONResponse(STATE)


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model"}]})


def chunk(**choice: object) -> str:
    values = {
        "id": "x", "object": "chat.completion.chunk", "created": 1, "model": NAME,
        "choices": [{"index": 0, "logprobs": None, "finish_reason": None, "delta": {}} | choice],
    }  # fmt: skip
    return f"data: {json.dumps(values)}\n\n"


async def chat(request: Request) -> Response:
    STATE["requests"] += 1
    STATE["logprobs"] = json.loads(await request.body()).get("logprobs")
    mode = STATE["mode"]
    if mode == "hang":
        await asyncio.sleep(3600)
    if mode == "error":
        return JSONResponse({"error": {"message": "broken"}}, status_code=500)
    if mode == "die":
        os._exit(9)
    if mode == "memory":
        # More than the limit that this process has set itself: a MemoryError, hence 500.
        bytearray(2 * LIMIT_BYTES)
    if mode == "html":
        return PlainTextResponse("<html>proxy error</html>", media_type="text/html")
    return StreamingResponse(events(mode), media_type="text/event-stream")


async def events(mode: str):
    for number, word in enumerate(WORDS):
        if number == 3 and mode == "garbage":
            yield 'data: {"choices": [{"delta": \x00\xff garbage\n\n'
            return
        if number == 3 and mode == "cut":
            raise ConnectionError("cut on purpose")
        if number == 3 and mode == "stall":
            await asyncio.sleep(3600)
        if mode == "slow":
            await asyncio.sleep(0.15)
        word = word if number == 0 else " " + word
        token = {"token": word, "logprob": -4.0 if mode == "unsure" else -0.1, "bytes": None}
        logprobs = {"content": [token | {"top_logprobs": []}]} if STATE["logprobs"] else None
        yield chunk(delta={"content": word}, logprobs=logprobs)
    yield chunk(finish_reason="stop")
    usage = {"prompt_tokens": 5, "completion_tokens": len(WORDS), "total_tokens": 5 + len(WORDS)}
    yield f"data: {json.dumps({'id': 'x', 'choices': [], 'model': NAME, 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    app = Starlette(
        routes=[
            Route("/mode", mode, methods=["POST"]),
            Route("/count", count),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )
    uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
