import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluate.windows import split_windows, tokenize_text


def test_windows_do_not_overlap_and_the_remainder_is_dropped():
    windows = split_windows(list(range(11)), 3)
    assert windows.ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows.length == 3
    assert windows.note is None


def test_exact_multiple_loses_nothing():
    assert split_windows(torch.arange(12), 4).ids.flatten().tolist() == list(range(12))


def test_limit_takes_the_first_windows():
    assert split_windows(torch.arange(100), 10, limit=2).ids.flatten().tolist() == list(range(20))


def test_limit_beyond_the_text_is_noted():
    windows = split_windows(torch.arange(25), 10, limit=7)
    assert len(windows.ids) == 2
    assert windows.note == "The text has 2 windows of 10 tokens; 7 were requested."


def test_short_text_becomes_one_shorter_window_with_a_note():
    windows = split_windows(torch.arange(7), 10)
    assert windows.ids.tolist() == [list(range(7))]
    assert "7 tokens, less than one window of 10" in windows.note


@pytest.mark.parametrize("ids", [[], [3]])
def test_text_without_a_token_to_predict_is_rejected(ids):
    with pytest.raises(ConfigError, match=f"text of {len(ids)} tokens: at least 2"):
        split_windows(ids, 10)


def test_invalid_settings_are_rejected():
    with pytest.raises(ConfigError, match="window is 1 tokens; it must be 2"):
        split_windows([1, 2, 3], 1)
    with pytest.raises(ConfigError, match="windows is 0; it must be 1"):
        split_windows([1, 2, 3], 2, limit=0)
    with pytest.raises(ConfigError, match=r"shape \[1, 4\] into windows: they must have one"):
        split_windows(torch.zeros(1, 4, dtype=torch.long), 2)


def test_text_is_tokenized_whole_without_special_tokens(tokenizer):
    assert tokenize_text(tokenizer, "w0 w1\nw59 ?").tolist() == [4, 5, 63, 0]


def test_bos_is_added_once_on_request(tokenizer):
    assert tokenize_text(tokenizer, "w0 w1", add_bos=True).tolist() == [1, 4, 5]


def test_bos_of_a_tokenizer_without_one_is_rejected(make_tokenizer):
    with pytest.raises(ConfigError, match=r"BOS token to the text: .* has none"):
        tokenize_text(make_tokenizer(bos=False), "w0", add_bos=True)
