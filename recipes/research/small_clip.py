"""A small dual encoder from scratch: what the recipes `pretrain_*_clip.py` and `pretrain_demo_siglip.py` share.

A genuine `CLIPModel` for images of 64x64 pixels, with a whole-word tokenizer over the words of its class names.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.text_bank import make_text_bank


SIZE = 64
TRANSFORM = PixelTransform(resize=SIZE, crop=(SIZE, SIZE))
SHIFT = 6  # pixels of random translation


def training_parser(description: str | None, *, output_dir: str, epochs: int) -> argparse.ArgumentParser:
    """The arguments of every pre-training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="new or empty folder")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def build_tokenizer(templates: Sequence[str], class_names: Sequence[str]) -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over the words of the prompts."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    texts = [normalizer.normalize_str(text.replace("{}", " ")) for text in (*templates, *class_names)]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", vocabulary["[BOS]"]), ("[EOS]", vocabulary["[EOS]"])]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def build_model(tokenizer: PreTrainedTokenizerFast, *, patch: int, width: int, layers: int) -> CLIPModel:
    """A CLIP of 64 px with 4 heads and an MLP of twice its width; text width 64, 2 layers."""
    vision = {"image_size": SIZE, "patch_size": patch, "hidden_size": width, "intermediate_size": 2 * width}
    vision |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 64, "intermediate_size": 256}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    """The stock processor of `build_model`."""
    size = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def augment(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to SHIFT pixels, repeating its border, and flip half of them if left may be right."""
    count = len(images)
    padded = F.pad(images, [SHIFT] * 4, mode="replicate")
    tops, lefts = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=generator).tolist()
    shifted = torch.stack(
        [padded[i, :, top : top + SIZE, left : left + SIZE] for i, (top, left) in enumerate(zip(tops, lefts))]
    )
    if not flip:
        return shifted
    turned = torch.rand(count, generator=generator) < 0.5
    return torch.where(turned.view(-1, 1, 1, 1), shifted.flip(3), shifted)


def contrastive_loss(logits: Tensor, image_classes: Tensor, text_classes: Tensor) -> Tensor:
    """CLIP's loss where all images and captions of one class are positives of each other.

    A caption without an image of its class is a negative of every image, and of no account in the other direction.

    Args:
        logits: Shape (images, captions).
        image_classes: Shape (images,); each has a caption.
        text_classes: Shape (captions,).
    """
    target = (image_classes[:, None] == text_classes[None]).float()
    drawn = target.any(0)
    directions = ((logits, target), (logits.T[drawn], target.T[drawn]))
    losses = [F.cross_entropy(scores, positive / positive.sum(1, keepdim=True)) for scores, positive in directions]
    return (losses[0] + losses[1]) / 2


def clip_loss(encoder: DualEncoder, output: EncoderOutput, labels: Tensor) -> Tensor:
    """`contrastive_loss` of a batch of images with a caption each, at the encoder's own scale."""
    scale = encoder.logit_scale.clamp(max=math.log(100)).exp()
    logits = scale * F.normalize(output.image_embeds, dim=-1) @ F.normalize(output.text_embeds, dim=-1).T
    return contrastive_loss(logits, labels, labels)


@torch.no_grad()
def accuracy(
    encoder: DualEncoder, tokenizer: Any, part: Mapping[str, Tensor], names: Sequence[str], templates: Sequence[str]
) -> float:
    """Zero-shot accuracy over the class names."""
    bank = make_text_bank(encoder, tokenizer, names, templates)
    embeds = [encoder.encode_images(images).image_embeds for images in part["images"].split(256)]
    guesses = bank.logits(torch.cat(embeds)).argmax(1)
    return (guesses == part["labels"]).float().mean().item()


def pretrain(
    encoder: DualEncoder,
    processor: ProcessorMixin,
    splits: Mapping[str, LabelledImages],
    templates: Sequence[str],
    args: argparse.Namespace,
    *,
    flip: bool,
    loss_of: Callable[[DualEncoder, EncoderOutput, Tensor], Tensor] = clip_loss,
) -> None:
    """Train on "train", print the accuracies on "validation" and "test", save a stock folder.

    Args:
        encoder: Freshly initialised.
        processor: Saved beside it; its tokenizer knows the words of templates and class names.
        splits: The images of the three splits.
        templates: Prompts, one drawn for each image of a batch.
        args: As `training_parser` reads them.
        flip: Whether an image and its mirror image have one name.
        loss_of: From the encoder, what it gives for images and their captions, and the classes of these.

    Raises:
        FileExistsError: If the output folder holds something.
    """
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise FileExistsError(f"{args.output_dir} is not empty; choose another --output_dir.")
    names, tokenizer = splits["train"].class_names, processor.tokenizer
    train, validation, test = (collate_images(list(splits[split])) for split in ("train", "validation", "test"))
    generator = torch.Generator().manual_seed(args.seed)
    per_epoch = len(train["ids"]) // args.batch_size
    steps = args.max_steps if args.max_steps > 0 else args.epochs * per_epoch
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.learning_rate, weight_decay=0.05)
    warm_up = min(50, max(steps // 10, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    start, cpu = time.time(), time.process_time()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train["ids"]), generator=generator)
        rows = order[step % per_epoch * args.batch_size :][: args.batch_size]
        images, labels = augment(train["images"][rows], generator, flip=flip), train["labels"][rows]
        drawn = torch.randint(0, len(templates), (len(rows),), generator=generator).tolist()
        captions = [templates[t].format(names[c]) for t, c in zip(drawn, labels.tolist())]
        output = encoder(images, encoder.tokenize(tokenizer, captions))
        loss = loss_of(encoder, output, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // 20, 1) == 0 or step + 1 == steps:
            score = accuracy(encoder.eval(), tokenizer, validation, names, templates)
            encoder.train()
            passed = f"{time.time() - start:.0f} s"
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  validation accuracy {score:.3f}  {passed}", flush=True)
    encoder.eval()
    score = accuracy(encoder, tokenizer, test, names, templates)
    print(f"test accuracy {score:.3f}  {time.process_time() - cpu:.0f} CPU s", flush=True)
    encoder.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
