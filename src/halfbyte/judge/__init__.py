"""May this model replace that one? tasks, text -> answers of each -> statistics -> verdict.

``compare.py`` is the entry. One model is in memory at a time: the base answers first, its answers
are kept on disk (``cache.py``), then the candidate answers the same token ids.
"""
