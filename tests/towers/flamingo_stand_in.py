"""A small model with the method structure of OpenFlamingo: images are encoded under `no_grad` and then attended to."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.swap.lookalikes import VisionTransformer


class MediaLayer(nn.Module):
    """A decoder layer behind a cross attention to the media that it was conditioned on."""

    def __init__(self, decoder_layer, width):
        super().__init__()
        self.decoder_layer, self.look = decoder_layer, nn.MultiheadAttention(width, 2, batch_first=True)
        self.vis_x = self.media_locations = self.cached = None

    def condition_vis_x(self, vis_x):
        self.vis_x = vis_x

    def condition_media_locations(self, locations):
        self.media_locations = locations

    def condition_use_cached_media(self, cached):
        self.cached = cached

    def forward(self, hidden, attention_mask=None, **settings):
        seen = self.look(hidden, self.vis_x.flatten(1, 2), self.vis_x.flatten(1, 2), need_weights=False)[0]
        if not self.cached:  # text before the image does not see it
            seen = seen * (self.media_locations.cumsum(1) > 0)[..., None]
        return self.decoder_layer(hidden + seen, attention_mask=attention_mask, **settings)


class LanguageModel(LlamaForCausalLM):
    """Its forward demands a mask, as OpenFlamingo's mixin does."""

    def init_flamingo(self, media_token_id):
        self.model.layers = nn.ModuleList(MediaLayer(layer, self.config.hidden_size) for layer in self.model.layers)
        self.media_token_id, self.initialized_flamingo, self._use_cached_vision_x = media_token_id, True, False

    def _get_decoder_layers(self):
        return self.model.layers

    def forward(self, input_ids, attention_mask, **settings):
        locations = input_ids == self.media_token_id
        cached = self._use_cached_vision_x and not bool(locations.any())
        for layer in self.model.layers:
            if not cached:
                layer.condition_media_locations(locations)
            layer.condition_use_cached_media(cached)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **settings)

    def clear_conditioned_layers(self):
        for layer in self.model.layers:
            layer.condition_vis_x(None)
            layer.condition_media_locations(None)
            layer.condition_use_cached_media(None)


class Flamingo(nn.Module):
    def __init__(self, vision_encoder, lang_encoder, eoc_token_id, media_token_id, width=32):
        super().__init__()
        self.eoc_token_id, self.media_token_id = eoc_token_id, media_token_id
        self.vision_encoder, self.perceiver = vision_encoder, nn.Linear(width, width)
        self.lang_encoder = lang_encoder
        lang_encoder.init_flamingo(media_token_id)

    def forward(self, vision_x, lang_x, attention_mask=None, labels=None, clear_conditioned_layers=True, **settings):
        self._encode_vision_x(vision_x=vision_x)
        output = self.lang_encoder(input_ids=lang_x, attention_mask=attention_mask, labels=labels, **settings)
        if clear_conditioned_layers:
            self.lang_encoder.clear_conditioned_layers()
        return output

    def generate(self, vision_x, lang_x, attention_mask=None, **settings):
        self.lang_encoder._use_cached_vision_x = True
        self._encode_vision_x(vision_x=vision_x)
        stop = settings.pop("eos_token_id", self.eoc_token_id)
        text = {"input_ids": lang_x, "attention_mask": attention_mask}
        output = self.lang_encoder.generate(**text, eos_token_id=stop, **settings)
        self.lang_encoder.clear_conditioned_layers()
        self.lang_encoder._use_cached_vision_x = False
        return output

    def _encode_vision_x(self, vision_x):
        batch, media, frames = vision_x.shape[:3]
        assert vision_x.ndim == 6
        assert frames == 1
        pixel_values = vision_x.flatten(0, 2)
        with torch.no_grad():
            tokens = self.vision_encoder(pixel_values)[1]
        tokens = self.perceiver(tokens.unflatten(0, (batch, media, frames)).flatten(2, 3))
        for layer in self.lang_encoder._get_decoder_layers():
            layer.condition_vis_x(tokens)


def make_flamingo(vocabulary, media_token_id, eoc_token_id):
    torch.manual_seed(0)
    language = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Flamingo(VisionTransformer(), LanguageModel(language), eoc_token_id, media_token_id)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.lang_encoder.lm_head.weight[[0, 1, 2, 3, media_token_id, eoc_token_id]] = 0
    return model.eval()
