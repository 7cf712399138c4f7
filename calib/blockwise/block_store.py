"""A model's blocks, kept where the next use finds them soonest: on the accelerator, in pinned RAM, or on disk.

The values are the same wherever they are kept. On a CPU they are read anew each time, one ahead of its use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from calib.runtime.device import DeviceMemory, is_accelerator

READERS = 4  # threads that read from disk for an accelerator, and blocks that are read ahead

Block = dict[str, Tensor]
Read = Callable[[int], Block]  # a block's tensors by name, on the CPU


class BlockStore:
    """Blocks that were read once: on the device of `room` where all of them fit, else pinned in RAM that can spare as
    much; else they are not kept.

    What reads them, and how many bytes they all take, is told with every use: an owner that stood in here would keep
    itself alive, and with it an accelerator's memory.
    """

    def __init__(self, room: DeviceMemory) -> None:
        self._room = room
        self._kept = dict[int, Block]()
        self._place: str | None = None

    def block(self, index: int, read: Read, size: Callable[[], int]) -> Block:
        """The tensors of one block by name: on the device, or where they have to be copied to it from."""
        return self._kept[index] if index in self._kept else self._keep(index, read(index), size)

    def reading(
        self, indices: Iterable[int], read: Read, size: Callable[[], int], *, ahead: bool = True
    ) -> Iterator[tuple[int, Block]]:
        """(index, tensors) of one block after the other; `ahead`: the next are read while the caller works on this."""
        most = READERS if is_accelerator(self._room.device) else 1
        with ThreadPoolExecutor(most) as readers:
            order = list(indices)
            waiting = deque[Future[Block] | None]()
            for position, index in enumerate(order):
                for soon in order[position + len(waiting) : position + 1 + most * ahead]:
                    waiting.append(None if soon in self._kept else readers.submit(read, soon))
                coming = waiting.popleft()
                if coming is None or index in self._kept:
                    yield index, self.block(index, read, size)
                else:
                    yield index, self._keep(index, coming.result(), size)
                del coming

    def _keep(self, index: int, block: Block, size: Callable[[], int]) -> Block:
        room = self._room
        if self._place is None:
            needed = size() if is_accelerator(room.device) else 0
            self._place = "device" if room.fits(needed) else "pinned" if room.fits_pinned(needed) else "disk"
        if self._place == "device":
            block = {name: tensor.to(room.device, non_blocking=True) for name, tensor in block.items()}
        if self._place != "disk":
            self._kept[index] = block
        return block
