from __future__ import annotations

import torch

from halfbyte.judge.memory_meter import MemoryMeter
from halfbyte.machine.memory import resident_memory_bytes


def test_memory_is_measured_on_the_device_that_computes(monkeypatch):
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return 3, 10

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    second = torch.device("cuda:1")
    assert MemoryMeter(second).now() == 7
    assert asked == [second]
    process = MemoryMeter(torch.device("cpu")).now()
    assert 0.5 < process / resident_memory_bytes() < 2
    with MemoryMeter(torch.device("cpu")).watch() as seen:
        pass
    assert min(seen()) > 1e6
