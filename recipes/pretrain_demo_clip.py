"""Train the small CLIP that the package ships, from scratch, in minutes on two cores.

    python recipes/pretrain_demo_clip.py --output_dir outputs/demo-clip

It is a genuine `CLIPModel` of 0.7 M parameters on the coloured shapes of easy-vqa. Seeded: the shipped checkpoint
comes out bit for bit on the same type of CPU with the same versions, and within its interval anywhere.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, set_seed

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, load_demo
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.encoders import CLIPEncoder, as_encoder
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.text_bank import make_text_bank, tokenize


SIZE = 64
SHIFT = 6  # pixels of random translation


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over the words of the prompts."""
    words = sorted({word for text in (*TEMPLATES["demo"], *CLASS_NAMES) for word in text.replace("{}", "").split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", vocabulary["[BOS]"]), ("[EOS]", vocabulary["[EOS]"])]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP of 64 px, patch 8, width 128 (MLP 256), 4 layers; text width 64, 2 layers."""
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 128, "intermediate_size": 256}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 64, "intermediate_size": 256}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to SHIFT pixels, repeating its border, and flip half of them."""
    count = len(images)
    padded = F.pad(images, [SHIFT] * 4, mode="replicate")
    tops, lefts = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=generator).tolist()
    shifted = [padded[i, :, top : top + SIZE, left : left + SIZE] for i, (top, left) in enumerate(zip(tops, lefts))]
    flip = torch.rand(count, generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), torch.stack(shifted).flip(3), torch.stack(shifted))


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """CLIP's loss where all images and captions of one class are positives of each other."""
    target = (labels[:, None] == labels[None]).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def accuracy(encoder: CLIPEncoder, tokenizer: PreTrainedTokenizerFast, images: Tensor, labels: Tensor) -> float:
    """Zero-shot accuracy over the class names."""
    bank = make_text_bank(encoder, tokenizer, CLASS_NAMES, TEMPLATES["demo"])
    return (bank.logits(encoder.encode_images(images).image_embeds).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, print the accuracies, save a stock folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-clip"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty; choose another --output_dir.")
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    encoder = as_encoder(build_model(tokenizer))
    transform = PixelTransform(resize=SIZE, crop=(SIZE, SIZE))
    train, validation, test = (
        collate_images(list(load_demo(split, transform))) for split in ("train", "validation", "test")
    )
    generator = torch.Generator().manual_seed(args.seed)
    per_epoch = len(train["ids"]) // args.batch_size
    steps = args.max_steps if args.max_steps > 0 else args.epochs * per_epoch
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.learning_rate, weight_decay=0.05)
    warm_up = min(50, max(steps // 10, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    start = time.time()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train["ids"]), generator=generator)
        rows = order[step % per_epoch * args.batch_size :][: args.batch_size]
        images, labels = augment(train["images"][rows], generator), train["labels"][rows]
        templates = torch.randint(0, len(TEMPLATES["demo"]), (len(rows),), generator=generator).tolist()
        captions = [TEMPLATES["demo"][t].format(CLASS_NAMES[c]) for t, c in zip(templates, labels.tolist())]
        output = encoder(images, tokenize(tokenizer, captions))
        scale = encoder.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * F.normalize(output.image_embeds, dim=-1) @ F.normalize(output.text_embeds, dim=-1).T
        loss = contrastive_loss(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            score = accuracy(encoder.eval(), tokenizer, validation["images"], validation["labels"])
            encoder.train()
            print(
                f"step {step + 1}/{steps}  loss {loss:.3f}  validation accuracy {score:.3f}  {time.time() - start:.0f} s"
            )
    encoder.eval()
    print(f"test accuracy {accuracy(encoder, tokenizer, test['images'], test['labels']):.3f}")
    encoder.save_pretrained(args.output_dir)
    size = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
