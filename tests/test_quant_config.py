from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig, ResourceConfig, Scheme

MODULE = "model.layers.3.mlp.down_proj"


def test_defaults_are_the_safe_artifact():
    scheme = QuantConfig().scheme_for(MODULE)
    assert scheme == Scheme(bits=4, group_size=128, symmetric=True)
    assert not QuantConfig().desc_act


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down_proj=bits:8", Override(pattern="down_proj", bits=8)),
        (
            r"layers\.[0-3]\.=bits:2,group_size:-1,symmetric:FALSE",
            Override(pattern=r"layers\.[0-3]\.", bits=2, group_size=-1, symmetric=False),
        ),
        ("a=b=symmetric:true", Override(pattern="a=b", symmetric=True)),
    ],
)
def test_override_is_read_from_the_command_line(text, expected):
    assert Override.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down_proj", "Cannot read override 'down_proj': it has no 'PATTERN=KEY:VALUE'"),
        ("=bits:8", "override '=bits:8'"),
        ("x=", "override 'x='"),
        ("x=bits", "Cannot read 'bits' in override 'x=bits'. Allowed keys: bits, group_size"),
        ("x=bit:8", "Cannot read 'bit:8' in override"),
        ("x=bits:four", "bits in override 'x=bits:four' is 'four', not an integer"),
        ("x=symmetric:1", "symmetric in override 'x=symmetric:1' is '1'. Use true or false"),
        ("x=bits:5", "bits is 5; allowed are 2, 3, 4, 8"),
        ("x=group_size:0", "group_size is 0; allowed are -1"),
        ("(=bits:8", r"The override pattern '\(' is not a regular expression"),
    ],
)
def test_override_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Override.parse(text)


def test_last_override_that_matches_wins_key_by_key():
    config = QuantConfig(
        overrides=(
            Override(pattern="mlp", bits=8, group_size=32),
            Override(pattern=r"down_proj$", bits=3),
            Override(pattern="other", symmetric=False),
        )
    )
    assert config.scheme_for(MODULE) == Scheme(bits=3, group_size=32, symmetric=True)
    assert config.scheme_for("x.mlp.up") == Scheme(bits=8, group_size=32, symmetric=True)


def test_skip_beats_override():
    config = QuantConfig(skip=(r"layers\.3\.",), overrides=(Override(pattern="mlp", bits=8),))
    assert config.scheme_for(MODULE) is None
    assert config.scheme_for(MODULE.replace("3", "4")) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; allowed are 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4', a str; int is needed"),
        ({"bits": True}, "bits is True, a bool; int is needed"),
        ({"group_size": 0}, "group_size is 0; allowed are -1"),
        ({"group_size": "64"}, "group_size is '64', a str"),
        ({"damping": 0}, "damping is 0; allowed is 0 < damping < 1"),
        ({"damping": 1.0}, "damping is 1.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": None}, "damping is None, a NoneType; float or int is needed"),
        ({"symmetric": 1}, "symmetric is 1, a int; bool is needed"),
        ({"skip": "lm_head"}, "skip is 'lm_head', a str; tuple is needed"),
        ({"skip": ("[",)}, r"The skip pattern '\[' is not a regular expression"),
    ],
)
def test_setting_out_of_range_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        QuantConfig(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationConfig(seed=-1), "seed is -1; allowed is 0 to 4294967295. Use 0, or"),
        (lambda: CalibrationConfig(seed=2**70), "seed is 1180591620717411303424; allowed is 0 to"),
        (lambda: ResourceConfig(device=5), "device is 5, a int; str is needed"),
        (lambda: ResourceConfig(memory=8), "memory is 8, a int; str is needed"),
        (lambda: ResourceConfig(memory="lots"), "memory is 'lots'; write a number and a unit"),
        (lambda: ResourceConfig(dtype="int8"), "dtype is 'int8'; allowed are auto, float32"),
    ],
)
def test_what_is_asked_of_text_and_machine_is_checked_at_once(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("name", "least"), [("samples", 1), ("length", 2), ("batch_size", 1)])
@pytest.mark.parametrize("too_few", [1, 2])
def test_calibration_counts_have_a_minimum(name, least, too_few):
    value = least - too_few
    with pytest.raises(
        ConfigError, match=f"{name} is {value}; it must be a whole number, {least} or more"
    ):
        CalibrationConfig(**{name: value})


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(
            bits=3,
            symmetric=False,
            damping=0.1,
            skip=("a", "b"),
            overrides=(Override(pattern="x", bits=8), Override(pattern="y", symmetric=False)),
        ),
    ],
)
def test_config_comes_back_from_json(config):
    text = json.dumps(config.to_dict())
    assert QuantConfig.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bit": 4}, "Unknown setting 'bit' for QuantConfig. Did you mean 'bits'"),
        ({"zzz": 4}, "Unknown setting 'zzz' for QuantConfig. Allowed: bits, group"),
        ({"overrides": [{"bits": 8}]}, "it has no pattern"),
        ({"overrides": ["x=bits:8"]}, "override 'x=bits:8': it has no pattern"),
        (
            {"overrides": [{"pattern": "x", "bit": 8}]},
            "Unknown setting 'bit' for Override. Did you mean 'bits'",
        ),
        ({"overrides": [{"pattern": 3}]}, "pattern is 3, a int; str is needed"),
        ({"overrides": None}, "overrides is None; a list is needed"),
        ({"skip": "abc"}, "skip is 'abc'; a list is needed"),
    ],
)
def test_values_that_are_no_config_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(values)


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        QuantConfig().bits = 8  # type: ignore[misc]
