"""Which model answers, and what happens where it cannot.

::

    Call ──router.py──> attempt.py (held back, watched, timed) ──> events
              │             on a cause: the next model
              ├─ breaker.py     a model that keeps failing is left alone
              ├─ budget.py      of the larger model, and of second tries
              └─ confidence.py  a threshold from `halfbyte serve calibrate`
"""
