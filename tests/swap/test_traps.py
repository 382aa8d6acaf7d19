"""What once went in as a hardened tower, or came out as a report, and was not."""

import copy
import json
import math
import pickle
import threading
from itertools import permutations

import pytest
import torch
from lookalikes import Flamingo, VisionTransformer
from test_refusals import assert_refused
from tiny_vlms import make_clip, randomise
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, CLIPModel

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.swap import hf_to_openclip, swap_vision_encoder
from hf_robust_vision.swap.convert import convert_checkpoint, export_open_clip, export_v4
from hf_robust_vision.swap.swap import STRANGE_DRIFT
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import as_encoder


IMAGE, VIDEO = "model.image_tower", "model.video_tower"


# -- verification -----------------------------------------------------------------------------------------------------


def test_a_tower_that_overflows_is_not_verified(llava, clip):
    """findings-swap 6: `max(0.0, nan)` is 0.0. Every weight is finite in half precision; the layers' outputs are not."""
    for norm in (clip.vision_model.pre_layrnorm, clip.vision_model.encoder.layers[0].layer_norm2):
        norm.weight.data.fill_(3e4)
    words = ["is not finite in torch.float16", "bfloat16 or float32", "brought back"]
    assert_refused(llava.half(), clip, words, error=RuntimeError)
    assert math.isfinite(swap_vision_encoder(llava.float(), clip).towers[0].output_error)


def test_an_old_tower_that_is_not_finite_can_be_replaced(llava, clip, tmp_path):
    """findings-swap 6: its drift was NaN, which is no JSON."""
    llava.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data[0, 0] = math.nan
    report = swap_vision_encoder(llava, clip)
    assert report.towers[0].drift is None
    assert "did not compute finite numbers" in report.warnings[0]

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(report.save(tmp_path).read_text(), parse_constant=refuse)


def scaled(module, inputs, output):
    return 1.2 * output


def other_eps(vision):
    vision.encoder.layers[1].layer_norm2.eps = 0.5


def hook_inside(vision):
    vision.encoder.layers[1].mlp.register_forward_hook(scaled)


def hook_on_a_block(vision):
    vision.encoder.layers[1].register_forward_hook(scaled)


def hook_before_the_tower(vision):
    vision.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0], *inputs[1:]))


def hook_behind_the_tower(vision):
    def hook(module, inputs, output):
        output.last_hidden_state = 1.2 * output.last_hidden_state
        return output

    vision.register_forward_hook(hook)


def another_norm(vision):
    vision.post_layernorm.register_forward_hook(scaled)


def another_forward(vision):
    mlp = vision.encoder.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda states: 1.2 * forward(states)


CHANGES = [
    other_eps, hook_inside, hook_on_a_block, hook_before_the_tower, hook_behind_the_tower, another_norm, another_forward
]  # fmt: skip
KINDS = {"CLIPModel": lambda clip: clip, "encoder": as_encoder, "vision": lambda clip: clip.vision_model}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_source_that_computes_something_else_is_refused(kind, change, llava, clip):
    """findings-swap 7: the reference was made anew from the source's weights, and so equal to the new tower."""
    change(clip.vision_model)
    words = ["layer_norm2 computes with 0.5"] if change is other_eps else ["does not compute what its weights", "hook"]
    assert_refused(llava, kind(clip), words)


@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_that_computes_something_else_is_refused(change, llava, clip):
    """The VLM's own hooks: what it reads is not what the source computes."""
    change(llava.model.vision_tower)
    error = ValueError if change is other_eps else RuntimeError
    assert_refused(llava, clip, ["0.5" if change is other_eps else "differs from the source's"], error=error)


