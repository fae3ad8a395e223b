"""What quantization cost: loading, windows -> logits -> window_mean -> perplexity, divergence."""
