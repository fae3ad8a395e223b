"""The quantized linear layer and how it gets into a model: linear -> replace."""
