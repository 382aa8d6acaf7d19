"""Captions under attack: scored by the library, worst over the attacks, resumable."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from hf_robust_vision.evaluation.results import SampleRecord, summarize_scores
from hf_robust_vision.evaluation.tasks import CaptionMetric, VLMProtocol, bleu, chrf, evaluate_captions
from tests.evaluation.journal import begun
from tests.evaluation.tasks.test_vqa import lines
from tests.swap.tiny_vlms import SIZE
from tests.towers.tiny_processors import Asked, make_processor, make_speaker


PROMPT = "<image> w1"
ABOUT = {"prompt": PROMPT, "model_name": "before", "dataset": "noise", "split": "test", "progress": False}
HOW = VLMProtocol((0.01, 0.3), steps=5, restarts=1, objectives=("nll",), batch_size=2)


def word_overlap(caption, references):
    """Share of a caption's words that some reference has."""
    known = {word for reference in references for word in reference.split()}
    words = caption.split()
    return sum(word in known for word in words) / max(len(words), 1)


OVERLAP = CaptionMetric("overlap", word_overlap)


@pytest.fixture(scope="module")
def vlm():
    return make_speaker("llava")


@pytest.fixture(scope="module")
def processor():
    return make_processor("llava")


def caption(vlm, processor, sample):
    inputs = processor(images=sample.image, text=PROMPT, return_tensors="pt")
    output = vlm.generate(**inputs, do_sample=False, max_new_tokens=4)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def samples(vlm, processor):
    """Pictures with what the model says about them as their first reference, so that there is something to lose."""
    bare = [Asked(place, size=(SIZE, SIZE)) for place in range(4)]
    return [replace(sample, references=(caption(vlm, processor, sample), "w7 w8 w9")) for sample in bare]


def run(vlm, processor, samples, how=HOW, **settings):
    return evaluate_captions(vlm, processor, samples, how, metric=OVERLAP, max_new_tokens=4, **ABOUT, **settings)


def records_of(result, folder):
    return [json.loads(line) for line in (folder / result.samples).read_text().splitlines()]


def test_a_caption_counts_with_its_worst_score(vlm, processor, samples, tmp_path):
    small, large = run(vlm, processor, samples, attacked_references=2, samples_dir=tmp_path)
    assert (large.task, large.metric, large.clean_accuracy) == ("caption", "overlap", 1.0)
    assert large.robust_accuracy < 1, "the attack must do something here"
    assert [attack["name"] for attack in large.attacks] == ["pgd-5-nll-ref0", "pgd-5-nll-ref1"]
    for before, after, sample in zip(records_of(small, tmp_path), records_of(large, tmp_path), samples):
        assert after["clean"] == caption(vlm, processor, sample)
        assert after["score"] <= before["score"] <= before["clean_score"] == 1.0
        if after["fooled_by"]:
            assert word_overlap(after["adversarial"], sample.references) == pytest.approx(after["score"], abs=1e-6)
    scores = [record["score"] for record in records_of(large, tmp_path)]
    assert large.robust_accuracy == pytest.approx(sum(scores) / len(scores))


def test_each_larger_radius_alone_lowers_the_score(vlm, processor, samples):
    """Each attacked on its own, because a joint run carries the worst score to the larger radii."""
    means = [run(vlm, processor, samples, replace(HOW, eps=(eps,)))[0].robust_accuracy for eps in (0.0, 0.01, 0.9)]
    assert means[0] == 1
    assert means[2] < 1
    assert means[2] <= means[1]


def test_worst_over_attacks_is_the_minimum_of_each_alone(vlm, processor, samples, tmp_path):
    """Against runs of one attack: no sample here is at score 0, where further attacks would be left out."""
    how = replace(HOW, eps=(0.1,))
    (both,) = run(vlm, processor, samples, how, attacked_references=2, samples_dir=tmp_path / "both")
    (first,) = run(vlm, processor, samples, how, samples_dir=tmp_path / "first")
    turned = [replace(sample, references=sample.references[::-1]) for sample in samples]
    (second,) = run(vlm, processor, turned, how, samples_dir=tmp_path / "second")
    columns = [
        [record["score"] for record in records_of(result, tmp_path / name)]
        for result, name in ((both, "both"), (first, "first"), (second, "second"))
    ]
    assert columns[0] == [min(pair) for pair in zip(columns[1], columns[2])]


def test_resumed_equals_unbroken(vlm, processor, samples, tmp_path):
    how = replace(HOW, eps=(0.3,))

    class Killed(Asked):
        def pixels(self, transform):
            raise KeyboardInterrupt

    (whole,) = run(vlm, processor, samples, how, samples_dir=tmp_path / "whole")
    killed = Killed(**vars(samples[2]))
    with pytest.raises(KeyboardInterrupt):
        run(vlm, processor, [*samples[:2], killed, samples[3]], how, samples_dir=tmp_path / "broken")
    assert begun(tmp_path / "broken") == {sample.id for sample in samples[:2]}
    (resumed,) = run(vlm, processor, samples, how, samples_dir=tmp_path / "broken")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert resumed.robust_accuracy == whole.robust_accuracy


def test_samples_without_references_are_refused(vlm, processor, samples):
    for references in ((), "w7 w8"):
        with pytest.raises(ValueError, match=r"samples \[0\] have no list of reference captions"):
            run(vlm, processor, [replace(samples[0], references=references)])
    with pytest.raises(ValueError, match="attacked_references must be at least 1, got 0"):
        run(vlm, processor, samples, attacked_references=0)


def test_scores_are_averaged_with_a_normal_interval():
    records = [SampleRecord(place, "a", "a", score=score, clean_score=0.5) for place, score in enumerate((0.2, 0.4))]
    summary = summarize_scores(records)
    assert summary["num_samples"] == 2
    assert (summary["clean_accuracy"], summary["ci95"]["clean_accuracy"]) == (0.5, [0.5, 0.5])
    assert summary["robust_accuracy"] == pytest.approx(0.3)
    # mean 0.3, standard error 0.1 (standard deviation 0.1414 over the root of 2)
    assert summary["ci95"]["robust_accuracy"] == pytest.approx([0.3 - 0.195996, 0.3 + 0.195996], abs=1e-6)
    with pytest.raises(ValueError, match="a record has no scores"):
        summarize_scores([SampleRecord(0, "a", "a")])


def test_metrics_are_the_librarys():
    library = pytest.importorskip("sacrebleu")
    caption, references = "a cat on a mat", ["a cat sat on the mat", "there is a cat"]
    expected = library.sentence_chrf(caption, references).score / 100
    assert 0 < expected < 1
    assert chrf().score(caption, references) == pytest.approx(expected)
    expected = library.sentence_bleu(caption, references, lowercase=True, use_effective_order=True).score / 100
    assert 0 < expected < 1
    assert bleu().score(caption.upper(), references) == pytest.approx(expected)
    for metric in (chrf(), bleu()):
        assert metric.score("red circle", ["red circle"]) == pytest.approx(1)
        assert metric.score("xyz", ["a cat"]) == pytest.approx(0)
        assert metric.settings["sacrebleu"] == library.__version__


def test_missing_library_says_what_to_type(monkeypatch, vlm, processor, samples):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ModuleNotFoundError, match=r'chrF2 needs sacrebleu: pip install "hf-robust-vision\[caption\]"'):
        evaluate_captions(vlm, processor, samples, HOW, **ABOUT)
