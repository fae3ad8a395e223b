"""Will it fit, and on what? config.json -> shapes -> bytes of weights and cache -> devices.

Arithmetic only: nothing is downloaded, nothing is loaded, torch is not imported.
"""
