// A "preset" choice in VSF Model Patch that sets the visible numbers. It is saved nowhere: the numbers are, so a
// workflow means the same with or without it.

import { app } from "../../scripts/app.js";
import { onGraphChange } from "./changes.js";
import { rootGraph } from "./graph.js";
import { PATCH } from "./rules.js";
import { say } from "./words.js";

const CUSTOM = "custom";

/**
 * Published settings, with the layout that they were used with: of SD3.5 Large Turbo those of the paper, of the others
 * those of the authors' repository; and the paper's numbers in Listing 1, where they push harder. None could be measured
 * here on real weights.
 * @type {Record<string, {scale: number, offset: number, layout: string}>}
 */
export const PRESETS = {
  quality: { scale: 3.3, offset: 0.2, layout: "released" },
  strong: { scale: 3.8, offset: 0.2, layout: "released" },
  hard: { scale: 3.3, offset: 0.2, layout: "paper" },
  harder: { scale: 3.8, offset: 0.2, layout: "paper" },
  schnellLow: { scale: 3.5, offset: 0, layout: "released" },
  schnellHigh: { scale: 6, offset: 0, layout: "released" },
  wanLow: { scale: 0.8, offset: 0.2, layout: "paper" },
  wanHigh: { scale: 1.9, offset: 0.1, layout: "paper" },
};

/**
 * What a preset sets: they are all of one method.
 * @param {string} name
 */
const settingsOf = (name) => (name in PRESETS ? { method: "vsf", ...PRESETS[name] } : {});

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
  const names = Object.keys(PRESETS);
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
  if (!(name in PRESETS)) return say("preset_custom");
  const { scale, offset, layout } = PRESETS[name];
  return `${say(`preset_${name}`)}: ${scale} / ${offset}, ${layout} (${say("untested")})`;
}

/** @param {GraphNode} node */
function addPresets(node) {
  const preset = node.addWidget("combo", "preset", presetOf(node), (name) => choose(node, name), {
    values: [...Object.keys(PRESETS), CUSTOM],
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
