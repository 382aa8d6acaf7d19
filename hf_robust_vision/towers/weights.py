"""The one place that reads weights: the whole model that its config tells, of finite floats, or a refusal in one line."""

from __future__ import annotations

import difflib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_POINTER = b"version https://git-lfs"
_OLD_BUFFERS = "embeddings.position_ids"  # whole numbers that old versions of transformers saved with the weights


def is_weights_file(path: str | Path) -> bool:
    """Whether a path is that of a single file of weights, be it there or not."""
    return Path(path).is_file() or Path(path).suffix in _SUFFIXES


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Read a model that somebody named: an `OSError` inside becomes a `ValueError` with that name."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{name} is neither a model folder nor a model of the Hub that can be read: {error}"
        ) from error


def local_or_hub(name: str | Path) -> str:
    """The whole path of a folder that is there, or a Hub id as it is.

    The path is whole because models and adapters record it: read from elsewhere, "runs/clip" would be a Hub id.

    Raises:
        ValueError: If it is a path and nothing is there; the Hub is not asked for it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.absolute())
    if path.is_file():
        raise ValueError(f"{name} is a file; wanted a model's folder or Hub id.")
    like_a_path = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1 or "\\" in str(name)
    here = path.parent.is_dir() and path.parent != Path()
    if like_a_path or here:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = "".join(f"; did you mean {path.parent / n}?" for n in difflib.get_close_matches(path.name, names, 1))
        raise ValueError(f"no such folder: {name}{near}")
    return str(name)


def find_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a folder or Hub id, or None; trouble with the Hub is left to the loading of the model."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    quiet = {f"_raise_exceptions_for_{trouble}": False for trouble in ("missing_entries", "connection_errors")}
    try:
        found = cached_file(name, file, revision=revision, **quiet)
    except OSError:  # no name that the Hub can have
        return None
    return None if found is None else Path(found)


def weights_files(name: str, revision: str | None = None) -> list[Path]:
    """The files that `from_pretrained` would read the weights of a folder or Hub id from."""
    found = next((path for file in _FILES if (path := find_file(name, file, revision)) is not None), None)
    if found is None or found.suffix != ".json":
        return [] if found is None else [found]
    try:
        shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{found} is no index of weights: download it again.") from error
    places = {shard: find_file(name, shard, revision) for shard in shards}
    if absent := [shard for shard, place in places.items() if place is None]:
        raise ValueError(f"{name} lacks {absent[0]}, which {found.name} names: download it again.")
    return [place for place in places.values() if place is not None]


def load_state_dict(path: str | Path) -> Mapping[str, Any]:
    """Read a `.safetensors` or `.pt` file on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a pointer of git LFS, damaged, a TorchScript archive, or holds other objects than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise ValueError(f"{path} is only git LFS's pointer to the weights: fetch them with `git lfs pull`.")
    if path.suffix != ".safetensors" and not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is {'not a file that torch.save wrote' if head else 'empty'}: download it again.")
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive (OpenAI's original CLIP files are): loading it executes code from the "
            "file. If you trust it, convert it once: "
            f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt'), and pass 'weights.pt'."
        )
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other objects than tensors, which only code can unpickle: where it was made, save the "
            "model's state_dict() alone, best as .safetensors."
        ) from error
    except Exception as error:  # whatever the reader meets first in damaged bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or cut off: download it again. ({reason[:120]})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; wanted a state dict.")
    return state


def check_weights(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None) -> None:
    """Refuse weights from `name` that are no finite floats, or would be none any more in another dtype."""
    for key, value in weights.items():
        if value.dtype not in FLOATS:
            raise ValueError(f"{name} holds {key} as {value.dtype}: dequantise it first.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity in {key}: take another checkpoint.")
        if dtype is not None and not bool(torch.isfinite(value.to(dtype)).all()):
            raise ValueError(f"{key} of {name} overflows in {dtype}: take bfloat16 or float32.")


def load_pretrained(kind: Any, name: str, *, unread: Sequence[str] = (), **kwargs: Any) -> Any:
    """`from_pretrained` of a class of transformers, and nothing left random, dropped, not finite or not a float.

    Args:
        kind: The class.
        name: Folder or Hub id, of `local_or_hub`.
        unread: Beginnings of the keys that may be there though the class has no place for them.
        kwargs: Passed on.

    Raises:
        ValueError: If a weight is missing, unknown, of another shape, or not finite, or a file can not be read.
    """
    files = weights_files(name, kwargs.get("revision"))
    states = [(path, load_state_dict(path)) for path in files]  # before transformers meets a damaged one
    # Shapes that differ are then told like weights that are missing: these, too, are left random.
    model, info = kind.from_pretrained(name, output_loading_info=True, **kwargs | {"ignore_mismatched_sizes": True})
    of = f"{getattr(kind, 'stock_class', kind).__name__} of its config"
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of the {of} ({', '.join(missing[:3])}), which would be left random. "
            "Export the whole model with save_pretrained."
        )
    unknown = sorted(k for k in info["unexpected_keys"] if not k.startswith(tuple(unread)) and _OLD_BUFFERS not in k)
    if unknown:
        raise ValueError(
            f"{name} holds {len(unknown)} weights that the {of} has no place for ({', '.join(unknown[:3])}), and would "
            "be dropped. Merge adapters first; layers beyond num_hidden_layers belong to another config.json."
        )
    for path, state in states:
        check_weights({k: v for k, v in state.items() if not k.endswith(_OLD_BUFFERS)}, str(path), model.dtype)
    scale = getattr(model, "logit_scale", None)
    if scale is not None and not bool(torch.isfinite(scale.exp())):
        raise ValueError(f"{name} has logit_scale {scale.item():g}, whose exponential overflows in {scale.dtype}.")
    return model


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError):  # no archive, or a damaged one, which its reader tells
        return False


def need_free(folder: str | Path) -> Path:
    """The folder that a model is to be written into, if it is not there or empty; else a `ValueError`."""
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is there already; name another --output_dir.")
    return path
