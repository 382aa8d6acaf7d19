from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from hf_robust_vision import LabelledImages, TeCoAArguments, TeCoATrainer, TIMAArguments, TIMATrainer
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.demo import CLASS_NAMES, demo_checkpoint
from hf_robust_vision.methods.classes import cosines
from hf_robust_vision.methods.tima import confusable, hyperspherical_energy, required_gap
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.base import Batch


TECOA = {"margin": 0.0, "mhe_weight": 0.0, "iakd_weight": 0.0, "text_params": "none"}
QUIET = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "templates": "demo"}


@pytest.fixture
def build(tmp_path):
    """A trainer of the demo model on eight noise images."""

    def make(trainer=TIMATrainer, arguments=TIMAArguments, dtype=torch.float32, **options):
        encoder = load_encoder(demo_checkpoint(), dtype=dtype)
        noise = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows = [{"image": Image.fromarray(noise[i].numpy()), "label": i} for i in range(8)]
        data = LabelledImages(rows, CLASS_NAMES, encoder.transform, name="noise", split="train")
        args = arguments(output_dir=str(tmp_path), **({"attack_steps": 2} | QUIET | options))
        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        return trainer(encoder, args, train_dataset=data, processing_class=processor)

    return make


@pytest.fixture
def texts():
    return unit(7, 5)


def unit(rows, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1)


def batch_of(trainer, dtype=torch.float32):
    inputs = collate_images(list(trainer.train_dataset))
    images = inputs["images"].to(dtype)
    return Batch(images, inputs["labels"], inputs["ids"], trainer.targets)


def image_gradients(trainer, inputs):
    trainer.compute_loss(trainer.model, inputs).backward()
    named = trainer.model.named_parameters()
    return {name: value.grad for name, value in named if name.startswith("visual_projection") or "vision_m" in name}


# Energy of the class texts


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_energy_of_a_simplex_is_its_closed_form(classes):
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    energy = hyperspherical_energy(F.normalize(centred, dim=-1))
    assert energy.item() == pytest.approx(1 / (3 + 2 / (classes - 1)), rel=1e-12)


def test_energy_is_one_at_a_point_and_a_fifth_at_opposite_poles():
    point = torch.ones(4, 3, dtype=torch.float64)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert hyperspherical_energy(point).item() == pytest.approx(1)
    assert hyperspherical_energy(poles).item() == pytest.approx(1 / 5)


def test_energy_gradient_matches_finite_differences():
    embeds = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: hyperspherical_energy(F.normalize(e, dim=-1)), embeds)


def test_energy_alone_spreads_the_texts(texts):
    raw = texts.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(hyperspherical_energy(F.normalize(raw, dim=-1)), raw)
    assert cosines(raw - gradient, raw - gradient).sum() < cosines(raw, raw).sum()


# Margin and gate


def test_gap_follows_the_formula_and_carries_no_gradient(texts):
    labels = torch.tensor([2, 0])
    texts.requires_grad_()
    similarity = (texts @ texts.T).detach()[labels]
    wanted = {"distance": 1 - similarity, "similarity": similarity.clamp_min(0), "constant": torch.ones(2, 7)}
    for mode, gap in wanted.items():
        found = required_gap(texts, labels, margin=0.1, mode=mode)
        torch.testing.assert_close(found, 0.1 * gap.double())
        assert not found.requires_grad
    assert required_gap(texts, labels, margin=0.1).gather(1, labels[:, None]).abs().max() < 1e-12


def test_gate_opens_for_confusable_classes_only():
    original = torch.tensor([[0.50, 0.48, 0.47, 0.10], [0.90, 0.20, 0.30, 0.10]])
    labels = torch.tensor([0, 0])
    by_class = confusable(original, labels, eta=0.95, scale=10.0, gate="class")
    assert by_class.tolist() == [[False, True, False, False], [False] * 4]
    by_sample = confusable(original, labels, eta=0.95, scale=10.0, gate="sample")
    assert by_sample.tolist() == [[False, True, True, True], [False] * 4]
    assert confusable(original, labels, eta=0.95, scale=10.0, gate="none").sum().item() == 6


def test_gate_stays_open_for_a_closer_class_where_the_true_cosine_is_negative():
    original = torch.tensor([[-0.50, -0.51, -0.49, -0.54, 0.10]])
    found = confusable(original, torch.tensor([0]), eta=0.95, scale=10.0)
    assert found.tolist() == [[False, True, True, False, True]]


def test_margin_is_added_on_the_scale_of_the_cosine(build):
    """On the scale of the logits m = 0.1 would do nothing."""
    trainer = build(margin=0.2, margin_mode="constant", gate="none", mhe_weight=0.0, iakd_weight=0.0)
    batch = batch_of(trainer)
    with torch.no_grad():
        loss = trainer.robust_loss(trainer.model, batch, batch.images)
        logits = trainer.logits(batch.original.image_embeds)
        gap = 0.2 * trainer.bank.logit_scale * (1 - F.one_hot(batch.labels, len(CLASS_NAMES)))
    assert loss.item() == pytest.approx(F.cross_entropy(logits + gap, batch.labels).item(), rel=1e-5)


