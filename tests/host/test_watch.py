"""A negative that nobody will see the effect of: said while the prompt runs, an error with ``VSF_STRICT``."""

import logging
import re
from types import SimpleNamespace

import execution
import pytest
import torch
from helpers import conditioning, load_sd3, sample, text
from hosting.client import run_in_thread

import nodes


def kind(returns, execute, output=False, **takes):
    """A node class as other packs write them: ``takes`` inputs by their types, and what ``execute`` makes of them."""
    return type(
        "Node",
        (),
        {
            "INPUT_TYPES": classmethod(lambda cls: {"required": {name: (one,) for name, one in takes.items()}}),
            **{"RETURN_TYPES": returns, "FUNCTION": "run", "CATEGORY": "", "OUTPUT_NODE": output},
            "run": lambda self, **given: execute(**given) or {},
        },
    )


@pytest.fixture(scope="module")
def model():
    return load_sd3(depth=1)


@pytest.fixture
def host(pack, model, monkeypatch):
    """A queue of ComfyUI's, with nodes of another pack: ``host.run(prompt)`` gives the errors of the prompt."""
    sampled = ("LATENT",)
    theirs = {
        "AModel": kind(("MODEL",), lambda: (model,)),
        "AText": kind(("CONDITIONING",), lambda seed: (conditioning(seed=seed),), seed="INT"),
        "Bundle": kind(("BUNDLE",), lambda model: ({"model": model},), model="MODEL"),
        "Context": kind(("MODEL", "LATENT"), lambda model, latent: (model, latent), model="MODEL", latent="LATENT"),
        "ByModel": kind(sampled, lambda model: ({"samples": torch.zeros(1, 16, 8, 8)},), model="MODEL"),
        "Deaf": kind(sampled, lambda seed, **k: (k["latent"],), model="MODEL", latent="LATENT", seed="INT", text="*"),
        "DeafBundle": kind(sampled, lambda b, latent: (latent,), b="BUNDLE", latent="LATENT"),
        "Save": kind((), lambda latent, name: None, output=True, latent="LATENT", name="STRING"),
        "DeafSave": kind(("LATENT",), lambda model, latent: (latent,), output=True, model="MODEL", latent="LATENT"),
    }
    for name, one in theirs.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, one)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *a: None)
    executor = execution.PromptExecutor(server, execution.CacheType.LRU, {"lru": 50, "ram": 0, "ram_inactive": 0})

    async def at_work(prompt):
        outputs = [node for node, one in prompt.items() if one["class_type"] in ("Save", "DeafSave")]
        await executor.execute_async(prompt, "prompt", {}, outputs)

    def run(prompt):
        run_in_thread(at_work({key: {**one, "inputs": dict(one["inputs"])} for key, one in prompt.items()}))
        return [data["exception_message"] for what, data in executor.status_messages if what == "execution_error"]

    return SimpleNamespace(run=run)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def graph(sampler="Deaf", **inputs):
    """A patched model, a negative, and a node of some class for a sampler."""
    core = {"steps": 1, "cfg": 1.0, "denoise": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    given = {
        "Deaf": {"model": ["patch", 0], "latent": ["latent", 0], "seed": 1, "text": ["negative", 0]},
        "KSampler": {
            "model": ["patch", 0],
            "positive": ["negative", 0],
            "latent_image": ["latent", 0],
            "seed": 1,
            "negative": ["text", 0],
        }
        | core,
        "DeafBundle": {"b": ["bundle", 0], "latent": ["latent", 0]},
        "DeafSave": {"model": ["patch", 0], "latent": ["latent", 0]},
    }
    return {
        "model": node("AModel"),
        "text": node("AText", seed=1),
        "other": node("AText", seed=2),
        "negative": node("VSFNegativeConditioning", positive=["text", 0], negative=["other", 0]),
        "patch": node("VSFModelPatch", model=["model", 0], scale=2.0, offset=0.0),
        "bundle": node("Bundle", model=["patch", 0]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": node(sampler, **given[sampler], **inputs),
        "save": node("Save", latent=["sample", 0], name="a"),
    }  # fmt: skip


def said(caplog):
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "VSF:" in r.getMessage()]
    caplog.clear()
    return lines


MISSED = r"VSF: node sample .* took the model of node patch .* without sampling it .* no effect"


@pytest.mark.parametrize("sampler", ["Deaf", "DeafBundle", "DeafSave"])
def test_a_sampler_that_ignores_its_model(host, caplog, sampler):
    prompt = graph(sampler)
    for expected in (1, 0):
        assert not host.run(prompt)
        lines = said(caplog)
        assert len(lines) == expected and all(re.search(MISSED, line) for line in lines)
        prompt["save"]["inputs"]["name"] = "another"  # the sampler's result comes from the cache now
    if sampler == "Deaf":
        prompt["sample"]["inputs"]["seed"] = 2  # and now the patched model alone
        assert not host.run(prompt)
        assert len(said(caplog)) == 1


def test_no_word_where_the_model_is_sampled(host, caplog, monkeypatch):
    """Also beside nodes that take the model for something else, pass it on, or came from the cache."""
    prompt = graph("KSampler")
    prompt["by"] = node("ByModel", model=["patch", 0])
    prompt["context"] = node("Context", model=["patch", 0], latent=["by", 0])
    prompt["sample"]["inputs"].update(model=["context", 0], latent_image=["context", 1])
    for strict in ("", "0", "1"):
        monkeypatch.setenv("VSF_STRICT", strict)
        for change in ({"name": f"a {strict}"}, {"name": f"b {strict}"}):
            prompt["save"]["inputs"].update(change)
            assert not host.run(prompt) and not said(caplog)
        prompt["sample"]["inputs"]["seed"] += 1
    del prompt["save"], prompt["sample"]  # nothing is to be made of the model yet
    prompt["peek"] = node("Save", latent=["latent", 0], name="c")
    assert not host.run(prompt) and not said(caplog)


def test_strict_stops_before_the_picture_is_saved(host, caplog, monkeypatch):
    monkeypatch.setenv("VSF_STRICT", "1")
    (error,) = host.run(graph("Deaf"))
    assert re.search(MISSED, error) and "VSF_STRICT" in error
    assert not host.run(graph("DeafSave"))  # it has saved by then
    assert any(re.search(MISSED, line) for line in said(caplog))


def test_strict_and_a_negative_without_a_patched_model(host, monkeypatch):
    """Before the sampler runs, also where the negative's node comes from the cache."""
    prompt = graph("KSampler")
    assert not host.run(prompt)
    prompt["sample"]["inputs"]["model"] = ["model", 0]
    assert not host.run(prompt)
    monkeypatch.setenv("VSF_STRICT", "1")
    prompt["sample"]["inputs"]["seed"] = 3
    (error,) = host.run(prompt)
    assert "the negative of node negative (VSF Negative Conditioning) meets no patched model" in error


@pytest.mark.parametrize(
    ("patch", "negative", "message"),
    [
        ({}, None, "no conditioning carries a negative"),
        ({}, "wrong", "negative input only"),
        ({"start_percent": 0.99}, {}, "no step of this run fell inside"),
        ({}, {"mask": torch.zeros(1, 8, 8)}, "mask of 1 of 1 negatives is black"),
        ({"method": "nag", "nag_scale": 1.0}, {}, "method nag does nothing at this nag_scale"),
        ({"offset": 60.0}, {}, "practically no effect"),
    ],
)
def test_strict_makes_each_warning_an_error(pack, model, monkeypatch, patch, negative, message):
    ready, attached = {"negative": [[text(4, 5), {}]]}, [conditioning(), conditioning(seed=99)]
    if negative is not None:
        at = int(negative == "wrong")
        attached[at] = pack.negative(attached[at], **ready, **({} if at else negative))
    sample(pack.patch(model, **patch), *attached)
    monkeypatch.setenv("VSF_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"VSF: .*{message}.*VSF_STRICT is set"):
        sample(pack.patch(model, **patch), *attached)
    sample(pack.patch(model), pack.negative(conditioning(), **ready))
