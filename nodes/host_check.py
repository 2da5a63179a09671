"""Whether this ComfyUI has what the pack stands on; asked before anything else of ComfyUI is imported."""

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from itertools import takewhile
from typing import Any

log = logging.getLogger(__name__)

OLDEST = (0, 16, 3)
"""The oldest ComfyUI that the pack is tested on."""

# How a thing is written: "function(a, b, *, c, d?)" takes a and b in these places, and c and d by name, of which d is
# not in every version; "Class().name" is an attribute of its instances; "'word'" a string that the module's code has.
NEEDED = {
    "comfy.patcher_extension": (
        *("WrappersMP.OUTER_SAMPLE", "WrappersMP.CALC_COND_BATCH", "WrappersMP.APPLY_MODEL"),
        *("WrappersMP.DIFFUSION_MODEL", "WrapperExecutor().class_obj", "WrapperExecutor().original", "'wrappers'"),
    ),
    "comfy.samplers": (
        "CFGGuider.outer_sample(noise, latent_image, sampler, sigmas, "
        "*, denoise_mask, callback, disable_pbar, seed, latent_shapes)",
        "_calc_cond_batch(model, conds, x_in, timestep, model_options)",
        *("CFGGuider().conds", "CFGGuider().model_options", "CFGGuider().model_patcher"),
    ),
    "comfy.model_base": (
        "BaseModel._apply_model(x, t, c_concat, c_crossattn, control, transformer_options)",
        *("BaseModel.get_dtype()", "BaseModel.get_dtype_inference()"),
        *("BaseModel().diffusion_model", "BaseModel().model_sampling", "BaseModel().manual_cast_dtype"),
    ),
    "comfy.model_patcher": (
        "ModelPatcher.clone(*, disable_dynamic?, model_override?, force_deepcopy?)",
        "ModelPatcher.add_wrapper_with_key(wrapper_type, key, wrapper)",
        *("ModelPatcher.get_wrappers(wrapper_type, key)", "ModelPatcher.get_model_object(name)"),
        *("ModelPatcher().model", "ModelPatcher().model_options"),
    ),
    "comfy.model_sampling": (
        *("ModelSamplingDiscrete.percent_to_sigma(percent)", "ModelSamplingDiscreteFlow.percent_to_sigma(percent)"),
        *("ModelSamplingFlux.percent_to_sigma(percent)", "ModelSamplingContinuousEDM.percent_to_sigma(percent)"),
    ),
    "comfy.conds": ("CONDRegular(cond)", "CONDConstant(cond)", "CONDNoiseShape(cond)"),
    "comfy.ldm.modules.attention": (
        "optimized_attention",  # some of those it may be name their arguments otherwise
        "attention_pytorch(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape)",
        "'optimized_attention_override'",
    ),
    "comfy.model_management": ("InterruptProcessingException", "OOM_EXCEPTION"),
    "comfy.nested_tensor": ("NestedTensor(tensors)", "NestedTensor.unbind()"),
    "comfy.utils": (
        *("repeat_to_batch_size(tensor, batch_size, *, dim)", "unpack_latents(combined_latent, latent_shapes)"),
    ),
    "comfy.latent_formats": ("Wan21.process_out(latent)",),
    "comfy.sd": (
        *("CLIP.tokenize(text, *, return_word_ids)", "CLIP().cond_stage_model", "CLIP().tokenizer", "CLIP().patcher"),
        "CLIP.encode_from_tokens_scheduled(tokens, *, unprojected, add_dict, show_pbar)",
    ),
    "comfy.sd1_clip": (
        *("escape_important(text)", "token_weights(string, current_weight)", "unescape_important(text)"),
        "SDTokenizer.tokenize_with_weights(text, *, return_word_ids, tokenizer_options)",
        *("SDTokenizer().start_token", "SDTokenizer().end_token", "SDTokenizer().pad_token", "SDTokenizer().tokenizer"),
    ),
    "comfy_execution.progress": (
        *("ProgressHandler(name)", "ProgressHandler.finish_handler(node_id, state, prompt_id)"),
        *("ProgressRegistry().dynprompt", "ProgressRegistry().handlers"),
        *("add_progress_handler(handler)", "get_progress_state()"),
    ),
    "comfy_execution.utils": (
        *("ExecutionContext.prompt_id", "ExecutionContext.node_id", "ExecutionContext.list_index"),
        "get_executing_context()",
    ),
    "comfy_api.latest": ("ComfyExtension", "io.ComfyNode", "ui.PreviewText"),
}
"""By module, what every run stands on: asked for at start."""
OUTER_SAMPLE = "comfy.samplers", 0