def test_a_closed_gate_makes_the_margin_irrelevant(build):
    losses = []
    for margin in (0.0, 0.5):
        trainer = build(margin=margin, gate="sample", eta=0.0)
        batch = batch_of(trainer)
        losses.append(trainer.robust_loss(trainer.model, batch, batch.images).item())
    assert losses[0] == losses[1]


# The whole loss


def test_without_margin_weights_and_text_its_gradients_are_tecoas(build):
    tima = build(dtype=torch.float64, **TECOA)
    tecoa = build(TeCoATrainer, TeCoAArguments, dtype=torch.float64)
    inputs = collate_images(list(tima.train_dataset))
    inputs["images"] = inputs["images"].double()
    found, wanted = image_gradients(tima, inputs), image_gradients(tecoa, inputs)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        difference = (found[name] - gradient).norm()
        assert difference <= 1e-10 * gradient.norm(), name


def test_distillation_of_an_untouched_text_tower_is_zero_and_so_is_its_gradient(build):
    trainer = build(**(TECOA | {"iakd_weight": 1.0, "text_params": "encoder"}))
    batch = batch_of(trainer)
    trainer.robust_loss(trainer.model, batch, batch.images)
    assert torch.stack(trainer._measured["loss_iakd"]).abs().max() < 1e-6
    output = trainer.model(prompts=trainer.prompts)
    texts = trainer._classes(output.text_embeds)
    original = batch.original.image_embeds
    divergence = F.kl_div(
        trainer.logits(original, texts).log_softmax(1), trainer.logits(original).softmax(1), reduction="batchmean"
    )
    gradients = torch.autograd.grad(divergence, list(trainer.model.text_model.parameters()), allow_unused=True)
    assert max(g.abs().max().item() for g in gradients if g is not None) < 1e-6


# Who is who: both towers moved, so that T is not T0 and z is not z0


