"""A quantized model behind an OpenAI-compatible address, with what production asks for around it.

::

    HTTP ──api/──> Call ──routing/──> Backend ─┬─> embedded.py ──> engine/ (this process)
              (backend.py)  │                 └─> upstream.py ──> any OpenAI-compatible address
                             ├─ fallback to a larger model, circuit breaker, budgets
                             ├─ rollout/: shadow and canary
                             └─ watch/: monitors of every answer, alerts, request log
    HTTP <──api/── events (Delta, Finish, Usage) <─┘

Everything between the API and a model is one call and one stream of events, whether the model runs
here, in vLLM or at somebody else's: so fallback, monitors and canary are written once.
``metrics.py`` and ``dashboard/`` show what happens.
"""
