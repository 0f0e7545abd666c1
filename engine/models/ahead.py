"""Blocks one after the other, the next one read while this one is worked with."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn


def one_ahead(
    block_for: Callable[[int], nn.Module], count: int, device: torch.device
) -> Generator[tuple[int, nn.Module], None, None]:
    """``(i, block_for(i))`` for ``count`` blocks.

    On a GPU a thread makes the next block meanwhile, on a stream of its own: reading a block from a disk
    takes about as long as sending an evaluation's text through it. A CPU has nobody to spare for that. Close
    the iterator (:func:`contextlib.closing`) where it may not be used up.
    """
    if device.type != "cuda":
        for index in range(count):
            yield index, block_for(index)
        return
    stream = torch.cuda.Stream(device)

    @torch.no_grad()
    def make(index: int) -> nn.Module:
        with torch.cuda.stream(stream):
            block = block_for(index)
            stream.synchronize()
        return block

    with ThreadPoolExecutor(1, thread_name_prefix="next-block") as thread:
        following: Future[nn.Module] = thread.submit(make, 0)
        for index in range(count):
            block = following.result()
            if index + 1 < count:
                following = thread.submit(make, index + 1)
            yield index, block
            # The block's memory goes back to the other stream, which may use it at once.
            torch.cuda.current_stream(device).synchronize()
            del block
