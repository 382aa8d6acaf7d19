"""Training from a stream: each process reads its own share, for as long as the run lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments

from hf_robust_vision.data.datasets import StreamedImages


class Endless(IterableDataset):
    """A stream that starts again when it ends, shuffled anew.

    Shares are of different lengths. If the process with the shortest one stopped, the others would wait for its
    gradients for ever.

    Raises:
        ValueError: If the share holds no image.
    """

    def __init__(self, stream: StreamedImages):
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self.stream.set_epoch(epoch)
            item = None
            for item in self.stream:
                yield item
            if item is None and get_worker_info() is not None:
                return  # more workers than shards
            if item is None:
                raise ValueError(f"process {self.stream.rank} of {self.stream.world} got no image from the stream.")


def stream_loader(
    stream: StreamedImages,
    args: TrainingArguments,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
) -> DataLoader:
    """Batches of this process's share of a stream.

    Accelerate would let one process read and decode for all. `Trainer` goes on after a resume by reading and dropping
    as many batches as were seen.
    """
    return DataLoaderShard(
        Endless(stream.share(args.process_index, args.world_size)),
        device=args.device,
        batch_size=args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
