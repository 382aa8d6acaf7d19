"""What hardening a VLM costs: an update through projector and processor against the bare tower, and peak memory.

`recipes/research/benchmark.py` calls it; on its own it is the process whose memory is measured:

    python recipes/research/benchmark_vlm.py path/to/vlm path/to/output --whole
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from benchmark_steps import interleaved, resident, trainer_step, wall
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.pipeline.harden_vlm import VLMTrainer, VLMTrainingArguments
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.load import as_encoder, load_encoder


GIB = 2**30


def demo_llava() -> tuple[Any, Any]:
    """The demo LLaVA and its image processor."""
    folder = demo_checkpoint("demo-llava")
    return tf.LlavaForConditionalGeneration.from_pretrained(folder), tf.CLIPImageProcessor.from_pretrained(folder)


def vit_llava(width: int) -> tuple[Any, Any]:
    """A LLaVA of random weights on a ViT-B/32 at 224 px, its projector as wide as a language model of that width."""
    text = tf.LlamaConfig(hidden_size=width, intermediate_size=8, num_hidden_layers=1, vocab_size=8)  # is never run
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(patch_size=32), text_config=text, image_token_index=7)
    return tf.LlavaForConditionalGeneration(config), clip_processor(224)


def clip_processor(side: int) -> Any:
    """Resize, crop and normalisation of a CLIP."""
    return tf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def cost_table(rounds: int, device: str) -> list[str]:
    """Seconds (on a CPU the processor's) of an update at language tokens and at patch tokens of the same tower, as Markdown lines."""
    cases = {
        "the demo LLaVA": (demo_llava, (), 64),
        "ViT-B/32, 224 px, a language model 2048 wide": (vit_llava, (2048,), 2),
    }
    rows = []
    for name, (make, settings, batch) in cases.items():
        torch.manual_seed(0)
        vlm, processor = make(*settings)
        encoder = as_encoder(vlm.eval().to(device), processor)
        bare = tf.CLIPVisionModelWithProjection(vlm.config.vision_config).eval().to(device)
        bare.vision_model = vlm.model.vision_tower
        tower = as_encoder(bare, processor)
        images = torch.rand(batch, *encoder.probe().shape[1:], device=device)
        builders: dict[str, Any] = {
            "patch": partial(trainer_step, tower, images, 2, feature="patch_tokens"),
            "language": partial(trainer_step, encoder, images, 2, feature="language_tokens"),
        }
        seconds = interleaved(builders, rounds, clock=time.process_time if device == "cpu" else wall)
        ratio = seconds["language"] / seconds["patch"]
        rows.append([name, batch, *(f"{value:.2f}" for value in seconds.values()), f"{ratio:.2f}"])
    head = ["tower", "images", "s at patch_tokens", "s at language_tokens", "ratio"]
    return markdown_table(head, rows).splitlines()


def llava_7b() -> tuple[Any, Any]:
    """Config and image processor of a LLaVA-1.5-7B's dimensions, a CLIP ViT-L/14 and a Vicuna, at a third of its 336 px."""
    vision = tf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=112,
        patch_size=14,
    )  # fmt: skip
    text = tf.LlamaConfig(vocab_size=32064)  # of which the defaults are the 7B's
    return tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000), clip_processor(112)


def smolvlm(vision: dict[str, int], text: dict[str, int], side: int, scale: int) -> tuple[Any, Any]:
    """Config and image processor of a SmolVLM, on one square of so many pixels in place of tiles."""
    edge = {"longest_edge": side}
    processor = tf.SmolVLMImageProcessor(do_image_splitting=False, size=edge, max_image_size=edge)
    config = tf.SmolVLMConfig(
        vision_config=vision, text_config=tf.LlamaConfig(vocab_size=49280, **text), scale_factor=scale,
        image_token_id=49190,
    )  # fmt: skip
    return config, processor


def smolvlm_500m() -> tuple[Any, Any]:
    """Of a SmolVLM-500M's dimensions, a SigLIP base and 32 layers, on images of 128 px in place of 512."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5}  # fmt: skip
    return smolvlm(vision, text, 128, 4)


def smolvlm_2b() -> tuple[Any, Any]:
    """Of a SmolVLM-2.2B's dimensions, a SigLIP So400m and 24 layers, on images of 126 px in place of 384."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
              "image_size": 384, "patch_size": 14}  # fmt: skip
    text = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    return smolvlm(vision, text, 126, 3)


