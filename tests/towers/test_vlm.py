"""One contract over the families: what a VLM's language model reads, as features of images in [0, 1]."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F

from hf_robust_vision.swap.layouts import SiglipTower
from hf_robust_vision.swap.towers import find_towers
from hf_robust_vision.towers import graft
from hf_robust_vision.towers.base import Reads, freeze_unread, weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.vlm import Absent, load_vlm, view_vlm
from hf_robust_vision.towers.vlm_inputs import vlm_inputs

from .zoo import FAMILIES, NAMES, saved, tiny_processor, tiny_vlm


READS = Reads("language_tokens")


def images_for(encoder, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *encoder.probe().shape[1:], generator=generator)


def stock_tokens(vlm, processor, image):
    """What the stock path makes of a picture, flat."""
    made = processor(images=[[image]], return_tensors="pt")
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")
    taken = {name: made[name] for name in names if name in made}
    if "image_grid_thw" not in made and vlm.config.model_type in (
        "llava",
        "vipllava",
        "internvl",
        "paligemma",
        "gemma3",
    ):
        taken = {"pixel_values": made["pixel_values"]}
    read = vlm.get_image_features(**taken, return_dict=True).pooler_output
    pieces = [read] if isinstance(read, torch.Tensor) else list(read)
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


@pytest.mark.parametrize("family", FAMILIES)
class TestContract:
    def test_tokens_are_those_of_the_stock_processor(self, family):
        vlm, processor = tiny_vlm(family)
        encoder = view_vlm(vlm, processor)
        # Neither black nor white: where a resize overshoots these, the stock processor cuts.
        cells = 0.25 + 0.5 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        whole = (F.interpolate(cells, encoder.probe().shape[-2:]) * 255).round()
        picture = Image.fromarray(whole[0].permute(1, 2, 0).to(torch.uint8).numpy())
        with torch.no_grad():
            tokens = encoder(whole / 255).language_tokens
            stock = stock_tokens(vlm, processor, picture)  # which rounds what it resized to whole grey levels
        assert tokens.shape[0] == 1
        assert tokens.shape[2] == vlm.config.get_text_config().hidden_size
        torch.testing.assert_close(tokens[0], stock, atol=5e-2 * stock.std().item(), rtol=0)

    def test_a_batch_is_its_images(self, family):
        encoder = view_vlm(*tiny_vlm(family))
        images = images_for(encoder, 3)
        with torch.no_grad():
            together = encoder(images)
            alone = [encoder(image[None]) for image in images]
        torch.testing.assert_close(together.language_tokens, torch.cat([one.language_tokens for one in alone]))
        if together.deepstack_tokens is not None:
            torch.testing.assert_close(together.deepstack_tokens, torch.cat([one.deepstack_tokens for one in alone]))

    def test_gradient_reaches_every_pixel_that_is_read(self, family):
        encoder = view_vlm(*tiny_vlm(family))
        images = images_for(encoder).requires_grad_()
        (gradient,) = torch.autograd.grad(encoder(images).language_tokens.square().sum(), images)
        assert gradient.isfinite().all()
        assert (gradient != 0).float().mean() > 0.99

    def test_an_update_changes_the_tower_only_and_is_saved_whole(self, family, tmp_path):
        vlm, processor = saved(family, tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        assert any(isinstance(module, Absent) for module in encoder.modules())
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        rest = encoder.origin.rest_sha256(encoder)
        freeze_unread(encoder, READS)
        train(encoder)
        tower = {id(value) for value in encoder.tower.parameters()}
        changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert changed <= {name for name, value in encoder.named_parameters() if id(value) in tower}
        encoder.save_pretrained(tmp_path / "hardened")
        again = load_vlm(str(tmp_path / "hardened"))
        stock = type(vlm).from_pretrained(tmp_path / "hardened").eval()
        images = images_for(encoder)
        with torch.no_grad():
            tokens = encoder.eval()(images).language_tokens
            assert torch.equal(tokens, again(images).language_tokens)
            assert torch.equal(tokens, view_vlm(stock, processor)(images).language_tokens)
        assert rest == again.origin.rest_sha256(again)
        ours, theirs = stock.state_dict(), vlm.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name not in changed)

    def test_a_model_in_memory_shares_its_tower_and_is_saved_whole(self, family, tmp_path):
        vlm, processor = tiny_vlm(family)
        encoder = view_vlm(vlm, processor)
        before = weights_sha256(vlm)
        freeze_unread(encoder, READS)
        train(encoder)
        assert weights_sha256(vlm) != before, "the VLM in memory sees the trained tower"
        encoder.save_pretrained(tmp_path)
        stock = type(vlm).from_pretrained(tmp_path)
        assert weights_sha256(stock) == weights_sha256(vlm)

    def test_what_trains_has_a_gradient(self, family):
        encoder = view_vlm(*tiny_vlm(family))
        freeze_unread(encoder, READS)
        trained = [value for value in encoder.parameters() if value.requires_grad]
        output = encoder(images_for(encoder))
        parts = [part for part in (output.language_tokens, output.deepstack_tokens) if part is not None]
        gradients = torch.autograd.grad(sum(part.square().sum() for part in parts), trained, allow_unused=True)
        assert trained
        assert all(gradient is not None for gradient in gradients)


def train(encoder):
    """One update of what trains."""
    optimizer = torch.optim.SGD([value for value in encoder.parameters() if value.requires_grad], lr=0.1)
    encoder(images_for(encoder, seed=1)).language_tokens.square().mean().backward()
    optimizer.step()


def killed(encoder, folder, moved):
    """Exit status of a process that saves, and is killed when so many files are moved; -1: while it copies a shard."""
    child = os.fork()
    if child == 0:
        replace, left = Path.replace, [moved]

        def counted(self, target):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return replace(self, target)

        Path.replace = counted
        if moved < 0:
            graft._write_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            encoder.save_pretrained(folder)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestSaving:
    def test_the_projector_trains_if_asked(self):
        encoder = view_vlm(*tiny_vlm("llava"))
        encoder.train_projector = True
        freeze_unread(encoder, READS)
        assert all(value.requires_grad for value in encoder.model.multi_modal_projector.parameters())

    def test_copies_share_the_language_model(self):
        vlm, processor = tiny_vlm("llava")
        encoder = view_vlm(vlm, processor)
        assert copy.deepcopy(encoder).origin.whole is vlm

    def test_names_of_old_files_are_kept(self, tmp_path):
        saved("llava", tmp_path)
        file = tmp_path / "model.safetensors"
        old = {
            name.replace("vision_tower.", "vision_tower.vision_model.").replace(
                "language_model.", "language_model.model."
            )
            if not name.startswith("language_model.lm_head")
            else name: value
            for name, value in load_file(file).items()
        }
        old = {name.replace("lm_head.", "language_model.lm_head.", 1) if name.startswith("lm_head") else name: value
               for name, value in old.items()}  # fmt: skip
        save_file(old, file, metadata={"format": "pt"})
        encoder = load_vlm(str(tmp_path))
        encoder.save_pretrained(tmp_path / "again")
        assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(old)

    def test_shards_and_their_precision_are_kept(self, tmp_path):
        vlm, processor = tiny_vlm("qwen2_5_vl")
        vlm.to(torch.bfloat16).save_pretrained(tmp_path / "vlm", max_shard_size="100KB")
        processor.save_pretrained(tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        assert encoder.dtype == torch.float32
        encoder.save_pretrained(tmp_path / "again")
        names = sorted(path.name for path in (tmp_path / "vlm").glob("*.safetensors"))
        assert len(names) > 1
        for name in names:
            with safe_open(tmp_path / "vlm" / name, "pt") as old, safe_open(tmp_path / "again" / name, "pt") as new:
                assert set(old.keys()) == set(new.keys())
                assert all(torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in old.keys())  # noqa: SIM118
        assert (tmp_path / "again" / "model.safetensors.index.json").is_file()

    def test_numbers_of_the_original_are_not_copied(self, tmp_path):
        saved("llava", tmp_path / "vlm")
        for name in ("README.md", "robustness.json", "swap_report.json"):
            (tmp_path / "vlm" / name).write_text("of the original")
        (tmp_path / "vlm" / "chat_template.jinja").write_text("kept")
        load_vlm(str(tmp_path / "vlm")).save_pretrained(tmp_path / "again")
        kept = {path.name for path in (tmp_path / "again").iterdir()}
        assert kept == {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
                        "chat_template.jinja"}  # fmt: skip

    def test_a_weight_of_another_shape_writes_nothing(self, tmp_path):
        """It would be written over its neighbours."""
        saved("llava", tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        state = encoder.state_dict()
        state["model.multi_modal_projector.linear_1.bias"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"linear_1.bias has shape \(3,\), in .* it has \(48,\)"):
            encoder.save_pretrained(tmp_path / "again", state_dict=state)
        assert not (tmp_path / "again").exists()

    @pytest.mark.parametrize(("value", "said"), [(1e6, "overflows in torch.float16"), (float("nan"), "NaN or inf")])
    def test_a_weight_that_the_file_can_not_hold_writes_nothing(self, value, said, tmp_path):
        """It would be infinite there, silently."""
        vlm, processor = tiny_vlm("llava")
        vlm.half().save_pretrained(tmp_path / "vlm")
        processor.save_pretrained(tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        bias = "model.multi_modal_projector.linear_1.bias"
        encoder.state_dict()[bias][0] = value
        with pytest.raises(ValueError, match=rf"multi_modal_projector.linear_1.bias.*{said}|{said}.*linear_1.bias"):
            encoder.save_pretrained(tmp_path / "again")
        whole = view_vlm(vlm.float(), processor)
        vlm.half()
        with pytest.raises(ValueError, match=rf"linear_1.bias.*{said}|{said}.*linear_1.bias"):
            whole.save_pretrained(tmp_path / "again", state_dict=encoder.state_dict())
        assert vlm.state_dict()[bias].isfinite().all()
        assert not (tmp_path / "again").exists()

    def test_the_folder_it_was_loaded_from_stays(self, tmp_path, monkeypatch):
        saved("llava", tmp_path / "vlm")
        before = {path.name: path.read_bytes() for path in (tmp_path / "vlm").iterdir()}
        encoder = load_vlm(str(tmp_path / "vlm"))
        train(encoder)
        monkeypatch.chdir(tmp_path)
        for name in (tmp_path / "vlm", "vlm", "vlm/../vlm"):
            with pytest.raises(
                ValueError, match="is where the VLM was loaded from, which stays as it is: name another"
            ):
                encoder.save_pretrained(name)
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "vlm").iterdir()}

    def test_a_killed_save_is_whole_or_does_not_load(self, tmp_path):
        """SIGKILL while a shard is copied, and before and after each file is moved, over an older save."""
        vlm, processor = tiny_vlm("llava")
        vlm.save_pretrained(tmp_path / "vlm", max_shard_size="200KB")
        processor.save_pretrained(tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        encoder.save_pretrained(tmp_path / "out")
        old = weights_sha256(encoder)
        train(encoder)
        new, loads = weights_sha256(encoder), []
        files = len(list((tmp_path / "out").iterdir()))
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        for moved in range(-1, files + 1):
            folder = shutil.copytree(tmp_path / "out", tmp_path / f"out{moved}")
            for start in (folder, tmp_path / f"new{moved}"):
                assert killed(encoder, start, moved) == (-signal.SIGKILL if moved < files else 0)
                try:
                    loads.append((moved, start is folder, weights_sha256(load_vlm(str(start)))))
                except (ValueError, OSError):
                    assert moved < files
            assert (len(list(folder.glob(".writing-*"))) == 1) == (moved < files)
        assert loads == [(-1, True, old), (files, True, new), (files, False, new)]
        encoder.save_pretrained(folder := tmp_path / "out-1")
        assert not list(folder.glob(".writing-*"))
        assert weights_sha256(load_vlm(str(folder))) == new

    def test_an_older_save_of_other_files_is_not_read(self, tmp_path):
        """transformers would read `model.safetensors` before it looks for shards."""
        vlm, processor = tiny_vlm("llava")
        for name, size in (("whole", "1GB"), ("shards", "50KB")):
            vlm.save_pretrained(tmp_path / name, max_shard_size=size)
            processor.save_pretrained(tmp_path / name)
        for updates, name in enumerate(("whole", "shards", "whole")):
            encoder = load_vlm(str(tmp_path / name))
            for _ in range(updates):
                train(encoder)
            encoder.save_pretrained(tmp_path / "out")
            assert weights_sha256(load_vlm(str(tmp_path / "out"))) == weights_sha256(encoder)

    def test_the_rest_is_hashed_alike_in_files_and_in_memory(self, tmp_path, monkeypatch):
        vlm, processor = saved("llava", tmp_path)
        monkeypatch.setattr(graft, "_CHUNK", 1000)
        encoder = load_vlm(str(tmp_path))
        whole = view_vlm(vlm, processor)
        assert encoder.origin.rest_sha256(encoder) == whole.origin.rest_sha256(whole)

    def test_a_weight_without_a_place_writes_nothing(self, tmp_path):
        saved("llava", tmp_path / "vlm")
        encoder = load_vlm(str(tmp_path / "vlm"))
        with pytest.raises(ValueError, match="is in none of the weights"):
            encoder.save_pretrained(tmp_path / "again", state_dict={"model.vision_tower.new": torch.zeros(1)})
        assert not (tmp_path / "again").exists()


def test_the_table_of_the_guide_is_what_the_families_are():
    """Each row is of a family tested here, with the tower that a swap finds in it, if it finds one."""
    page = (Path(__file__).parents[2] / "docs" / "how-to-harden-a-vlm.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", page.split("## What is supported")[1], re.MULTILINE)
    assert [name for name, *_ in rows] == [NAMES[family] for family in FAMILIES]
    for (_, told, way), family in zip(rows, FAMILIES):
        try:
            (tower,) = find_towers(tiny_vlm(family)[0])
            kind = "SigLIP" if isinstance(tower, SiglipTower) else "CLIP"
        except ValueError:
            kind = "its own"
        assert told.startswith(kind), family
        # PaliGemma's has been trained with it since, and is no published SigLIP any more.
        assert (way == "in place, or swapped") == (kind != "its own" and family != "paligemma"), family


class Wall(torch.autograd.Function):
    """The same values; nothing comes back."""

    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        return None


class TestRefusals:
    def test_processor_of_another_model(self):
        vlm, _ = tiny_vlm("llava")
        _, processor = tiny_vlm("qwen2_5_vl")
        with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration can not read what Qwen2VLImageProcessor"):
            view_vlm(vlm, processor)

    def test_a_processor_of_the_same_shapes_is_warned_of(self):
        """Nothing else would tell: SigLIP's mean in the place of CLIP's."""
        vlm, own = tiny_vlm("llava")
        side = own.crop_size["height"]
        other = transformers.SiglipImageProcessor(size={"height": side, "width": side})
        said = r"is a SiglipImageProcessor, and transformers pairs LlavaFor\w+ with CLIPImageProcessor or LlavaImageProcessor"
        with pytest.warns(UserWarning, match=said):
            view_vlm(vlm, other)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_its_own_processor_is_not(self, family):
        vlm, processor = tiny_vlm(family)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the image processor is a")
            view_vlm(vlm, processor)

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
    def test_a_processor_that_works_with_pil(self, family):
        """As transformers gives it where torchvision is not installed."""
        vlm, processor = tiny_vlm(family)
        slow = getattr(transformers, f"{type(processor).__name__}Pil").from_dict(processor.to_dict())
        with pytest.raises(ValueError, match="Pil does not work on tensors .* install torchvision"):
            view_vlm(vlm, slow)

    def test_not_a_processor(self):
        with pytest.raises(TypeError, match="wanted the processor of a VLM or its image processor, got int"):
            view_vlm(tiny_vlm("llava")[0], 3)

    @pytest.mark.parametrize("part", ["the whole in memory", "the whole on disk", "the language model on disk"])
    def test_offloaded(self, part, tmp_path):
        """By accelerate itself."""
        vlm, processor = tiny_vlm("llava")
        if part == "the whole in memory":
            accelerate.cpu_offload(vlm, execution_device="cpu")
        elif part == "the whole on disk":
            accelerate.disk_offload(vlm, str(tmp_path), execution_device="cpu")
        else:
            places = dict.fromkeys(["model.language_model", "lm_head"], "disk")
            places |= dict.fromkeys(["model.vision_tower", "model.multi_modal_projector"], "cpu")
            accelerate.dispatch_model(vlm, places, main_device="cpu", offload_dir=str(tmp_path))
        for refused in (lambda: view_vlm(vlm, processor), lambda: vlm_inputs(vlm, tiny_processor("llava", processor))):
            with pytest.raises(ValueError, match="parts of the LlavaForConditionalGeneration are offloaded: load it"):
                refused()

    def test_offloaded_as_it_is_loaded(self, tmp_path):
        saved("llava", tmp_path / "vlm")
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk"}
        with pytest.raises(ValueError, match="are offloaded"):
            load_encoder(tmp_path / "vlm", device_map=places, offload_folder=str(tmp_path / "offload"))
        assert load_encoder(tmp_path / "vlm", device_map="cpu").device.type == "cpu"

    def test_sharded(self):
        """Over a mesh of one process, as tensor parallelism leaves the weights."""
        vlm, processor = tiny_vlm("llava")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            layer = vlm.model.language_model.layers[0].mlp.up_proj
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh))
            with pytest.raises(ValueError, match="LlavaForConditionalGeneration is sharded over processes"):
                view_vlm(vlm, processor)
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_quantised_layers_that_hold_no_parameter(self):
        """torch's own packed weights, and the whole numbers of GPTQ and AWQ, which only the config tells."""
        vlm, processor = tiny_vlm("llava")
        vlm.model.language_model.layers[0].mlp.up_proj = torch.ao.nn.quantized.dynamic.Linear(48, 64)
        with pytest.raises(ValueError, match=r"is quantised \(torch.ao.nn.quantized.dynamic"):
            view_vlm(vlm, processor)
        vlm, processor = tiny_vlm("llava")
        vlm.config.quantization_config = {"quant_method": "gptq", "bits": 4}
        with pytest.raises(ValueError, match=r"is quantised \(its config has a quantization_config\)"):
            view_vlm(vlm, processor)

    def test_quantised(self, tmp_path):
        vlm, processor = saved("llava", tmp_path)
        vlm.lm_head.weight = nn.Parameter(vlm.lm_head.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"quantised \(torch.int8\)"):
            view_vlm(vlm, processor)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is quantised"):
            load_vlm(str(tmp_path))

    @pytest.mark.parametrize("wall", [torch.Tensor.detach, lambda tensor: Wall.apply(tensor)])
    @pytest.mark.parametrize("path", ["vision_tower.pre_layrnorm", "vision_tower.encoder.layers.1",
                                      "multi_modal_projector.linear_1"])  # fmt: skip
    def test_a_module_that_cuts_the_gradient_is_told_by_name(self, path, wall):
        """Also one whose output says that it has a gradient."""
        vlm, processor = tiny_vlm("llava")
        vlm.model.get_submodule(path).register_forward_hook(lambda module, inputs, output: wall(output))
        with pytest.raises(ValueError, match=f"no gradient reaches the pixels of .*: model.{path} cuts it"):
            view_vlm(vlm, processor)
        with pytest.raises(ValueError, match=f"no gradient reaches the pixels of .*: model.{path} cuts it"):
            vlm_inputs(vlm, tiny_processor("llava", processor))

    def test_a_projector_of_zeros(self):
        vlm, processor = tiny_vlm("gemma3")
        nn.init.zeros_(vlm.model.multi_modal_projector.mm_input_projection_weight)
        with pytest.raises(ValueError, match="zero at every pixel"):
            view_vlm(vlm, processor)

    @pytest.mark.parametrize("lost", ["vision_tower.post_layernorm.weight", "multi_modal_projector.linear_1.bias"])
    def test_missing_weights(self, tmp_path, lost):
        saved("llava", tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[lost]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 weights of the tower"):
            load_vlm(str(tmp_path))

    def test_weights_that_are_not_finite(self, tmp_path):
        saved("llava", tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["vision_tower.post_layernorm.weight"][0] = float("nan")
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="NaN or infinity"):
            load_vlm(str(tmp_path))

    def test_a_damaged_file(self, tmp_path):
        saved("llava", tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged or cut off"):
            load_vlm(str(tmp_path))

    def test_a_family_without_the_hook(self, tmp_path):
        saved("llava", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"}
        config.pop("vision_config"), config.pop("text_config")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=r"'mllama' model \(MllamaForConditionalGeneration\), which has no get_image"
        ):
            load_vlm(str(tmp_path))

    def test_no_image_processor(self, tmp_path):
        saved("llava", tmp_path)
        (tmp_path / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match="has no image processor"):
            load_vlm(str(tmp_path))

    def test_weights_as_pickle(self, tmp_path):
        saved("llava", tmp_path)
        shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"no .safetensors file"):
            load_vlm(str(tmp_path))