WHERE_PRESENT = {
    "comfy.model_base": (
        *("BaseModel", "SDXL", "SD3", "Flux", "Flux2", "Chroma", "ChromaRadiance", "CosmosPredict2", "Anima", "LTXV"),
        *("LTXAV", "QwenImage", "Lumina2", "HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"),
        *("HunyuanVideo15", "HunyuanVideo15_SR_Distilled", "WAN21", "WAN21_Vace", "WAN21_Camera", "WAN22"),
        *("'c_crossattn'", "'ref_latents'", "'denoise_mask'", "'keyframe_idxs'", "'vace_frames'", "'vace_mask'"),
        *("'guide_attention_entries'", "'unprocessed_ltxav_embeds'"),
    ),
    "comfy.samplers": ("'context_handler'", "'model_conds'", "'uuids'", "'model_function_wrapper'"),
    "comfy.context_windows": (
        *("IndexListContextWindow().dim", "IndexListContextWindow().total_frames", "'context_window'"),
        "IndexListContextWindow.get_tensor(full, *, device, dim, retain_index_list)",
        *("IndexListContextWindow().guide_frames_indices", "IndexListContextHandler().context_length"),
        "IndexListContextHandler().latent_retain_index_list",
    ),
    "comfy.ldm.modules.attention": (
        *("attention_sage", "attention_flash", "attention_xformers", "'attn2_patch'", "'block'"),
    ),
    "comfy.ldm.modules.diffusionmodules.openaimodel": (
        *("UNetModel().input_blocks", "UNetModel().middle_block", "UNetModel().output_blocks"),
    ),
    "comfy.ldm.modules.diffusionmodules.mmdit": (
        *("MMDiT().context_embedder", "MMDiT().context_processor", "MMDiT().register_length", "MMDiT().joint_blocks"),
        *("MMDiT().hidden_size", "MMDiT().num_heads", "'patches_replace'", "'double_block'", "'img'", "'txt'"),
    ),
    "comfy.ldm.flux.model": (
        *("Flux().double_blocks", "Flux().single_blocks", "Flux().params", "Flux().hidden_size", "Flux().num_heads"),
        *("Flux().pe_embedder", "FluxParams.context_in_dim", "FluxParams.guidance_embed", "FluxParams.txt_ids_dims"),
        *("'patches_replace'", "'double_block'", "'single_block'", "'post_input'", "'img'", "'txt'", "'img_slice'"),
        *("'block_index'", "'block_type'"),
    ),
    "comfy.ldm.flux.layers": ("'attn1_patch'",),
    "comfy.ldm.chroma.model": (
        *("Chroma().double_blocks", "Chroma().single_blocks", "Chroma().params", "Chroma().hidden_size"),
        *("Chroma().num_heads", "Chroma().pe_embedder", "'patches_replace'", "'double_block'", "'single_block'"),
    ),
    "comfy.ldm.chroma_radiance.model": ("ChromaRadiance",),
    "comfy.ldm.cosmos.predict2": (
        *("MiniTrainDIT().blocks", "Block().cross_attn", "Attention().context_dim", "Attention().head_dim"),
        "'block_index'",
    ),
    "comfy.ldm.anima.model": ("Anima.preprocess_text_embeds(text_embeds, text_ids, *, t5xxl_weights)",),
    "comfy.ldm.lightricks.model": (
        *("LTXVModel().transformer_blocks", "LTXVModel().caption_channels", "LTXVModel().attention_head_dim"),
        *("LTXVModel().inner_dim", "LTXVModel().caption_proj_before_connector", "LTXVModel().cross_attention_dim"),
        *("'patches_replace'", "'double_block'"),
    ),
    "comfy.ldm.lightricks.av_model": (
        *("LTXAVModel.preprocess_text_embeds(context, *, unprocessed)", "LTXAVModel().audio_inner_dim"),
        *("LTXAVModel().audio_cross_attention_dim", "'v_context'", "'patches_replace'", "'double_block'"),
    ),
    "comfy.ldm.qwen_image.model": (
        *("QwenImageTransformer2DModel().transformer_blocks", "QwenImageTransformer2DModel().txt_in"),
        *("QwenImageTransformer2DModel().pe_embedder", "QwenImageTransformerBlock().attention_head_dim"),
        *("'patches_replace'", "'double_block'", "'img'", "'txt'"),
    ),
    "comfy.ldm.lumina.model": (
        *(
            "NextDiT().layers",
            "NextDiT().cap_embedder",
            "NextDiT().dim",
            "NextDiT().n_heads",
            "NextDiT().rope_embedder",
        ),
        *("NextDiT().pad_tokens_multiple", "'block_index'", "'double_block'"),
    ),
    "comfy.ldm.hunyuan_video.model": (
        *("HunyuanVideo().double_blocks", "HunyuanVideo().single_blocks", "HunyuanVideo().params"),
        *(
            "HunyuanVideo().hidden_size",
            "HunyuanVideo().num_heads",
            "HunyuanVideo().txt_in",
            "HunyuanVideo().pe_embedder",
        ),
        *("HunyuanVideoParams.context_in_dim", "'patches_replace'", "'double_block'", "'single_block'", "'img_slice'"),
    ),
    "comfy.ldm.wan.model": (
        *("WanModel().blocks", "WanModel().text_embedding", "WanModel().dim", "WanModel().num_heads"),
        *(
            "WanModel().ref_conv",
            "WanI2VCrossAttention().k_img",
            "'patches_replace'",
            "'double_block'",
            "'block_index'",
        ),
    ),
    "comfy.sd1_clip": ("SD1ClipModel", "SDTokenizer().embedding_directory"),
    "comfy.sdxl_clip": ("SDXLClipModel",),
    "comfy.text_encoders.sd2_clip": ("SD2ClipModel",),
    "comfy.text_encoders.sd3_clip": ("SD3ClipModel",),
    "comfy.text_encoders.flux": ("FluxClipModel", "Flux2TEModel"),
    "comfy.text_encoders.ovis": ("OvisTEModel",),
    "comfy.text_encoders.pixart_t5": ("PixArtT5XXL",),
    "comfy.text_encoders.cosmos": ("CosmosT5XXL",),
    "comfy.text_encoders.anima": ("AnimaTEModel",),
    "comfy.text_encoders.genmo": ("MochiT5XXL",),
    "comfy.text_encoders.lt": ("LTXAVTEModel",),
    "comfy.text_encoders.qwen_image": ("QwenImageTEModel",),
    "comfy.text_encoders.z_image": ("ZImageTEModel",),
    "comfy.text_encoders.hunyuan_video": ("HunyuanVideoClipModel", "HunyuanVideo15Tokenizer"),
    "comfy.text_encoders.hunyuan_image": ("HunyuanImageTEModel",),
    "comfy.text_encoders.wan": ("WanT5Model",),
    "server": ("PromptServer.instance", "PromptServer.add_on_prompt_handler(handler)"),
    "nodes": ("NODE_CLASS_MAPPINGS",),
}
"""What one family, or one node, stands on, and asks for itself; not in every version. `tests/hosting/host_names.py`
compares both lists with any ComfyUI."""


