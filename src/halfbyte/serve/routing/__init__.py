"""Decides which model answers a request, and falls back to the next one if it fails.

::

    Call ──router.py──> attempt.py (buffers, monitors, enforces timeouts) ──> events
              │             on failure: the next model
              ├─ breaker.py     stops sending requests to a model that keeps failing
              ├─ budget.py      limits fallback and retries; spending_file.py saves what is spent
              └─ confidence.py  a threshold from `halfbyte serve calibrate`
"""