SIZES = {  # class, what makes config and processor, and what is loaded: a 7B in float32 and bfloat16 is 19 GiB
    "a SmolVLM-500M's": (tf.SmolVLMForConditionalGeneration, smolvlm_500m, ("tower", "whole")),
    "a SmolVLM-2.2B's": (tf.SmolVLMForConditionalGeneration, smolvlm_2b, ("tower", "whole")),
    "a LLaVA-1.5-7B's": (tf.LlavaForConditionalGeneration, llava_7b, ("tower",)),
}


def memory_table() -> list[str]:
    """Peak memory of one update and of saving, with and without the language model in memory, as Markdown lines."""
    rows = []
    for name, (kind, make, ways) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "vlm"
            weights = write_random(kind, *make(), folder)
            for way in ways:
                output = Path(place) / "out"
                words = [sys.executable, __file__, str(folder), *([str(output)] if len(ways) > 1 else [])]
                words += ["--whole"] if way == "whole" else []
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                peaks = json.loads(done.stdout.splitlines()[-1])
                print(name, way, peaks, file=sys.stderr)
                cells = [f"{peaks[stage]:.2f}" if stage in peaks else "" for stage in ("load", "update", "save")]
                rows.append([name, f"{weights:.2f}", "loaded" if way == "whole" else "not loaded", *cells])
    head = ["dimensions", "the VLM's file", "language model", "peak after loading", "after an update", "after saving"]
    return [*markdown_table(head, rows).splitlines(), "", "GiB of resident memory of a process."]


def write_random(kind: Any, config: Any, processor: Any, folder: Path) -> float:
    """A stock folder with random weights in bfloat16, one tensor of which is in memory at a time; GiB of the weights."""
    with torch.device("meta"):
        model = kind(config)
    config.architectures, config.dtype = [kind.__name__], torch.bfloat16
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    state = revert_weight_conversion(model, model.state_dict())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in state.items():
        start, end = end, end + 2 * math.prod(value.shape)
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name, value in state.items():
            scale = name.endswith("weight") and value.dim() == 1  # of a norm
            tensor = torch.empty(value.shape, dtype=torch.bfloat16)
            tensor = tensor.fill_(1) if scale else tensor.normal_(std=0.02)
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    return end / GIB


def loaded(folder: str, whole: bool) -> nn.Module:
    """The encoder of a folder: tower and projector in float32, the language model absent or as it was saved."""
    if not whole:
        return load_encoder(folder)
    vlm = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    for value in vlm.parameters():  # transformers maps the file: what is not read yet would not count
        value.data = value.data.clone()
    # Linux: the high-water mark starts anew, since the weights stand twice in the old one, mapped and copied.
    Path("/proc/self/clear_refs").write_text("5")
    encoder = as_encoder(vlm, tf.AutoImageProcessor.from_pretrained(folder))
    return encoder.float()  # of tower and projector, which it shares with the VLM


def main() -> None:
    """Load, make one update on one image, save if there is a place for it; the peak up to the end of each, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output", nargs="?")
    parser.add_argument("--whole", action="store_true")
    args = parser.parse_args()
    peaks = {"import": peak()}
    encoder: Any = loaded(args.folder, args.whole)
    peaks["load"] = peak()
    settings = VLMTrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, attack_steps=2,
    )  # fmt: skip
    images = torch.rand(2, *encoder.probe().shape[1:])
    data: Any = [{"images": image, "labels": 0, "ids": place} for place, image in enumerate(images)]
    VLMTrainer(model=encoder, args=settings, train_dataset=data).train()
    peaks["update"] = peak()
    if args.output:
        encoder.save_pretrained(args.output)
        peaks["save"] = peak()
    print(json.dumps(peaks))


def peak() -> float:
    """GiB of resident memory that this process has held at most, since the mark was set back last."""
    return resident("VmHWM") * 1024 / GIB


if __name__ == "__main__":
    main()
