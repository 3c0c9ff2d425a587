"""The native library's threads: right results whoever else calls it, and in a process that was forked."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from engines.kernels.native import Arena, Native

ROWS, DEPTH, COLUMNS = 40, 96, 700


def test_calls_from_several_threads_at_once_are_right(native: Native) -> None:
    weights = [torch.randn(COLUMNS, DEPTH) for _ in range(4)]
    panels = [native.pack_panels(weight) for weight in weights]
    inputs = [torch.randn(ROWS, DEPTH) for _ in range(4)]
    expected = [native.linear(x, packed, COLUMNS, None) for x, packed in zip(inputs, panels, strict=True)]

    def call(which: int) -> bool:
        torch.set_num_threads(3)
        results = (native.linear(inputs[which], panels[which], COLUMNS, None) for _ in range(50))
        return all(torch.equal(result, expected[which]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))


def test_tapes_may_go_while_other_calls_are_helped(native: Native) -> None:
    panels, x = native.pack_panels(torch.randn(COLUMNS, DEPTH)), torch.randn(ROWS, DEPTH)
    torch.set_num_threads(3)
    expected = native.linear(x, panels, COLUMNS, None)
    for _ in range(30):
        with native.recording(3, Arena(ROWS)) as tape:
            out = native.linear(x, panels, COLUMNS, None)
        out.zero_()
        tape.run()
        del tape
        assert torch.equal(out, expected)


def test_a_forked_process_gets_threads_of_its_own(native: Native) -> None:
    panels, x = native.pack_panels(torch.randn(COLUMNS, DEPTH)), torch.randn(ROWS, DEPTH)
    torch.set_num_threads(2)
    expected = native.linear(x, panels, COLUMNS, None)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear(x, panels, COLUMNS, None), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native.linear(x, panels, COLUMNS, None), expected)
