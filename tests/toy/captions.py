"""The captions' embeddings: ComfyUI's tokenizer and its CLIP class over the generated CLIP-L (``tiny.clip_l``)."""

import tiny
import torch
from torch import Tensor

LENGTH, WIDTH = 77, 768


def load_clip():
    """The SD3 text encoder that the stock CLIPLoader makes of the generated CLIP-L."""
    import comfy.sd

    return comfy.sd.load_text_encoder_state_dicts([tiny.clip_l()], clip_type=comfy.sd.CLIPType.SD3)


class Captions:
    """Embeds captions as ``load_clip()`` does, but from a table: its layers pass token + position on unchanged."""

    def __init__(self) -> None:
        state = tiny.clip_l()
        self.tokens = state["text_model.embeddings.token_embedding.weight"].float()
        self.positions = state["text_model.embeddings.position_embedding.weight"].float()
        self.tokenizer = load_clip().tokenizer
        self.ids: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Context [n, 77, 768] and pooled [n, 768]; the real ones are zero beyond these channels."""
        ids = torch.stack([self._ids(text) for text in texts])
        context = self.tokens[ids] + self.positions
        end = (ids == ids[:, -1:]).int().argmax(1)
        last = context[torch.arange(len(ids)), end]
        return context, torch.nn.functional.layer_norm(last, (WIDTH,))

    def _ids(self, text: str) -> Tensor:
        if text not in self.ids:
            if len(self.ids) > 100_000:
                self.ids.clear()
            (pairs,) = self.tokenizer.tokenize_with_weights(text)["l"]
            self.ids[text] = torch.tensor([token for token, _ in pairs])
        return self.ids[text]
