"""Estimates of the memory a model needs: config.json -> shapes -> bytes -> devices it fits on.

Arithmetic only: nothing is downloaded or loaded, and torch is not imported.
"""
