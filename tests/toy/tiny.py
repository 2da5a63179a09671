"""Tiny models in ComfyUI's own formats, so that its real loaders load them.

``python tests/toy/tiny.py DIR`` writes them below DIR as ComfyUI's model folders; run it with the host's Python, with
VSF_COMFYUI naming the tree. Weights are random, but for the demo's trained SD3 (``weights/``); sizes are what the
loaders read off the weights.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import codec
import torch
from torch import Tensor

StateDict = dict[str, Tensor]
WEIGHTS = Path(__file__).parent / "weights"


def randomize(state: StateDict, seed: int, qk_gain: float = 1.5) -> StateDict:
    """New weights of the same names and shapes, as ``fill_`` draws them."""
    g = torch.Generator().manual_seed(seed)
    return {key: fill_(key, torch.empty(value.shape), g, qk_gain) for key, value in state.items()}


def fill_(key: str, weight: Tensor, g: torch.Generator, qk_gain: float = 1.5) -> Tensor:
    """In place: a value for the weight named ``key`` that keeps activations near unit size and gives attention
    something to choose from."""
    if key.endswith(
        ("ln_q.weight", "ln_k.weight", "norm_q.weight", "norm_k.weight", "query_norm.scale", "key_norm.scale")
    ):
        return weight.fill_(qk_gain)
    if key.endswith(("pos_embed", "pad_token")):
        return weight.normal_(generator=g)
    if weight.ndim >= 2:
        return weight.normal_(generator=g).mul_(weight[0].numel() ** -0.5)
    if key.endswith("weight"):
        return weight.fill_(1.0)
    return weight.normal_(generator=g).mul_(0.1)


def sd3(seed: int = 0, **config) -> StateDict:
    """An SD3-format MMDiT of random weights, as ``sd3_model`` builds it."""
    return randomize(sd3_model(**config).state_dict(), seed)


def sd3_model(depth: int = 3, context: int = 64, self_attn_layers: Sequence[int] = (), **config) -> torch.nn.Module:
    """ComfyUI's class of SD3; ``self_attn_layers`` as in SD3.5 Medium."""
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    return OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=16,
        depth=depth,
        adm_in_channels=2048,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": context, "out_features": 64 * depth},
        },
        num_patches=64 * 64,
        pos_embed_max_size=64,
        qk_norm="rms",
        x_block_self_attn_layers=list(self_attn_layers),
        operations=torch.nn,
        dtype=torch.float32,
        **config,
    )


def flux(seed: int = 0, **config) -> StateDict:
    """A Flux.1-format model of random weights, as ``flux_model`` builds it."""
    return randomize(flux_model(**config).state_dict(), seed)


def flux_model(
    hidden: int = 256, double: int = 2, single: int = 2, context: int = 64, guidance: bool = False
) -> torch.nn.Module:
    """ComfyUI's Flux.1 class; ``guidance``: Dev's guidance embedding, which Schnell lacks."""
    from comfy.ldm.flux.model import Flux

    return Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=context,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=hidden // 128,
        depth=double,
        depth_single_blocks=single,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=guidance,
        txt_ids_dims=[],
        operations=torch.nn,
        dtype=torch.float32,
    )


FLUX2 = {"num_heads": 2, "axes_dim": [8, 8, 8, 8]}
"""Sizes that ComfyUI's loader takes for granted: its text always has 512 tokens, so the rest is small."""


def flux2(seed: int = 0, **config) -> StateDict:
    """A Flux.2-format model of random weights, as ``flux2_model`` builds it."""
    return randomize(flux2_model(**config).state_dict(), seed)


