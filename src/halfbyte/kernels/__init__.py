"""Quantized linears, y = x @ dequantize(W).T: op -> registry (selects a kernel) -> kernels."""
