from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import pytest

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args
from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig


def parse(cls: type, *words: str) -> object:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_dataclass_options(parser, cls)
    return dataclass_from_args(cls, parser.parse_args(words))


def help_of(cls: type) -> str:
    parser = argparse.ArgumentParser(prog="x", formatter_class=argparse.HelpFormatter)
    add_dataclass_options(parser, cls)
    return " ".join(parser.format_help().split())


@pytest.mark.parametrize("cls", [QuantConfig, CalibrationConfig])
def test_no_options_give_the_dataclass_defaults(cls):
    assert parse(cls) == cls()


def test_every_option_reaches_its_field():
    config = parse(
        QuantConfig,
        *("--bits", "3", "--group-size", "-1", "--asymmetric", "--desc-act", "--no-act-order"),
        *("--damping", "0.05", "--ragged-groups", "--lm-head", "--skip", "a", "--skip", "b.*c"),
        *("--override", "down=bits:8,group_size:32", "--override", "up=symmetric:false"),
    )
    assert config == QuantConfig(
        bits=3,
        group_size=-1,
        symmetric=False,
        desc_act=True,
        act_order=False,
        damping=0.05,
        ragged_groups=True,
        lm_head=True,
        skip=("a", "b.*c"),
        overrides=(
            Override(pattern="down", bits=8, group_size=32),
            Override(pattern="up", symmetric=False),
        ),
    )


def test_optional_number_is_read_as_a_number():
    assert parse(CalibrationConfig, "--batch-size", "4").batch_size == 4
    assert parse(CalibrationConfig).batch_size is None


def test_repeatable_option_does_not_leak_into_the_next_parse():
    parser = argparse.ArgumentParser()
    add_dataclass_options(parser, QuantConfig)
    parser.parse_args(["--skip", "first"])
    assert dataclass_from_args(QuantConfig, parser.parse_args([])).skip == ()


def test_value_out_of_range_is_the_configs_own_error():
    with pytest.raises(ConfigError, match=r"damping is 7\.0; allowed is 0 < damping < 1"):
        parse(QuantConfig, "--damping", "7")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "5"], "argument --bits: invalid choice: 5"),
        (["--group-size", "x"], "argument --group-size: invalid int value: 'x'"),
        (["--override", "down"], "Cannot read override 'down': it has no 'PATTERN=KEY:VALUE'"),
        (["--override", "down=bots:4"], "Cannot read 'bots:4' in override 'down=bots:4'"),
    ],
)
def test_bad_value_is_a_usage_error_that_keeps_the_reason(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(QuantConfig, *words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_metavars_and_choices():
    text = help_of(QuantConfig)
    assert "--bits {2,3,4,8} bits per weight (default: 4)" in text
    assert "--group-size N" in text
    assert "(default: 0.01)" in text
    assert "--override PATTERN=KEY:VALUE,..." in text
    assert "--asymmetric use one zero point per group" in text
    assert "quantization settings:" in text


def test_help_text_may_hold_a_percent_sign_and_undocumented_fields_stay_out():
    @dataclass(frozen=True, kw_only=True)
    class Config:
        share: float = field(default=0.5, metadata={"help": "50 % of it"})
        internal: int = 3

    text = help_of(Config)
    assert "50 % of it (default: 0.5)" in text
    assert "internal" not in text
