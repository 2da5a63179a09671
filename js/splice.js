// "Add VSF to this workflow": puts VSF Model Patch and VSF Negative Conditioning between what a sampler gets and the
// sampler, as one step to undo.

import { app } from "../../scripts/app.js";
import { comesFromOutside, places, rootGraph, sourceOf, upstream } from "./graph.js";
import { NEGATIVE, PATCH, isSampler, samplerInputs } from "./rules.js";
import { say } from "./words.js";

const GAP = 40;
const TITLE = 30;
const GROWTH = 80; // Nodes 2.0 draws nodes taller than they say before they are drawn
const LEAST_WIDTH = 340; // wide enough for the names of the presets

/**
 * An input of a node, and the graph that both are in.
 * @typedef {import("./graph.js").Place} Place
 * @typedef {{place: Place, index: number}} Consumer
 */

/**
 * Where a node of the shown graph runs; the first time, when its subgraph is used more than once.
 * @param {GraphNode} node
 */
function placeOf(node) {
  return [...places(rootGraph(app))].find((place) => place.node === node);
}

/**
 * The consumer to splice in front of: out of subgraphs, as long as what it gets comes from outside.
 * @type {(place: Place, name: string) => Consumer}
 */
function outermost(place, name) {
  let at = { place, index: place.node.inputs.findIndex((input) => input.name === name) };
  for (;;) {
    const link = linkInto(at);
    const { outer } = at.place;
    if (!link || !outer || !comesFromOutside(link) || outer.node.inputs[link.origin_slot]?.link == null) return at;
    at = { place: outer, index: link.origin_slot };
  }
}

/** @param {Consumer} consumer */
function linkInto({ place, index }) {
  const input = place.node.inputs[index];
  return input?.link == null ? null : place.node.graph.getLink(input.link);
}

/** @type {(place: Place, name: string, wanted: string) => boolean} */
function passes(place, name, wanted) {
  return upstream(place, name).some(({ node }) => node.comfyClass === wanted);
}

/**
 * What a sampler lacks.
 * @param {GraphNode} node
 */
function lacks(node) {
  const place = placeOf(node);
  if (!place) return null;
  const { model, positives } = samplerInputs(node);
  const patch = !passes(place, model, PATCH);
  const negative = positives.length > 0 && !passes(place, positives[0], NEGATIVE);
  return patch || negative ? { place, model, positive: positives[0], patch, negative } : null;
}

/**
 * Adds what samplers lack; those that share a positive share its negative too.
 * @param {GraphNode[]} nodes
 */
function addTo(nodes) {
  const wanted = nodes.map(lacks).filter((lack) => lack !== null);
  if (!wanted.length) return;
  let isMissingClip = false;
  /** @type {GraphNode[]} */
  const added = [];
  app.canvas.emitBeforeChange();
  try {
    for (const { place, model, positive, patch, negative } of wanted) {
      // asked again, since what was added for a sampler before can serve this one too
      if (patch && !passes(place, model, PATCH)) added.push(insert(outermost(place, model), PATCH, 0, nodes).node);
      if (!negative || passes(place, positive, NEGATIVE)) continue;
      const { node, at } = insert(outermost(place, positive), NEGATIVE, 1, nodes);
      added.push(node);
      isMissingClip = !connectClip(node, at) || isMissingClip;
    }
  } finally {
    app.canvas.emitAfterChange();
  }
  const own = added.filter((node) => node.graph === app.canvas.graph);
  if (own.length) app.canvas.selectItems(own);
  if (isMissingClip) app.extensionManager.toast.add({ severity: "warn", summary: "VSF", detail: say("noClip") });
}

/**
 * A new node in front of a consumer, on what comes in there; the other samplers among `nodes` that get the same too.
 * @param {Consumer} at
 * @param {string} type
 * @param {number} row
 * @param {GraphNode[]} nodes
 */
function insert(at, type, row, nodes) {
  const { node: target } = at.place;
  const { graph } = target;
  const link = linkInto(at);
  const node = window.LiteGraph.createNode(type);
  graph.add(node);
  place(node, target, row);
  const slot = node.inputs.findIndex((input) => input.type === node.outputs[0].type);
  if (link) connectOrigin(graph, link, node, slot);
  const alike = link ? siblings(nodes, link, node.outputs[0].type) : [];
  for (const { node: other, index } of [...alike, { node: target, index: at.index }]) node.connect(0, other, index);
  return { node, at: { ...at, place: { node, outer: at.place.outer }, index: slot } };
}

