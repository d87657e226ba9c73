"""device.py on this machine's own CPU; accelerators are simulated in test_musa.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from funasr_mooer.device import HUGE_PAGE, on_huge_pages


def flags_of_mapping(address: int) -> list[str]:
    """What the kernel was told of the memory at an address: VmFlags of /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if limits := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(limits[1], 16) <= address < int(limits[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file(), reason="a kernel without huge pages"
)
def test_a_large_new_tensor_is_told_to_lie_on_huge_pages():
    x = on_huge_pages(torch.empty(33 << 18))  # 33 MiB: fresh from the kernel
    assert "hg" in flags_of_mapping(x.data_ptr() + HUGE_PAGE)
    assert x.fill_(1.0).sum() == x.numel()


@pytest.mark.parametrize("numel", [0, 1, HUGE_PAGE // 2 - 1])
def test_a_small_tensor_is_left_where_it_is(numel: int):
    x = torch.empty(numel)
    address = x.data_ptr()
    assert on_huge_pages(x) is x
    assert x.data_ptr() == address
    assert x.zero_().count_nonzero() == 0