def test_a_source_of_open_clip_is_run_itself(clip):
    """findings-swap 7, the neighbour: one block of another epsilon, and a hook."""
    vlm, source = randomise(Flamingo(VisionTransformer()), 2), randomise(VisionTransformer(), 3)
    swap_vision_encoder(vlm, source)
    source.transformer.resblocks[2].ln_2.eps = 0.5
    with pytest.raises(ValueError, match=r"the first block says layer_norm_eps=1e-05, .*\.2\.ln_2 computes with 0\.5"):
        swap_vision_encoder(vlm, source)
    source.transformer.resblocks[2].ln_2.eps = 1e-5
    source.transformer.resblocks[2].attn.num_heads = 2
    with pytest.raises(ValueError, match="the first block says num_attention_heads=4, block 2 computes with 2"):
        swap_vision_encoder(vlm, source)
    source.transformer.resblocks[2].attn.num_heads = 4
    source.transformer.resblocks[1].mlp.register_forward_hook(scaled)
    with pytest.raises(ValueError, match="does not compute what its weights"):
        swap_vision_encoder(vlm, source)
    swap_vision_encoder(vlm, source.state_dict())


def test_the_source_is_left_as_it_was(llava, clip):
    clip.train().requires_grad_(True)
    hooks = sum(len(module._forward_hooks) for module in clip.modules())
    swap_vision_encoder(llava, clip)
    assert all(module.training for module in clip.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clip.parameters())
    swap_vision_encoder(llava, clip)
    assert sum(len(module._forward_hooks) for module in copy.deepcopy(clip).modules()) - hooks in (0, 2 * 4)


# -- a tower of another world -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    vlm = AutoModelForImageTextToText.from_pretrained(demo_checkpoint("demo-llava"), dtype=torch.float32)
    return vlm.eval(), CLIPModel.from_pretrained(demo_checkpoint())


def test_a_tower_of_another_world_is_warned_of(demo):
    """findings-journey 9: drift -0.04, and no warning."""
    vlm, clip = demo
    torch.manual_seed(1)
    report = swap_vision_encoder(vlm, CLIPModel(clip.config).eval())
    report.restore()
    assert abs(report.towers[0].drift) < 0.2 < STRANGE_DRIFT
    assert report.warnings[0].startswith("THE NEW TOWER IS A STRANGER at model.vision_tower: ")


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_tower_that_was_moved_is_no_stranger(demo, noise):
    """As far as hardening moves it: noise of 0.3 of a weight's deviation gives 0.96; hardened towers have 0.83 to 0.97."""
    vlm, clip = demo
    generator = torch.Generator().manual_seed(0)
    source = copy.deepcopy(clip.vision_model)
    for parameter in source.parameters():
        scale = noise * parameter.detach().std().nan_to_num(0)
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    report = swap_vision_encoder(vlm, source)
    report.restore()
    assert STRANGE_DRIFT < report.towers[0].drift <= 1.0001
    assert not any("STRANGER" in warning for warning in report.warnings)


# -- provenance and the way back --------------------------------------------------------------------------------------


def told(vlm):
    entries = getattr(vlm.config, "robust_vision_swap", {"towers": []})["towers"]
    return {entry["path"]: entry["sha256_after"] for entry in entries}


def true(vlm, swapped):
    return {path: weights_sha256(vlm.get_submodule(path)) for path in swapped}


@pytest.mark.parametrize("order", list(permutations("abc")), ids="".join)
def test_provenance_follows_partial_swaps(order, vlm_of):
    """findings-swap 9: image, then video, then one of them restored: the record told of the other."""
    vlm = vlm_of("video_llava")
    config = vlm.config.to_dict()
    swaps = {"a": (IMAGE, make_clip(7)), "b": (VIDEO, make_clip(8)), "c": (IMAGE, make_clip(9))}
    reports, swapped = {}, []
    for name, (path, source) in swaps.items():
        reports[name] = swap_vision_encoder(vlm, source, towers=path)
        swapped = sorted({*swapped, path})
        assert told(vlm) == true(vlm, swapped)
    if order.index("a") < order.index("c"):
        with pytest.raises(RuntimeError, match="restore.. of the latest report first"):
            reports["a"].restore()
        return
    left = {"a": IMAGE, "b": VIDEO, "c": IMAGE}
    for name in order:
        reports[name].restore()
        del left[name]
        assert told(vlm) == true(vlm, sorted(set(left.values())))
    assert vlm.config.to_dict() == config


