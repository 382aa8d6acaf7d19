"""The lines of a card that load what the repository holds; a test runs them."""

from __future__ import annotations

import re

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.report.escape import markdown_code, python


KINDS = ("model", "tower", "adapter")
_START, _END = (
    "<!-- usage: `hf-robust-vision push` keeps this block in step with the repository -->",
    "<!-- /usage -->",
)

_MODEL = """import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained({name})
processor = CLIPProcessor.from_pretrained({name})
"""
_ADAPTER = """import torch
from peft import PeftModel
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained({base})
model = PeftModel.from_pretrained(model, {name}).merge_and_unload()
processor = CLIPProcessor.from_pretrained({base})
"""
_CLASSIFY = """
image = Image.new("RGB", (224, 224))  # or Image.open("picture.png")
prompts = [{prompts}]
inputs = processor(text=prompts, images=image, return_tensors="pt", padding=True)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
"""
_TOWER = """import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

tower = CLIPVisionModelWithProjection.from_pretrained({name})
processor = AutoImageProcessor.from_pretrained({name})

image = Image.new("RGB", (224, 224))  # or Image.open("picture.png")
with torch.no_grad():
    print(tower(**processor(images=image, return_tensors="pt")).image_embeds.shape)
"""


def usage_block(kind: str, name: str, result: RobustnessResult, base_model: str | None = None) -> str:
    """The part of a card that shows how to load it, between the comments that `replace_usage` looks for.

    Args:
        kind: "model", "tower" or "adapter".
        name: Id of the repository, or "." for the folder that the card lies in.
        result: Its first prompts become those of the example.
        base_model: What an adapter is put on.
    """
    template = result.templates[0] if result.templates else "a photo of a {}"
    prompts = [python(template.replace("{}", word)) for word in (result.class_names or ["cat", "dog"])[:2]]
    loaded = python(name)
    lines = {"model": _MODEL, "tower": _TOWER, "adapter": _ADAPTER}[kind]
    lines = lines.format(name=loaded, base=python(base_model or ""))
    if kind != "tower":
        lines += _CLASSIFY.format(prompts=", ".join(prompts))
    load, swap = (markdown_code(f"{call}{loaded})") for call in ("load_robust_encoder(", "swap_vision_encoder(vlm, "))
    more = (
        f"With hf-robust-vision, {load} gives the encoder with its recorded measurements, and\n"
        f"{swap} puts the tower into a LLaVA or another VLM with the same tower."
    )
    return f"{_START}\n\n```python\n{lines}```\n\n{more}\n\n{_END}"


def replace_usage(text: str, block: str) -> str:
    """A card's text with its usage block replaced; a card without one is left as it is."""
    return re.sub(re.escape(_START) + ".*?" + re.escape(_END), lambda _: block, text, count=1, flags=re.DOTALL)
