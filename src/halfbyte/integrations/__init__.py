"""Entry points of other libraries (Transformers, AutoGPTQ), and text generation."""
