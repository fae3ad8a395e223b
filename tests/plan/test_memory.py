"""Planned bytes compared with files on disk, manual calculations and published tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from tests.helpers.checkpoints import Recipe, read_tensors, tiny_llama_config, write_checkpoint

from halfbyte.cli.main import main
from halfbyte.errors import ConfigError
from halfbyte.plan.devices import fit_devices, parse_device
from halfbyte.plan.memory import Load, bits_per_weight, cache_bytes, plan_memory
from halfbyte.plan.shapes import parse_config, read_shapes

GIB = 1 << 30


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_bytes_match_the_checkpoint(tmp_path, bits):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(bits=bits, group_size=32))
    shapes = read_shapes(tmp_path)
    assert (shapes.stored_bits, shapes.stored_group_size) == (bits, 32)
    plan = plan_memory(shapes, Load(bits=bits, group_size=32))
    stored = sum(t.numel() * t.element_size() for t in read_tensors(tmp_path).values())
    assert plan.weights == stored


@pytest.mark.parametrize(
    ("name", "g128", "g32", "token_kib"),
    [
        ("7B", 3.62, 3.98, 512),
        ("13B", 6.75, 7.44, 800),
        ("70B", 34.1, 37.8, 320),
        ("8B", 5.33, 5.72, 128),
    ],
)
def test_sizes_match_the_planning_table(name, g128, g32, token_kib):
    shapes = read_shapes(name)
    for group, gib in ((128, g128), (32, g32)):
        plan = plan_memory(shapes, Load(group_size=group))
        # The table leaves out the group indices, 4 bytes per input: under a percent.
        assert plan.weights / GIB == pytest.approx(gib, rel=0.01)
        assert plan.weights / GIB >= gib - 0.06
    assert cache_bytes(shapes, 1, "float16") == token_kib * 1024


def test_cache_of_many_requests_outweighs_the_weights():
    plan = plan_memory(read_shapes("7B"), Load(context=4096, requests=16))
    assert plan.cache == 32 * GIB
    assert plan.cache / plan.weights > 8


def test_bits_per_weight_are_four_and_twenty_over_the_group():
    shapes = read_shapes("7B")
    indices = 8 * 4 / 4096  # g_idx: 4 bytes per input, shared by all rows
    assert bits_per_weight(shapes, Load(group_size=128)) == pytest.approx(4 + 20 / 128, abs=indices)


def test_sliding_layers_cache_at_most_their_window():
    config = json.loads(tiny_llama_config().to_json_string(use_diff=False))
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    shapes = parse_config(config, "m")
    per_layer = 2 * 2 * 16 * 2  # keys and values, 2 heads of 16, fp16
    assert cache_bytes(shapes, 10, "float16") == 2 * 10 * per_layer
    assert cache_bytes(shapes, 50, "float16") == (50 + 16) * per_layer
    assert cache_bytes(shapes, 50, "fp8") * 2 == cache_bytes(shapes, 50, "float16")


def test_reported_maximum_fits_and_one_more_does_not():
    shapes = read_shapes("8B")
    load = Load(context=8192, requests=8)
    device = parse_device("24GB")
    (fit,) = fit_devices(shapes, load, [device])
    for field, most in (("requests", fit.max_requests), ("context", fit.max_context)):
        assert plan_memory(shapes, replace(load, **{field: most})).total <= device.bytes
        more = plan_memory(shapes, replace(load, **{field: most + 1})).total
        assert more > device.bytes or most == shapes.context
    assert fit.fits
    assert fit.bits == 8  # 16 bits and 8.6 GB of cache are too much
    assert fit.free_bytes == device.bytes - plan_memory(shapes, load).total


def test_number_of_gpus_for_70b():
    load = Load(context=4096, requests=1)
    fits = fit_devices(read_shapes("70B"), load, [parse_device("80GB"), parse_device("24GB")])
    assert [fit.cards for fit in fits] == [1, 2]
    fp16 = fit_devices(read_shapes("70B"), Load(bits=16), [parse_device("80GB")])
    assert [fit.cards for fit in fp16] == [2]


@pytest.mark.parametrize(
    ("text", "gib"), [("24GB", 24), ("24", 24), ("rtx4090", 24), ("4090", 24), ("h100", 80)]
)
def test_device_by_size_or_name(text, gib):
    assert parse_device(text).bytes == int(gib * GIB * 0.92)


def test_unknown_device_lists_known_gpus():
    with pytest.raises(ConfigError, match=r"24GB.*RTX 4090"):
        parse_device("toaster")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"requests": 0}, "requests is 0"),
        ({"cache_type": "int3"}, "'int3'"),
    ],
)
def test_invalid_load_is_refused(changes, part):
    with pytest.raises(ConfigError, match=part):
        Load(**changes)


def test_command_prints_bytes_as_json(capsys):
    words = "plan 7B --bits 4 --group-size 128 --gpu 24GB --context 8192 --requests 8 --json"
    assert main(words.split()) == 0
    values = json.loads(capsys.readouterr().out)
    load = Load(context=8192, requests=8)
    assert values["bytes"] == plan_memory(read_shapes("7B"), load).to_dict()
    assert values["devices"][0]["name"] == "24 GB card"
    assert values["devices"][0]["fits"] is False
    assert "times the memory of the weights" in values["notes"][0]


@pytest.mark.parametrize("name", ["bits", "group-size", "context"])
def test_command_does_not_replace_zero_by_a_default(name, capsys):
    assert main(["plan", "7B", f"--{name}", "0"]) == 2
    assert f"{name.replace('-', '_')} is 0; " in capsys.readouterr().err


def test_command_prints_tables(capsys):
    assert main(["plan", "70B", "--gpu", "H100"]) == 0
    out = capsys.readouterr().out
    for part in ("70B: 69 billion", "KV cache", "1.3 GB", "H100", "34.2 GB"):
        assert part in out


def test_plan_imports_no_torch():
    program = (
        "import sys\nfrom halfbyte.cli.main import main\nmain(['plan', '7B', '--json'])\n"
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
