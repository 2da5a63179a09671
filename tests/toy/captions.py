"""The captions' embeddings, a family each: ComfyUI's tokenizers and text encoder classes with generated weights.

The generated encoders of SD3 and Flux pass their input on, so that an embedding is a token's row of a table; Wan's
mixes a token with its neighbours. For training, ``Captions`` computes that without running the encoder; a test compares
the two.
"""

import io
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import tiny
import torch
import vector_world
import world
from torch import Tensor
from torch.nn.functional import layer_norm

POOLED = 768
WIDTH = 256
"""Of the T5 tables; umt5's rows go on with zeros."""
T5_TOKENS = 40
"""T5 prompts are padded to this length, not 256 or 512, as ComfyUI's T5TokenizerOptions does: cheaper to train."""


def load_clip(family: str) -> Any:
    """The family's text encoder, a ``comfy.sd.CLIP``."""
    return LOADERS[family]()


def _sd3() -> Any:
    """What the stock CLIPLoader makes of the generated CLIP-L."""
    import comfy.sd

    return comfy.sd.load_text_encoder_state_dicts([tiny.clip_l()], clip_type=comfy.sd.CLIPType.SD3)


def _flux() -> Any:
    import comfy.sd
    import comfy.text_encoders.flux as flux
    from comfy.supported_models_base import ClipTarget

    options = {"t5xxl_model_config": tiny.T5_CONFIG}
    target = ClipTarget(flux.FluxTokenizer, flux.flux_clip())
    weights = [tiny.clip_l(), tiny.t5(t5_table())]
    return _padded_less(comfy.sd.CLIP(target, state_dict=weights, model_options=options, parameters=1_000_000))


def _wan() -> Any:
    import comfy.sd
    import comfy.text_encoders.wan as wan
    from comfy.supported_models_base import ClipTarget

    table = umt5_table()
    config = tiny.umt5_config(table)
    data = {"spiece_model": torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)}
    weights = [tiny.t5(table, umt5=True)]
    return _padded_less(
        comfy.sd.CLIP(
            ClipTarget(wan.WanT5Tokenizer, wan.te()),
            state_dict=weights,
            tokenizer_data=data,
            model_options={"umt5xxl_model_config": config},
            parameters=1_000_000,
        )
    )


LOADERS: dict[str, Callable[[], Any]] = {"sd3": _sd3, "flux": _flux, "wan": _wan}


def _padded_less(clip: Any) -> Any:
    for encoder in ("t5xxl", "umt5xxl"):
        clip.set_tokenizer_option(f"{encoder}_min_length", T5_TOKENS)
    return clip


def t5_table() -> Tensor:
    """T5's embeddings, [32128, 256]."""
    return torch.randn(32128, WIDTH, generator=torch.Generator().manual_seed(0)).half().float()


@cache
def sentencepiece_model() -> bytes:
    """umt5's tokenizer file for the worlds' words and no others: each is one piece. And for their letters, as every
    real tokenizer has them: the pack takes a letter that one does not know out of a negative."""
    import sentencepiece

    known = {*world.words(), *vector_world.words()}
    words, model = sorted({*known, *"".join(known)}), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 2),
        model_writer=model,
        model_type="word",
        vocab_size=len(words) + 3,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def umt5_table() -> Tensor:
    """umt5's embeddings, [pieces, 4096], of which 256 columns are not zero; a row depends on its piece's text alone."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    table = torch.zeros(pieces.get_piece_size(), 4096)
    for k in range(len(table)):
        g = torch.Generator().manual_seed(zlib.crc32(pieces.id_to_piece(k).encode()))
        table[k, :WIDTH] = torch.randn(WIDTH, generator=g)
    return table.half().float()


class Captions:
    """Embeds captions as ``load_clip(family)`` does, from its table, on a device."""

    def __init__(self, family: str, device: torch.device | str = "cpu") -> None:
        self.family, self.device = family, torch.device(device)
        self.tokenize = load_clip(family).tokenize
        self.key = {"sd3": "l", "flux": "t5xxl", "wan": "umt5xxl"}[family]
        if family != "wan":  # Wan has no CLIP
            clip_l = tiny.clip_l()
            self.tokens = clip_l["text_model.embeddings.token_embedding.weight"].float().to(device)
            self.positions = clip_l["text_model.embeddings.position_embedding.weight"].float().to(device)
        if family == "flux":
            self.table = _rms(t5_table()).to(device)
        elif family == "wan":
            self.table = umt5_table()[:, :WIDTH]
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Context [n, length, width] (the real one may go on with zeros) and pooled [n, 768] (zero for Wan)."""
        own, clip_l = (torch.stack(rows).to(self.device) for rows in zip(*map(self._read, texts), strict=True))
        if self.family == "wan":
            return own, torch.zeros(len(texts), POOLED, device=self.device)
        context = self.table[own] if self.family == "flux" else self.tokens[own] + self.positions
        end = (clip_l == 49407).int().argmax(1)
        rows = self.tokens[clip_l[torch.arange(len(texts)), end]] + self.positions[end]
        return context, layer_norm(rows, (POOLED,))

    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        """A caption's tokens, those of Wan embedded; and CLIP's."""
        if text not in self.seen:
            if len(self.seen) > 20_000:
                self.seen.clear()
            chunks = self.tokenize(text)
            ids = {key: torch.tensor([token for token, _ in chunk]) for key, (chunk,) in chunks.items()}
            own = ids[self.key]
            if self.family == "wan":
                own = _mixed(self.table[own], int((own != 0).sum()))
            self.seen[text] = own, ids.get("l", torch.zeros(0))
        return self.seen[text]


def _mixed(rows: Tensor, words: int) -> Tensor:
    """What umt5's layer (``tiny.MIX``) makes of the first ``words`` rows; the rest is padding, and zero."""
    own = rows[:words]
    normed, distance = _rms(own), torch.arange(words) - torch.arange(words)[:, None]
    mixed = own.clone()
    for (offset, gain), shuffle in zip(tiny.MIX, tiny.shuffles(own.shape[1]), strict=True):
        near = tiny.NEAR * (distance == offset) if offset else torch.zeros(words, words)
        mixed += gain * (torch.softmax(near, 1) @ normed)[:, shuffle]
    return torch.nn.functional.pad(_rms(mixed), (0, 0, 0, len(rows) - words))


def _rms(table: Tensor) -> Tensor:
    return table * torch.rsqrt(table.square().mean(1, keepdim=True) + 1e-6)
