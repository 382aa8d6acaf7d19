"""What the tests of the Hub run in a process of its own: the client reads HF_ENDPOINT when it is imported."""

from __future__ import annotations

import contextlib
import io
from hashlib import sha256
from pathlib import Path


def push(folder, repo_id, **settings) -> dict:
    from hf_robust_vision import push_robust_encoder

    report = push_robust_encoder(folder, repo_id, **settings)
    return {"report": report, "text": str(report)}


def command(*words) -> tuple[int, str]:
    """`hf-robust-vision ...`: exit status, and what was printed to either stream."""
    from hf_robust_vision.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    return status, said.getvalue()


def stock_model(repo_id, **settings) -> dict:
    """`CLIPModel.from_pretrained` of a repository: its weights' hash, and the hash of the file it came from."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPModel, CLIPProcessor

    from hf_robust_vision.towers.base import weights_sha256

    model, info = CLIPModel.from_pretrained(repo_id, output_loading_info=True, **settings)
    CLIPProcessor.from_pretrained(repo_id, **settings)
    file = Path(hf_hub_download(repo_id, "model.safetensors", **settings))
    return {
        "weights": weights_sha256(model),
        "file": sha256(file.read_bytes()).hexdigest(),
        "missing": sorted(info["missing_keys"]),
    }


def load(name, **settings) -> dict:
    from hf_robust_vision import load_robust_encoder
    from hf_robust_vision.towers.base import weights_sha256

    loaded = load_robust_encoder(name, **settings)
    return {
        "kind": type(loaded.encoder).__name__,
        "weights": weights_sha256(loaded.encoder),
        "results": loaded.results,
        "before": loaded.before,
        "training": loaded.training,
    }


def model_info(repo_id) -> dict:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo_id)
    listed = [model.id for model in HfApi().list_models(filter="hf-robust-vision")]
    card = info.card_data
    return {
        "index": info.model_index, "results": card.eval_results, "base_model": card.base_model, "listed": listed,
        "scores": info.eval_results, "library": info.library_name, "task": info.pipeline_tag, "tags": info.tags, "license": card.license,
    }  # fmt: skip


def collections(slugs) -> list:
    """Titles, and the items with their notes, of collections."""
    from huggingface_hub import HfApi

    found = [HfApi().get_collection(slug) for slug in slugs]
    return [(one.title, [(item.item_id, item.item_type, item.note) for item in one.items]) for one in found]


def load_images(repo_id) -> dict:
    """A published data set of adversarial images: rows without pictures, class names, and the card."""
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    rows, card = load_dataset(repo_id, split="adversarial"), DatasetCard.load(repo_id)
    return {
        "rows": rows.remove_columns("image").to_list(), "sizes": [image.size for image in rows["image"]],
        "names": rows.features["label"].names, "card": str(card), "license": card.data.license,
    }  # fmt: skip


def run_usage(card: str) -> str:
    """Execute the first Python block of a card."""
    code = card.split("```python\n")[1].split("```")[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def recipe(words) -> list:
    """A recipe from parse to push: what it printed, and the error that ended it."""
    from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
    from hf_robust_vision.pipeline import parse, run

    said, error = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run(SimCLIPTrainer, *parse(SimCLIPTrainer, words))
        except (ValueError, OSError) as caught:
            error = str(caught)
    return [said.getvalue(), error]
