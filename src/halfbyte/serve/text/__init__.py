"""Between what a client writes and reads and the token ids of an engine.

::

    messages, tools ──prompts.py──> token ids ──engine──> token ids ──TextStream──> text
    text ──stops.py──> text before a stop string ──tool_calls.py──> content, tool calls
    token id ──token_text.py──> text and bytes of one token, for logprobs
"""
