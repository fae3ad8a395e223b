"""The quantized linear layer, its placement in a model, and fast decode steps built on it."""
