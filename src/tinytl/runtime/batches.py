"""Photographs into the executor's slot, a batch at a time, while a thread decodes the next.

What is held is one batch of bytes beside the slot, whatever the number of photographs. Pillow lets go of the
interpreter's lock while it decodes, and the executor while it computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from PIL import Image

from tinytl.data.decode import Photo, open_photo

Read = Callable[[Photo, int], Image.Image]
"""Makes an image, RGB and as large as the network's input, of an opened photograph and its number."""


def filled(
    slot: memoryview, paths: Sequence[Path], batches: Sequence[Sequence[int]], read: Read
) -> Generator[Sequence[int], None, None]:
    """Write one batch of photographs after the other to the start of `slot` and yield their numbers.

    While the caller works on one, the next is decoded. The thread ends with the generator: close it where it may be
    left early.

    Args:
        slot: bytes, (batch, H, W, 3).
        paths: of the photographs, by number.
        batches: numbers of the photographs of each batch, at most as many as fit into `slot`.
        read: what makes an image of a photograph.

    Raises:
        PhotoError: a photograph cannot be read; it comes when the turn is at its batch.
    """
    ahead = _Ahead(len(slot), paths, batches, read)
    thread = threading.Thread(target=ahead.run, name="tinytl-decode", daemon=True)
    thread.start()
    try:
        for numbers in batches:
            ahead.done.acquire()
            if ahead.error is not None:
                raise ahead.error
            slot[: ahead.size] = ahead.buffer[: ahead.size]
            ahead.free.release()
            yield numbers
    finally:
        ahead.stopped = True
        ahead.free.release()
        thread.join()


class _Ahead:
    """The batch that is decoded ahead: `free` to be written to, `done` to be taken."""

    def __init__(self, nbytes: int, paths: Sequence[Path], batches: Sequence[Sequence[int]], read: Read) -> None:
        self.buffer = memoryview(bytearray(nbytes))
        self.size = 0
        self.error: BaseException | None = None
        self.stopped = False
        self.free, self.done = threading.Semaphore(1), threading.Semaphore(0)
        self._paths, self._batches, self._read = paths, batches, read

    def run(self) -> None:
        """Decode all batches, until `stopped`."""
        try:
            for numbers in self._batches:
                self.free.acquire()
                end = 0
                for number in numbers:
                    if self.stopped:
                        return
                    with open_photo(self._paths[number]) as photo:
                        pixels = self._read(photo, number).tobytes()
                    self.buffer[end : end + len(pixels)] = pixels
                    end += len(pixels)
                    del pixels  # else it stands beside the next photograph, whole and decoded
                self.size = end
                self.done.release()
        except BaseException as error:  # whoever waits for the batch raises it
            self.error = error
            self.done.release()


def in_batches(numbers: list[int], size: int) -> list[list[int]]:
    """The numbers in rows of `size`; the last may be shorter."""
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
