"""Rolls out a candidate: shadows it, tries it on some requests, promotes it or rolls it back.

::

    Observation ──shadow.py──> the candidate answers a copy ──> compared, discarded
                ──canary.py──> failures, by the arm that was drawn
                                 └─> sequential.py: evidence after every request ──> decision
    evidence.py           saves both, and resumes them after a restart
    trial.py              a canary from start to end: opens, promotes or closes the candidate
    store_models.py       resolves versions in a store, and switches when their alias moves
    adapter_transfer.py   loads adapters into the model that takes over
"""
