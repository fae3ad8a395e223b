"""y = x @ dequantize(W).T: op (the contract) -> registry (who runs it, and why) -> kernels."""
