"""Endless batches of a source in an order that depends on a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenenv.artefact import Unfit, Within, check_fields
from tokenenv.data.source import Batch, ImageSource
from tokenenv.errors import UserError

Agree = Callable[[list[int]], list[int]]
"""A function that unites positions over processes."""

_STATE = dict.fromkeys(("seed", "epoch", "position", "images"), Within(0, 2**53))


class Stream:
    """Endless batches of a source, each epoch in a new order that depends on the seed.

    Every batch holds exactly ``batch_size`` readable images; it may span two epochs.

    In data-parallel training each process reads its part of every batch. The parts in order of
    rank are the batch that a single process would read. As skipping an unreadable image shifts all
    that follow, the processes tell each other of those that they find, and read such a batch anew.

    While a batch is used, the next one is decoded in the background.

    Args:
        source: the images.
        batch_size: images in a whole batch.
        seed: seed of the order.
        rank: which part of each batch to read, from 0.
        of: number of parts. If it does not divide ``batch_size``, some parts have one image more.
        agree: called for every batch with the positions of this part's images that can't be read;
            returns those of all parts. None: all images have to be readable.

    Attributes:
        source: as above.

    Raises:
        UserError: ``batch_size`` is less than one, or than ``of``.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        rank: int = 0,
        of: int = 1,
        agree: Agree | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is too small; use at least 1")
        if batch_size < of:
            raise UserError(f"{of} processes cannot share a batch of {batch_size}: start fewer")
        self.source = source
        self._batch_size = batch_size
        self._seed = seed
        self._part = slice(batch_size * rank // of, batch_size * (rank + 1) // of)
        self._agree, self._lost = agree, set[int]()
        self._position = 0
        self._shuffle(epoch=0)

    @property
    def part_size(self) -> int:
        """Number of images of each batch that this stream reads."""
        return self._part.stop - self._part.start

    def next(self) -> Batch:
        """Read the next ``batch_size`` images, or this stream's part of them.

        Raises:
            UserError: none of the source's images is readable; or, with several parts, an image
                is unreadable that was not known to be.
        """
        batch = self._next_part() if self.part_size < self._batch_size else self._next_whole()
        ahead = self._order[self._position : self._position + self._batch_size]
        self.source.expect(ahead[self._part])
        return batch

    def _next_whole(self) -> Batch:
        parts: list[Batch] = []
        missing = self._batch_size
        while missing:
            batch = self.source.batch(self._ahead(missing))
            missing -= len(batch.index)
            parts.append(batch)
            if not len(batch.index):
                self.source.check_readable()
        return Batch(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def next_of(self, labels: Sequence[int]) -> Batch:
        """For each of ``labels`` the next readable image of that class, in the stream's order.

        The images before it are passed over.

        Raises:
            UserError: the source has no readable image of a class.
        """
        parts = []
        for label in labels:
            batch = None
            for _ in range(2 * len(self.source)):  # what is left of an epoch, and a whole one
                index = self._ahead(1)
                if int(self.source.labels[index]) == label:
                    batch = self.source.batch(index)
                    if len(batch.index):
                        break
            if batch is None or not len(batch.index):
                known = self.source.labels.unique().tolist()
                raise UserError(
                    f"'{self.source.name}' has no readable image of label={label}: choose from "
                    f"{known[0]} to {known[-1]}"
                )
            parts.append(batch)
        return Batch(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _next_part(self) -> Batch:
        while True:
            before = self._epoch, self._position
            mine = self._known(self._batch_size)[self._part]
            batch = self.source.batch(mine)
            lost = sorted(set(mine.tolist()) - set(batch.index.tolist()))
            if lost and self._agree is None:
                raise UserError(
                    f"image '{self.source.files[lost[0]]}' can no longer be read: put it back, or "
                    "take it away and start anew"
                )
            found = self._agree(lost) if self._agree is not None else []
            if not found:
                return batch
            self._lost.update(found)
            if len(self._lost) == len(self.source):
                raise UserError(
                    f"none of the {len(self.source)} images of '{self.source.name}' is readable, "
                    f"for example '{self.source.files[0]}'; replace the files"
                )
            if before[0] != self._epoch:
                self._shuffle(before[0])
            self._position = before[1]

    def _known(self, count: int) -> Tensor:
        """The next ``count`` positions of images that no part has found unreadable."""
        known: list[Tensor] = []
        while count:
            index = self._ahead(count)
            if self._lost:
                index = index[[position not in self._lost for position in index.tolist()]]
            known.append(index)
            count -= len(index)
        return torch.cat(known)

    def _ahead(self, count: int) -> Tensor:
        """The next positions of the order, at most ``count``, at least one."""
        if self._position == len(self._order):
            self._position = 0
            self._shuffle(self._epoch + 1)
        index = self._order[self._position : self._position + count]
        self._position += len(index)
        return index

    def state_dict(self) -> dict[str, int]:
        """The stream's position; a stream that loads it continues exactly from there."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "images": len(self.source),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position of the stream that returned ``state``.

        Raises:
            Unfit: it is no stream's state.
            UserError: that stream's source had another number of images.
        """
        check_fields(state, _STATE)
        if state["images"] != len(self.source):
            raise UserError(
                f"the saved stream read {state['images']} images and '{self.source.name}' "
                f"has {len(self.source)}; resume with the data the run was started with"
            )
        if state["position"] > len(self.source):
            raise Unfit(f"'position' is {state['position']} of {len(self.source)} images")
        self._seed, self._position = state["seed"], state["position"]
        self._shuffle(state["epoch"])

    def _shuffle(self, epoch: int) -> None:
        self._epoch = epoch
        rng = np.random.default_rng([self._seed, epoch])
        self._order = torch.from_numpy(rng.permutation(len(self.source)))
