"""Train the small CLIP of the emoji benchmark from scratch, in minutes on one core.

    python recipes/research/pretrain_emoji_clip.py --data outputs/emoji --output_dir outputs/emoji-clip

A genuine `CLIPModel` of 0.6 M parameters that knows every name of the folder that `prepare_emoji.py` wrote, from its
train images alone. Images are shifted, never mirrored: a leftwards hand is no rightwards hand. Seeded. At the end it
prints how close class texts lie: what the names share should show in it.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from prepare_emoji import concept
from small_clip import TRANSFORM, build_model, build_processor, build_tokenizer, pretrain, training_parser
from transformers import set_seed

from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import as_encoder
from hf_robust_vision.towers.text_bank import make_text_bank


PROMPTS = TEMPLATES["emoji"]


def text_cosines(encoder: DualEncoder, tokenizer: object, names: tuple[str, ...]) -> dict[str, float]:
    """Mean cosine of the class texts of one concept, of those that share a word otherwise, and of the others."""
    texts = make_text_bank(encoder, tokenizer, names, PROMPTS).embeddings
    cosines = texts @ texts.T
    kinds: dict[str, list[float]] = {"man and woman": [], "a shared word": [], "no shared word": []}
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        shared = "a" if set(one.split()) & set(other.split()) else "no"
        kind = "man and woman" if concept(one) == concept(other) else f"{shared} shared word"
        kinds[kind].append(cosines[i, j].item())
    return {kind: sum(values) / len(values) for kind, values in kinds.items() if values}


def main() -> None:
    """Train, print accuracies and text distances, save a stock folder."""
    parser = training_parser(__doc__, output_dir="outputs/emoji-clip", epochs=100)
    parser.set_defaults(learning_rate=2e-3)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji"), help="folder of prepare_emoji.py")
    args = parser.parse_args()
    set_seed(args.seed)
    splits = {split: load_labelled_images(args.data, split, TRANSFORM) for split in ("train", "validation", "test")}
    names = splits["train"].class_names
    tokenizer = build_tokenizer(PROMPTS, names)
    encoder = as_encoder(build_model(tokenizer, patch=16, width=128, layers=3))
    pretrain(encoder, build_processor(tokenizer), splits, PROMPTS, args, flip=False)
    for kind, value in text_cosines(encoder, tokenizer, names).items():
        print(f"mean cosine of two class texts, {kind}: {value:.2f}")


if __name__ == "__main__":
    main()
