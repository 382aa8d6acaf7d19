"""A VLM's folder with another tower in it: everything else stays, bit for bit, and is not loaded into memory.

Its files are copied, and the tower's weights written into their places in the copies: shapes and dtypes are as they were.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from .base import tensor_sha256
from .records import REPORTS
from .weights import check_weights


# What describes a model or its numbers is of the original, and would be untrue of the result.
_NOT_OURS = ("README.md", "robustness.json", "training_args.bin", *REPORTS)
_CHUNK = 2**24  # bytes that are read at a time
_DRAFT = ".writing-"
_CONFIG = "config.json"
_NAME = "the encoder"  # in errors


@dataclass
class Origin:
    """Where the rest of a VLM is: its files, or the whole model in memory, which shares the tower's weights.

    Args:
        files: Of its weights, `.safetensors`.
        name: Folder or Hub id.
        revision: Of the Hub.
        whole: The model in memory.
    """

    files: tuple[Path, ...] = ()
    name: str = ""
    revision: str | None = None
    whole: Any = field(default=None, repr=False)

    def __deepcopy__(self, memo: Any) -> Origin:
        return self  # the frozen copy of a tower needs no second language model

    def check_files(self) -> None:
        """Refuse weights that can not be written again one tensor at a time.

        Raises:
            ValueError: If there are none, they are not safetensors, or one is damaged.
        """
        if not self.files:
            raise ValueError(f"{self.name} holds no weights.")
        for file in self.files:
            if file.suffix != ".safetensors":
                raise ValueError(
                    f"{file} is no .safetensors file: load the model and save it again with save_pretrained."
                )
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged or cut off: download it again. ({error})") from error

    def check_names(self, encoder: Any) -> None:
        """Refuse an encoder whose weights have no place in the files, before hours of training.

        Raises:
            ValueError: If transformers would write a weight under another name than the one that it was read from.
        """
        there = {name for file in self.files for name in _places(file)}
        if strange := sorted(set(revert_weight_conversion(encoder, encoder.state_dict())) - there):
            raise ValueError(
                f"{self.name} names its weights in another way than transformers writes them: {strange[0]}."
            )

    def rest_sha256(self, encoder: Any) -> str:
        """SHA-256 over all weights that are not the encoder's, which holds no adapter: of language model and head.

        Over their values, not their names: a model in memory has other ones than its file, and a tied head twice.
        """
        return hashlib.sha256("".join(sorted(set(self._rest(encoder)))).encode()).hexdigest()

    def save_with(self, encoder: Any, state: Mapping[str, Tensor], folder: Path, **kwargs: Any) -> None:
        """Write the whole VLM with the weights of an encoder, in the precision that its files have.

        A save that is killed leaves what was in the folder, or a folder that does not load; the next one clears it up.

        Args:
            encoder: Without its language model.
            state: Its weights under their names in the module.
            folder: Made if it is not there; what it holds of other files stays.
            kwargs: For `save_pretrained` of a model in memory.

        Raises:
            ValueError: If the folder is the original's, or a weight has no place in the original files, one of another
                shape, or one that it does not fit in as a finite number; then nothing is written.
        """
        if self.whole is not None:
            _fill(self.whole.state_dict(), state)
            self.whole.save_pretrained(folder, **kwargs)
            return
        source = self.files[0].parent
        if folder.exists() and folder.samefile(source):
            raise ValueError(f"{folder} is where the VLM was loaded from, which stays as it is: name another folder.")
        new = revert_weight_conversion(encoder, dict(state))
        if missing := sorted(set(new) - {name for file in self.files for name in _places(file)}):
            raise ValueError(f"{missing[0]} is in none of the weights of {self.name}.")
        for file in self.files:
            _check_fit(file, new)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_DRAFT}*"):  # of a save that was killed
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as place:
            for file in self.files:
                _write_shard(file, new, Path(place) / file.name)
            for file in source.iterdir():
                if _belongs(file):
                    shutil.copyfile(file, Path(place) / file.name)
            _move(Path(place), folder)

    def _rest(self, encoder: Any) -> Iterator[str]:
        """Hashes of the weights that are not the encoder's."""
        own = encoder.state_dict()
        if self.whole is not None:
            yield from (tensor_sha256(value) for name, value in self.whole.state_dict().items() if name not in own)
            return
        ours = set(revert_weight_conversion(encoder, own))
        for file in self.files:
            yield from (_sha256(file, *place) for name, place in _places(file).items() if name not in ours)


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Names of the weights in a `.safetensors` file, and where the bytes of each begin and end."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in offsets.items()}


def _sha256(file: Path, begin: int, end: int) -> str:
    """As `tensor_sha256`, of bytes of a file: pages that are mapped would count as memory of the process."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        content.seek(begin)
        for at in range(begin, end, _CHUNK):
            digest.update(content.read(min(_CHUNK, end - at)))
    return digest.hexdigest()


def _fill(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Write a state into that of a model in memory, unless it does not fit in there as finite numbers."""
    for name, value in state.items():
        if own[name].is_floating_point():
            check_weights({name: value}, _NAME, own[name].dtype)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _check_fit(file: Path, new: Mapping[str, Tensor]) -> None:
    """Refuse those of `new` that have another shape in a file of weights, or are not finite in its dtype."""
    with safe_open(file, "pt") as content:
        for name in sorted(new.keys() & _places(file).keys()):
            old = content.get_tensor(name)
            if new[name].shape != old.shape:
                raise ValueError(f"{name} has shape {tuple(new[name].shape)}, in {file} it has {tuple(old.shape)}.")
            check_weights({name: new[name]}, _NAME, old.dtype)


def _write_shard(file: Path, new: Mapping[str, Tensor], target: Path) -> None:
    """A copy of a file of weights with those of `new` in it, in the dtype that they had."""
    shutil.copyfile(file, target)
    with safe_open(file, "pt") as content, target.open("r+b") as copy:
        for name, (begin, _) in _places(file).items():
            if name not in new:
                continue
            dtype = content.get_tensor(name).dtype
            copy.seek(begin)
            copy.write(new[name].detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data)


def _belongs(file: Path) -> bool:
    """Whether a file beside the weights is part of the model, and still true of it."""
    hidden, weights = file.name.startswith("."), file.suffix in (".safetensors", ".bin", ".pt")
    ours = file.name not in _NOT_OURS and not file.name.startswith("samples-")
    return file.is_file() and ours and not hidden and not weights


def _move(draft: Path, folder: Path) -> None:
    """Put the files of a draft into their folder, which can be loaded before and after, and not in between."""
    for name in (_CONFIG, "model.safetensors", "model.safetensors.index.json"):  # what a reader begins with
        (folder / name).unlink(missing_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == _CONFIG):  # the config is last
        file.replace(folder / file.name)
