"""Damage small models in every source format of conversions, and read the result."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from tests.fuzz.bases import Base, Files, read_files
from tests.fuzz.damage import Damage
from tests.fuzz.folder_mutations import LABEL_VALUES
from tests.fuzz.judge import write_files
from tests.fuzz.mutations import MUTATORS
from tests.helpers.conversions import ATTENTION, MLP, write_source
from tests.helpers.tiny_gptq import TinyLinear

from halfbyte.convert.detect import open_source
from halfbyte.convert.run import ConversionConfig, convert
from halfbyte.errors import HalfbyteError

FORMATS = ("gguf", "awq", "mlx", "compressed-tensors")


def make_bases(folder: Path) -> list[Base]:
    """Convert a symmetric and an asymmetric model into each format."""
    bases = []
    for symmetric in (True, False):
        linears = {
            **{
                f"{ATTENTION}.{part}_proj": TinyLinear(
                    out_features=64, symmetric=symmetric, with_bias=True
                )
                for part in "qkvo"
            },
            f"{MLP}.down_proj": TinyLinear(in_features=96, out_features=64, symmetric=symmetric),
        }
        source = folder / f"source{symmetric}"
        write_source(source, linears, is_whole=True)
        for to in FORMATS:
            name = f"{to} {'symmetric' if symmetric else 'asymmetric'}"
            config = ConversionConfig(to=to, allow_error=True)
            convert(source, folder / name, config=config)
            bases.append(Base(name=name, files=read_files(folder / name), linears=linears))
    return bases


def damage(rng: random.Random, base: Base) -> tuple[Damage, Files]:
    """Damage a copy of a model in one random way."""
    while True:
        files = dict(base.files)
        if "model.gguf" in files:
            return rng.choice(GGUF_MUTATORS)(rng, files), files
        mutate = rng.choice([change_config, *MUTATORS])
        done = mutate(rng, base, files)
        if done is not None:
            return done, files


def change_config(rng: random.Random, base: Base, files: Files) -> Damage:
    """Replace any value in the config by an unexpected one."""
    content = json.loads(files["config.json"])
    place: Any = content
    path: list[Any] = []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        path.append(key)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            break
        place = inner
    place[key] = rng.choice(LABEL_VALUES)
    files["config.json"] = json.dumps(content).encode()
    return Damage(kind="config value", what=f"{path}: {place[key]!r}", may_fool=True)


def header_bytes(content: bytes) -> int:
    """Estimate the size of a GGUF file's header, which ends soon after the last tensor's name."""
    return content.rfind(b"blk.0") + 60


def flip_bits(rng: random.Random, files: Files) -> Damage:
    content = bytearray(files["model.gguf"])
    places = [rng.randrange(header_bytes(content)) for _ in range(rng.choice([1, 1, 2, 4]))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    files["model.gguf"] = bytes(content)
    return Damage(kind="gguf header bits", what=str(places))


def change_number(rng: random.Random, files: Files) -> Damage:
    """Overwrite a position in the header with a forged count, length, type or offset."""
    content = bytearray(files["model.gguf"])
    place = rng.randrange(4, header_bytes(content))
    code = rng.choice("IQ")
    value = rng.choice([0, 1, 2, 7, 9, 31, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
    packed = struct.pack(f"<{code}", value % 2 ** (32 if code == "I" else 64))
    content[place : place + len(packed)] = packed
    files["model.gguf"] = bytes(content)
    return Damage(kind="gguf number", what=f"{value} at {place}")


def cut(rng: random.Random, files: Files) -> Damage:
    content = files["model.gguf"]
    kept = rng.randrange(len(content))
    files["model.gguf"] = content[:kept] + (rng.randbytes(20) if rng.random() < 0.3 else b"")
    return Damage(kind="gguf cut", what=str(kept))


def flip_data(rng: random.Random, files: Files) -> Damage:
    content = bytearray(files["model.gguf"])
    place = rng.randrange(header_bytes(content), len(content))
    content[place : place + 4] = rng.randbytes(4)
    files["model.gguf"] = bytes(content)[: len(files["model.gguf"])]
    return Damage(kind="gguf data", what=str(place), may_fool=True)


def move_bytes(rng: random.Random, files: Files) -> Damage:
    """Remove or duplicate a run of bytes."""
    content = files["model.gguf"]
    place, length = rng.randrange(len(content)), rng.choice([1, 4, 8, 32])
    lost = rng.random() < 0.5
    middle = b"" if lost else content[place : place + length] * 2
    files["model.gguf"] = content[:place] + middle + content[place + length :]
    return Damage(kind="gguf bytes lost or doubled", what=f"{length} at {place}")


GGUF_MUTATORS = (flip_bits, flip_bits, change_number, change_number, cut, flip_data, move_bytes)


def judge(folder: Path, files: Files, source: Path | None) -> str:
    """Read a damaged model in every way that a conversion does.

    Args:
        folder: Where to write it; existing content is removed.
        files: The damaged model.
        source: Folder of a config and a tokenizer, to convert the model; None to only read it.

    Returns:
        "refused" or "read". Exceptions other than halfbyte's are not caught.
    """
    write_files(folder / "x", files)
    shutil.rmtree(folder / "out", ignore_errors=True)
    try:
        found = open_source(folder / "x")
        for name in found.linears:
            spec = found.describe(name)
            linear = found.load_linear(name)
            assert linear.dequantize().shape == (spec.out_features, spec.in_features)
        for name in found.others:
            found.load_other(name)
        if source is not None:
            config = ConversionConfig(to="gptq", allow_error=True)
            convert(folder / "x", folder / "out", config=config, base=source)
    except HalfbyteError:
        return "refused"
    return "read"
