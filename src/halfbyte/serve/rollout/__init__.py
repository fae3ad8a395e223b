"""A candidate beside the model in use: shadowed, tried on some requests, promoted or taken back.

::

    Observation ──shadow.py──> the candidate answers too ──> compared, thrown away
                ──canary.py──> who failed, by the arm that was drawn
                                 └─> sequential.py: evidence at every request ──> decision
    store_models.py   which version an alias means, and following it when it moves
"""
