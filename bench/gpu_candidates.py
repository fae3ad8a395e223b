"""Candidate configurations of the CUDA kernels for compute capability 9.0, for the sweep."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

import gpu_checks
from halfbyte.kernels import cuda_rows, cuda_stream
from halfbyte.kernels.contract import LinearSpec
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig

Config = RowsConfig | StreamConfig
Check = tuple[Config, dict[str, Any]]
"""A candidate, and the fields in which the layer differs from the default."""

MAX_STAGES = 16

KINDS: list[dict[str, Any]] = [
    {},
    {"group_size": 32, "symmetric": False},
    {"group_size": 64, "symmetric": False, "act_order": True, "dtype": torch.float16},
    {"group_size": 1152},
    {"bits": 8, "group_size": 64, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False, "dtype": torch.float16},
    {"bits": 2},
]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel, and what to measure of it."""

    module: ModuleType
    """Module of halfbyte.kernels with ``multiply``."""
    config: type[Config]
    source: str
    architecture: str
    rows: tuple[int, ...]
    """Numbers of rows of x, most important first."""
    early_start: bool
    """Whether candidates are compared with early start."""
    list_candidates: Callable[[], list[Config]]
    list_checks: Callable[[Sequence[Config]], list[Check]]
    list_check_rows: Callable[[Config], tuple[int, ...]]
    list_splits: Callable[[Config, LinearSpec, int], Iterator[Config]]
    """Lists a candidate with every useful number of splits, for this many rows."""


def name_config(config: Config) -> str:
    """Return the arm name of a configuration."""
    return json.dumps(asdict(config))


def name_candidate(config: Config) -> str:
    """Return a configuration's name without its number of splits."""
    return json.dumps({name: value for name, value in asdict(config).items() if name != "splits"})


# ------------------------------------------------------------------------------- many rows

SPLITS = (0, 1, 2, 3, 4, 8)
ROWS_BLOCKS = [
    # rows, tiles, warpgroups, blocks, cluster; as many stages as fit, 16 at most
    (8, 2, 2, 1, 1), (8, 4, 2, 1, 1), (8, 2, 2, 2, 1), (8, 2, 4, 1, 1),
    (16, 2, 2, 1, 1), (16, 4, 2, 1, 1), (16, 1, 4, 1, 1), (16, 2, 2, 2, 1), (16, 2, 4, 1, 1),
    (32, 2, 2, 1, 1), (32, 1, 2, 2, 1), (32, 4, 2, 1, 1),
    (64, 2, 2, 1, 1), (64, 1, 2, 2, 1), (64, 4, 2, 1, 1), (64, 1, 3, 1, 1),
    (64, 2, 2, 1, 2),
    (128, 2, 2, 1, 1), (128, 1, 2, 1, 1), (128, 1, 3, 1, 1), (128, 2, 2, 1, 2), (128, 1, 2, 1, 2),
    (256, 1, 2, 1, 1), (256, 1, 2, 1, 2),
]  # fmt: skip
JOINED = (2, 3, 4)
JOINED_BLOCKS = ((64, 2), (128, 2), (128, 1), (256, 1))
"""Rows and tiles, of two warpgroups, that are also tried with clusters that share a tile."""


def list_rows_candidates() -> list[Config]:
    """List every thread block of the sweep, with as many stages as fit."""
    found = []
    for rows, tiles, warpgroups, blocks, cluster in ROWS_BLOCKS:
        config = RowsConfig(
            rows=rows,
            tiles=tiles,
            warpgroups=warpgroups,
            stages=MAX_STAGES,
            blocks=blocks,
            cluster=cluster,
        )
        config = cuda_rows.fit_memory(config, gpu_checks.make_spec(), torch.float16)
        found.append(config)
        if warpgroups == 2 and (blocks, cluster) == (1, 1) and (rows, tiles) in JOINED_BLOCKS:
            found.extend(replace(config, splits=joined, joined=joined) for joined in JOINED)
    turns = [config for config in found if can_take_turns(config)]
    return [*found, *(replace(config, turns=1) for config in turns)]


def can_take_turns(config: RowsConfig) -> bool:
    """Whether to also try it with warpgroups that start their products in turns."""
    alone = config.blocks == config.cluster == 1
    return config.rows >= 32 and config.warpgroups == 2 and config.tiles <= 2 and alone


def list_rows_checks(candidates: Sequence[RowsConfig]) -> list[Check]:
    """List checks: all candidates on the default layer, some on all kinds."""
    plain = [
        (replace(config, splits=splits), KINDS[0])
        for config in candidates
        for splits in ((0, 3) if config.joined == 1 else (config.splits,))
    ]
    some = [config for config in candidates if (config.rows, config.tiles) in ((64, 2), (128, 1))]
    some = [config for config in some if config.joined < 3]
    return [*plain, *((config, kind) for config in some for kind in KINDS[1:])]


