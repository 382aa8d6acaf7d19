"""Train the small LLaVA that the package ships, on the frozen tower of the shipped CLIP, in minutes on two cores.

    python recipes/research/pretrain_demo_llava.py --output_dir outputs/demo-llava

A genuine `LlavaForConditionalGeneration` (LLaMA of 4 layers, width 128; 64 image tokens from layer -2) that answers
the questions of easy-vqa. Seeded, like `pretrain_demo_clip.py`. Only the projector and the language model learn.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, Question, load_questions
from hf_robust_vision.towers.load import load_encoder


IMAGE_TOKENS = 64
CHAT_TEMPLATE = (  # `PROMPT`, of the question as the user's message
    "{% for message in messages %}{{ message['role'] }} :"
    "{% for part in message['content'] %} {{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_tokenizer(questions: Sequence[Question]) -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over questions, answers and the prompt."""
    texts = (
        {PROMPT.replace("<image>", "").replace("{}", "")} | {q.text for q in questions} | {q.answer for q in questions}
    )
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "<image>"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", vocabulary["[BOS]"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        padding_side="left",
        model_max_length=128,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def build_model(clip_folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA around the shipped tower."""
    clip = load_encoder(clip_folder)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=clip.vision_model.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=True)
    model.model.vision_tower.requires_grad_(False)
    return model


def build_processor(clip_folder: Path, tokenizer: PreTrainedTokenizerFast, patch_size: int) -> LlavaProcessor:
    """Expands `<image>` to as many tokens as the tower gives."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(clip_folder),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


class VisionCache:
    """Patch tokens of every image, read once: the tower is frozen and images are not augmented."""

    def __init__(self, model: LlavaForConditionalGeneration, transform: object, questions: Sequence[Question]):
        paths = {q.image: q for q in questions}
        self.place = {path: index for index, path in enumerate(paths)}
        tokens = []
        for start in range(0, len(paths), 256):
            images = torch.stack([q.pixels(transform) for q in list(paths.values())[start : start + 256]])
            with torch.no_grad():
                output = model.model.vision_tower(transform.normalize(images), output_hidden_states=True)
            tokens.append(output.hidden_states[-2][:, 1:])
        self.tokens = torch.cat(tokens)

    def __call__(self, questions: Sequence[Question]) -> Tensor:
        """Patch tokens of the questions' images, shape (questions, 64, 128)."""
        return self.tokens[[self.place[q.image] for q in questions]]


def answer_logits(
    model: LlavaForConditionalGeneration, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """Next-token logits after the prompt, from cached patch tokens."""
    embeds = model.get_input_embeddings()(input_ids)
    mask = (input_ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(mask, model.model.multi_modal_projector(tokens))
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
    return model.lm_head(hidden)


def encode(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Prompt, answer and end of text, padded on the left: the last two places are answer and end."""
    image = "<image>" * IMAGE_TOKENS
    texts = [f"{PROMPT.replace('<image>', image).format(q.text)} {q.answer} [EOS]" for q in questions]
    return tokenizer(texts, padding=True, return_tensors="pt")


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration,
    cache: VisionCache,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
) -> float:
    """Share of questions whose answer is the likeliest next token of the whole vocabulary."""
    hits = 0
    for start in range(0, len(questions), 128):
        rows = questions[start : start + 128]
        batch = encode(tokenizer, rows)
        logits = answer_logits(model, cache(rows), batch["input_ids"], batch["attention_mask"])
        hits += (logits[:, -3].argmax(1) == batch["input_ids"][:, -2]).sum().item()
    return hits / len(questions)


def main() -> None:
    """Train, print the accuracies, save a stock folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-llava"))
    parser.add_argument("--clip", type=Path, default=demo_checkpoint())
    parser.add_argument("--max_steps", type=int, default=900)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty; choose another --output_dir.")
    set_seed(args.seed)
    train = load_questions("train")
    # Two thirds of the questions are yes/no and barely need the image; half of each batch asks for colour or shape.
    open_ended, yes_no = [q for q in train if not q.yes_no], [q for q in train if q.yes_no]
    tokenizer = build_tokenizer(train)
    model = build_model(args.clip, tokenizer)
    transform = load_encoder(args.clip).transform
    held_out = {
        name: load_questions("validation", yes_no=kind) for name, kind in (("colour/shape", False), ("yes/no", True))
    }
    cache = VisionCache(model, transform, [*train, *held_out["colour/shape"], *held_out["yes/no"]])
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.learning_rate, weight_decay=0.01)
    warm_up = min(50, max(args.max_steps // 10, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * s / args.max_steps)))
    )
    generator = torch.Generator().manual_seed(args.seed)
    start = time.time()
    for step in range(args.max_steps):
        half = args.batch_size // 2
        rows = [open_ended[i] for i in torch.randint(len(open_ended), (half,), generator=generator).tolist()]
        rows += [yes_no[i] for i in torch.randint(len(yes_no), (half,), generator=generator).tolist()]
        batch = encode(tokenizer, rows)
        logits = answer_logits(model, cache(rows), batch["input_ids"], batch["attention_mask"])
        loss = F.cross_entropy(logits[:, -3:-1].flatten(0, 1), batch["input_ids"][:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == args.max_steps:
            scores = [f"{name} {accuracy(model, cache, tokenizer, rows[:512]):.3f}" for name, rows in held_out.items()]
            print(
                f"step {step + 1}/{args.max_steps}  loss {loss.item():.3f}  validation {', '.join(scores)}  {time.time() - start:.0f} s",
                flush=True,
            )
    model.requires_grad_(True)
    model.save_pretrained(args.output_dir)
    build_processor(args.clip, tokenizer, model.config.vision_config.patch_size).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
