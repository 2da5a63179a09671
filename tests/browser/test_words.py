"""Locales, tooltips, aliases and help of every node, against what the server says its nodes are."""

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja", "ko", "fr", "de", "es", "ru")


@pytest.fixture(scope="session")
def schema(server):
    """The pack's nodes as the server describes them."""
    with urlopen(f"{server.address}/object_info") as answer:
        nodes = json.load(answer)
    return {name: node for name, node in nodes.items() if name.startswith("VSF")}


def inputs(node):
    return {name: spec for group in node["input"].values() if isinstance(group, dict) for name, spec in group.items()}


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
    keys = set(re.findall(r'say\("(\w+)"', code))
    rules = set(re.findall(r'key: "(\w+)"', code)) | set(re.findall(r'"(unpatched|noNegative)"', code))
    presets = set(re.findall(r"^  (\w+): \{ scale", code, re.MULTILINE)) | {"custom"}
    wanted = keys | rules | {f"{rule}Fix" for rule in rules} | {f"preset_{preset}" for preset in presets}
    assert len(rules) == 7 and len(presets) == 9
    assert wanted == set(locale("en", "main")["vsf"])


def test_every_input_and_output_has_a_tooltip_and_every_node_aliases(schema):
    for node in schema.values():
        assert all(text and text.strip() for text in wanted_texts(node).values())
        assert {"negative prompt", "NAG", "cfg 1"} <= set(node["search_aliases"])


def test_help_documents_every_input(schema, server):
    for name, node in schema.items():
        with urlopen(f"{server.address}/extensions/ComfyUI-VSF/docs/{name}.md") as answer:
            page = answer.read().decode()
        # the frontend asks for the language's page first, and the console would show that it is missing
        assert (ROOT / "js" / "docs" / name / "en.md").read_text(encoding="utf-8") == page
        cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
        assert set(inputs(node)) <= set(re.findall(r"`(\w+)`", cells)), name
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
            assert (ROOT / "js" / "docs" / picture).is_file()
