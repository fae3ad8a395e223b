"""Mutations of one safetensors file: its header, its data and its tensors."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.bases import Base, Files
from tests.fuzz.damage import JSON_GARBAGE, Damage


def parse_shard(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def build_shard(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensors_of(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def changeable(base: Base, tensor: str) -> bool:
    """Return whether other bytes in this tensor are also valid."""
    suffix = tensor.rpartition(".")[2]
    if suffix == "qzeros":
        return not base.is_symmetric
    return suffix in ("qweight", "scales", "bias")


def flip_header(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    size = int.from_bytes(files[name][:8], "little")
    content = bytearray(files[name])
    places = [rng.randrange(8, 8 + size) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
    for place in places:
        if rng.random() < 0.5:
            content[place] ^= 1 << rng.randrange(8)
        else:
            content[place] = rng.choice(b'0123456789{}[]",:. \x00\xff-eFIBUq')
    files[name] = bytes(content)
    return Damage(kind="header bytes", what=f"{name} at {places}")


def change_length(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    size = int.from_bytes(files[name][:8], "little")
    wrong = rng.choice(
        [0, 1, size - 1, size + 1, size + 8, 2**31, 2**63, 2**64 - 1, rng.getrandbits(20)]
    )
    if wrong == size:
        return change_length(rng, base, files)
    files[name] = wrong.to_bytes(8, "little") + files[name][8:]
    return Damage(kind="header length", what=f"{name}: {wrong} for {size}")


def truncate(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    kept = rng.choice([0, 4, 8, len(files[name]) - 1, rng.randrange(len(files[name]))])
    files[name] = files[name][:kept]
    return Damage(kind="truncated", what=f"{name} to {kept} bytes")


def extend(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    files[name] += rng.randbytes(rng.choice([1, 2, 64]))
    return Damage(kind="extended", what=name)


def flip_data(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    tensor = rng.choice(tensors_of(header))
    begin, end = header[tensor]["data_offsets"]
    start = len(files[name]) - len(data)
    content = bytearray(files[name])
    place = rng.randrange(begin, end)
    content[start + place] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)
    return Damage(
        kind=f"data bit ({_short_suffix(tensor)})",
        what=f"{tensor} at {place - begin}",
        may_fool=changeable(base, tensor),
    )


def _short_suffix(tensor: str) -> str:
    suffix = tensor.rpartition(".")[2]
    return suffix if suffix != "weight" else "dense"


def overwrite_data(rng: random.Random, base: Base, files: Files) -> Damage:
    """Overwrite a run of bytes with zeros or noise, as a lost sector does."""
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    length = rng.choice([4, 16, 64, 256])
    begin = rng.randrange(len(data))
    noise = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    changed = (data[:begin] + noise + data[begin + length :])[: len(data)]
    files[name] = files[name][: len(files[name]) - len(data)] + changed
    hit = [
        tensor
        for tensor in tensors_of(header)
        if header[tensor]["data_offsets"][0] < begin + length
        and header[tensor]["data_offsets"][1] > begin
    ]
    # Several columns may swap their groups, which gives another valid order.
    reordered = base.has_act_order and any(tensor.endswith(".g_idx") for tensor in hit)
    return Damage(
        kind="data overwritten",
        what=f"{hit} of {name}",
        may_fool=reordered or any(changeable(base, tensor) for tensor in hit),
    )


def swap_names(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    first, second = rng.sample(tensors_of(header), 2)
    alike = all(header[first][key] == header[second][key] for key in ("dtype", "shape"))
    header[first], header[second] = header[second], header[first]
    files[name] = build_shard(header, data)
    return Damage(kind="tensors swapped", what=f"{first} and {second}", may_fool=alike)


def change_shape(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    tensor = rng.choice(tensors_of(header))
    shape = header[tensor]["shape"]
    count = 1
    for size in shape:
        count *= size
    divisor = rng.choice([d for d in range(1, count + 1) if count % d == 0])
    options: list[Any] = [
        shape[::-1],
        [count],
        [divisor, count // divisor],
        [*shape, 1],
        [1, *shape],
        [size + 1 for size in shape],
        [],
        [-1, *shape[1:]],
        [2**63, *shape[1:]],
        [str(size) for size in shape],
        None,
        [0],
    ]
    header[tensor]["shape"] = rng.choice(options)
    files[name] = build_shard(header, data)
    return Damage(kind="shape", what=f"{tensor}: {header[tensor]['shape']} for {shape}")


def change_dtype(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    tensor = rng.choice(tensors_of(header))
    old = header[tensor]["dtype"]
    new = rng.choice(["F16", "BF16", "F32", "I32", "U32", "I16", "U8", "F8_E4M3", "F4", "x", 16])
    header[tensor]["dtype"] = new
    files[name] = build_shard(header, data)
    floats = {"F16", "BF16"}
    fooled = tensor.endswith((".scales", ".bias")) and {old, new} == floats
    return Damage(kind="element type", what=f"{tensor}: {new} for {old}", may_fool=fooled)


def change_offsets(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    first, second = rng.sample(tensors_of(header), 2)
    begin, end = header[first]["data_offsets"]
    options: list[Any] = [
        [begin + 1, end + 1],
        [begin, end + 4],
        [end, begin],
        [-4, end],
        [begin, 2**64],
        header[second]["data_offsets"],
        [begin],
        "0",
        [float(begin), float(end)],
    ]
    header[first]["data_offsets"] = rng.choice(options)
    files[name] = build_shard(header, data)
    return Damage(kind="offsets", what=f"{first}: {header[first]['data_offsets']}")


def remove_tensor(rng: random.Random, base: Base, files: Files) -> Damage:
    """Remove a tensor and close the gap, as a tool that lost it would."""
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    tensor = rng.choice(tensors_of(header))
    begin, end = header.pop(tensor)["data_offsets"]
    for other in tensors_of(header):
        offsets = header[other]["data_offsets"]
        if offsets[0] >= end:
            header[other]["data_offsets"] = [offset - (end - begin) for offset in offsets]
    files[name] = build_shard(header, data[:begin] + data[end:])
    return Damage(kind="tensor removed", what=tensor)


def add_tensor(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    module = rng.choice(list(base.linears))
    added = rng.choice(
        [f"{module}.weight", f"{module}.perm", "x.scales", "x.g_idx", "y.qweight", "z.bias"]
    )
    header[added] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    files[name] = build_shard(header, data + b"abcd")
    return Damage(kind="tensor added", what=added)


def rename_tensor(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    old = rng.choice(tensors_of(header))
    other = rng.choice(tensors_of(header))
    new = rng.choice([old + "x", old[:-1], other.upper(), "", "model." + old, old.replace(".", "")])
    if new in header:
        return Damage(kind="tensor renamed", what="nothing")
    header[new] = header.pop(old)
    files[name] = build_shard(header, data)
    return Damage(kind="tensor renamed", what=f"{old} to {new}")


def repeat_key(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    header, data = parse_shard(files[name])
    first, second = rng.sample(tensors_of(header), 2)
    text = json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}"
    files[name] = build_shard(text.encode(), data)
    return Damage(kind="key twice", what=first)


def garbage_header(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(base.weight_files)
    _, data = parse_shard(files[name])
    files[name] = build_shard(rng.choice(JSON_GARBAGE), data)
    return Damage(kind="header garbage", what=name)