/**
 * Connects an input to what a link of its graph brings, from a node or from the subgraph's input side.
 * @type {(graph: Graph, link: Link, node: GraphNode, slot: number) => boolean}
 */
function connectOrigin(graph, link, node, slot) {
  if (!comesFromOutside(link)) return Boolean(graph.getNodeById(link.origin_id)?.connect(link.origin_slot, node, slot));
  /** @type {Subgraph} */ (graph).inputNode.slots[link.origin_slot].connect(node.inputs[slot], node);
  return true;
}

/**
 * The samplers' inputs of a type that get the same output over a link of their own.
 * @param {GraphNode[]} nodes
 * @param {Link} link
 * @param {string} type
 */
function siblings(nodes, link, type) {
  return nodes.flatMap((node) => {
    const { model, positives } = samplerInputs(node);
    const names = type === "MODEL" ? [model] : positives;
    const indices = names.map((name) => node.inputs.findIndex((input) => input.name === name));
    const own = indices.map((index) => ({ index, link: linkInto({ place: { node, outer: null }, index }) }));
    const equal = own.filter((one) => one.link?.origin_id === link.origin_id && one.link.origin_slot === link.origin_slot);
    return equal.map(({ index }) => ({ node, index }));
  });
}

/**
 * Connects the CLIP that encodes the positive; false where it is not in this graph.
 * @type {(node: GraphNode, at: Consumer) => boolean}
 */
function connectClip(node, at) {
  const encoder = upstream(at.place, "positive").find((place) => clipIndex(place.node) >= 0);
  const graph = node.graph;
  const clip = node.inputs.findIndex((input) => input.name === "clip");
  if (!encoder) return false;
  const link = encoder.node.graph === graph ? linkInto({ place: encoder, index: clipIndex(encoder.node) }) : null;
  if (link) return connectOrigin(graph, link, node, clip);
  const source = sourceOf(encoder, clipIndex(encoder.node));
  if (source && "place" in source && source.place.node.graph === graph) {
    return Boolean(source.place.node.connect(source.slot, node, clip));
  }
  return false;
}

/** @param {GraphNode} node */
const clipIndex = (node) => (node.inputs ?? []).findIndex((input) => input.type === "CLIP");

/**
 * Left of the target, moved up until nothing is under it.
 * @type {(node: GraphNode, target: GraphNode, row: number) => void}
 */
function place(node, target, row) {
  const [x, y] = target.pos;
  node.setSize([Math.max(LEAST_WIDTH, node.size[0]), node.size[1]]);
  const width = node.size[0];
  const height = node.size[1] + GROWTH;
  const others = target.graph.nodes.filter((other) => other !== node);
  /** @param {number} top */
  const covers = (top) =>
    others.some(
      ({ pos, size }) =>
        pos[0] < node.pos[0] + width + GAP / 2 &&
        node.pos[0] < pos[0] + size[0] + GAP / 2 &&
        pos[1] - TITLE < top + height + GAP / 2 &&
        top - TITLE < pos[1] + size[1] + GAP / 2,
    );
  let top = y + row * (TITLE + GAP);
  node.pos = [x - width - GAP, top];
  while (covers(top)) top -= GAP / 2;
  node.pos = [x - width - GAP, top];
}

const samplersShown = () => (app.canvas.graph?.nodes ?? []).filter(isSampler);

app.registerExtension({
  name: "VSF.Splice",
  commands: [
    {
      id: "VSF.AddToWorkflow",
      label: "Add VSF to this workflow",
      icon: "pi pi-minus-circle",
      function: () => addTo(samplersShown()),
    },
  ],
  getNodeMenuItems(node) {
    if (!isSampler(node)) return [];
    return [{ content: say("add"), disabled: !lacks(node), callback: () => addTo([node]) }];
  },
  getCanvasMenuItems() {
    const samplers = samplersShown();
    if (!samplers.length) return [];
    return [null, { content: say("add"), disabled: !samplers.some(lacks), callback: () => addTo(samplers) }];
  },
});