def test_each_tower_tells_its_own_source(vlm_of, tmp_path):
    vlm = vlm_of("video_llava")
    swap_vision_encoder(vlm, make_clip(7), towers=IMAGE)
    make_clip(8).save_pretrained(tmp_path / "fare")
    swap_vision_encoder(vlm, tmp_path / "fare", towers=VIDEO)
    sources = {entry["path"]: entry["source"] for entry in vlm.config.robust_vision_swap["towers"]}
    assert sources == {IMAGE: "a CLIPModel in memory", VIDEO: "fare"}


def test_a_record_of_an_earlier_version_is_kept(vlm_of, clip):
    """There was one source for all towers."""
    vlm = vlm_of("video_llava")
    old = {"path": IMAGE, "sha256_before": "0", "sha256_after": "1"}
    vlm.config.robust_vision_swap = {"source": "fare", "resize": "error", "towers": [old]}
    report = swap_vision_encoder(vlm, clip, towers=VIDEO)
    image, video = vlm.config.robust_vision_swap["towers"]
    assert image == old | {"source": "fare", "resize": "error"}
    assert (video["path"], video["source"]) == (VIDEO, report.source)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda report: pickle.loads(pickle.dumps(report)),
    "with the model": lambda report: copy.deepcopy((report, report._journal))[0],
}


@pytest.mark.parametrize("take", COPIES.values(), ids=COPIES)
def test_a_copied_report_does_not_claim_to_restore(take, llava, clip):
    """findings-swap 10: it returned without error and changed nothing."""
    before = weights_sha256(llava)
    report = swap_vision_encoder(llava, clip)
    swapped, again = weights_sha256(llava), take(report)
    assert again.to_dict() == report.to_dict()
    with pytest.raises(RuntimeError, match="or this report is a copy, which has no way back"):
        again.restore()
    assert weights_sha256(llava) == swapped
    report.restore()
    assert weights_sha256(llava) == before


def test_threads_swap_one_after_the_other(llava):
    """findings-swap 13: weights of two sources could mix, both reports telling success."""
    sources = [make_clip(seed) for seed in range(20, 26)]
    reports, errors = [], []
    together = threading.Barrier(len(sources))

    def swap(source):
        together.wait()
        try:
            reports.append(swap_vision_encoder(llava, source))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=swap, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    hashes = [(report.towers[0].sha256_before, report.towers[0].sha256_after) for report in reports]
    assert {after for _, after in hashes} == {weights_sha256(source.vision_model) for source in sources}
    assert (
        len(set(dict(hashes)) - {after for _, after in hashes}) == 1
    )  # each but the first found what another had left
    assert len(dict(hashes)) == len(sources)
    latest = [report for report in reports if report._journal.latest]
    assert [report.towers[0].sha256_after for report in latest] == [weights_sha256(llava.model.vision_tower)]


# -- unclear errors ---------------------------------------------------------------------------------------------------


def test_a_vlm_given_as_a_path(clip, tmp_path):
    """findings-swap 14."""
    for name in ("some/llava", tmp_path):
        with pytest.raises(TypeError, match=r"wanted a model, got .*: load it first, for instance with AutoModelFor"):
            swap_vision_encoder(name, clip)


@pytest.mark.parametrize("name", ["some/llava", "."])
def test_a_processor_given_as_a_name(name, llava, clip):
    """findings-swap 14: it was silently not compared."""
    assert_refused(llava, clip, [f"processor='{name}' is a name", "AutoProcessor.from_pretrained"], processor=name)


def test_mixed_dtypes_that_can_not_run(llava, clip):
    """findings-swap 14."""
    llava.model.vision_tower.encoder.layers[1].mlp.half()
    words = ["torch.float16 and torch.float32", "can not run on its own", "one dtype", "verify=False"]
    assert_refused(llava, clip, words)
    swap_vision_encoder(llava, clip, verify=False)
    assert llava.model.vision_tower.encoder.layers[1].mlp.fc1.weight.dtype == torch.float16
    assert llava.model.vision_tower.encoder.layers[1].mlp.fc2.bias.dtype == torch.float16


