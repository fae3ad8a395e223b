"""Adapters on a quantized base: train them, repair with them, merge them.

::

    examples ──data──> token ids, labels ──train──> a plain PEFT adapter ──merge──> one model
    base, original, text ──repair──> an adapter that gives back part of what rounding took
"""
