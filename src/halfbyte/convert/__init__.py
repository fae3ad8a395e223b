"""Conversion of quantized models between formats without requantizing: codes and scales are kept.

::

    open_source(folder or .gguf) -> Source: CodedSpec per linear, other tensors, config
        -> reorder: fold act-order into the neighboring layers, where possible
        -> Target: which linears it can represent exactly, and why not the others
        -> one linear at a time: CodedLinear -> the target's tensors -> file

Each format has a module that reads and writes it: ``gptq``, ``awq``, ``mlx``,
``compressed_tensors``, ``gguf_*``; ``dense`` writes 16- or 32-bit weights.
"""
