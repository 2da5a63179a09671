"""Masks over text and padding in half precision, as a GPU takes them; and the checker that every test here runs under
finds each thing that it is there for."""

import kernel_rules
import pytest
import torch
from cases import CASES, model_of, padding, region
from helpers import spy_override, with_override
from kernel_rules import KernelRule, broken_rules, kills, ruled

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def own_mask(length, grid):
    """A user's mask over text and picture, as Redux makes one."""
    whole = length + grid[0] * grid[1]
    return {"attention_mask": torch.randn(1, whole, whole), "attention_mask_img_shape": grid}


def over_text(length, grid):
    return {"attention_mask": padding(length - 2, length - 1, length=length)}


MASKED = {"qwen-image": over_text, "hunyuan": over_text, "ltxv": over_text, "flux": own_mask}
PADDED = ("wan", "ltx2", "sd3")
"""Of models without such masks, a negative shorter than another's in the batch is padded all the same."""


def others_attention(model):
    """One that returns no log-sum-exp: every call has a mask."""
    return with_override(model, spy_override([]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*MASKED, *PADDED])
def test_every_mask_begins_where_a_gpu_reads(pack, monkeypatch, name, dtype):
    """Odd n, and lengths with which torch would hand masks on as they are, wherever they begin."""
    case, seen, asked = CASES[name], [], kernel_rules.broken_rules

    def noting(q, k, v, mask=None):
        seen.append((q.dtype, mask is not None))
        return asked(q, k, v, mask)

    monkeypatch.setattr(kernel_rules, "broken_rules", noting)
    model, size = model_of(name).clone(), case.sizes[0]
    model.set_model_compute_dtype(HALF[dtype])
    run = {"cfg": 1.0} if name == "hunyuan" else {"cfg": 2.5, "batch": 2}  # ComfyUI's own takes one masked text
    for n, node in ((5, {}), (7, {"mask": region(size)[1]})):
        length = 16 - n
        options = MASKED[name](length, (size[-2] // 2, size[-1] // 2)) if name in MASKED else {}
        positive = pack.negative(case.prompt(length, **options), negative=case.negative(n), **node)
        other = pack.negative(case.prompt(length, seed=99, **options), negative=case.negative(n - 2))
        patched = pack.patch(model)
        for m in (patched, others_attention(patched), pack.patch(model, method="nag")):
            result = case.run(m, positive, other, steps=1, **run)
            assert torch.isfinite(result).all()
    if name in ("sd3", "flux"):  # where the authors' own pipeline has N as ordinary text, whose padding is masked
        negative = [[case.negative(5)[0][0], {"pooled_output": positive[0][1]["pooled_output"]}]]
        positive = pack.negative(case.prompt(length, **options), negative=negative)
        case.run(pack.patch(model, layout="released"), positive, cfg=2.5, steps=1)
    assert {q for q, _ in seen} == {HALF[dtype]} and any(masked for _, masked in seen)


def test_the_mask_that_the_model_gets(pack):
    """It may hand that on to attention that VSF leaves alone."""
    grown = pack.module.nodes.wrappers._grown_mask
    q = torch.zeros(2, 3, 21, 64, dtype=torch.float16)
    for mask in (torch.zeros(2, 1, 16, 16, dtype=torch.float16), torch.zeros(1, 1, 1, 16, dtype=torch.float16)):
        assert broken_rules(q, q, q, grown(mask, 5, 13)) == []


# -- the checker ------------------------------------------------------------------------------------------------------


def given(**changed):
    """q, k, v and a mask that keep the rules, but for what is ``changed``."""
    kept = {name: torch.zeros(2, 3, 4, 64, dtype=torch.float16) for name in "qkv"}
    mask = torch.zeros(2, 1, 4, 16, dtype=torch.float16)[..., :4]
    return {**kept, "mask": mask, **changed}


HALVES = torch.zeros(4096, dtype=torch.float16)
BAD = {
    "q is empty": {"q": HALVES[:0].view(2, 3, 0, 64)},
    "k is empty": {"k": HALVES[:0].view(2, 3, 0, 64)},
    "v is torch.float32": {"v": torch.zeros(2, 3, 4, 64)},
    "k is torch.float16 on meta": {"k": HALVES[:1536].view(2, 3, 4, 64).to("meta")},
    "v's last stride is 4": {"v": HALVES[:1536].view(2, 3, 64, 4).mT},
    "q begins 10 bytes off": {"q": HALVES[5 : 5 + 1536].view(2, 3, 4, 64)},
    r"k's strides \(812": {"k": HALVES.as_strided((2, 3, 4, 64), (812, 260, 65, 1))},
    "the mask is torch.float32": {"mask": torch.zeros(2, 1, 4, 16)[..., :4]},
    "the mask is torch.float16 on meta": {"mask": HALVES[:16].to("meta")},
    "the mask is torch.bool on meta": {"mask": HALVES[:16].bool().to("meta")},
    "the mask's last stride is 0": {"mask": HALVES[:16].view(4, 4)[..., :1].expand(-1, 4)},
    "the mask begins 10 bytes off": {"mask": torch.zeros(2, 1, 4, 16, dtype=torch.float16)[..., 5:9]},
    r"the mask's strides \(84": {"mask": torch.zeros(2, 1, 4, 21, dtype=torch.float16)[..., :4]},
}


@pytest.mark.parametrize("words", BAD)
def test_each_rule(words):
    broken = given(**BAD[words])
    with pytest.raises(KernelRule, match=f"attention: .*{words}"):
        ruled(attention)(*broken.values())


def attention(q, k, v, mask):
    return torch.zeros_like(q)


def test_what_keeps_the_rules():
    row, heads = torch.zeros(1, 1, 1, 5, dtype=torch.float16), torch.zeros(1, 1, 4, 12)[..., 3:]
    for kept in (given(), given(mask=None), given(mask=row), given(mask=torch.zeros(4, 5)[:, 1:].bool())):
        assert broken_rules(*kept.values()) == []
    assert broken_rules(heads, heads, heads) == []  # heads of 9 are padded by torch
    assert torch.equal(ruled(attention)(*given().values()), given()["q"])


def test_outputs_that_share_memory():
    for out in (torch.zeros(1, 3, 4, 64).expand(2, -1, -1, -1), (given()["q"], torch.zeros(1).expand(2, 3, 4))):
        with pytest.raises(KernelRule, match="expanded"):
            ruled(lambda *_, out=out: out)(*given().values())


def test_masks_that_kill():
    """As torch tells them apart: those with other strides it copies, and bools it makes anew."""
    mask = torch.zeros(2, 1, 4, 24, dtype=torch.float16)
    assert kills(mask[..., 5:21]) and not kills(mask[..., 8:]) and not kills(mask.bool()[..., 5:])
    assert not kills(torch.zeros(2, 1, 4, 21, dtype=torch.float16)[..., 5:])
    q = given()["q"].float()
    with pytest.raises(KernelRule, match="scaled_dot_product_attention: the mask begins 4 bytes off"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask.float()[..., 1:5])


def test_all_that_vsf_attends_with_is_watched(pack):
    host, backends = (pack.module.nodes.host_attention, pack.module.vsf_core.backends)
    tables = [*backends.LIBRARIES.values(), *(f for some in backends.CANDIDATES.values() for f in some)]
    assert len(tables) >= 7 and all(getattr(backends, f.__name__) is f for f in tables)
    ways = [host.HostAttention.black_box, host._sdpa, torch.nn.functional.scaled_dot_product_attention, *tables]
    assert all(hasattr(way, "__wrapped__") for way in ways)
