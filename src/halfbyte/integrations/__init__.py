"""Other people's entry points: transformers, auto_gptq."""
