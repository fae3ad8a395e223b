"""One timer for many waits behaves like a timer for each."""

from __future__ import annotations

import asyncio

import pytest

from halfbyte.serve.time_limit import TimeLimit


async def later(seconds, value="done"):
    await asyncio.sleep(seconds)
    return value


def test_only_a_wait_past_its_deadline_is_cancelled():
    async def work():
        loop, limit = asyncio.get_running_loop(), TimeLimit()
        assert await limit.wait(later(0), loop.time() + 5) == "done"
        assert await limit.wait(later(0.05), None) == "done"
        cancelled = asyncio.Event()

        async def stuck():
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        # The timer of the first wait goes off later than this one may last.
        with pytest.raises(TimeoutError):
            await limit.wait(stuck(), loop.time() + 0.05)
        assert cancelled.is_set()
        assert limit.has_expired
        # Set for the past wait, it goes off in the midst of this one, which has time left.
        await limit.wait(later(0), loop.time() + 0.02)
        assert await limit.wait(later(0.1), loop.time() + 5) == "done"
        assert not limit.has_expired
        assert asyncio.current_task().cancelling() == 0
        limit.close()

    asyncio.run(work())


def test_timeout_of_the_awaited_work_is_passed_on():
    async def own():
        raise TimeoutError("its own")

    async def work():
        limit = TimeLimit()
        with pytest.raises(TimeoutError, match="its own"):
            await limit.wait(own(), asyncio.get_running_loop().time() + 5)
        assert not limit.has_expired

    asyncio.run(work())


def test_external_cancellation_is_passed_on():
    async def work():
        limit = TimeLimit()
        late = asyncio.get_running_loop().time() + 0.05
        task = asyncio.create_task(limit.wait(asyncio.Event().wait(), late))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)  # the timer finds nobody
        assert await limit.wait(later(0.01), late + 5) == "done"

    asyncio.run(work())


def test_a_thousand_waits_use_one_timer(monkeypatch):
    async def work():
        loop, limit = asyncio.get_running_loop(), TimeLimit()
        timers, call_at = [], loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda *a: timers.append(a) or call_at(*a))
        for _ in range(1000):
            await limit.wait(asyncio.sleep(0), loop.time() + 60)
        assert len(timers) == 1
        limit.close()

    asyncio.run(work())