def flux2_model(
    hidden: int = 64, double: int = 2, single: int = 2, context: int = 64, guidance: bool = True
) -> torch.nn.Module:
    """ComfyUI's class of Flux.2; ``guidance``: Dev's, which Klein lacks."""
    from comfy.ldm.flux.model import Flux

    return Flux(
        **{"in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "context_in_dim": context},
        **{"hidden_size": hidden, **FLUX2, "depth": double, "depth_single_blocks": single},
        **{"mlp_ratio": 3.0, "theta": 2000, "txt_ids_dims": [3]},
        **{"qkv_bias": False, "ops_bias": False, "guidance_embed": guidance, "global_modulation": True},
        **{"mlp_silu_act": True, "default_ref_method": "index", "ref_index_scale": 10.0},
        **{"operations": torch.nn, "dtype": torch.float32},
    )


CHROMA = {"hidden_size": 256, "num_heads": 2, "hidden_dim": 64, "out_dim": 256, "n_layers": 2}
"""Sizes that ComfyUI's loader takes for granted, as a tiny model has them."""
NERF = {"nerf_hidden_size": 16, "nerf_depth": 2}
"""The same of Radiance's head, whose weights a network of the square of its size makes for each token."""


def chroma(seed: int = 0, **config) -> StateDict:
    """A Chroma-format model of random weights, as ``chroma_model`` builds it."""
    return randomize(chroma_model(**config).state_dict(), seed)


def chroma_model(
    double: int = 2, single: int = 2, context: int = 64, radiance: str | None = None, **sizes: int
) -> torch.nn.Module:
    """ComfyUI's class of Chroma; sizes: others than ``CHROMA``. ``radiance``: that of pixels, whose text is "alike" in
    position, or "counted"."""
    import comfy.ldm.chroma.model
    import comfy.ldm.chroma_radiance.model

    config = {
        **{**CHROMA, **sizes},
        **{"in_channels": 64, "out_channels": 64, "in_dim": 64, "context_in_dim": context, "mlp_ratio": 4.0},
        **{"depth": double, "depth_single_blocks": single, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2},
        **{"qkv_bias": True, "txt_ids_dims": [], "vec_in_dim": None, "operations": torch.nn, "dtype": torch.float32},
    }
    if radiance is None:
        return comfy.ldm.chroma.model.Chroma(**config)
    pixels = {
        **{"in_channels": 3, "out_channels": 3, "patch_size": 16, **NERF, "nerf_mlp_ratio": 4},
        **{"nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv"},
        **{"nerf_embedder_dtype": torch.float32, "use_x0": False},
    }
    if "use_sequential_txt_ids" in comfy.ldm.chroma_radiance.model.ChromaRadianceParams.__dataclass_fields__:
        pixels["use_sequential_txt_ids"] = radiance == "counted"
    return comfy.ldm.chroma_radiance.model.ChromaRadiance(**{**config, **pixels})


QWEN_IMAGE = {"attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 64}


def qwen_image(seed: int = 0, **config) -> StateDict:
    """A Qwen-Image-format model of random weights, as ``qwen_image_model`` builds it."""
    return randomize(qwen_image_model(**config).state_dict(), seed)


def qwen_image_model(
    layers: int = 3,
    heads: int = QWEN_IMAGE["num_attention_heads"],
    context: int = QWEN_IMAGE["joint_attention_dim"],
    default_ref_method: str = "index",
) -> torch.nn.Module:
    """ComfyUI's class of Qwen-Image; ``default_ref_method`` "index_timestep_zero" is Edit 2511's."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    sizes = {**QWEN_IMAGE, "num_attention_heads": heads, "joint_attention_dim": context}
    ours = {"num_layers": layers, "default_ref_method": default_ref_method}
    return QwenImageTransformer2DModel(**sizes, **ours, operations=torch.nn, dtype=torch.float32)


Z_IMAGE = {
    **{"n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0},
    **{"ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
}
"""What the loader reads off the width of the real Z-Image."""


def z_image(seed: int = 0, **config) -> StateDict:
    """A Z-Image-format model of random weights, as ``z_image_model`` builds it."""
    return randomize(z_image_model(**config).state_dict(), seed)


def z_image_model(dim: int = 256, layers: int = 3, context: int = 64) -> torch.nn.Module:
    """ComfyUI's class of Z-Image."""
    from comfy.ldm.lumina.model import NextDiT

    config = {"dim": dim, "cap_feat_dim": context, "n_layers": layers, "qk_norm": True, "in_channels": 16}
    heads = {"n_heads": dim // 128, "n_kv_heads": dim // 128}
    return NextDiT(**config, **{**Z_IMAGE, **heads}, operations=torch.nn, dtype=torch.float32)


def hunyuan_video(kind: str = "t2v", seed: int = 0) -> StateDict:
    """A HunyuanVideo-format model of random weights, as ``hunyuan_video_model`` builds it."""
    return randomize(hunyuan_video_model(kind).state_dict(), seed)


def hunyuan_video_model(
    kind: str = "t2v", hidden: int = 256, double: int = 2, single: int = 2, context: int = 64
) -> torch.nn.Module:
    """ComfyUI's class of HunyuanVideo (t2v, or i2v, which takes more channels), or of 1.5."""
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    is_new = kind == "1.5"
    return HunyuanVideo(
        **{"in_channels": {"t2v": 16, "i2v": 33, "1.5": 65}[kind], "out_channels": 32 if is_new else 16},
        **{"patch_size": [1, 1, 1] if is_new else [1, 2, 2], "vec_in_dim": None if is_new else 768},
        **{"vision_in_dim": 1152 if is_new else None, "byt5": is_new, "use_cond_type_embedding": is_new},
        **{"meanflow": False, "meanflow_sum": is_new, "guidance_embed": not is_new, "context_in_dim": context},
        **{"hidden_size": hidden, "num_heads": hidden // 128, "mlp_ratio": 4.0},
        **{"depth": double, "depth_single_blocks": single},
        **{"axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True, "operations": torch.nn, "dtype": torch.float32},
    )


def wan(kind: str = "t2v", seed: int = 0, **config) -> StateDict:
    """A Wan-format model of random weights, as ``wan_model`` builds it."""
    return randomize(wan_model(kind, **config).state_dict(), seed)


def wan_model(
    kind: str = "t2v",
    dim: int = 256,
    layers: int = 3,
    context: int = 4096,
    frames_tokens: int | None = None,
    ffn: int | None = None,
) -> torch.nn.Module:
    """ComfyUI's class of a Wan model: t2v, i2v (CLIP-vision tokens; ``frames_tokens`` 514: first and last frame),
    vace, 5b, control (Fun control: CLIP-vision tokens, a reference frame before the video), camera (Fun camera 2.1),
    camera_2.2."""
    from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel

    channels = {
        **{"t2v": (16, 16), "i2v": (36, 16), "vace": (16, 16), "5b": (48, 48)},
        **{"control": (48, 16), "camera": (32, 16), "camera_2.2": (36, 16)},
    }[kind]
    config = {
        "in_dim": channels[0],
        "out_dim": channels[1],
        "dim": dim,
        "ffn_dim": ffn or 2 * dim,
        "text_dim": context,
        "num_heads": dim // 128,
        "num_layers": layers,
        "operations": torch.nn,
        "dtype": torch.float32,
    }
    if kind == "vace":
        return VaceWanModel(vace_layers=layers, vace_in_dim=96, **config)
    if kind.startswith("camera"):
        return CameraWanModel(model_type=kind, **config)
    return WanModel(
        model_type="i2v" if kind in ("i2v", "control") else "t2v",
        flf_pos_embed_token_number=frames_tokens,
        in_dim_ref_conv=16 if kind == "control" else None,
        **config,
    )


UNETS = {
    "sd1": {"context_dim": 768, "num_heads": 4, "transformer_depth": [1, 1, 0]},
    "sd2": {"context_dim": 1024, "num_head_channels": 16, "transformer_depth": [1, 1, 0]},
    "sdxl": {"context_dim": 2048, "num_head_channels": 16, "transformer_depth": [0, 2, 5]},
}
"""What ComfyUI's loader tells the UNets by, but for the heads; SDXL's depths are those of its small relative KOALA."""
UNET_CHANNELS = 64
"""In place of 320."""


def unet(kind: str = "sdxl", seed: int = 0) -> StateDict:
    """A UNet of random weights, as ``unet_model`` builds it."""
    return randomize(unet_model(kind).state_dict(), seed)


def unet_model(kind: str) -> torch.nn.Module:
    """ComfyUI's UNet class with three grids."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    is_sdxl = kind == "sdxl"
    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=UNET_CHANNELS,
        num_res_blocks=[1, 1, 1],
        channel_mult=[1, 1, 1 if is_sdxl else 2],
        num_classes="sequential" if is_sdxl else None,
        adm_in_channels=2816 if is_sdxl else None,
        use_spatial_transformer=True,
        use_linear_in_transformer=kind != "sd1",
        transformer_depth_middle=1,
        transformer_depth_output=[0, 0, 2, 1, 1, 2] if is_sdxl else [1, 1, 1, 1, 0, 0],
        legacy=False,
        **UNETS[kind],
    )


COSMOS = {"model_channels": 48, "num_blocks": 4, "num_heads": 4}
"""The loader knows no other number of blocks and heads than checkpoints have."""


def cosmos(kind: str = "cosmos", seed: int = 0) -> StateDict:
    """A Cosmos-Predict2-format model of random weights, as ``cosmos_model`` builds it."""
    return randomize(cosmos_model(kind).state_dict(), seed)


def cosmos_model(kind: str) -> torch.nn.Module:
    """ComfyUI's class of Cosmos Predict2 (cosmos) or of Anima."""
    from comfy.ldm.anima.model import Anima
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    return (Anima if kind == "anima" else MiniTrainDIT)(
        max_img_h=240,
        max_img_w=240,
        max_frames=128,
        in_channels=16,
        out_channels=16,
        patch_spatial=2,
        patch_temporal=1,
        **COSMOS,
        pos_emb_cls="rope3d",
        use_adaln_lora=True,
        rope_enable_fps_modulation=False,
        operations=torch.nn,
        dtype=torch.float32,
    )


def ltxv(seed: int = 0) -> StateDict:
    """An LTX-Video-format model of random weights, as ``ltxv_model`` builds it."""
    return randomize(ltxv_model().state_dict(), seed)


def ltxv_model() -> torch.nn.Module:
    """ComfyUI's class of LTX-Video; the loader knows 32 heads and captions of 4096 channels alone."""
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(
        cross_attention_dim=256, attention_head_dim=8, num_layers=3, operations=torch.nn, dtype=torch.float32
    )


_LTXAV = {
    **{"in_channels": 128, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16},
    **{"cross_attention_dim": 64, "audio_num_attention_heads": 4, "audio_attention_head_dim": 8},
    **{"audio_cross_attention_dim": 32, "connector_num_layers": 1, "connector_attention_head_dim": 16},
    "rope_type": "split",
}
LTXAV: dict[str, dict] = {
    "2": {**_LTXAV, "caption_channels": 48, "connector_num_attention_heads": 3},
    "2.3": {
        **_LTXAV,
        **{"caption_channels": 64, "connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 8},
        **{"caption_proj_before_connector": True, "caption_projection_first_linear": False},
        **{"cross_attention_adaln": True, "apply_gated_attention": True, "connector_apply_gated_attention": True},
    },
}
"""What the file of an LTX-2, or of a 2.3, says of the model's sizes."""


def ltxav(kind: str, seed: int = 0) -> StateDict:
    """An LTX-2-format model of random weights."""
    from comfy.ldm.lightricks.av_model import LTXAVModel

    model = LTXAVModel(**LTXAV[kind], operations=torch.nn, dtype=torch.float32)
    return randomize(model.state_dict(), seed)


def clip_l(seed: int = 0) -> StateDict:
    """A full-size CLIP-L (what the stock CLIPLoader recognises) whose layers pass their input on."""
    from comfy.clip_model import CLIPTextModel

    config = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }
    with torch.device("meta"):
        shapes = CLIPTextModel(config, torch.float16, "meta", torch.nn).state_dict()
    g = torch.Generator().manual_seed(seed)
    state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in shapes.items()}
    for key, value in state.items():
        if "embedding" in key:
            value.copy_(torch.randn(value.shape, generator=g) * (0.3 if "position" in key else 1.0))
        elif "norm" in key and key.endswith("weight"):
            value.fill_(1.0)
        elif key == "text_projection.weight":
            value.copy_(torch.eye(768))
    return state


T5_CONFIG = {"num_layers": 1, "d_model": 256, "d_ff": 8, "d_kv": 8, "num_heads": 1, "vocab_size": 32128}
"""A T5 as ``t5`` writes it; the rest is as in ComfyUI's own configuration files."""


MIX = ((-1, 0.75), (1, 0.5), (0, 0.75))
"""What umt5's layer adds to a token, a head each: (of the token so far on, or of the mean of all at 0; how much)."""
NEAR = 8.0
"""How much higher the neighbour's logit is than all others' in a head of ``MIX``."""


def shuffles(width: int) -> Tensor:
    """The order [heads, width] in which each head of ``MIX`` adds its channels: a neighbour is not oneself."""
    g = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(width, generator=g) for _ in MIX])


def t5(table: Tensor, umt5: bool = False) -> StateDict:
    """A T5 encoder of one layer; its output is normed to unit mean square.

    T5's passes the table's rows on. umt5's mixes them, as real encoders do, or a negative's article would be the
    prompt's: Wan's blocks have no attention in which text meets text. table: [pieces, width]; zero columns at the end
    do not count towards the mean.
    """
    from comfy.text_encoders.t5 import T5

    used = columns_used(table)
    config = {
        **(umt5_config(table) if umt5 else T5_CONFIG),
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "umt5" if umt5 else "t5",
    }
    shapes = T5(config, torch.float32, "meta", torch.nn).state_dict()
    state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in shapes.items()}
    state["shared.weight"].copy_(table)
    norm = (used / table.shape[1]) ** 0.5
    state["encoder.final_layer_norm.weight"].fill_(norm)
    if umt5:
        layer = "encoder.block.0.layer.0"
        state[f"{layer}.layer_norm.weight"].fill_(norm)
        bias, v, o = (state[f"{layer}.SelfAttention.{name}.weight"] for name in ("relative_attention_bias", "v", "o"))
        channels = torch.arange(used)
        for head, ((offset, gain), shuffle) in enumerate(zip(MIX, shuffles(used), strict=True)):
            if offset:  # buckets of keys: 0 and up for those before the query, 16 and up for those behind
                bias[abs(offset) + 16 * (offset > 0), head] = NEAR
            v[head * used + channels, channels] = 1
            o[channels, head * used + shuffle] = gain
    return state


def umt5_config(table: Tensor) -> dict[str, int]:
    """What ComfyUI has to know of ``t5``'s umt5 with this table."""
    sizes = {"d_model": table.shape[1], "vocab_size": len(table), "d_kv": columns_used(table), "num_heads": len(MIX)}
    return {**T5_CONFIG, **sizes}


def columns_used(table: Tensor) -> int:
    """How many columns of a table of embeddings are not zero."""
    return int(table.abs().sum(0).count_nonzero())


WIDE = {"context_embedder.weight": 4096, "y_embedder.mlp.0.weight": 2048, "text_embedding.0.weight": 4096}
"""Columns that ComfyUI expects where the toy's text fills fewer: the rest is zero and not shipped."""


def packed(state: StateDict) -> StateDict:
    """Trained weights in half of fp16's room: each matrix row as int8 with a scale of its own, all else in fp16."""
    out = {}
    for key, value in state.items():
        if value.ndim < 2:
            out[key] = value.half()
            continue
        rows = value.reshape(len(value), -1)
        scale = rows.abs().amax(1).clamp(min=1e-8) / 127
        out[key] = (rows / scale[:, None]).round().to(torch.int8).reshape(value.shape)
        out[f"{key}.scale"] = scale
    return out


def unpacked(state: StateDict) -> StateDict:
    """``packed`` undone: the fp32 weights with the keys and shapes that ComfyUI's loader recognises."""
    out = {}
    for key, value in state.items():
        if value.dtype == torch.int8:
            scale = state[f"{key}.scale"].reshape(-1, *[1] * (value.ndim - 1))
            out[key] = value.float() * scale
        elif not (key.endswith(".scale") and state.get(key[:-6], value).dtype == torch.int8):
            out[key] = value.float()
        if key in WIDE:
            out[key] = torch.nn.functional.pad(out[key], (0, WIDE[key] - value.shape[1]))
    # Flux's files say scale where ComfyUI's newer classes say weight
    return {
        key.replace("query_norm.weight", "query_norm.scale").replace("key_norm.weight", "key_norm.scale"): value
        for key, value in out.items()
    }


def write_all(out: Path) -> None:
    """The demo's models, each written whole or not at all."""
    from safetensors.torch import load_file

    for path in WEIGHTS.glob("*.safetensors"):
        state = {key: value.half() for key, value in unpacked(load_file(path)).items()}
        _save(state, out / "diffusion_models" / f"vsf_tiny_{path.name}")
    _save(clip_l(), out / "text_encoders" / "vsf_tiny_clip_l.safetensors")
    codec.write(out / "vae_approx")
    codec.write_wan(out / "vae")


def _save(state: StateDict, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in state.items()}, part)
    part.replace(path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    sys.path.insert(0, os.environ["VSF_COMFYUI"])
    from comfy.cli_args import args

    args.cpu = True
    write_all(Path(sys.argv[1]))
