r"""Train a small SigLIP on the demo's coloured shapes, from scratch, in minutes on one core.

    python recipes/research/pretrain_demo_siglip.py --output_dir outputs/demo-siglip

It is a genuine `SiglipModel` of 0.3 M parameters, which the package does not ship: a sigmoid loss with a bias, a head
that pools patch tokens by attention, text padded to its full length and read without a mask. Seeded. To harden it:

    accelerate launch recipes/sim_clip.py --config hf_robust_vision/configs/sim_clip_demo.yaml \
        --model_name_or_path outputs/demo-siglip --output_dir outputs/sim-clip-demo-siglip

Reference:
    SigLIP, https://huggingface.co/papers/2303.15343, algorithm 1.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from small_clip import SIZE, TRANSFORM, build_tokenizer, pretrain, training_parser
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    set_seed,
)

from hf_robust_vision.data.demo import CLASS_NAMES, load_demo
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import as_encoder


LENGTH = 10  # tokens of a text; a prompt has at most 8


def build_model(tokenizer: PreTrainedTokenizerFast) -> SiglipModel:
    """A SigLIP of 64 px, 4 layers of width 64 with 4 heads; text of 2 layers and the same width; scale 10 at first."""
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 64, "intermediate_size": 128}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "hidden_size": 64,
        "intermediate_size": 256,
    }
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "projection_size": 64}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    nn.init.constant_(model.logit_scale, math.log(10))
    # Deviation: the paper's -10 is the prior of its batches of 32k; here one pair in as many as there are classes fits.
    nn.init.constant_(model.logit_bias, -math.log(len(CLASS_NAMES) - 1))
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> SiglipProcessor:
    """Its stock processor."""
    return SiglipProcessor(SiglipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)


def siglip_loss(encoder: DualEncoder, output: EncoderOutput, labels: Tensor) -> Tensor:
    """SigLIP's loss: of each image with each caption, whether they belong together; summed over captions, mean over images."""
    cosines = F.normalize(output.image_embeds, dim=-1) @ F.normalize(output.text_embeds, dim=-1).T
    logits = encoder.logit_scale.exp() * cosines + encoder.logit_bias
    # Deviation: all captions of an image's class are its positives, for a batch has each class several times.
    signs = 2.0 * (labels[:, None] == labels[None]) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def main() -> None:
    """Train, print the accuracies, save a stock folder."""
    parser = training_parser(__doc__, output_dir="outputs/demo-siglip", epochs=15)
    parser.set_defaults(batch_size=32)
    args = parser.parse_args()
    set_seed(args.seed)
    tokenizer = build_tokenizer(TEMPLATES["demo"], CLASS_NAMES)
    encoder = as_encoder(build_model(tokenizer))
    splits = {split: load_demo(split, TRANSFORM) for split in ("train", "validation", "test")}
    processor = build_processor(tokenizer)
    pretrain(encoder, processor, splits, TEMPLATES["demo"], args, flip=True, loss_of=siglip_loss)


if __name__ == "__main__":
    main()
