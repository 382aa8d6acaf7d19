"""Training from a stream: each process reads its own share, for as long as the run lasts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer

from hf_robust_vision.data.datasets import StreamedImages


class Endless(IterableDataset):
    """A stream that starts again when it ends, shuffled anew; a ValueError if it holds no image."""

    # Shares are of different lengths. If the process with the shortest one stopped, the others would wait for its
    # gradients for ever.

    def __init__(self, stream: StreamedImages):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        tell = 1
        if get_worker_info() is not None:
            # `datasets` keeps the epoch in memory that all workers share: one that is ahead would shuffle the pass that
            # another one begins.
            self.stream = copy.copy(self.stream)
            self.stream.rows = copy.deepcopy(self.stream.rows)
        for epoch in count():
            self.stream.set_epoch(epoch)
            item = None
            for item in self.stream:
                if self.stream.skipped >= tell:
                    tell = 10 * self._tell()
                yield item
            if item is None and get_worker_info() is not None:
                return  # more workers than shards; `StreamTrainer` sees to it that one of them has images
            if item is None:
                raise ValueError(_no_image(self.stream.rank, self.stream.world))

    def _tell(self) -> int:
        """Warn about images that were left out: at 1, and at every tenfold."""
        skipped, worker = self.stream.skipped, get_worker_info()
        who = f"process {self.stream.rank}" + ("" if worker is None else f", worker {worker.id}")
        warnings.warn(f"{who}: skipped {skipped} corrupt images of {self.stream.name} so far", stacklevel=2)
        return skipped


def _no_image(rank: int, world: int) -> str:
    return (
        f"process {rank} of {world} got no image from the stream; start fewer processes, or name a split with more "
        "images that can be decoded."
    )


class StreamTrainer(Trainer):
    """The part of `Trainer` that reads, for streams."""

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer` does; of a stream each process reads its own share."""
        args, stream = self.args, self.train_dataset
        if not isinstance(stream, StreamedImages):
            return super().get_train_dataloader()
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(args, name) == "epoch":
                raise ValueError(f"a stream has no epochs, so {name}=epoch would wait for ever; type --{name} steps.")
        # Not prepared by accelerate, which would let one process read and decode for all; its class moves the batches to
        # the device. After a resume `Trainer` reads and drops as many batches as were seen.
        return DataLoaderShard(
            Endless(stream.share(args.process_index, args.world_size)),
            device=args.device,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As `Trainer` does, but a stream that ends, as none of this process's workers got an image, is a ValueError."""
        # `Trainer` would take it for the end of the run, while the other processes wait.
        samples, count_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, StreamedImages) and len(samples) < num_batches:
            raise ValueError(_no_image(self.args.process_index, self.args.world_size))
        return samples, count_items
