from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.serve.engine.page_pool import PagePool

TEXT = list(range(100, 130))


def compute(pool, tokens, room, **keywords):
    reservation = pool.reserve(tokens, room, **keywords)
    pool.register_computed(reservation, tokens, len(tokens))
    return reservation


def test_cached_prefix_is_found():
    pool = PagePool(20, 4)
    first = compute(pool, TEXT, 40)
    assert (first.cached_tokens, len(first.pages)) == (0, 10)
    second = pool.reserve([*TEXT[:9], 1, 2, 3], 16)
    assert second.cached_tokens == 8
    assert second.pages[:2] == first.pages[:2]
    assert not set(second.pages[2:]) & set(first.pages)


def test_last_token_is_never_taken_from_the_cache():
    pool = PagePool(20, 4)
    pool.release(compute(pool, TEXT[:8], 8))
    assert pool.reserve(TEXT[:8], 8).cached_tokens == 4
    assert pool.reserve(TEXT[:9], 9).cached_tokens == 8


def test_pages_are_shared_only_within_a_namespace_and_prefix():
    pool = PagePool(20, 4)
    pool.release(compute(pool, TEXT[:12], 12, namespace=("adapter", "")))
    assert pool.reserve(TEXT[:12], 12).cached_tokens == 0
    # The same page of tokens after another one.
    assert pool.reserve([1, 2, 3, 4, *TEXT[4:12]], 12, namespace=("adapter", "")).cached_tokens == 0
    assert pool.reserve(TEXT[:12], 12, namespace=("adapter", "")).cached_tokens == 8


def test_failed_reservation_takes_no_pages():
    pool = PagePool(4, 4)
    held = pool.reserve(TEXT[:5], 9)
    assert pool.used == 3
    assert pool.reserve(TEXT[5:9], 8) is None
    assert pool.used == 3
    pool.release(held)
    assert pool.used == 0


def test_eviction_is_lru_and_from_the_end_of_prefixes():
    pool = PagePool(6, 4)
    pool.release(compute(pool, TEXT[:12], 12))
    pool.release(compute(pool, TEXT[20:28], 8))
    # One page is empty; three more must go: the end of the first text, then what is before it.
    pool.release(pool.reserve([1] * 9, 12))
    assert pool.reserve(TEXT[:12], 12).cached_tokens == 4


def test_forget_invalidates_the_cache_and_loses_no_page():
    pool = PagePool(6, 4)
    pool.release(compute(pool, TEXT[:12], 12))
    pool.release(compute(pool, TEXT[:12], 12, namespace=("a", "key")))
    pool.forget("a")
    assert pool.reserve(TEXT[:12], 4, namespace=("a", "key")).cached_tokens == 0
    pool.forget()
    assert pool.reserve(TEXT[:12], 12).cached_tokens == 0
    assert pool.reserve([], 8) is not None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_page_is_owned_twice_or_lost(data):
    pool = PagePool(12, 2)
    held = []
    contents = {}
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1)))[0])
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
        room = len(tokens) + data.draw(st.integers(0, 4))
        reservation = pool.reserve(tokens, room)
        if reservation is None:
            assert pool.count_pages(room) > pool.pages - pool.used
            continue
        shared = reservation.cached_tokens // 2
        for index, page in enumerate(reservation.pages[:shared]):
            # What is found holds exactly these tokens after exactly those before them.
            assert contents[page] == tokens[: 2 * index + 2]
        written = set(reservation.pages[shared:])
        assert not written & {page for other, _ in held for page in other.pages}
        for index, page in enumerate(reservation.pages[shared:], shared):
            contents[page] = tokens[: 2 * index + 2]
        pool.register_computed(reservation, tokens, len(tokens))
        held.append((reservation, tokens))
        used = {page for other, _ in held for page in other.pages}
        assert pool.used == len(used)
    for reservation, _ in held:
        pool.release(reservation)
    assert pool.used == 0
    assert pool.reserve([5], 24) is not None