def list_rows_check_rows(config: RowsConfig) -> tuple[int, ...]:
    """Return numbers of rows: less than a tile, exactly one, and several."""
    return 1, config.rows - 1, config.rows, 2 * config.rows + 3


def list_rows_splits(config: RowsConfig, spec: LinearSpec, rows: int) -> Iterator[Config]:
    """Yield the candidate with every number of splits that keeps the processors busy."""
    if config.rows > max(rows, 8) or rows > (16 if config.rows >= 128 else 2) * config.rows:
        return
    tiles = config.count_tiles(spec, rows)
    for splits in SPLITS if config.joined == 1 else (config.joined,):
        runs = tiles * splits
        if splits > 1 and (runs > 4 * 132 or spec.in_features // splits < 512):
            continue
        if splits == 1 and runs < 64:
            continue
        found = replace(config, splits=splits)
        if cuda_rows.find_mismatch(found, spec, rows) is None:
            yield found


# ------------------------------------------------------------------------------- few rows

STREAM_BLOCKS = [
    # row tiles, tiles, warps out, warps in, blocks, spare; as many stages as fit
    (1, 2, 1, 16, 1, 0), (1, 4, 1, 8, 1, 0), (1, 4, 1, 16, 1, 0), (1, 2, 1, 8, 1, 0),
    (1, 1, 16, 1, 1, 0), (1, 2, 8, 1, 1, 0), (1, 2, 4, 4, 1, 0), (1, 4, 2, 4, 1, 0),
    (1, 4, 4, 2, 1, 0), (1, 4, 1, 8, 2, 0), (1, 4, 1, 8, 2, 1), (1, 2, 1, 8, 2, 1),
    (1, 4, 2, 4, 2, 1),
    # These divide some of the shapes into whole blocks for 128 multiprocessors.
    (1, 3, 1, 16, 1, 0), (1, 5, 1, 16, 1, 0), (1, 7, 1, 8, 1, 0), (1, 3, 1, 8, 2, 1),
    (2, 3, 1, 16, 1, 0), (2, 5, 1, 8, 1, 0), (2, 7, 1, 8, 1, 0), (2, 3, 1, 8, 2, 1),
    (2, 4, 1, 8, 1, 0), (2, 2, 2, 8, 1, 0), (2, 4, 2, 4, 1, 0), (2, 2, 4, 4, 1, 0),
    (2, 1, 16, 1, 1, 0), (2, 2, 8, 1, 1, 0), (2, 2, 1, 16, 1, 0), (2, 2, 2, 4, 2, 0),
    (2, 2, 2, 4, 2, 1), (2, 4, 1, 4, 2, 1),
]  # fmt: skip


def list_stream_candidates() -> list[Config]:
    """List every thread block of the sweep."""
    names = ("row_tiles", "tiles", "warps_out", "warps_in", "blocks", "spare")
    configs = [
        StreamConfig(stages=MAX_STAGES, **dict(zip(names, block, strict=True)))
        for block in STREAM_BLOCKS
    ]
    return [
        cuda_stream.fit_memory(config, gpu_checks.make_spec(), torch.float16) for config in configs
    ]


def list_stream_checks(candidates: Sequence[StreamConfig]) -> list[Check]:
    """List checks: all candidates on the default layer, one per size on all kinds."""
    blocks = ((1, 2, 1, 8), (2, 2, 2, 8))
    some = [
        config
        for config in candidates
        if (config.row_tiles, config.tiles, config.warps_out, config.warps_in) in blocks
    ]
    plain = [(config, KINDS[0]) for config in candidates]
    return [*plain, *((config, kind) for config in some for kind in KINDS[1:])]


def list_stream_check_rows(config: StreamConfig) -> tuple[int, ...]:
    """Return numbers of rows: one, and around a full thread block."""
    return 1, 8 * config.row_tiles - 1, 8 * config.row_tiles


def list_stream_splits(config: StreamConfig, spec: LinearSpec, rows: int) -> Iterator[Config]:
    """Yield the candidate if the rows fill its tiles."""
    fits = 8 * config.row_tiles - 8 < rows <= 8 * config.row_tiles
    if fits and cuda_stream.find_mismatch(config, spec) is None:
        yield config


KERNELS = {
    "rows": Kernel(
        module=cuda_rows,
        config=RowsConfig,
        source="multiply_rows.cu",
        architecture="sm_90a",
        rows=(64, 128, 256, 512, 32, 1024, 16, 8, 1, 4096),
        early_start=False,
        list_candidates=list_rows_candidates,
        list_checks=list_rows_checks,
        list_check_rows=list_rows_check_rows,
        list_splits=list_rows_splits,
    ),
    "stream": Kernel(
        module=cuda_stream,
        config=StreamConfig,
        source="multiply_stream.cu",
        architecture="sm_90",
        rows=(1, 16, 8, 4, 2),
        early_start=True,  # the work left to the next launch shows only then
        list_candidates=list_stream_candidates,
        list_checks=list_stream_checks,
        list_check_rows=list_stream_check_rows,
        list_splits=list_stream_splits,
    ),
}
