"""Convert requests to token ids, and generated token ids to text and tool calls.

::

    messages, tools ──prompts.py──> token ids ──engine──> token ids ──TextStream──> text
    text ──stops.py──> text before a stop string ──tool_calls.py──> content, tool calls
    token id ──token_text.py──> text and bytes of a single token, for logprobs
"""
