"""Sanity checks of answers: the shipped LLaVA passes, behind a rounding in its vision tower it is flagged."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.results import load_results, load_samples, save_results
from hf_robust_vision.evaluation.tasks import ChosenText, VLMProtocol, evaluate_vqa
from hf_robust_vision.evaluation.tasks.vqa import VQA
from hf_robust_vision.report.page import write_report
from hf_robust_vision.sanity.bench import Bench, pick, right_on_grey
from hf_robust_vision.sanity.check import check_task, sanity_text
from hf_robust_vision.sanity.checks import same_answer
from hf_robust_vision.towers.base import attack_mode, weights_sha256
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from tests.sanity.maskers import rounded_tower


pytest.importorskip("easy_vqa")

HOW = VLMProtocol((32 / 255,), steps=4, restarts=1, batch_size=12)


@pytest.fixture(scope="module")
def vlm():
    return LlavaForConditionalGeneration.from_pretrained(demo_checkpoint("demo-llava")).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(demo_checkpoint("demo-llava"))


@pytest.fixture(scope="module")
def questions():
    return load_questions("test", yes_no=False, limit=12)


def task_of(vlm, processor, questions):
    return VQA(vlm, processor, questions, PROMPT, DEMO_NAME, "test")


@pytest.fixture
def measure(vlm, processor, questions):
    def run(how=HOW, **settings):
        about = {"prompt": PROMPT, "model_name": "before", "dataset": DEMO_NAME, "split": "test", "progress": False}
        return evaluate_vqa(vlm, processor, questions, how, **about, **settings)

    return run


def test_the_honest_model_is_not_flagged(vlm, processor, questions):
    """Nor nearly: everything falls long before the steps are spent, and noise is far behind."""
    how = replace(HOW, eps=(32 / 255, 64 / 255), steps=8)
    report = check_task(task_of(vlm, processor, questions), how.robustness(), samples=12, queries=10)
    assert report["flagged"] == []
    assert (report["verdict"], report["num_samples"], report["protocol"]) == ("passed", 12, "vlm-pgd-8")
    found = {check["name"]: check["numbers"] for check in report["checks"]}
    assert found["steps converged"]["robust"][-2:] == [0, 0]
    assert found["falls at a large radius"]["at_largest"] == 0
    assert found["stronger than noise"]["lead"] > 0.5


def test_a_masker_is_flagged(vlm, processor, questions):
    how = replace(HOW, steps=2)
    tasks = [task_of(model, processor, questions) for model in (rounded_tower(vlm), vlm)]
    report = check_task(tasks[0], how.robustness(), surrogate=tasks[1], samples=6, queries=5)
    signs = {"gradients", "loss rises", "falls at a large radius", "stronger than noise", "as strong as a transfer"}
    assert signs <= set(report["flagged"])
    assert report["verdict"] == "flagged"


def check_target(vlm, processor, steps, **settings):
    colours = [question for question in load_questions("test", yes_no=False, limit=60) if "color" in question.text]
    how = replace(HOW, eps=(64 / 255,), steps=steps)
    other = settings.pop("surrogate", None)
    about = (processor, colours, PROMPT, DEMO_NAME, "test")
    tasks = [
        None if model is None else ChosenText(model, *about, target="blue", max_new_tokens=4) for model in (vlm, other)
    ]
    return check_task(tasks[0], how.robustness(), surrogate=tasks[1], queries=5, **settings)


def test_a_chosen_text_behind_a_masker_is_flagged(vlm, processor):
    report = check_target(rounded_tower(vlm), processor, 2, samples=4, surrogate=vlm)
    assert {"gradients", "stronger than noise", "as strong as a transfer"} <= set(report["flagged"])
    assert report["metric"] == "targeted_success"
    large = next(check for check in report["checks"] if check["name"] == "falls at a large radius")
    assert large["verdict"] == "not run"


@pytest.mark.slow
def test_a_chosen_text_of_the_honest_model_is_not_flagged(vlm, processor):
    assert check_target(vlm, processor, 40, samples=12)["flagged"] == []


def test_a_random_defence_is_flagged(vlm, processor, questions):
    """Ten passes over an image are ten draws: nothing remembers the first."""
    twin = copy.deepcopy(vlm)
    twin.model.multi_modal_projector.register_forward_pre_hook(
        lambda layer, args: tuple(part + 0.1 * torch.randn(part.shape) for part in args)
    )
    with attack_mode(twin):
        trials = pick(task_of(twin, processor, questions), HOW.robustness(), 2)
        bench = Bench(trials, "linf", HOW.eps, HOW.steps, 0, "nothing", "try harder")
        assert same_answer(bench)["verdict"] == "flagged"


def test_what_is_checked_is_what_was_measured(vlm, processor, questions, measure, tmp_path):
    """The same samples fall to the same attacks as in the evaluation, and grey is the blank control."""
    how = replace(HOW, eps=(8 / 255,), steps=2)
    (result,) = measure(how, samples_dir=tmp_path)
    records = {record.id: record for record in load_samples(tmp_path / result.samples)}
    with attack_mode(vlm):
        trials = pick(task_of(vlm, processor, questions), replace(how, batch_size=5).robustness(), 12)
        bench = Bench(trials, "linf", how.eps, how.steps, 0, "nothing", "try harder")
        fell, grey = bench.white().tolist(), right_on_grey(trials)
    ids = [sample for trial in trials for sample in trial.noise.ids]
    assert len(trials) == 3
    assert sorted(ids) == sorted(sample for sample, record in records.items() if record.clean_hit)
    assert fell == [not records[sample].robust_hit for sample in ids]
    assert 0 < sum(fell) < len(fell)
    (blank,) = measure(replace(how, eps=(0.0,)), blank=True)
    assert result.clean_accuracy == 1, "or the shares are of other questions"
    assert grey == pytest.approx(blank.clean_accuracy)


def test_results_carry_their_checks(vlm, processor, questions, measure, tmp_path):
    """Records on disk are not touched."""
    how = replace(HOW, steps=1, objectives=("nll",))
    (result,) = measure(how, samples_dir=tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    result.sanity = check_task(task_of(vlm, processor, questions), how.robustness(), samples=2, queries=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert json.loads(json.dumps(result.sanity, allow_nan=False)) == result.sanity
    save_results([result], tmp_path)
    assert load_results(tmp_path)[0].sanity == result.sanity
    page = write_report([tmp_path], tmp_path / "report")[1].read_text()
    assert "undefended, falls at a large radius: " in page
    assert sanity_text([result]).startswith(f"sanity checks, before on {DEMO_NAME}, answer accuracy: ")


def test_no_trace(vlm, processor, questions):
    vlm.train()
    before, state = weights_sha256(vlm), torch.get_rng_state()
    how = replace(HOW, steps=1, objectives=("nll",))
    try:
        check_task(
            task_of(vlm, processor, questions),
            how.robustness(),
            surrogate=task_of(vlm, processor, questions),
            samples=2,
            queries=2,
        )
        assert vlm.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in vlm.parameters())
        assert weights_sha256(vlm) == before
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        vlm.eval()


def test_bad_input(vlm, processor, questions):
    def run(how=HOW, asked=questions, **settings):
        return check_task(task_of(vlm, processor, asked), how.robustness(), samples=2, queries=1, **settings)

    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        replace(HOW, steps=0)
    with pytest.raises(ValueError, match="nothing to check"):
        run(replace(HOW, eps=(0.0,)))
    with pytest.raises(ValueError, match="right about none of 12 samples"):
        run(asked=[replace(question, answer="nonsense") for question in questions])
    other = vlm_inputs(vlm, processor)
    other.transform = replace(other.transform, resize=(32, 32), crop=None)
    with pytest.raises(ValueError, match="images of 32 x 32 pixels, the model of 64 x 64"):
        run(surrogate=task_of(vlm, other, questions))
