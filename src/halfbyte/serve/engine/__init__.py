"""The inference engine: continuous batching of many requests, on token ids.

::

    TokenRequest ──> scheduler: reserves KV cache for prompt + max_new_tokens, or queues
                 ──> runner: chunked prefill, then one decode step for all running sequences
                 ──> sampler: penalties, grammar, temperature, draw ──> TokenEvent

contract.py is its interface to the rest of `serve`.
"""
