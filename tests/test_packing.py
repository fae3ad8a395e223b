from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.tiny_gptq import pack_stream

from halfbyte.errors import CheckpointError
from halfbyte.packing import (
    codes_per_run,
    pack_codes,
    pack_weight,
    pack_zeros,
    unpack_codes,
    unpack_weight,
    unpack_zeros,
    words_per_run,
)
from halfbyte.quant_config import SUPPORTED_BITS

# Written out by hand from the format's description; 3 bits: 32 codes 0..7 over and over in 3 words.
KNOWN_WORDS = {
    2: ([0, 1, 2, 3] * 4, [0xE4E4E4E4]),
    3: ([0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    4: ([0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
    8: ([0x12, 0x34, 0x56, 0xF8], [0xF8563412]),
}


def as_unsigned(words: torch.Tensor) -> list[int]:
    return [word % 2**32 for word in words.flatten().tolist()]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_known_codes_pack_to_known_words(bits):
    codes, words = KNOWN_WORDS[bits]
    packed = pack_codes(torch.tensor(codes)[:, None], bits)
    assert packed.dtype == torch.int32
    assert as_unsigned(packed) == words
    assert unpack_codes(packed, bits).flatten().tolist() == codes


@pytest.mark.parametrize(
    ("zero_offset", "word"), [(1, 0x77777777), (0, 0x88888888)], ids=["v1", "v2"]
)
def test_symmetric_4_bit_zeros_are_the_word_of_their_dialect(zero_offset, word):
    packed = pack_zeros(torch.full((8, 3), 8), 4, zero_offset)
    assert packed.shape == (3, 1)
    assert as_unsigned(packed) == [word] * 3


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(SUPPORTED_BITS), st.integers(1, 3), st.integers(1, 4))
def test_packing_equals_a_stream_of_python_integers(data, bits, runs, columns):
    rows = runs * codes_per_run(bits)
    codes = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=rows, max_size=rows),
            min_size=columns,
            max_size=columns,
        )
    )
    packed = pack_weight(torch.tensor(codes), bits)
    assert packed.shape == (runs * words_per_run(bits), columns)
    assert packed.t().tolist() == [pack_stream(column, bits) for column in codes]
    unpacked = unpack_weight(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert unpacked.is_contiguous()
    assert unpacked.tolist() == codes


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(SUPPORTED_BITS), st.sampled_from([0, 1]), st.integers(1, 3))
def test_zeros_round_trip_in_both_dialects(data, bits, zero_offset, groups):
    out_features = 32
    zero = st.integers(zero_offset, 2**bits - 1)
    group = st.lists(zero, min_size=out_features, max_size=out_features)
    zeros = data.draw(st.lists(group, min_size=groups, max_size=groups))
    packed = pack_zeros(torch.tensor(zeros).t(), bits, zero_offset)
    stored = [[zero - zero_offset for zero in group] for group in zeros]
    assert packed.tolist() == [pack_stream(group, bits) for group in stored]
    assert unpack_zeros(packed, bits, zero_offset).t().tolist() == zeros


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reads_zeros_of_0_that_were_subtracted_from_whole_words(bits):
    """GPTQModel writes v1 so; reading each field by itself would get the neighbours wrong too."""
    zeros = torch.arange(64).reshape(32, 2) % 2**bits
    ones = sum(1 << shift for shift in range(0, 32, bits))
    stored = pack_zeros(zeros, bits, zero_offset=0) - ones
    assert torch.equal(unpack_zeros(stored, bits, zero_offset=1), zeros.to(torch.int16))
    by_field = unpack_codes(stored.t(), bits).to(torch.int16) + 1
    assert not torch.equal(by_field, zeros.to(torch.int16))


def test_reads_a_3_bit_zero_of_0_that_was_subtracted_from_its_own_field():
    zeros = torch.arange(32)[:, None] % 8
    stored = pack_codes((zeros - 1) % 8, 3).t()
    assert torch.equal(unpack_zeros(stored, 3, zero_offset=1), zeros.to(torch.int16))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_codes_that_do_not_fill_words_are_refused(bits):
    rows = codes_per_run(bits) + 1
    with pytest.raises(CheckpointError, match=rf"{rows} codes of {bits} bits: a multiple of "):
        pack_codes(torch.zeros(rows, 1, dtype=torch.int32), bits)


def test_words_that_are_not_a_multiple_of_a_run_are_refused():
    with pytest.raises(CheckpointError, match="4 words of 3-bit codes: a multiple of 3 is needed"):
        unpack_codes(torch.zeros(4, 1, dtype=torch.int32), 3)


@pytest.mark.parametrize(("low", "high"), [(0, 16), (-1, 15)])
def test_codes_out_of_range_are_refused(low, high):
    codes = torch.tensor([low, high] * 4)[:, None]
    with pytest.raises(CheckpointError, match=rf"codes {low}\.\.{high} in 4 bits: .* 0\.\.15"):
        pack_codes(codes, 4)


@pytest.mark.parametrize(
    ("low", "high", "zero_offset", "allowed"), [(0, 8, 1, r"1\.\.15"), (8, 16, 0, r"0\.\.15")]
)
def test_zeros_that_do_not_fit_the_dialect_are_refused(low, high, zero_offset, allowed):
    zeros = torch.tensor([low, high] * 4)[:, None]
    found = rf"zeros {low}\.\.{high} in 4 bits with offset {zero_offset}: allowed are {allowed}"
    with pytest.raises(CheckpointError, match=found):
        pack_zeros(zeros, 4, zero_offset)


def test_sizes_that_fill_words_but_not_32_codes_are_packed():
    codes = torch.arange(40).reshape(1, 40) % 16
    assert torch.equal(unpack_weight(pack_weight(codes, 4), 4).long(), codes)
