"""A VLM's folder with a hardened tower in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from hf_robust_vision.towers.load import load_named
from hf_robust_vision.towers.weights import need_free

from .report import SwapReport
from .swap import swap_vision_encoder


def swap_folder(
    vlm: str | Path, source: Any, output_dir: str | Path, *, revision: str | None = None, **settings: Any
) -> SwapReport:
    """Write the stock folder of a VLM whose vision tower is a hardened one, with its processor and `swap_report.json`.

    Args:
        vlm: Folder or Hub id; read, and left as it is. The weights keep their dtype.
        source: The hardened encoder, see `load_source`.
        output_dir: The folder to write, whole or not at all.
        revision: Branch, tag or commit of the VLM.
        settings: Those of `swap_vision_encoder`, but the processor, which is the VLM's own.

    Raises:
        ValueError: If `output_dir` holds anything, the VLM can not be read whole, or as `swap_vision_encoder`. Nothing
            is written then.
    """
    folder = need_free(output_dir)
    model = load_named(vlm, revision=revision, dtype="auto")
    processor = AutoProcessor.from_pretrained(str(vlm), revision=revision)
    report = swap_vision_encoder(model, source, processor=processor, **settings)
    report.original = Path(vlm).resolve().name if Path(vlm).is_dir() else str(vlm)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        report.save(draft)
        if folder.is_dir():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report
