// A "preset" choice in VSF Model Patch that sets the visible numbers. It is saved nowhere: the numbers are, so a
// workflow means the same with or without it.

import { app } from "../../scripts/app.js";
import { onGraphChange } from "./changes.js";
import { rootGraph } from "./graph.js";
import { PATCH } from "./rules.js";
import { STARTS } from "./starts.js";
import { say } from "./words.js";

const CUSTOM = "custom";

/** By name, from the table. */
const PRESETS = new Map(STARTS.map((start) => [start.preset, start]));

/**
 * What a preset sets: they are all of one method.
 * @param {string} name
 */
function settingsOf(name) {
  const start = PRESETS.get(name);
  return start ? { method: "vsf", scale: start.scale, offset: start.offset, layout: start.layout } : {};
}

/**
 * @param {GraphNode} node
 * @param {string} name
 */
const widgetOf = (node, name) => node.widgets?.find((w) => w.name === name);

/**
 * The name of the preset that the node's numbers are.
 * @param {GraphNode} node
 */
function presetOf(node) {
  const names = [...PRESETS.keys()];
  /** @param {string} name */
  const isSet = (name) => Object.entries(settingsOf(name)).every(([key, value]) => widgetOf(node, key)?.value === value);
  return names.find(isSet) ?? CUSTOM;
}

/** @param {GraphNode} node */
function sync(node) {
  const preset = widgetOf(node, "preset");
  if (!preset) return;
  if (preset.value !== presetOf(node)) preset.value = presetOf(node);
  preset.label = say("preset"); // the language may be another one now
  preset.tooltip = say("presetTooltip");
}

/**
 * @param {GraphNode} node
 * @param {string} name
 */
function choose(node, name) {
  for (const [key, value] of Object.entries(settingsOf(name))) {
    const widget = widgetOf(node, key);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value);
  }
}

/** @param {string} name */
function label(name) {
  const start = PRESETS.get(name);
  if (!start) return say("preset_custom");
  return `${say(`preset_${name}`)}: ${start.scale} / ${start.offset}, ${start.layout} (${say(`from_${start.from}`)})`;
}

/** @param {GraphNode} node */
function addPresets(node) {
  const preset = node.addWidget("combo", "preset", presetOf(node), (name) => choose(node, name), {
    values: [...PRESETS.keys(), CUSTOM],
    getOptionLabel: (name) => label(name ?? CUSTOM),
    serialize: false, // not in the prompt
  });
  preset.serialize = false; // not in the workflow, whose values go by position: it has to stay the last widget
  sync(node);
  for (const name of ["scale", "offset", "layout", "method"]) {
    const widget = widgetOf(node, name);
    const told = widget?.callback;
    if (widget) {
      widget.callback = function (...args) {
        const result = told?.apply(this, args);
        sync(node);
        return result;
      };
    }
  }
}

/**
 * @param {Graph | undefined} graph
 * @returns {Generator<GraphNode>}
 */
function* allNodes(graph) {
  for (const node of graph?.nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

app.registerExtension({
  name: "VSF.Presets",
  nodeCreated(node) {
    if (node.comfyClass === PATCH) addPresets(node);
  },
  setup() {
    onGraphChange(() => {
      for (const node of allNodes(rootGraph(app))) if (node.comfyClass === PATCH) sync(node);
    });
  },
});
