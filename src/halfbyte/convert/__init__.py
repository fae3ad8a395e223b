"""The same codes and scales in the spelling of another runtime, without rounding again.

::

    open_source(folder or .gguf) -> Source: CodedSpec per linear, other tensors, config
        -> reorder: act-order folded into the neighbouring layers, where it folds
        -> Target: what it can hold exactly, what not and why
        -> one linear at a time: CodedLinear -> the target's tensors -> the file

Each format has one file that reads and writes it: ``gptq``, ``awq``, ``mlx``,
``compressed_tensors``, ``gguf_*``; ``dense`` gives 16- or 32-bit weights.
"""