def test_a_source_of_mixed_dtypes(llava, clip):
    clip.vision_model.encoder.layers[1].mlp.half()
    assert_refused(llava, clip, ["torch.float16 and torch.float32", "can not run on its own"])
    report = swap_vision_encoder(llava, clip.vision_model.state_dict())
    assert report.towers[0].output_error < 1e-5


# -- convert and export -----------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, clip):
    folder = tmp_path / "base"
    clip.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(demo_checkpoint()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_checkpoint()).save_pretrained(folder)
    return folder


def bad(change, dtype=None):
    state = hf_to_openclip(make_clip(9).state_dict())
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    state[name] = change(state[name]) if dtype is None else change(state[name]).to(dtype)
    return state


BAD = {
    "NaN": (bad(lambda value: value * math.nan), "NaN or infinity in encoder.layers.1.mlp.fc1.weight"),
    "fp64": (bad(lambda value: value.double() * 1e300), "overflows in torch.float32"),
    "int8": (bad(lambda value: value * 100, torch.int8), "torch.int8: dequantise it first"),
}


@pytest.mark.parametrize("case", BAD)
def test_convert_refuses_what_is_no_weight(case, base, tmp_path):
    """findings-swap 8: exit 0."""
    state, words = BAD[case]
    torch.save(state, tmp_path / "tower.pt")
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "tower.pt", str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "tokenizer"])
def test_a_base_without_processor_leaves_nothing_behind(lost, base, tmp_path):
    """findings-swap 8: config and weights were written already."""
    torch.save(hf_to_openclip(make_clip(9).state_dict()), tmp_path / "tower.pt")
    convert_checkpoint(tmp_path / "tower.pt", str(base), tmp_path / "fine")
    if lost == "tokenizer":
        for path in base.glob("tokenizer*"):
            path.write_text("{")
    else:
        for path in base.glob("*processor*"):
            path.unlink()
    doors = [lambda: convert_checkpoint(tmp_path / "tower.pt", str(base), tmp_path / "out")]
    if lost != "tokenizer":
        doors.append(lambda: export_v4(str(base), tmp_path / "out"))
    for door in doors:
        with pytest.raises((ValueError, OSError)):
            door()
        assert not (tmp_path / "out").exists()


def test_what_is_written_is_of_the_other_kind(base, tmp_path):
    """findings-reliability 16: `convert --output FILE`, `export --output FOLDER`."""
    torch.save(hf_to_openclip(make_clip(9).state_dict()), tmp_path / "tower.pt")
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        convert_checkpoint(tmp_path / "tower.pt", str(base), tmp_path / "tower.pt")
    with pytest.raises(ValueError, match="is a folder; wanted a .pt file"):
        export_open_clip(str(base), base)
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        export_v4(str(base), tmp_path / "tower.pt")
    export_open_clip(str(base), tmp_path / "new" / "tower.pt")
    assert isinstance(torch.load(tmp_path / "new" / "tower.pt", weights_only=True), dict)


def test_convert_equals_what_it_was_given(base, tmp_path):
    wanted = make_clip(9)
    torch.save(hf_to_openclip(wanted.state_dict()), tmp_path / "tower.pt")
    got = CLIPModel.from_pretrained(convert_checkpoint(tmp_path / "tower.pt", str(base), tmp_path / "out"))
    assert weights_sha256(got.vision_model) == weights_sha256(wanted.vision_model)
    assert torch.equal(got.visual_projection.weight, wanted.visual_projection.weight)
    assert weights_sha256(got.text_model) == weights_sha256(make_clip().text_model)


def test_another_activation_in_one_block_of_open_clip():
    tower = randomise(VisionTransformer(), 3)
    tower.transformer.resblocks[3].mlp.gelu = nn.GELU()
    with pytest.raises(ValueError, match="the first block says hidden_act='quick_gelu', block 3 computes with 'gelu'"):
        swap_vision_encoder(Flamingo(VisionTransformer()), tower)