@pytest.fixture
def moved(build):
    """A trainer whose two towers have left the original, a batch, and other images in the place of adversarial ones."""

    def make(**options):
        trainer = build(dtype=torch.float64, eta=0.9, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in trainer.model.parameters():
                if value.requires_grad:
                    value += (
                        0.2 * value.abs().mean() * torch.randn(value.shape, generator=generator, dtype=value.dtype)
                    )
        batch = batch_of(trainer, torch.float64)
        return trainer, batch, batch.images.flip(-1)

    return make


def by_hand(trainer, batch, adversarial, margin_text="tuned", student="adversarial"):
    """The four terms as the class docstring writes them, and the gate, from one embedding at a time."""
    scale, labels = trainer.bank.logit_scale, batch.labels

    def embed(encoder, **inputs):
        output = encoder(**inputs)
        return F.normalize(output.image_embeds if "images" in inputs else output.text_embeds, dim=-1).detach()

    def classes(encoder):
        prompts = embed(encoder, prompts=trainer.prompts)
        return F.normalize(prompts.view(len(CLASS_NAMES), -1, prompts.shape[-1]).mean(1), dim=-1)

    def kl(teacher, student):
        p, q = (scale * teacher).softmax(1), (scale * student).softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    tuned, original = classes(trainer.model), classes(trainer.reference.encoder)
    clean, attacked = embed(trainer.model, images=batch.images), embed(trainer.model, images=adversarial)
    frozen = embed(trainer.reference.encoder, images=batch.images)
    judged = frozen @ original.T
    others = ~F.one_hot(labels, len(CLASS_NAMES)).bool()
    true = judged[torch.arange(len(labels)), labels][:, None]
    gate = (judged >= true - (1 - trainer.args.eta) * true.abs()) & others
    spread = {"tuned": tuned, "original": original}[margin_text]
    gap = trainer.args.margin * (1 - spread[labels] @ spread.T)
    distances = torch.cdist(tuned, tuned).square()
    pairs = ~torch.eye(len(tuned), dtype=torch.bool)
    seen = {"adversarial": attacked, "clean": clean}[student]
    return gate, {
        "margin": F.cross_entropy(scale * (attacked @ tuned.T + gate * gap), labels),
        "mhe": (1 / (1 + distances))[pairs].mean(),
        "iakd": kl(frozen @ original.T, frozen @ tuned.T),
        "takd": kl(frozen @ tuned.T, seen @ tuned.T),
    }


@pytest.mark.parametrize("margin_text", ["tuned", "original"])
@pytest.mark.parametrize("student", ["adversarial", "clean"])
def test_each_term_is_what_is_written(moved, margin_text, student):
    trainer, batch, adversarial = moved(takd_weight=1.0, margin=1.0, margin_text=margin_text, takd_student=student)
    loss = trainer.robust_loss(trainer.model, batch, adversarial)
    gate, wanted = by_hand(trainer, batch, adversarial, margin_text, student)
    assert 0.05 < gate.double().mean() < 0.95
    assert trainer._measured["gate_open"][0].item() == pytest.approx(gate.sum().item() / gate.numel() * 24 / 23)
    for name, value in wanted.items():
        assert trainer._measured[f"loss_{name}"][0].item() == pytest.approx(value.item(), rel=1e-5), name
    assert loss.item() == pytest.approx(sum(wanted.values()).item(), rel=1e-7)


@pytest.mark.parametrize(
    ("options", "logged"),
    [({}, True), ({"takd_student": "clean"}, False), ({"takd_student": "clean", "takd_weight": 0.5}, True)],
)
def test_a_distillation_that_is_not_computed_is_not_logged(build, options, logged):
    trainer = build(**options)
    batch = batch_of(trainer)
    trainer.robust_loss(trainer.model, batch, batch.images)
    assert ("loss_takd" in trainer._measured) is logged


@pytest.mark.parametrize("name", ["mhe", "iakd", "takd"])
def test_each_term_reaches_one_tower_only(moved, name):
    """What one weight changes in the gradient of the whole loss."""
    trainer, batch, adversarial = moved()
    gradients = []
    for weight in (0.0, 1.0):
        for each in ("mhe", "iakd", "takd"):
            setattr(trainer.args, f"{each}_weight", weight if each == name else 0.0)
        trainer.model.zero_grad()
        trainer.robust_loss(trainer.model, batch, adversarial).backward()
        gradients.append({key: p.grad.clone() for key, p in trainer.model.named_parameters() if p.grad is not None})
    change = {"image": 0.0, "text": 0.0}
    for key, gradient in gradients[1].items():
        tower = "text" if key.startswith("text") else "image"
        change[tower] = max(change[tower], (gradient - gradients[0][key]).abs().max().item())
    reached, untouched = ("image", "text") if name == "takd" else ("text", "image")
    assert change[untouched] < 1e-12
    assert change[reached] > 1e-5


def test_attack_raises_the_cross_entropy_of_the_tuned_texts(moved):
    trainer, batch, adversarial = moved(margin=0.0)
    _, wanted = by_hand(trainer, batch, adversarial)
    found = trainer.attack_objective(trainer.model, batch)(adversarial)
    assert found.mean().item() == pytest.approx(wanted["margin"].item(), rel=1e-9)


# What trains, and what is saved


def test_variants_differ_in_gate_and_image_distillation(tmp_path):
    aaai, v1 = (TIMAArguments(output_dir=str(tmp_path), variant=name) for name in ("aaai", "v1"))
    assert (aaai.gate, aaai.takd_weight) == ("class", 0.0)
    assert (v1.gate, v1.takd_weight) == ("none", 1.0)
    assert TIMAArguments(output_dir=str(tmp_path), variant="v1", gate="sample").gate == "sample"


@pytest.mark.parametrize(
    ("params", "trains"),
    [("encoder", {"text_model", "text_projection"}), ("projection", {"text_projection"}), ("none", set())],
)
def test_what_of_the_text_tower_trains(build, params, trains):
    trainer = build(text_params=params)
    trainable = {name.split(".")[0] for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable == {"vision_model", "visual_projection"} | trains


def test_attack_holds_the_text_fixed_and_leaves_no_trace(build):
    trainer = build()
    trainer.compute_loss(trainer.model, collate_images(list(trainer.train_dataset)))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.text_projection.weight.requires_grad


def test_the_saved_folder_is_a_stock_clip_with_the_tuned_text_tower(build, tmp_path):
    trainer = build(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    after = CLIPModel.from_pretrained(tmp_path / "model").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision_model", "visual_projection", "text_model", "text_projection"}
    assert torch.equal(before["logit_scale"], after["logit_scale"])


@pytest.mark.parametrize(
    "wrong", [{"gate": "maybe"}, {"variant": "v2"}, {"margin": -0.1}, {"mhe_weight": -1.0}, {"text_params": "all"}]
)
def test_refuses_what_makes_no_sense(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TIMAArguments(output_dir=str(tmp_path), **wrong)


def test_prompts_in_parts_have_the_same_gradients_and_keep_less(build):
    """findings-scale 7: a thousand classes kept 7.9 GB."""
    whole, parts = (build(dtype=torch.float64, prompts_at_once=size) for size in (0, 7))
    assert len(whole.prompts["input_ids"]) > 21
    gradients, kept = [], []
    for trainer in (whole, parts):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t):
            texts = trainer.model(prompts=trainer.prompts).text_embeds
        weight = torch.linspace(-1, 1, texts.numel(), dtype=torch.float64).view_as(texts)
        (texts * weight).sum().backward()
        named = trainer.model.text_model.named_parameters()
        gradients.append({name: value.grad for name, value in named if value.grad is not None})
        kept.append(sum(sizes))
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.allclose(value, gradients[1][name], rtol=0, atol=1e-9) for name, value in gradients[0].items())
    assert kept[1] < 0.2 * kept[0]
    with torch.no_grad():
        assert torch.allclose(parts.model(prompts=parts.prompts).text_embeds, texts, rtol=0, atol=1e-12)
