"""Token ids in, token ids out: many requests through one model at the same time.

::

    TokenRequest ──> scheduler: cache for prompt + max_new_tokens reserved, or it waits
                 ──> runner: prompt in pieces, then one step for all running sequences
                 ──> sampler: penalties, grammar, temperature, draw ──> TokenEvent

contract.py is what the rest of `serve` sees of it.
"""
