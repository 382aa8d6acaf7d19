"""Train the small SmolVLM that the package ships, all of it from scratch, in a quarter of an hour on one core.

    python recipes/research/pretrain_demo_smolvlm.py --output_dir outputs/demo-smolvlm

An `Idefics3ForConditionalGeneration`, which is what SmolVLM is in transformers: a vision transformer of its own (no
CLIP), pixel shuffle, a LLaMA of 3 layers and width 96 that reads 16 image tokens; 0.9 M parameters. It answers the
questions of easy-vqa. Beside the answers it learns, through a linear head that is thrown away, to name the colour and
shape of the image from the mean of its tokens: the tower learns faster so. Seeded; killed and started again with the
same words it goes on.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrain_photo_clip import generator_of
from small_clip import SIZE, augment
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_robust_vision.data.demo import CLASS_NAMES, demo_rows
from hf_robust_vision.data.demo_questions import Question, load_questions
from hf_robust_vision.pixels import PixelTransform


TRANSFORM = PixelTransform(SIZE, (SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # as SmolVLM's
PATCH, SHUFFLE = 8, 2
IMAGE_TOKENS = (SIZE // PATCH // SHUFFLE) ** 2
SPECIAL = [
    "[PAD]",
    "[UNK]",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
]
# SmolVLM's, for one role after the other.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_tokenizer(questions: Sequence[Question]) -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over questions, answers and roles."""
    texts = {"user : assistant"} | {q.text for q in questions} | {q.answer for q in questions}
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=128, **names)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    """One tile an image; a question becomes the user's message by the chat template."""
    whole = {"longest_edge": SIZE}
    images = Idefics3ImageProcessor(size=whole, max_image_size=whole, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Idefics3ForConditionalGeneration:
    """A freshly initialised SmolVLM."""
    vision = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": 128, "intermediate_size": 256}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return Idefics3ForConditionalGeneration(config)


class Lesson:
    """Images with their questions and classes, in memory.

    Args:
        questions: What is asked; images that are asked for neither colour nor shape are left out.
        rows: Images with their class, as `demo_rows`.
    """

    def __init__(self, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]):
        self.open: dict[str, list[Question]] = {}
        self.all: dict[str, list[Question]] = {}
        for question in questions:
            self.all.setdefault(question.image, []).append(question)
            if not question.yes_no:
                self.open.setdefault(question.image, []).append(question)
        self.paths = sorted(self.open)
        self.images = torch.stack([self.open[path][0].pixels(TRANSFORM) for path in self.paths])
        classes = {row["image"]: row["label"] for row in rows}
        # -100: questions do not tell the colour and the shape of every image.
        self.classes = torch.tensor([classes.get(path, -100) for path in self.paths])

    def draw(self, rows: Tensor, each: int, generator: torch.Generator) -> list[Question]:
        """Questions of some images: of each image `each`, half of them of colour or shape."""
        # Yes/no questions are two thirds, and barely need the image.
        drawn = []
        for path in [self.paths[row] for row in rows.tolist()]:
            for place, pick in enumerate(torch.rand(each, generator=generator).tolist()):
                questions = (self.open if place % 2 else self.all)[path]
                drawn.append(questions[int(pick * len(questions))])
        return drawn

    @staticmethod
    def encode(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> Mapping[str, Tensor]:
        """Prompt, answer and end, padded on the left: the last two places are answer and end."""
        image = f"<fake_token_around_image><global-img>{'<image>' * IMAGE_TOKENS}<fake_token_around_image>"
        texts = [
            f"<|im_start|>User:{image} {q.text}<end_of_utterance>\nAssistant: {q.answer}<end_of_utterance>"
            for q in questions
        ]
        return tokenizer(texts, padding=True, return_tensors="pt")


class Pretraining:
    """The model, its helping head, and how far they are."""

    def __init__(self, args: argparse.Namespace):
        set_seed(args.seed)
        self.args, self.step, self.seconds = args, 0, 0.0
        tokenizer = build_tokenizer(load_questions("train"))
        self.processor, self.model = build_processor(tokenizer), build_model(tokenizer)
        self.head = nn.Linear(self.model.config.text_config.hidden_size, len(CLASS_NAMES))
        self.parts = nn.ModuleDict({"model": self.model, "head": self.head})
        self.optimizer = torch.optim.AdamW(self.parts.parameters(), lr=args.learning_rate, weight_decay=0.05)
        self.settings = {name: str(value) for name, value in vars(args).items() if name != "output_dir"}

    def save_state(self, file: Path) -> None:
        """Write all that the next step needs; a kill in between leaves the old state."""
        partial = file.with_suffix(".partial")
        state = {name: getattr(self, name) for name in ("settings", "step", "seconds")}
        torch.save(state | {name: getattr(self, name).state_dict() for name in ("parts", "optimizer")}, partial)
        partial.replace(file)

    def load_state(self, file: Path) -> None:
        """Go on from there.

        Raises:
            ValueError: If it is of a run with other settings.
        """
        state = torch.load(file, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{file} is of a run with {state['settings']}; choose another --output_dir.")
        for name in ("parts", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def read(self, images: Tensor) -> Tensor:
        """What the language model reads of images in [0, 1], shape (images, tokens, width)."""
        features = self.model.model.get_image_features(TRANSFORM.normalize(images)[:, None])
        return torch.stack(list(features.pooler_output))

    def answers(self, tokens: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """Logits of answer and end, shape (questions, 2, vocabulary)."""
        embeds = self.model.get_input_embeddings()(text["input_ids"])
        places = (text["input_ids"] == self.model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, tokens)
        hidden = self.model.model.text_model(inputs_embeds=embeds, attention_mask=text["attention_mask"])
        return self.model.lm_head(hidden.last_hidden_state[:, -3:-1])

    def update(self, lesson: Lesson) -> float:
        """One step."""
        args, generator = self.args, generator_of(self.args.seed, "batch", self.step)
        rows = torch.randint(len(lesson.paths), (args.batch_size,), generator=generator)
        text = lesson.encode(self.processor.tokenizer, lesson.draw(rows, args.questions, generator))
        tokens = self.read(augment(lesson.images[rows], generator, flip=True))
        logits = self.answers(tokens.repeat_interleave(args.questions, 0), text)
        loss = F.cross_entropy(logits.flatten(0, 1), text["input_ids"][:, -2:].flatten())
        helping = F.cross_entropy(self.head(tokens.mean(1)), lesson.classes[rows])
        warm, through = min(1, (self.step + 1) / args.warm_up), self.step / args.max_steps
        for group in self.optimizer.param_groups:
            group["lr"] = args.learning_rate * min(warm, 0.5 * (1 + math.cos(math.pi * through)))
        self.optimizer.zero_grad()
        (loss + args.helping * helping).backward()
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def accuracy(self, lesson: Lesson, most: int = 512) -> str:
        """Share of questions whose answer is the likeliest next token, by kind."""
        scores = []
        for name, yes_no in (("colour/shape", False), ("yes/no", True)):
            asked = [(row, q) for row, path in enumerate(lesson.paths) for q in lesson.all[path] if q.yes_no == yes_no]
            asked = asked[:: max(len(asked) // most, 1)][:most]
            hits = 0
            for start in range(0, len(asked), 128):
                rows, questions = zip(*asked[start : start + 128])
                text = lesson.encode(self.processor.tokenizer, questions)
                logits = self.answers(self.read(lesson.images[list(rows)]), text)
                hits += (logits[:, 0].argmax(1) == text["input_ids"][:, -2]).sum().item()
            scores.append(f"{name} {hits / len(asked):.3f}")
        return ", ".join(scores)

    def run(self, state: Path) -> None:
        """Train to the end, print a line now and then, write `state` every few minutes."""
        rows = demo_rows("train")
        lesson, held_out = (Lesson(load_questions(split), rows) for split in ("train", "validation"))
        begun, saved = time.process_time() - self.seconds, time.time()
        while self.step < self.args.max_steps:
            loss = self.update(lesson)
            self.seconds = time.process_time() - begun
            if self.step % 100 == 0 or self.step == self.args.max_steps:
                told = f"step {self.step}/{self.args.max_steps}  loss {loss:.3f}"
                print(f"{told}  validation {self.accuracy(held_out)}  {self.seconds:.0f} CPU s", flush=True)
            if time.time() - saved > 60 * self.args.checkpoint_minutes:
                self.save_state(state)
                saved = time.time()


def main() -> None:
    """Train, print the accuracies, save a stock folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-smolvlm"))
    parser.add_argument("--max_steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=64, help="images")
    parser.add_argument("--questions", type=int, default=4, help="of each image")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warm_up", type=int, default=50, help="steps")
    parser.add_argument("--helping", type=float, default=0.5, help="weight of naming colour and shape")
    parser.add_argument("--checkpoint_minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    state = args.output_dir / "state.pt"
    if args.output_dir.exists() and any(args.output_dir.iterdir()) and not state.is_file():
        parser.error(f"{args.output_dir} is not empty; choose another --output_dir.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pretraining = Pretraining(args)
    if state.is_file():
        pretraining.load_state(state)
        print(f"goes on from step {pretraining.step} of {args.max_steps}", flush=True)
    pretraining.run(state)
    print(f"test {pretraining.accuracy(Lesson(load_questions('test'), []), most=10_000)}", flush=True)
    pretraining.model.save_pretrained(args.output_dir / "model")
    pretraining.processor.save_pretrained(args.output_dir / "model")


if __name__ == "__main__":
    main()
