"""Text encoders for the host tests: ComfyUI's real classes and real tokenizers, of tiny size and random weights."""

import comfy.sd
import comfy.text_encoders.sd3_clip as sd3_clip
import folder_paths
import torch
from comfy.supported_models_base import ClipTarget


def made(target, options, **kw):
    """A CLIP with the folders of embeddings that ComfyUI's loaders give to one."""
    folders = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.CLIP(target, embedding_directory=folders, model_options=options, parameters=1_000_000, **kw)


def tiny_config(width):
    return {
        "num_hidden_layers": 3,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
    }


def make_clip(clip_l=True, clip_g=True, t5=True, seed=0):
    """SD3's text encoders, those that are asked for."""
    width = 4096 if clip_l or clip_g else 64  # SD3 pads CLIP's embeddings to 4096 and joins T5's to them
    options = {
        "t5xxl_model_config": {"num_layers": 2, "d_model": width, "d_ff": 128, "d_kv": 16, "num_heads": 4},
        "clip_l_model_config": tiny_config(64),
        "clip_g_model_config": tiny_config(128),
    }
    target = ClipTarget(sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(clip_l=clip_l, clip_g=clip_g, t5=t5))
    clip = made(target, options)
    g = torch.Generator().manual_seed(seed)
    for name, p in clip.cond_stage_model.named_parameters():
        norm = "norm" in name and p.ndim == 1
        p.data.copy_(torch.ones_like(p) if norm else torch.randn(p.shape, generator=g) * (0.5 if p.ndim < 2 else 0.2))
    return clip


def make_flux_clip(pooled=64):
    """Flux.1's text encoders; T5 is 64 wide. ``pooled``: CLIP-L's width, 768 where a model takes its output."""
    import comfy.text_encoders.flux as flux

    return randomized(ClipTarget(flux.FluxTokenizer, flux.flux_clip()), 64, pooled)


def make_unet_clip(kind):
    """The text encoders of SD1.5 (sd1), SD2.1 (sd2) or SDXL."""
    import comfy.sd1_clip as sd1_clip
    import comfy.sdxl_clip as sdxl_clip
    import comfy.text_encoders.sd2_clip as sd2_clip

    tokenizer, model = {
        "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
        "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    }[kind]
    return randomized(ClipTarget(tokenizer, model), 64, {"sd1": 768, "sd2": 1024, "sdxl": 768}[kind])


def make_cosmos_clip(kind):
    """The text encoder of Cosmos Predict2 (cosmos) or of Anima."""
    import comfy.text_encoders.anima as anima
    import comfy.text_encoders.cosmos as cosmos

    tokenizer, module = (anima.AnimaTokenizer, anima) if kind == "anima" else (cosmos.CosmosT5Tokenizer, cosmos)
    return randomized(ClipTarget(tokenizer, module.te()), 1024)


def make_ltxv_clip():
    """LTX-Video's T5, in full width."""
    import comfy.text_encoders.lt as lt

    return randomized(ClipTarget(lt.LTXVT5Tokenizer, lt.ltxv_te()), 4096)


def make_wan_clip(folder):
    """Wan's real tokenizer class over a tiny sentencepiece model."""
    import comfy.text_encoders.wan as wan

    data = {"spiece_model": sentencepiece_model(folder, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)}
    return randomized(ClipTarget(wan.WanT5Tokenizer, wan.te()), 4096, tokenizer_data=data)


def make_ltxav_clip(folder, kind):
    """The text encoder of LTX-2, 48 wide, or of 2.3: ComfyUI's classes of Gemma 3 and its tokenizer, whose vocabulary
    comes with the weights; here that is a tiny sentencepiece model. The projection is ComfyUI's too, cut to size."""
    import comfy.text_encoders.lt as lt

    small = {**tiny_config(64), "num_key_value_heads": 1, "vocab_size": 256}
    model = lt.ltxav_te(text_projection_type="dual_linear" if kind == "2.3" else "single_linear")
    data = {"spiece_model": sentencepiece_model(folder, pad_id=0, eos_id=1, bos_id=2, unk_id=3)}
    clip = made(ClipTarget(lt.LTXAVGemmaTokenizer, model), {"_model_config": small}, tokenizer_data=data)
    read = (small["num_hidden_layers"] + 1) * small["hidden_size"]
    clip.cond_stage_model.text_embedding_projection = (
        lt.DualLinearProjection(read, 64, 32, operations=torch.nn)
        if kind == "2.3"
        else torch.nn.Linear(read, 48, bias=False)
    )
    g = torch.Generator().manual_seed(0)
    for name, p in clip.cond_stage_model.named_parameters():
        if "vision" not in name and "multi_modal" not in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0))
    return clip


