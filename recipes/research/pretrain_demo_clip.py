"""Train the small CLIP that the package ships, from scratch, in minutes on two cores.

    python recipes/research/pretrain_demo_clip.py --output_dir outputs/demo-clip

It is a genuine `CLIPModel` of 0.7 M parameters on the coloured shapes of easy-vqa. Seeded: the shipped checkpoint
comes out bit for bit on the same type of CPU with the same versions, and within its interval anywhere.
"""

from __future__ import annotations

from small_clip import TRANSFORM, build_model, build_processor, build_tokenizer, pretrain, training_parser
from transformers import set_seed

from hf_robust_vision.data.demo import CLASS_NAMES, load_demo
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.towers.load import as_encoder


def main() -> None:
    """Train, print the accuracies, save a stock folder."""
    args = training_parser(__doc__, output_dir="outputs/demo-clip", epochs=20).parse_args()
    set_seed(args.seed)
    tokenizer = build_tokenizer(TEMPLATES["demo"], CLASS_NAMES)
    encoder = as_encoder(build_model(tokenizer, patch=8, width=128, layers=4))
    splits = {split: load_demo(split, TRANSFORM) for split in ("train", "validation", "test")}
    pretrain(encoder, build_processor(tokenizer), splits, TEMPLATES["demo"], args, flip=True)


if __name__ == "__main__":
    main()
