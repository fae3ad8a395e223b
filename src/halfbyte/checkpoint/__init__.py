"""Codes <-> files on disk, in the standard GPTQ layout: layout -> write -> read -> check."""
