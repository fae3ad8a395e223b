"""The CUDA kernels of compute capability 9.0, cut in every way that is worth a measurement."""

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
"""A candidate, and what is other than usual of the layer."""

MOST_STAGES = 16

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
    """A kernel, and what is measured of it."""

    module: ModuleType
    """Of halfbyte.kernels; it multiplies."""
    config: type[Config]
    source: str
    architecture: str
    rows: tuple[int, ...]
    """Of x, in the order of what is wanted most."""
    early_start: bool
    """Whether candidates are compared as they start early."""
    list_candidates: Callable[[], list[Config]]
    list_checks: Callable[[Sequence[Config]], list[Check]]
    list_check_rows: Callable[[Config], tuple[int, ...]]
    cut: Callable[[Config, LinearSpec, int], Iterator[Config]]
    """Every way to cut a product of so many rows that makes sense with a candidate."""


def name_config(config: Config) -> str:
    """A configuration as the name of an arm."""
    return json.dumps(asdict(config))


def name_candidate(config: Config) -> str:
    """The same of all ways to cut a product with it."""
    return json.dumps({name: value for name, value in asdict(config).items() if name != "splits"})


# ------------------------------------------------------------------------------- many rows

SPLITS = (0, 1, 2, 3, 4, 8)
ROWS_BLOCKS = [
    # rows, tiles, warpgroups, blocks, cluster; as many stages as there is room for, 16 at most
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
"""Rows and tiles, of two warpgroups, that are tried with clusters that share a tile too."""


def list_rows_candidates() -> list[Config]:
    """Every thread block of the sweep, with as many stages as there is room for."""
    found = []
    for rows, tiles, warpgroups, blocks, cluster in ROWS_BLOCKS:
        config = RowsConfig(
            rows=rows,
            tiles=tiles,
            warpgroups=warpgroups,
            stages=MOST_STAGES,
            blocks=blocks,
            cluster=cluster,
        )
        config = cuda_rows.fit_memory(config, gpu_checks.make_spec(), torch.float16)
        found.append(config)
        if warpgroups == 2 and (blocks, cluster) == (1, 1) and (rows, tiles) in JOINED_BLOCKS:
            found.extend(replace(config, splits=joined, joined=joined) for joined in JOINED)
    turns = [config for config in found if takes_turns(config)]
    return [*found, *(replace(config, turns=1) for config in turns)]


def takes_turns(config: RowsConfig) -> bool:
    """Whether it is tried with warpgroups that begin their products in turns."""
    alone = config.blocks == config.cluster == 1
    return config.rows >= 32 and config.warpgroups == 2 and config.tiles <= 2 and alone


def list_rows_checks(candidates: Sequence[RowsConfig]) -> list[Check]:
    """Each candidate on the plain kind of layer, some on all kinds."""
    plain = [
        (replace(config, splits=splits), KINDS[0])
        for config in candidates
        for splits in ((0, 3) if config.joined == 1 else (config.splits,))
    ]
    some = [config for config in candidates if (config.rows, config.tiles) in ((64, 2), (128, 1))]
    some = [config for config in some if config.joined < 3]
    return [*plain, *((config, kind) for config in some for kind in KINDS[1:])]


def list_rows_check_rows(config: RowsConfig) -> tuple[int, ...]:
    """Less than a tile, one, and several."""
    return 1, config.rows - 1, config.rows, 2 * config.rows + 3


def cut_rows(config: RowsConfig, spec: LinearSpec, rows: int) -> Iterator[Config]:
    """With every number of splits that keeps the processors busy."""
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
    # row tiles, tiles, warps out, warps in, blocks, spare; as many stages as there is room for
    (1, 2, 1, 16, 1, 0), (1, 4, 1, 8, 1, 0), (1, 4, 1, 16, 1, 0), (1, 2, 1, 8, 1, 0),
    (1, 1, 16, 1, 1, 0), (1, 2, 8, 1, 1, 0), (1, 2, 4, 4, 1, 0), (1, 4, 2, 4, 1, 0),
    (1, 4, 4, 2, 1, 0), (1, 4, 1, 8, 2, 0), (1, 4, 1, 8, 2, 1), (1, 2, 1, 8, 2, 1),
    (1, 4, 2, 4, 2, 1),
    # These cut some of the shapes into whole blocks for 128 multiprocessors.
    (1, 3, 1, 16, 1, 0), (1, 5, 1, 16, 1, 0), (1, 7, 1, 8, 1, 0), (1, 3, 1, 8, 2, 1),
    (2, 3, 1, 16, 1, 0), (2, 5, 1, 8, 1, 0), (2, 7, 1, 8, 1, 0), (2, 3, 1, 8, 2, 1),
    (2, 4, 1, 8, 1, 0), (2, 2, 2, 8, 1, 0), (2, 4, 2, 4, 1, 0), (2, 2, 4, 4, 1, 0),
    (2, 1, 16, 1, 1, 0), (2, 2, 8, 1, 1, 0), (2, 2, 1, 16, 1, 0), (2, 2, 2, 4, 2, 0),
    (2, 2, 2, 4, 2, 1), (2, 4, 1, 4, 2, 1),
]  # fmt: skip


def list_stream_candidates() -> list[Config]:
    """Every thread block of the sweep."""
    names = ("row_tiles", "tiles", "warps_out", "warps_in", "blocks", "spare")
    configs = [
        StreamConfig(stages=MOST_STAGES, **dict(zip(names, block, strict=True)))
        for block in STREAM_BLOCKS
    ]
    return [
        cuda_stream.fit_memory(config, gpu_checks.make_spec(), torch.float16) for config in configs
    ]


def list_stream_checks(candidates: Sequence[StreamConfig]) -> list[Check]:
    """Each candidate on the plain kind of layer, one of a size on all kinds."""
    blocks = ((1, 2, 1, 8), (2, 2, 2, 8))
    some = [
        config
        for config in candidates
        if (config.row_tiles, config.tiles, config.warps_out, config.warps_in) in blocks
    ]
    plain = [(config, KINDS[0]) for config in candidates]
    return [*plain, *((config, kind) for config in some for kind in KINDS[1:])]


def list_stream_check_rows(config: StreamConfig) -> tuple[int, ...]:
    """One, and up to what a thread block takes."""
    return 1, 8 * config.row_tiles - 1, 8 * config.row_tiles


def cut_stream(config: StreamConfig, spec: LinearSpec, rows: int) -> Iterator[Config]:
    """There is one way, where the rows fill its tiles."""
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
        cut=cut_rows,
    ),
    "stream": Kernel(
        module=cuda_stream,
        config=StreamConfig,
        source="multiply_stream.cu",
        architecture="sm_90",
        rows=(1, 16, 8, 4, 2),
        early_start=True,  # what is left to the next launch shows only then
        list_candidates=list_stream_candidates,
        list_checks=list_stream_checks,
        list_check_rows=list_stream_check_rows,
        cut=cut_stream,
    ),
}