def is_supported() -> bool:
    """Whether the pack can work here; if not, one line in the log says why, and ComfyUI goes on without its nodes."""
    problem = _problem()
    if problem is not None:
        log.warning(f"VSF: {problem} Its nodes are not loaded; everything else works as ever.")
    return problem is None


def changed_host(found: str) -> RuntimeError:
    """The error for a place where ComfyUI, or another node, does not do what the pack stands on."""
    return RuntimeError(
        f"VSF: {found}, so the negative would have no effect. ComfyUI {_version() or '(version unknown)'}, or another "
        "node of this workflow, works in a way that this version of ComfyUI-VSF does not know. Update ComfyUI-VSF; "
        "until then bypass VSF Model Patch, or the other node. Please report it."
    )


def _problem() -> str | None:
    """What is wrong with this ComfyUI and what to do about it, or None."""
    stated = _version()
    oldest = ".".join(map(str, OLDEST))
    if () < _numbers(stated or "") < OLDEST:
        return f"ComfyUI-VSF needs ComfyUI {oldest} or newer, and this is {stated}: update ComfyUI."
    missing = [f"{module}.{name}" for module, names in NEEDED.items() for name in names if not _has(module, name)]
    missing = [name.replace("().", ".") for name in missing]
    if missing:
        return (
            f"ComfyUI-VSF needs {', '.join(missing)}, which this ComfyUI ({stated or 'of unknown version'}) does not "
            f"have. If it is older than {oldest}, update ComfyUI; else update ComfyUI-VSF, or report it."
        )
    return None


