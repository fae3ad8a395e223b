"""What is noticed about answers, and who is told.

::

    events ──observation.py──> Observation ─┬─> monitors.py   what is wrong with this answer
                                            ├─> drift.py      what has changed over many
                                            ├─> request_log.py   kept, redacted
                                            └─> ../metrics.py    counted
    probes.py, oracle.py   ask now and then ──> alerts.py ──> log, metric, webhook

Nothing here may fail or slow a request: what cannot be written or sent is counted and dropped.
"""
