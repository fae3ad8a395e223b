"""Mutations of a checkpoint folder: its files, its index and its configs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.bases import Base, Files
from tests.fuzz.damage import JSON_GARBAGE, Damage

INDEX = "model.safetensors.index.json"

LABEL_VALUES: tuple[Any, ...] = (
    None, 0, 1, -1, 2, 3, 4, 5, 8, 16, 32, 33, 48, 64, 10**30, 4.0, True, False, "", "4", "gptq",
    "gptq_v2", "awq", "marlin", [], ["x"], [["x", 1]], {}, {"-:.*": {}}, {"(": {}},
    {"+:.*": {"bits": 8}}, {"+:.*": {"sym": 3, "bits": [], "group_size": "x"}}, {"x": 1},
)  # fmt: skip


def garbage_file(rng: random.Random, base: Base, files: Files) -> Damage:
    """Replace any file of the folder by invalid content."""
    name = rng.choice(list(files))
    files[name] = rng.choice([*JSON_GARBAGE, rng.randbytes(rng.randrange(1, 200))])
    # An empty config is not an error; the dialect of asymmetric zeros is unknown then.
    return Damage(kind="file garbage", what=name, may_fool=_depends_on(base, name))


def _depends_on(base: Base, name: str) -> bool:
    """Return whether the weights depend on this config file."""
    return name in base.config_files and not (base.is_symmetric and base.has_g_idx)


def remove_file(rng: random.Random, base: Base, files: Files) -> Damage:
    name = rng.choice(list(files))
    del files[name]
    return Damage(kind="file removed", what=name, may_fool=_depends_on(base, name))


def exchange_files(rng: random.Random, base: Base, files: Files) -> Damage:
    first, second = rng.sample(list(files), 2) if len(files) > 1 else [next(iter(files))] * 2
    files[first], files[second] = files[second], files[first]
    fooled = _depends_on(base, first) or _depends_on(base, second)
    return Damage(kind="files exchanged", what=f"{first} and {second}", may_fool=fooled)


def add_file(rng: random.Random, base: Base, files: Files) -> Damage:
    source = rng.choice(base.weight_files)
    name = rng.choice(
        ["model.safetensors", "other.safetensors", "x.safetensors.index.json", "pytorch_model.bin"]
    )
    if name in files:
        return Damage(kind="file added", what="nothing")
    files[name] = files[source]
    return Damage(kind="file added", what=f"{name} like {source}")


def lie_in_index(rng: random.Random, base: Base, files: Files) -> Damage | None:
    if INDEX not in files:
        return None
    index = json.loads(files[INDEX])
    weight_map = index["weight_map"]
    tensor, other = rng.sample(list(weight_map), 2)
    lies: list[Callable[[], Any]] = [
        lambda: weight_map.pop(tensor),
        lambda: weight_map.update({tensor: weight_map[other]}),
        lambda: weight_map.update({tensor: rng.choice(["../" + weight_map[other], "/etc/passwd"])}),
        lambda: weight_map.update({tensor: rng.choice([None, 3, [], {}, "", ".", "..", "a/b"])}),
        lambda: weight_map.update({tensor: "gone.safetensors"}),
        lambda: weight_map.update({tensor + "x": weight_map[tensor]}),
        lambda: weight_map.update({tensor: weight_map[tensor] + "\0"}),
        lambda: index.update({"weight_map": rng.choice([None, [], {}, "x", list(weight_map)])}),
        lambda: index.pop("weight_map"),
    ]
    rng.choice(lies)()
    files[INDEX] = json.dumps(index).encode()
    return Damage(kind="index", what=tensor)


def change_label(rng: random.Random, base: Base, files: Files) -> Damage | None:
    if not base.config_files:
        return None
    name = rng.choice(base.config_files)
    content = json.loads(files[name])
    labels = content["quantization_config"] if name == "config.json" else content
    extra = ["dynamic", "w_bit", "q_group_size", "format", "pack_dtype", "version"]
    key = rng.choice([*labels, *extra])
    if rng.random() < 0.2:
        labels.pop(key, None)
    else:
        labels[key] = rng.choice(LABEL_VALUES)
    files[name] = json.dumps(content).encode()
    fooled = (not base.is_symmetric and key in ("checkpoint_format", "format")) or (
        not base.has_g_idx and key in ("group_size", "q_group_size")
    )
    return Damage(kind="label", what=f"{key}: {labels.get(key)!r} in {name}", may_fool=fooled)


def flip_text(rng: random.Random, base: Base, files: Files) -> Damage | None:
    texts = [name for name in files if name.endswith(".json")]
    if not texts:
        return None
    name = rng.choice(texts)
    content = bytearray(files[name])
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)
    return Damage(kind="text bit", what=f"{name} at {place}", may_fool=_depends_on(base, name))
