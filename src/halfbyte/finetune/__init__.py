"""Adapters on a quantized base model: training, error correction and merging.

::

    examples ──data──> token ids, labels ──train──> a plain PEFT adapter ──merge──> one model
    base, original, text ──repair──> an adapter that corrects part of the quantization error
"""
