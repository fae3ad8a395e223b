"""What OpenAI's own client is made to ask, again and again."""

from __future__ import annotations

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln"}}\n</tool_call>'


def ask(client, content="hello", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny", messages=messages, **more)
