"""What makes a measured run believed: the sanity checks, and an attack of another implementation.

The latter is pyautoattack's standard AutoAttack on the photos of one set. Our worst case and theirs look at the same photos
at the same radius; ours should leave no more standing. AutoAttack is the stronger protocol of the two where few steps
were asked for: it has 100 a restart, FAB and Square beside APGD.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import torch
from compare_run import Run
from transfer import CrossCheck, Sanity

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks import ZeroShot
from hf_robust_vision.files import write_atomically
from hf_robust_vision.sanity.check import check_sanity
from hf_robust_vision.sanity.checks import not_run
from hf_robust_vision.towers.base import attack_mode
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.text_bank import make_text_bank


BATCH = 100


def check(run: Run, how: Sanity) -> dict[str, Any]:
    """The sanity checks of a hardened model, with the original as surrogate, or what was found before."""
    file = run.folder / f"sanity-{how.protocol}-{how.steps}-{how.samples}-{how.queries}.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    start = time.process_time()
    encoder, templates = run.encoder(), get_templates(run.benchmark.templates)
    part = next(iter(run.benchmark.measured("test", encoder.transform).values()))
    part = seeded_subset(part, run.measuring.images, seed=0)
    bank = make_text_bank(encoder, run.tokenizer, part.class_names, templates)
    original = load_encoder(run.benchmark.checkpoint)
    other = make_text_bank(original, run.tokenizer, part.class_names, templates)
    protocol = RobustnessProtocol(get_protocol(how.protocol, steps=how.steps, restarts=1), run.measuring.eps)
    rest: dict[str, Any] = {"samples": how.samples, "queries": how.queries}
    try:
        found = check_sanity(encoder, bank, part, protocol, surrogate=original, surrogate_bank=other, **rest)
    except ValueError as error:  # such as a model that is right about nothing
        found = not_run(error)
    found |= {"set": part.name, "cpu_seconds": time.process_time() - start}
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    return found


def cross_check(run: Run, how: CrossCheck) -> dict[str, Any]:
    """Both robust accuracies of a run, or what was found before.

    Raises:
        ValueError: If pyautoattack is not installed.
    """
    file = run.folder / f"cross-{how.set}-{255 * how.eps:g}-{how.images}.json"
    if file.is_file():
        return dict(json.loads(file.read_text()))
    encoder = run.encoder()
    part = seeded_subset(run.benchmark.measured("test", encoder.transform)[how.set], how.images, seed=0)
    bank = make_text_bank(encoder, run.tokenizer, part.class_names, get_templates(run.benchmark.templates))
    task = ZeroShot(encoder, bank, part)
    start = time.process_time()
    protocol = replace(run.measuring.how(), eps=(how.eps,))
    (ours,) = evaluate(task, protocol, model_name="ours", samples_dir=None, progress=False)
    middle = time.process_time()
    theirs = standard_autoattack(task, how.eps)
    found = {
        "num_samples": len(part),
        "clean": ours.clean_accuracy,
        "ours": ours.robust_accuracy,
        "theirs": theirs,
        "cpu_seconds": {"ours": middle - start, "theirs": time.process_time() - middle},
    }
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    return found


def standard_autoattack(task: ZeroShot, eps: float) -> float:
    """Share of all images of a task that the model is right about, and stays right about under AutoAttack (Croce and Hein 2020).

    Raises:
        ValueError: If pyautoattack is not installed.
        RuntimeError: If it left the ball.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ValueError('pyautoattack is missing; type pip install "pyautoattack>=0.2".') from error
    classify = task.logits.function
    images = torch.stack([item["images"] for item in task.images])
    labels = torch.tensor(task.labels)
    robust = 0
    with attack_mode(task.model):
        attack = AutoAttack(classify, norm="Linf", eps=eps, version="standard", seed=0, device="cpu")
        classes = len(task.bank.class_names)
        for targeted in (attack.apgd_targeted, attack.fab):  # by itself it wants nine wrong classes
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        if classes < 4:  # too few for DLR; ours leaves it out, too
            attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "apgd-t"]
        for some, truth in zip(images.split(BATCH), labels.split(BATCH)):
            with torch.no_grad():
                right = classify(some).argmax(1) == truth
            if not right.any():
                continue
            some, truth = some[right], truth[right]
            found = attack.run_standard_evaluation(some, truth, batch_size=BATCH)[0]
            if (found - some).abs().max() > eps + 1e-6:
                raise RuntimeError("AutoAttack left the ball; nothing that it found counts.")
            with torch.no_grad():
                robust += int((classify(found).argmax(1) == truth).sum())
    return robust / len(labels)
