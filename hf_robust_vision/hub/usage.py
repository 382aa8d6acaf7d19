"""The lines of a card that load what the repository holds; a test runs them."""

from __future__ import annotations

import re

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.report.escape import Verbatim
from hf_robust_vision.report.templates import template


KINDS = ("model", "tower", "adapter")
# A card that somebody edited keeps its words: a push exchanges only what stands between these two.
_START = "<!-- usage: `hf-robust-vision push` keeps this block in step with the repository -->"
_END = "<!-- /usage -->"


def usage_block(
    kind: str, name: str, result: RobustnessResult, base_model: str | None = None, family: str = "CLIP"
) -> Verbatim:
    """The part of a card that shows how to load a "model", "tower", "adapter" or "vlm", which `replace_usage` looks for.

    `name` is the id of the repository, or "." for the card's own folder; `result` lends the example its prompts; `family`
    is "CLIP" or "Siglip", as transformers' classes begin.
    """
    prompt = result.templates[0] if result.templates else "a photo of a {}"
    prompts = [prompt.replace("{}", word) for word in (result.class_names or ["cat", "dog"])[:2]]
    if kind == "vlm":
        asked = result.generation or {}
        prompts = [str(asked.get("chat_template") or asked.get("prompt", "{}")).replace("{}", "what is it?")]
    if family == "Siglip":
        prompts = [prompt.lower() for prompt in prompts]  # as `SiglipEncoder.tokenize`
    # The classes of tokenizers, and so the processors, of SigLIP and SigLIP 2 differ.
    processor = "CLIPProcessor" if family == "CLIP" else "AutoProcessor"
    names = {"kind": kind, "name": name, "base": base_model or "", "family": family, "processor": processor}
    lines = template("usage.md").render(prompts=prompts, **names)
    return Verbatim(f"{_START}\n\n{lines}\n{_END}")


def replace_usage(text: str, block: str) -> str:
    """A card's text with its usage block replaced; a card without one is left as it is."""
    return re.sub(re.escape(_START) + ".*?" + re.escape(_END), lambda _: block, text, count=1, flags=re.DOTALL)
