"""The attack on the shipped LLaVA is a real one: more steps and larger radii, each attacked anew, lower the accuracy."""

from __future__ import annotations

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.tasks import VLMProtocol, evaluate_vqa


pytest.importorskip("easy_vqa")


def right_answers(steps, eps, count):
    """How many questions stand, one row per number of steps; a fallen one is not carried over from cell to cell."""
    vlm = LlavaForConditionalGeneration.from_pretrained(demo_checkpoint("demo-llava")).eval()
    processor = AutoProcessor.from_pretrained(demo_checkpoint("demo-llava"))
    asked = load_questions("test", yes_no=False, limit=count)
    about = {"prompt": PROMPT, "model_name": "before", "dataset": DEMO_NAME, "split": "test", "progress": False}
    return [
        [
            round(count * evaluate_vqa(vlm, processor, asked, how, **about)[0].robust_accuracy)
            for how in (VLMProtocol((radius / 255,), steps=number, restarts=1, objectives=("nll",)) for radius in eps)
        ]
        for number in steps
    ]


def check(table, slack=1):
    """Rows and columns fall, but for one question, and end near nothing."""
    for line in (*table, *zip(*table)):
        assert all(after <= before + slack for before, after in zip(line, line[1:])), table
    assert table[0][0] > table[-1][-1] + slack, table
    assert table[-1][-1] <= slack, table


def test_more_steps_and_larger_radii_lower_the_accuracy():
    check(right_answers((1, 10), (2, 64), 8))


@pytest.mark.slow
def test_the_whole_table_falls():
    check(right_answers((1, 5, 20), (2, 8, 32, 64), 30))