def _version() -> str | None:
    """What ComfyUI says it is, or None where it doesn't say."""
    return getattr(_imported("comfyui_version"), "__version__", None)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.3.60 is (0, 3, 60), 0.31.0rc1 is (0, 31); none where it is no version."""
    return tuple(map(int, takewhile(str.isdigit, version.split("."))))


def _has(module: str, thing: str) -> bool:
    """Whether ``module`` can be imported and has the ``thing``, as far as that can be seen without an instance."""
    found, (name, arguments) = _imported(module), parsed(thing)
    if name.startswith("'"):
        return found is not None
    for part in name.partition("().")[0].split("."):
        found = getattr(found, part, None)
    return found is not None and (arguments is None or _takes(found, arguments))


def by_name(place: tuple[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ComfyUI's by the names that ``NEEDED`` lists at a ``place``, (module, number)."""
    names = [name for name in parsed(NEEDED[place[0]][place[1]])[1] or () if name != "*"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def parsed(thing: str) -> tuple[str, list[str] | None]:
    """A thing's name and, of a function, its arguments, with "*" between those by place and those by name."""
    name, bracket, arguments = thing.partition("(")
    if not bracket or arguments.startswith(")."):
        return thing, None
    return name, [part for part in arguments.rstrip(")").split(", ") if part]


def _takes(function: Any, arguments: list[str]) -> bool:
    """Whether a function takes these arguments."""
    try:
        given = [p.name for p in signature(function).parameters.values() if p.name != "self"]
    except (TypeError, ValueError):  # some compiled things say nothing
        return True
    return not misfits(arguments, given)


def misfits(arguments: list[str], given: list[str]) -> list[str]:
    """Which of the listed arguments a function with the parameters ``given`` does not take as they are listed."""
    at = arguments.index("*") if "*" in arguments else len(arguments)
    by_place = [name for i, name in enumerate(arguments[:at]) if given[i : i + 1] != [name]]
    return by_place + [name for name in arguments[at + 1 :] if not name.endswith("?") and name not in given]


def _imported(module: str) -> object | None:
    try:
        return import_module(module)
    except ImportError:
        return None
