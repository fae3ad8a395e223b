"""Some hundred damaged checkpoints; `make fuzz` tests ten thousand."""

from __future__ import annotations

import random

import pytest
from tests.fuzz.bases import make_bases
from tests.fuzz.judge import digest_weights, judge, write_files
from tests.fuzz.mutations import MUTATORS, damage

from halfbyte.checkpoint.read import open_checkpoint


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    found = make_bases(folder)
    return [(base, digest_weights(open_checkpoint(folder / base.name))) for base in found]


@pytest.mark.parametrize("part", range(4))
def test_damage_is_refused_or_changes_nothing(bases, tmp_path, part):
    for number in range(100):
        rng = random.Random(f"unit/{part}/{number}")
        base, intact = rng.choice(bases)
        done, files = damage(rng, base)
        judge(tmp_path / "x", base, intact, done, files)


def test_every_kind_of_damage_is_detected_somewhere(bases, tmp_path):
    """A mutation that is never detected would not be damage."""
    for mutate in dict.fromkeys(MUTATORS):
        outcomes = set()
        for number in range(12):
            rng = random.Random(f"{mutate.__name__}/{number}")
            base, intact = bases[0]
            files = dict(base.files)
            done = mutate(rng, base, files)
            outcomes.add(judge(tmp_path / "x", base, intact, done, files))
        assert outcomes & {"refused", "digest"}, mutate.__name__


def test_every_flipped_bit_of_the_weights_is_found_by_the_digests(bases, tmp_path):
    base, _ = bases[0]
    rng = random.Random(0)
    write_files(tmp_path / "x", dict(base.files))
    checkpoint = open_checkpoint(tmp_path / "x")
    assert checkpoint.verify() == len(checkpoint.files.infos)
    for info in checkpoint.files.infos.values():
        content = info.file.read_bytes()
        for place in rng.sample(range(info.offset, info.offset + info.num_bytes), 4):
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            info.file.write_bytes(damaged)
            with pytest.raises(
                Exception, match=f"Tensor {info.name} of .* was changed after writing"
            ):
                checkpoint.verify()
        info.file.write_bytes(content)
