"""Locales, tooltips, aliases and help of every node, against what the server says its nodes are."""

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja", "ko", "fr", "de", "es", "ru")
NODES = {
    "VSFNegativeConditioning",
    "VSFModelPatch",
    "VSFRecord",
    "VSFAttentionMap",
    "VSFScaleSweep",
    "VSFContactSheet",
}


@pytest.fixture(scope="session")
def schema(server):
    """The pack's nodes as the server describes them."""
    with urlopen(f"{server.address}/object_info") as answer:
        nodes = json.load(answer)
    pack = {name: node for name, node in nodes.items() if node["python_module"].split(".")[-1] == "ComfyUI-VSF"}
    assert set(pack) == NODES
    return pack


def inputs(node):
    """What can be seen of its inputs, by name."""
    shown = (node["input"].get(group, {}) for group in ("required", "optional"))
    return {name: spec for group in shown for name, spec in group.items()}


def locale(language, name):
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def leaves(tree, path=()):
    """Every text with the path of keys to it."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {found: text for key, value in tree.items() for found, text in leaves(value, (*path, key)).items()}


def wanted_texts(node):
    """What ComfyUI's nodeDefs.json has of a node; outputs by their index."""
    wanted = {("display_name",): node["display_name"], ("description",): node["description"]}
    for name, spec in inputs(node).items():
        wanted[("inputs", name, "name")] = name
        wanted[("inputs", name, "tooltip")] = spec[1].get("tooltip")
    for index, name in enumerate(node["output_name"]):
        wanted[("outputs", str(index), "name")] = name
        wanted[("outputs", str(index), "tooltip")] = node["output_tooltips"][index]
    return wanted


def test_every_language_that_is_promised_is_there():
    assert sorted(folder.name for folder in (ROOT / "locales").iterdir()) == sorted(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_node_definitions_match_the_nodes(schema, language):
    wanted = {(name, *path): text for name, node in schema.items() for path, text in wanted_texts(node).items()}
    found = leaves(locale(language, "nodeDefs"))
    assert sorted(found) == sorted(wanted)
    assert not [path for path, text in found.items() if not text.strip()]
    if language == "en":
        assert found == wanted
    else:  # what was never translated; single words can be the same in two languages
        english = leaves(locale("en", "nodeDefs"))
        assert not [path for path, text in found.items() if path[-1] == "tooltip" and text == english[path]]


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_translated_tooltips_explain_the_same_options(schema, language):
    """A combo's options stay as they are in every language, so what explains one has to name it as it is shown."""
    nodes, explained = locale(language, "nodeDefs"), []
    for name, node in schema.items():
        for key, spec in inputs(node).items():
            options = (spec[1].get("options") or []) if spec[0] == "COMBO" else []
            found = nodes[name]["inputs"][key]["tooltip"]
            for option in (o for o in options if f"{o}:" in spec[1]["tooltip"]):
                explained.append((name, key, option))
                assert re.search(rf"(?<!\w){re.escape(option)} ?[:：]", found), (name, key, option)
    assert ("VSFModelPatch", "layout", "released") in explained
    assert ("VSFAttentionMap", "normalize", "0 to 1") in explained


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["main", "settings", "commands"])
def test_messages_are_all_there_with_the_same_placeholders(language, name):
    english, found = leaves(locale("en", name)), leaves(locale(language, name))
    assert sorted(found) == sorted(english)
    assert not [path for path, text in found.items() if not text.strip()]
    holes = re.compile(r"\{\w+\}")
    assert {path: holes.findall(text) for path, text in found.items()} == {
        path: holes.findall(text) for path, text in english.items()
    }


def test_every_message_that_the_code_says_exists():
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "js").glob("*.js")))
    keys = set(re.findall(r'say\("(\w+)"', code)) | {"added", "addedInside"}
    rules = set(re.findall(r'key: "(\w+)"', code)) | set(re.findall(r'"(unpatched|noNegative)"', code))
    presets = set(re.findall(r'"preset": "(\w+)"', code)) | {"custom"}
    sources = set(re.findall(r'"from": "(\w+)"', code))
    wanted = keys | rules | {f"{rule}Fix" for rule in rules} | {f"preset_{preset}" for preset in presets}
    wanted |= {f"from_{source}" for source in sources}
    assert len(rules) == 11 and len(presets) == 12 and len(sources) == 5
    assert wanted == set(locale("en", "main")["vsf"])


def test_every_input_and_output_has_a_tooltip_and_every_node_aliases(schema):
    for node in schema.values():
        assert all(text and text.strip() for text in wanted_texts(node).values())
        assert "VSF" in node["search_aliases"]
    for name in ("VSFNegativeConditioning", "VSFModelPatch"):
        assert {"negative prompt", "NAG", "cfg 1"} <= set(schema[name]["search_aliases"])


def test_every_node_has_one_help_page():
    """The frontend asks for a page in its language, then for the one that all languages share."""
    docs = ROOT / "js" / "docs"
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} == {f"{name}.md" for name in NODES}


@pytest.mark.parametrize("name", sorted(NODES))
def test_help_documents_every_input(schema, server, name):
    with urlopen(f"{server.address}/extensions/ComfyUI-VSF/docs/{name}.md") as answer:
        page = answer.read().decode()
    cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    documented = set(re.findall(r"`(\w+)`", cells))
    own = {"preset"} if name == "VSFModelPatch" else set()  # the frontend's, no input of the node
    assert documented == set(inputs(schema[name])) | own
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
        assert (ROOT / "js" / "docs" / picture).is_file()
