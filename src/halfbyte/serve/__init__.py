"""An OpenAI-compatible server for quantized models, with routing, monitoring and rollouts.

::

    HTTP ──api/──> Call ──routing/──> Backend ─┬─> embedded.py ──> engine/ (this process)
              (backend.py)  │                 └─> upstream.py ──> any OpenAI-compatible address
                             ├─ fallback to a larger model, circuit breaker, budgets
                             ├─ rollout/: shadow and canary
                             └─ watch/: monitors of every answer, alerts, request log
    HTTP <──api/── events (Delta, Finish, Usage) <─┘

Between the API and a model there is only one call and one stream of events, whether the model runs
in this process, in vLLM or on another server, so fallback, monitors and canaries are written once.
``metrics.py`` and ``dashboard/`` expose the server's state.
"""
