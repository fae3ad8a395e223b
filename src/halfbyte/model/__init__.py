"""A Hugging Face model, one block at a time: blocks -> weights -> stream."""