def sentencepiece_model(folder, **ids):
    """The bytes of one trained in ``folder`` on a few words. ids: of its special tokens."""
    import sentencepiece

    words = "a red roof house tree sails boat without with and the of hands clock on " * 40
    (folder / "text.txt").write_text("\n".join(words.split()) + "\n" + "\n".join(words[i : i + 40] for i in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        **ids,
    )
    return torch.frombuffer(bytearray((folder / "m.model").read_bytes()), dtype=torch.uint8)


def randomized(target, width, pooled=64, **kw):
    """A CLIP of random weights."""
    small = {"num_layers": 2, "d_model": width, "d_ff": 128, "d_kv": 16, "num_heads": 4}
    options = {
        "t5xxl_model_config": small,
        "umt5xxl_model_config": {**small, "vocab_size": 256},
        "clip_l_model_config": tiny_config(pooled),
        "clip_h_model_config": tiny_config(pooled),
        "clip_g_model_config": tiny_config(1280),
        "qwen3_06b_model_config": {"num_hidden_layers": 2, "intermediate_size": 128},
    }
    clip = made(target, options, **kw)
    g = torch.Generator().manual_seed(0)
    for p in clip.cond_stage_model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return clip


def make_chroma_clip():
    """Chroma's T5, 64 wide."""
    import comfy.text_encoders.pixart_t5 as pixart

    return randomized(ClipTarget(pixart.PixArtTokenizer, pixart.pixart_te()), 64)


def make_language_clip(target, layers=3, tokenizer_data=None, pooled=64, **config):
    """A CLIP of a language model with random weights, 64 wide; the part of it that sees pictures has none. ``pooled``:
    the width of a CLIP-L beside it."""
    small = {
        **tiny_config(64),
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        **config,
    }
    names = ("qwen25_7b", "qwen3_2b", "qwen3_4b", "qwen3_8b", "mistral3_24b", "llama")
    options = {f"{name}_model_config": small for name in names} | {"clip_l_model_config": tiny_config(pooled)}
    clip = made(target, options, tokenizer_data=tokenizer_data or {})
    g = torch.Generator().manual_seed(0)
    for name, p in clip.cond_stage_model.named_parameters():
        if ".visual." not in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0))
    return clip


def make_qwen_image_clip():
    """Qwen-Image's Qwen2.5-VL, 64 wide."""
    import comfy.text_encoders.qwen_image as qwen_image

    return make_language_clip(ClipTarget(qwen_image.QwenImageTokenizer, qwen_image.te()))


def make_z_image_clip():
    """Z-Image's Qwen3, 64 wide."""
    import comfy.text_encoders.z_image as z_image

    return make_language_clip(ClipTarget(z_image.ZImageTokenizer, z_image.te()))


def make_ovis_clip():
    """Ovis-Image's Qwen3, 64 wide."""
    import comfy.text_encoders.ovis as ovis

    return make_language_clip(ClipTarget(ovis.OvisTokenizer, ovis.te()))


def make_klein_clip():
    """Flux.2 Klein's Qwen3, 64 wide: three of its layers, side by side."""
    import comfy.text_encoders.flux as flux

    return make_language_clip(ClipTarget(flux.KleinTokenizer, flux.klein_te()), layers=28)


def make_flux2_clip():
    """Flux.2 Dev's Mistral, 64 wide, in ComfyUI's real template. The real vocabulary comes with the weights: Qwen's
    stands in, with Mistral's marks as tokens of their own."""
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.z_image as z_image

    class Marked(z_image.Qwen3Tokenizer):
        def __init__(self, **kw):
            super().__init__(**kw)
            self.tokenizer.add_tokens(["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"], special_tokens=True)

    target = ClipTarget(flux.Flux2Tokenizer, flux.flux2_te())
    return make_language_clip(target, 31, {"mistral3_24b_tokenizer_class": Marked}, vocab_size=152064)


def make_hunyuan_video_clip(pooled=64):
    """HunyuanVideo's LLaMA, 64 wide, and CLIP-L, ``pooled`` wide."""
    import comfy.text_encoders.hunyuan_video as hunyuan_video

    target = ClipTarget(hunyuan_video.HunyuanVideoTokenizer, hunyuan_video.hunyuan_video_clip())
    return make_language_clip(target, 4, pooled=pooled)


def make_hunyuan_video_15_clip():
    """HunyuanVideo 1.5's Qwen2.5-VL, 64 wide."""
    import comfy.text_encoders.hunyuan_image as hunyuan_image
    import comfy.text_encoders.hunyuan_video as hunyuan_video

    return make_language_clip(ClipTarget(hunyuan_video.HunyuanVideo15Tokenizer, hunyuan_image.te(byt5=False)), 4)


def make_hunyuan_image_clip():
    """HunyuanImage's Qwen2.5-VL, 64 wide."""
    import comfy.text_encoders.hunyuan_image as hunyuan_image

    return make_language_clip(ClipTarget(hunyuan_image.HunyuanImageTokenizer, hunyuan_image.te(byt5=False)), layers=4)
