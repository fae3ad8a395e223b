"""Entry points of other libraries (Transformers, AutoGPTQ), and text generation.

autoload -> transformers, auto_gptq -> load -> generation -> graph_steps
"""
