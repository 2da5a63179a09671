// Shows in VSF Negative Conditioning which tokens it pushes away, once a run has told.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { rootGraph } from "./graph.js";
import { say } from "./words.js";

const NODE = "VSFNegativeConditioning";
/** @type {WeakMap<GraphNode, HTMLElement>} */
const shown = new WeakMap();

/**
 * The node that an execution id like "12" or, inside subgraphs, "5:12" means.
 * @param {string} executionId
 */
function findNode(executionId) {
  let graph = rootGraph(app);
  let node = null;
  for (const id of String(executionId).split(":")) {
    node = graph?.getNodeById(Number(id)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * Adds the read-only line below the node's widgets; it is saved neither in the workflow nor in the prompt.
 * @param {GraphNode} node
 */
function addTokenView(node) {
  const view = document.createElement("div");
  view.style.cssText = "font: 11px sans-serif; opacity: 0.8; white-space: pre-wrap; overflow: auto; padding: 2px 6px;";
  view.textContent = say("runOnce");
  const widget = node.addDOMWidget("vsf_tokens", "vsf_tokens", view, {
    serialize: false,
    getMinHeight: () => 48,
    getMaxHeight: () => 72,
  });
  widget.serialize = false;
  shown.set(node, view);
}

app.registerExtension({
  name: "VSF.Tokens",
  nodeCreated(node) {
    if (node.comfyClass === NODE) addTokenView(node);
  },
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const node = findNode(detail.display_node ?? detail.node);
      const view = node && shown.get(node);
      const text = detail.output?.text?.[0];
      if (view && typeof text === "string") view.textContent = text;
    });
  },
});
