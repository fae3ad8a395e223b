"""Decides whether a candidate may replace its base: items -> answers -> statistics -> verdict.

``compare.py`` is the entry point. One model is in memory at a time: the base runs first and its
answers are cached on disk (``model_cache.py``), then the candidate runs on the same token ids.
"""
