"""Reading, writing and checking checkpoints in the standard GPTQ layout.

``layout`` -> ``write`` -> ``read`` -> ``check``
"""
