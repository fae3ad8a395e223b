"""Measures the loss from quantization: loading, windows -> logits -> perplexity, divergence."""
