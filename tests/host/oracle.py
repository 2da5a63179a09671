"""An oracle of VSF on whole models that imports nothing of the pack and sits on other seams.

It replaces the model file's own attention function by a dense fp64 softmax with Listing 1's mask, written out by hand,
and appends the negative at the END of the text (the pack puts it first). Entries of a batch run one by one.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field

import comfy.ldm.cosmos.predict2 as cosmos
import comfy.ldm.flux.math as flux_math
import comfy.ldm.lightricks.model as ltx
import comfy.ldm.lumina.model as lumina
import comfy.ldm.modules.attention as unet_attention
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.ldm.qwen_image.model as qwen_image
import comfy.ldm.wan.model as wan
import torch


@dataclass
class Expect:
    """What the oracle should do to the entry whose text embedding equals ``positive`` [1, P, C].

    negative [1, n, C]; alpha: float or [n]; beta: float; keep: [I, n] in 0..1, for a UNet a dict of these by I, or
    None; blocks: indices that see N, counted over all blocks that have text; pooled [1, C']: the negative's, where the
    released pipeline mixes it in; guide: NAG, NASA or ONG in VSF's place, (Z+, Z-) -> Z [B, I, H*D], where one of a
    token's ``keep`` tells how much of that it takes.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    alpha: float | torch.Tensor
    beta: float
    keep: torch.Tensor | dict | None = None
    blocks: frozenset | None = None
    pooled: torch.Tensor | None = None
    guide: object = None


@dataclass
class Record:
    """What really happened, so that a test can see that the oracle was in force."""

    joint: int = 0
    passed: int = 0
    forwards: list = field(default_factory=list)
    blocks: int = 0
    shares: list = field(default_factory=list)
    """(block, [B, I] of 1 - W: the mean over heads of the weight on N), one a call in which the image saw it."""

    def block(self):
        """The index of the block at work, counted over one forward's joint calls."""
        self.blocks += 1
        return self.blocks - 1


def dense(q, k, v, heads, allowed, bias, seen=None):
    """softmax(q k^T / sqrt(d) + bias where allowed) v in fp64; q, k, v [B, L, H*D]. ``seen``: takes the weights."""
    b, _, c = q.shape
    d = c // heads
    q, k, v = (t.double().view(b, -1, heads, d).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / d**0.5 + bias
    logits = logits.masked_fill(~allowed, float("-inf"))
    if seen is not None:
        seen(logits.softmax(-1))
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, -1, c)


def listing_1(q, k, v, heads, image, positive, n, expect, block, user_mask=None, record=None, padding=0, plain=False):
    """Sequence [P, N0, I] (text first, as the model file builds it), keys of N1 appended. q, k, v [B, L, H*D].

    In the released pipeline's [P, N, N0] the plain copy N is ordinary text: it counts as the end of P here.
    ``user_mask``: additive, [B, L, L] over the sequence; ``padding``: how many of N's last tokens nobody sees;
    ``plain``: the image sees N0 too, with its own values and no offset, wherever it sees N1; "to the letter": with all
    that the mask of the authors' Flux pipeline hides and shows besides.
    """
    length = positive + n + image
    p, n0, i = slice(0, positive), slice(positive, positive + n), slice(positive + n, length)
    n1 = slice(length, length + n)
    alpha = torch.as_tensor(expect.alpha, dtype=torch.float64, device=v.device).expand(n)
    v = v.flatten(2)
    k = torch.cat([k, k[:, n0]], dim=1)
    v = torch.cat([v.double(), -alpha[:, None] * v[:, n0].double()], dim=1)
    allowed = torch.zeros(length, length + n, dtype=torch.bool)
    allowed[i, i] = allowed[i, p] = allowed[i, n1] = True
    allowed[i, n0] = bool(plain)
    shown = (n0, n1) if plain else (n1,)
    allowed[p, i] = allowed[p, p] = True
    allowed[n0, i] = allowed[n0, n0] = True
    if plain == "to the letter":
        first, second, texts = i.start + n, i.start + 2 * n, slice(0, i.start)
        allowed[p, n0] = allowed[texts, n1] = True
        allowed[n0, n0] = allowed[texts, i.start : second] = allowed[i.start : first, first:second] = False
    if padding:
        allowed[:, n0.stop - padding : n0.stop] = allowed[:, -padding:] = False
    bias = torch.zeros(length, length + n, dtype=torch.float64)
    bias[i, n1] -= expect.beta
    if expect.keep is not None:
        for columns in shown:
            bias[i, columns] += expect.keep.double().log()
    if expect.blocks is not None and block not in expect.blocks:
        for columns in shown:
            allowed[i, columns] = False
    if user_mask is not None:
        bias = bias + torch.nn.functional.pad(user_mask.double(), (0, n))[:, None]

    def seen(weights):
        if record is not None and (expect.blocks is None or block in expect.blocks):
            share = sum(weights[:, :, i, columns].sum(-1) for columns in shown)
            record.shares.append((block, share.mean(1)))

    if expect.guide is None:
        return dense(q, k, v, heads, allowed, bias, seen).to(q.dtype)
    acts = expect.blocks is None or block in expect.blocks
    allowed[i, n1] = False
    z = dense(q, k, v, heads, allowed, bias)
    allowed[i, p], allowed[i, n0] = False, allowed[n0, n0][:1]  # N in P's place
    return steered(z, i, dense(q, k, v, heads, allowed, bias), expect, acts).to(q.dtype)


def steered(z, i, z_neg, expect, acts):
    """z [B, L, H*D], whose rows ``i`` are Z+, with the guide's result there."""
    share = torch.tensor(float(acts)) if expect.keep is None else expect.keep.double().amax(-1)[:, None] * acts
    z[:, i] += share * (expect.guide(z[:, i], z_neg[:, i]) - z[:, i])
    return z


def sd3_attention(original, image, positive, n, expect, record, released, user_mask):
    """SD3's attention on [text, image] is Listing 1; on the image alone (Medium) it is untouched."""

    def attention(q, k, v, heads, **kwargs):
        if q.shape[1] == image:
            record.passed += 1
            return original(q, k, v, heads=heads, **kwargs)
        assert q.shape[1] == positive + n + image
        record.joint += 1
        return listing_1(q, k, v, heads, image, positive, n, expect, record.block(), record=record)

    return attention


def flux_attention(doubles):
    """Flux's attention, [B, H, L, D], in double and single blocks. Released, as in their code: the image sees plain
    N0 beside N1 in double blocks, and single blocks are plain attention."""

    def make(original, image, positive, n, expect, record, released, user_mask):
        def attention(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
            cached = k.shape[2] - q.shape[2]  # keys of references whose tokens a patch has taken out
            seen = image - cached
            assert skip_reshape and q.shape[2] == positive + n + seen
            record.joint += 1
            block = record.block()
            if cached:
                q = torch.cat([q, q[:, :, -cached:]], dim=2)
            q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
            if released and block >= doubles:
                everything = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
                return dense(q, k, v, heads, everything, torch.zeros(1, dtype=torch.float64)).to(q.dtype)
            out = listing_1(q, k, v, heads, image, positive, n, expect, block, user_mask, record, plain=released)
            return out[:, : out.shape[1] - cached]

        return attention

    return make


@contextlib.contextmanager
def replaced(module, name, make, embedder=None, at_end=False, in_front=0, **kw):
    """While open, the module's own function ``name`` is what ``make`` makes; and a text's N has the positions of a
    prompt of its own in the module ``embedder`` that makes rotations of them: the first, or those ``at_end`` of P's."""
    original = getattr(module, name)
    kw["record"].blocks = 0
    setattr(module, name, make(original, **kw))
    if embedder is not None:
        embedder.forward = own_positions(embedder.forward, kw["positive"], kw["n"], at_end, in_front)
    try:
        yield
    finally:
        setattr(module, name, original)
        if embedder is not None:
            del embedder.forward


def own_positions(forward, positive, n, at_end, in_front):
    start = max(in_front, positive - n) if at_end else in_front

    def run(ids):
        ids = ids.clone()
        ids[:, positive : positive + n] = ids[:, start : start + n].clone()
        return forward(ids)

    return run


@contextlib.contextmanager
def z_image(dit, negative, inside, expect, record):
    """While open, Z-Image embeds N as a text of its own, with its filling, behind P, and [P, N, I] is Listing 1;
    the texts refine themselves apart; what fills N or the image up is not seen or sees no N; the image keeps its
    positions. inside: the picture's tokens."""
    real, lengths = negative.shape[1], []
    embed, rotate, attend = dit.embed_cap, dit.rope_embedder.forward, lumina.optimized_attention_masked
    refiners = [True] * len(dit.context_refiner) + [False] * len(dit.noise_refiner)

    def both_texts(cap_feats, *args, **kw):
        (p, p_rotations, length), (n, n_rotations, _) = (embed(t, *args, **kw) for t in (cap_feats, negative))
        return (torch.cat([p[0], n[0]], 1),), (torch.cat([p_rotations[0], n_rotations[0]], 1),), length

    def rotations(ids):
        if len(lengths) == 2:  # asked for P, N, the image
            ids = ids.clone()
            ids[..., 0] -= lengths[1] * (ids[..., 0] > 0)
        lengths.append(ids.shape[1])
        return rotate(ids)

    def attention(q, k, v, heads, mask=None, transformer_options=None, **kw):
        (positive, n, image), length = lengths, q.shape[2]
        flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
        if "block_index" in transformer_options:
            assert length == positive + n + image
            record.joint += 1
            keep = torch.zeros(image, n)
            keep[:inside, :real] = 1.0 if expect.keep is None else expect.keep
            alpha = torch.as_tensor(expect.alpha, dtype=torch.float64).expand(real)
            full = dataclasses.replace(expect, keep=keep, alpha=torch.nn.functional.pad(alpha, (0, n - real)))
            return listing_1(*flat, heads, image, positive, n, full, record.block(), record=record, padding=n - real)
        if refiners.pop(0):
            allowed = torch.zeros(length, length, dtype=torch.bool)
            allowed[:positive, :positive] = allowed[positive:, positive : positive + real] = True
            return dense(*flat, heads, allowed, torch.zeros(1, dtype=torch.float64)).to(q.dtype)
        assert length == image
        return attend(q, k, v, heads, mask, transformer_options=transformer_options, **kw)

    record.blocks = 0
    dit.embed_cap, dit.rope_embedder.forward, lumina.optimized_attention_masked = both_texts, rotations, attention
    try:
        yield
    finally:
        del dit.embed_cap, dit.rope_embedder.forward
        lumina.optimized_attention_masked = attend


@contextlib.contextmanager
def refined_apart(refiner, positive, mask):
    """While open, P and N go through HunyuanVideo's token refiner one by one; ``mask``: of P's padding, or None."""
    original = refiner.forward

    def forward(x, timesteps, _, transformer_options):
        hidden = None if mask is None else (mask - 1).to(x.dtype) * torch.finfo(x.dtype).max
        texts = ((x[:, :positive], hidden), (x[:, positive:], None))
        return torch.cat([original(t, timesteps, m, transformer_options) for t, m in texts], dim=1)

    refiner.forward = forward
    try:
        yield
    finally:
        del refiner.forward


def seam(diffusion_model):
    """Where a joint model's attention is: the module, the name of its function, what replaces it."""
    if hasattr(diffusion_model, "double_blocks"):
        return flux_math, "optimized_attention", flux_attention(len(diffusion_model.double_blocks))
    if hasattr(diffusion_model, "transformer_blocks"):
        return qwen_image, "optimized_attention_masked", flux_attention(len(diffusion_model.transformer_blocks))
    return mmdit, "optimized_attention", sd3_attention


def eq_9(q, k, v, heads, n, expect, block, record, own=True, mask=None):
    """Cross-attention on keys [P, N], q, k, v [B, L, H*D]. ``own``: the call belongs into the record of shares;
    ``mask``: additive, [B, 1, 1, P + N], the same for all of the batch."""
    v = v.double()
    alpha = torch.as_tensor(expect.alpha if expect.guide is None else -1.0, dtype=torch.float64).expand(n)
    positive = k.shape[1] - n
    v = torch.cat([v[:, :positive], -alpha[:, None] * v[:, positive:]], dim=1)
    allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    bias = torch.zeros(q.shape[1], k.shape[1], dtype=torch.float64)
    bias[:, positive:] -= expect.beta
    if mask is not None:
        bias = bias + mask[0, 0].double()
    if expect.keep is not None:
        keep = expect.keep[q.shape[1]] if isinstance(expect.keep, dict) else expect.keep
        bias[:, positive:] += keep.double().log()
    if expect.blocks is not None and block not in expect.blocks:
        allowed[:, positive:] = False

    if expect.guide is not None:
        n_only = torch.zeros_like(allowed)
        n_only[:, positive:], allowed[:, positive:] = True, False
        bias[:, positive:] = 0.0
        z, z_neg = (dense(q, k, v, heads, some, bias) for some in (allowed, n_only))
        keep = expect.keep[q.shape[1]] if isinstance(expect.keep, dict) else expect.keep
        acts = expect.blocks is None or block in expect.blocks
        return steered(z, slice(None), z_neg, dataclasses.replace(expect, keep=keep), acts)

    def seen(weights):
        if own and allowed[:, positive:].all():
            record.shares.append((block, weights[..., positive:].sum(-1).mean(1)))

    return dense(q, k, v, heads, allowed, bias, seen)


@contextlib.contextmanager
def wan_cross_attention(model, n, expect, record):
    """While open, Wan's cross-attention layers are Eq. 9, dense and by hand, on [P, N]; VACE's follow their host."""
    diffusion_model = model.model.diffusion_model
    layers = {id(block.cross_attn): i for i, block in enumerate(diffusion_model.blocks)}
    own = set(layers)  # VACE's are no part of the record
    hosts = {n: i for i, n in getattr(diffusion_model, "vace_layers_mapping", {}).items()}
    for j, block in enumerate(getattr(diffusion_model, "vace_blocks", ())):
        layers[id(block.cross_attn)] = hosts[j]

    def forward(self, x, context, context_img_len=None, transformer_options=None, **kw):
        record.joint += 1
        q, out = self.norm_q(self.q(x)), 0.0
        if hasattr(self, "k_img"):
            image, context = context[:, :context_img_len], context[:, context_img_len:]
            k, v = self.norm_k_img(self.k_img(image)), self.v_img(image)
            everything = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
            out = dense(q, k, v, self.num_heads, everything, torch.zeros(1, dtype=torch.float64))
        k, v = self.norm_k(self.k(context)), self.v(context)
        z = eq_9(q, k, v, self.num_heads, n, expect, layers[id(self)], record, id(self) in own)
        return self.o((out + z).to(x.dtype))

    with methods_replaced({cls: forward for cls in (wan.WanT2VCrossAttention, wan.WanI2VCrossAttention)}):
        yield


@contextlib.contextmanager
def unet_cross_attention(model, n, expect, record):
    """While open, a UNet's attn2 layers are Eq. 9 on [P, N]; every other attention is ComfyUI's."""
    unet, layers = model.model.diffusion_model, {}
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for block in (*unet.input_blocks, *middle, *unet.output_blocks):
        found = [layer.attn2 for layer in block.modules() if hasattr(layer, "attn2")]
        if found:
            index = len(set(layers.values()))
            layers.update({id(attention): index for attention in found})

    def forward(self, index, x, context=None, value=None, mask=None, transformer_options=None):
        assert mask is None
        record.joint += 1
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        return self.to_out(eq_9(q, k, v, self.heads, n, expect, index, record).to(x.dtype))

    with layers_replaced(unet_attention.CrossAttention, layers, forward):
        yield


@contextlib.contextmanager
def cosmos_cross_attention(model, n, expect, record):
    """While open, the cross-attention layers of Cosmos Predict2 and Anima are Eq. 9 on [P, N]."""
    layers = {id(block.cross_attn): i for i, block in enumerate(model.model.diffusion_model.blocks)}

    def forward(self, index, x, context=None, rope_emb=None, **kw):
        record.joint += 1
        q, k, v = (
            norm(project(t).unflatten(-1, (self.n_heads, self.head_dim))).flatten(2)
            for norm, project, t in (
                (self.q_norm, self.q_proj, x),
                (self.k_norm, self.k_proj, context),
                (self.v_norm, self.v_proj, context),
            )
        )
        return self.output_proj(eq_9(q, k, v, self.n_heads, n, expect, index, record).to(x.dtype))

    with layers_replaced(cosmos.Attention, layers, forward):
        yield


@contextlib.contextmanager
def ltx_cross_attention(model, n, expect, record):
    """While open, the attn2 layers of LTX-Video are Eq. 9 on [P, N], with the mask of P's padding; those of LTX-2's
    sound are ComfyUI's, on P."""
    blocks = model.model.diffusion_model.transformer_blocks
    layers = {id(block.attn2): i for i, block in enumerate(blocks)}
    layers |= {id(block.audio_attn2): None for block in blocks if hasattr(block, "audio_attn2")}
    original = ltx.CrossAttention.forward

    def forward(self, index, x, context=None, mask=None, *args, **kw):
        if index is None:
            return original(self, x, context[:, :-n], mask if mask is None else mask[..., :-n], *args, **kw)
        record.joint += 1
        q, k, v = self.q_norm(self.to_q(x)), self.k_norm(self.to_k(context)), self.to_v(context)
        z = eq_9(q, k, v, self.heads, n, expect, index, record, mask=mask)
        if self.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(self.to_gate_logits(x).double())
            z = (z.unflatten(-1, (self.heads, -1)) * gates[..., None]).flatten(2)
        return self.to_out(z.to(x.dtype))

    with layers_replaced(ltx.CrossAttention, layers, forward):
        yield


def layers_replaced(cls, layers, forward):
    """While open, those of a class's modules whose ids ``layers`` has compute ``forward(self, layers[id], ...)``."""
    original = cls.forward

    def chosen(self, *args, **kw):
        return original(self, *args, **kw) if id(self) not in layers else forward(self, layers[id(self)], *args, **kw)

    return methods_replaced({cls: chosen})


@contextlib.contextmanager
def methods_replaced(forwards):
    """While open, each class has the ``forward`` that it is given here."""
    originals = {cls: cls.forward for cls in forwards}
    for cls, forward in forwards.items():
        cls.forward = forward
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.forward = original


CROSS = {
    "patch_embedding": wan_cross_attention,
    "input_blocks": unet_cross_attention,
    "pos_embedder": cosmos_cross_attention,
    "patchify_proj": ltx_cross_attention,
}
"""The oracles of cross-attention models, by an attribute of the model that is theirs alone."""


def oracle_model(model, expects, released=False, in_front=0):
    """A clone of ``model`` (stock) on which every entry with an ``Expect`` runs as the oracle says; and its record."""
    record = Record()
    is_flux = hasattr(model.model.diffusion_model, "double_blocks")
    diffusion_model = model.model.diffusion_model
    cross = next((f for name, f in CROSS.items() if hasattr(diffusion_model, name)), None)
    is_z_image = hasattr(diffusion_model, "context_refiner")
    embedder = getattr(diffusion_model, "pe_embedder", None)
    patch = getattr(diffusion_model, "patch_size", 2)
    patch = patch[-1] if isinstance(patch, list) else patch

    def run(apply_model, params):
        chunks = len(params["cond_or_uncond"])
        record.forwards.append(chunks)
        pieces = []
        for j in range(chunks):
            c = {k: _chunk(v, chunks, j) for k, v in params["c"].items()}
            x, t = params["input"].chunk(chunks)[j], params["timestep"].chunk(chunks)[j]
            text = c["c_crossattn"]
            own = {id(e): text[:, : e.positive.shape[1]] for e in expects}  # a UNet's may be repeated for the batch
            expect = next((e for e in expects if torch.equal(e.positive.to(text), own[id(e)][:1])), None)
            if expect is None:
                pieces.append(apply_model(x, t, **c))
                continue
            n = expect.negative.expand(x.shape[0], -1, -1).to(text)
            if cross is not None:
                c["c_crossattn"] = torch.cat([own[id(expect)], n], dim=1)
                if c.get("attention_mask") is not None:  # of P's padding: N has none
                    c["attention_mask"] = torch.nn.functional.pad(c["attention_mask"], (0, n.shape[1]), value=1)
                with cross(model, n.shape[1], expect, record):
                    pieces.append(apply_model(x, t, **c))
                continue
            if is_z_image:
                inside = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)
                # older ComfyUIs hand each call the same dict, in which the last one's block still stands
                c["transformer_options"] = {k: v for k, v in c["transformer_options"].items() if k != "block_index"}
                with z_image(diffusion_model, n, inside, expect, record):
                    pieces.append(apply_model(x, t, **c))
                continue
            looked_at = [x, *(c.get("ref_latents", []) if diffusion_model.__class__.__name__ != "Chroma" else [])]
            looked_at += [c["ref_latent"]] if c.get("ref_latent") is not None else []
            image = sum(z[0, 0, ..., ::patch, ::patch].numel() for z in looked_at)
            plain_copy = [n] if released and not is_flux else []
            c["c_crossattn"] = torch.cat([text, *plain_copy, n], dim=1)
            positive = c["c_crossattn"].shape[1] - n.shape[1]
            if released and is_flux:
                c["y"] = expect.pooled + 1.1 * (c["y"] - expect.pooled)
            mask = c.pop("attention_mask", None)
            refiner = getattr(diffusion_model, "txt_in", None) if hasattr(diffusion_model, "byt5_in") else None
            refined = refined_apart(refiner, text.shape[1], mask) if refiner else contextlib.nullcontext()
            positive += sum(c[k].shape[1] for k in ("txt_byt5", "clip_fea") if c.get(k) is not None)
            if mask is not None and mask.ndim == 2:  # over the text alone, 0 where it is padding
                mask = torch.nn.functional.pad((mask - 1.0) * 1e30, (0, n.shape[1] + image))[:, None]
            elif mask is not None:
                mask = _insert(_insert(mask, positive, n.shape[1], 1), positive, n.shape[1], 2)
            positive += in_front  # tokens that a patch puts in front of the text
            kw = {"image": image, "positive": positive, "n": n.shape[1], "expect": expect}
            is_flux2 = hasattr(diffusion_model, "double_stream_modulation_img")
            at_end = is_flux2 and hasattr(diffusion_model.guidance_in, "in_layer")  # Dev
            with (
                refined,
                replaced(
                    *seam(diffusion_model),
                    *(embedder, at_end, in_front),
                    record=record,
                    released=released,
                    user_mask=mask,
                    **kw,
                ),
            ):
                pieces.append(apply_model(x, t, **c))
        return torch.cat(pieces)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(run)
    return clone, record


def _insert(mask, at, n, dim):
    """``n`` zeros put into ``mask`` at position ``at`` of ``dim``."""
    before, after = mask.split([at, mask.shape[dim] - at], dim=dim)
    shape = list(mask.shape)
    shape[dim] = n
    return torch.cat([before, mask.new_zeros(shape), after], dim=dim)


def _chunk(value, chunks, j):
    if isinstance(value, torch.Tensor):
        return value.chunk(chunks)[j]
    if isinstance(value, list) and all(isinstance(t, torch.Tensor) for t in value):  # reference latents
        return [t.chunk(chunks)[j] for t in value]
    if isinstance(value, dict) and ("output" in value or "input" in value):  # a ControlNet's residuals
        return {k: [None if t is None else t.chunk(chunks)[j] for t in ts] for k, ts in value.items()}
    return value
