"""The menu entry on ComfyUI's official templates, as they are installed with the host: on all with ``--long``.

What is right of each is read off the prompt that Run would send: every sampler of a supported model has both halves,
every other none, and past our nodes the prompt is what it was. Which models are supported is told here by the files'
names, after the classes that ComfyUI makes of them.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from browser.splicing import HELPERS, LOAD, TRY, chain, links_of, plain, without_ours

SAMPLERS = {
    "KSampler",
    "KSamplerAdvanced",
    "CFGGuider",
    "BasicGuider",
    "DualCFGGuider",
    "SamplerCustom",
    "DualModelGuider",
}
NOT_OURS = re.compile(  # as the classes are called in comfy/model_base.py, and their files in the templates
    "acestep|ace_step|stable.audio|boogu|ernie|hidream|hunyuan3d|hunyuan_3d|ideogram4|joyai|kandinsky5|krea2|lens_|longcat|"
    "lotus|mage_flow|minimax|newbie|netayume|omnigen2|pid_flux|pixeldit|sam3|SCAIL|sdpose|seedvr2|svd_xt|triposplat|void_pass|"
    "humo|s2v|animate|dancer|causal_forcing|refiner|rt_detr",
    re.IGNORECASE,
)
FIRST = (
    "01_get_started_text_to_image",
    "sdxl_refiner_prompt_example",
    "flux_depth_lora_example",
    "video_wan2_2_14B_s2v",
)
EVERY = 10


def templates():
    """Those in which a node takes a model and a conditioning, in whatever graph."""
    folder = Path(find_spec("comfyui_workflow_templates_json").submodule_search_locations[0]) / "templates"
    for path in sorted(folder.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(workflow, dict) and "nodes" in workflow:
            graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", ())]
            if any({"MODEL", "CONDITIONING"} <= kinds(node) for graph in graphs for node in graph["nodes"]):
                yield path.stem, workflow


def kinds(node):
    return {str(one["type"]) for one in node.get("inputs") or ()}


def files(prompt, value):
    """Model files that a link can come from."""
    todo, seen, found = [value], set(), []
    while todo:
        link = todo.pop()
        if isinstance(link, list) and len(link) == 2 and link[0] in prompt and link[0] not in seen:
            seen.add(link[0])
            inputs = prompt[link[0]]["inputs"]
            found += [inputs[name] for name in ("unet_name", "ckpt_name") if isinstance(inputs.get(name), str)]
            todo += inputs.values()
    return found


def halves(prompt, node):
    """Whether a sampler's model is patched, and whether its positive has a negative."""
    inputs = node["inputs"]
    positive = next(inputs[name] for name in ("positive", "conditioning", "cond1") if name in inputs)
    found = [chain(prompt, inputs["model"], "model"), chain(prompt, positive, "positive")]
    names = ("VSFModelPatch", "VSFNegativeConditioning")
    return tuple(any(one["class_type"] == name for _, one in way) for way, name in zip(found, names, strict=True))


def wrong(result):
    """What is wrong with a template after the command, in words."""
    after, before = result["after"], result["before"]
    found = []
    for key, node in after.items():
        if node.get("class_type") in SAMPLERS and "model" in node["inputs"]:
            ours = not NOT_OURS.search(" ".join(files(after, node["inputs"]["model"])))
            if halves(after, node) != (ours, ours):
                found.append(f"sampler {key} has {halves(after, node)}")
        if node.get("class_type") == "VSFModelPatch" and "model" not in node["inputs"]:
            found.append(f"patch {key} without a model")
        if node.get("class_type") == "VSFNegativeConditioning" and not {"positive", "clip"} <= set(node["inputs"]):
            found.append(f"negative {key} without a link")
    checks = {
        "the prompt is another one": links_of(without_ours(after, before)) == links_of(before),
        "undo is not exact": plain(result["undone"]) == plain(result["saved"]),
        "more than one step to undo": result["steps"] == (1 if result["added"] else 0),
        "the second click added something": result["again"],
        f"overlaps {result['overlaps']}": not result["overlaps"],
        "out of view": not result["added"] or not result["far"],
        "nothing was said": len(result["said"]) == 1,
        "said for ever": all(result["lives"]),
    }
    return found + [text for text, holds in checks.items() if not holds]


def test_every_official_template_comes_out_right(server, new_page, times, tally):
    tab = new_page(server.address)
    tab.evaluate(HELPERS)
    everything = list(templates())
    assert len(everything) > 100
    chosen = everything if times > 1 else [one for i, one in enumerate(everything) if i % EVERY == 0 or one[0] in FIRST]
    bad = {}
    for name, workflow in chosen:
        tab.evaluate(LOAD, workflow)
        result = tab.evaluate(TRY)
        tally["official templates"] += 1
        tally["templates that VSF was added to" if result["added"] else "templates that it was not, with a reason"] += 1
        if wrong(result):
            bad[name] = wrong(result)
    tally["templates that came out wrong"] += len(bad)
    assert bad == {}
    assert not [text for text in tab.problems if "vsf" in text.lower()]
