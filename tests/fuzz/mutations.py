"""All mutations of a checkpoint. Each must be refused or change nothing, unless it may fool."""

from __future__ import annotations

import random

from tests.fuzz.bases import Base, Files
from tests.fuzz.damage import Damage, Mutator
from tests.fuzz.folder_mutations import (
    add_file,
    change_label,
    exchange_files,
    flip_text,
    garbage_file,
    lie_in_index,
    remove_file,
)
from tests.fuzz.shard_mutations import (
    add_tensor,
    change_dtype,
    change_length,
    change_offsets,
    change_shape,
    extend,
    flip_data,
    flip_header,
    garbage_header,
    overwrite_data,
    remove_tensor,
    rename_tensor,
    repeat_key,
    swap_names,
    truncate,
)

MUTATORS: tuple[Mutator, ...] = (
    flip_header,
    flip_header,
    flip_data,
    flip_data,
    change_label,
    flip_text,
    lie_in_index,
    change_length,
    truncate,
    extend,
    overwrite_data,
    swap_names,
    change_shape,
    change_dtype,
    change_offsets,
    remove_tensor,
    add_tensor,
    rename_tensor,
    repeat_key,
    garbage_header,
    garbage_file,
    remove_file,
    exchange_files,
    add_file,
)
"""The first two are listed twice, because they can hit the most places."""


def damage(rng: random.Random, base: Base) -> tuple[Damage, Files]:
    """Damage a copy of a checkpoint in one random way."""
    while True:
        files = dict(base.files)
        done = rng.choice(MUTATORS)(rng, base, files)
        if done is not None:
            return done, files
