"""The machine: facts for reports, memory, fast dtypes, devices, cache folder."""
