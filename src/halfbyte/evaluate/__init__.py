"""What quantization cost: perplexity, divergence."""
