"""Features of the original model, and a memory of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .base import EncoderOutput, Reads
from .load import Encoder


_PROBES = 64  # pixels that tell an image that was seen before from a changed one


class Reference:
    """The original model: images in [0, 1] to its features, without gradient.

    It is a frozen copy. With `share_weights` only the modules are copied, around the weights of `encoder` itself: the
    original of a model whose adapter, added afterwards, is all that trains.
    """

    def __init__(self, encoder: Encoder, reads: Reads | None = None, *, share_weights: bool = False):
        shared = {id(parameter): parameter for parameter in encoder.parameters()} if share_weights else {}
        self.encoder = copy.deepcopy(encoder, shared).eval()
        if not share_weights:
            self.encoder.requires_grad_(False)
        self.reads = reads or Reads()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> EncoderOutput:
        """Features of the original model; the copy follows the images to their device once."""
        # Shared weights move with the model that trains, the copy's own buffers do not.
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()]
        if any(tensor.device != images.device for tensor in tensors):
            self.encoder.to(images.device)
        return self.encoder(images, **self.reads.asked())


class TargetCache:
    """Remembers features by sample id, in so many mebibytes of the CPU's memory; a stream's ids name no samples.

    Augmented images are remembered where each view has an id of its own: a data set of N samples in V seeded views holds
    N * V items, of which item `view * N + sample` has that id. There is no key of a sample and its augmentation's draw
    beside that: a view that is drawn anew at each epoch never comes again, and with V views nothing is saved before the
    V-th epoch has passed, of a target that is one pass of an update's eight.

    A feature is that of the batch in which its sample came first: where a batch of another composition is computed
    with other roundings, it differs in the last digits.
    """

    def __init__(self, reference: Callable[[Tensor], EncoderOutput], mebibytes: int, dataset: Any):
        if isinstance(dataset, IterableDataset):
            raise ValueError("cache_targets_mb needs samples that keep their ids; for a stream type 0.")
        self.reference, self._room = reference, mebibytes * 2**20
        self._features: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._features)

    def __call__(self, images: Tensor, ids: Tensor) -> EncoderOutput:
        """Features of a batch, images and ids in the same order; only those of samples that are new are computed."""
        probes = images.flatten(1)[:, :: max(images[0].numel() // _PROBES, 1)].cpu()
        names = ids.tolist()
        entries: list[Any] = [self._features.get(name) for name in names]
        for name, probe, entry in zip(names, probes, entries):
            if entry is not None and not torch.equal(entry["probe"], probe):
                raise ValueError(
                    f"sample {name} has other pixels than before, so its features can not be remembered; for "
                    "augmented images type --cache_targets_mb 0, or give each view an id of its own."
                )
        if new := [row for row, entry in enumerate(entries) if entry is None]:
            features = {key: value.detach().cpu() for key, value in self.reference(images[new]).items()}
            for place, row in enumerate(new):
                entries[row] = {"probe": probes[row]} | {key: value[place] for key, value in features.items()}
                self._remember(names[row], entries[row])
        columns = {key: torch.stack([entry[key] for entry in entries]) for key in entries[0] if key != "probe"}
        return EncoderOutput(**{key: column.to(images.device) for key, column in columns.items()})

    def _remember(self, name: int, entry: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in entry.values())
        if size <= self._room:
            self._room -= size
            self._features[name] = {key: tensor.clone() for key, tensor in entry.items()}  # not a view of its batch
