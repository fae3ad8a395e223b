"""The quantized linear layer, its placement in a model, and fast decode steps built on it.

model_loading -> replace -> linear, fusion -> native_decoder (CPU) or gpu_step
"""
