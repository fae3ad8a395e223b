"""Monitors answers, and reports what is wrong.

::

    events ──observation.py──> Observation ─┬─> monitors.py      checks of one answer
                                            ├─> drift.py         changes over many answers
                                            ├─> request_log.py   stored, redacted
                                            ├─> ../metrics.py    counted
                                            ├─> history.py       kept 15 minutes, for the dashboard
                                            └─> health.py        breakers, budget, memory
    probes.py, oracle.py   run from time to time ──> alerts.py ──> log, metric, webhook

Nothing here may fail or slow down a request: what cannot be written or sent is counted and dropped.
"""
