// "Add VSF to this workflow": puts VSF Model Patch and VSF Negative Conditioning between what samplers get and them, as
// one step to undo, and says in a sentence what was done or why not.

import { app } from "../../scripts/app.js";
import { broadcaster, comesFromOutside, linkInto, places, rootGraph, sourceOf, upstream, ways } from "./graph.js";
import { bringIntoView, placeNear } from "./layout.js";
import { modelOf } from "./models.js";
import { NEGATIVE, PATCH, gets, isSampler, samplerInputs } from "./rules.js";
import { say } from "./words.js";

const SHOWN_MS = 15000;

/**
 * What a sampler lacks, and the inputs to put it in front of.
 * @typedef {import("./graph.js").Place} Place
 * @typedef {import("./graph.js").Consumer} Consumer
 * @typedef {import("./starts.js").Start} Start
 * @typedef {{place: Place, patch: Consumer[], negative: Consumer[], encoder: Place | undefined, start: Start, unsure: string}} Lack
 */

/** @type {(place: Place, name: string) => Consumer} */
const inputOf = (place, name) => ({ place, index: place.node.inputs.findIndex((input) => input.name === name) });

/** @param {GraphNode} node */
const nameOf = (node) => node.title || node.type || node.comfyClass;

/** @type {(place: Place, name: string, wanted: string) => boolean} */
const passes = (place, name, wanted) => upstream(place, name).some(({ node }) => node.comfyClass === wanted);

/**
 * What a sampler lacks, or the sentence that says why nothing can be added: both halves or none.
 * @param {Place} place
 * @returns {Lack | string}
 */
function lackOf(place) {
  const { node } = place;
  const inputs = samplerInputs(node);
  const models = inputs.models.filter((name) => gets(place, name));
  const positives = inputs.positives.filter((name) => gets(place, name));
  const patch = models.filter((name) => !passes(place, name, PATCH));
  const isNegative = positives.some((name) => passes(place, name, NEGATIVE));
  if (models.length && !patch.length && isNegative) return say("allThere");
  if (!models.length || !positives.length) return say("unlinked", { node: nameOf(node) });
  const model = modelOf(place, models, positives[0]);
  if (model.refusals.length) {
    const [{ key, values }] = model.refusals;
    return `${say(key, values)}. ${say(`${key}Fix`, values)}`;
  }
  const way = ways(place, positives[0]);
  const encoder = way.find((one) => encodes(one.place)) ?? way.find((one) => clipOutput(one.place.node) >= 0);
  const outside = encoder?.crossed.at(-1) ?? outermost(place, positives[0]);
  return {
    place,
    patch: patch.map((name) => outermost(place, name)),
    negative: isNegative ? [] : [outside],
    encoder: encoder?.place,
    start: model.start,
    unsure: model.isKnown ? "" : (model.files[0] ?? nameOf(node)),
  };
}

/**
 * The input to splice in front of: out of subgraphs, as long as what it gets comes from outside.
 * @type {(place: Place, name: string) => Consumer}
 */
function outermost(place, name) {
  let at = inputOf(place, name);
  for (;;) {
    const link = linkInto(at.place, at.index);
    const { outer } = at.place;
    if (!link || !outer || !comesFromOutside(link) || !sourceOf(outer, link.origin_slot)) return at;
    at = { place: outer, index: link.origin_slot };
  }
}

/** @param {GraphNode} node */
const clipInput = (node) => (node.inputs ?? []).findIndex((input) => input.type === "CLIP");
/** @param {GraphNode} node */
const clipOutput = (node) => (node.outputs ?? []).findIndex((output) => output.type === "CLIP");
/** @param {Place} place */
const encodes = ({ node, outer }) => clipOutput(node) < 0 && sourceOf({ node, outer }, clipInput(node)) !== null;

/**
 * Adds what samplers lack, and tells. Those that get the same model or prompt share what is put behind it.
 * @param {Place[]} samplers
 */
function addTo(samplers) {
  const found = samplers.map(lackOf);
  const lacks = found.filter((one) => typeof one !== "string");
  const reasons = new Set(found.filter((one) => typeof one === "string"));
  const told = [...reasons].filter((one) => one !== say("allThere"));
  if (!lacks.length) return tell(told.length ? told : [samplers.length ? say("allThere") : noSampler()], "warn");
  const { added, isMissingClip } = insertAll(lacks);
  const own = added.filter((node) => node.graph === app.canvas.graph);
  if (own.length) {
    app.canvas.selectItems(own);
    bringIntoView(own);
  }
  const counts = [PATCH, NEGATIVE].map((type) => added.filter((node) => node.comfyClass === type).length);
  const unsure = [...new Set(lacks.map((one) => one.unsure))].filter(Boolean).map((model) => say("unsure", { model }));
  const done = say(own.length ? "added" : "addedInside", { patches: counts[0], negatives: counts[1] });
  tell([done, ...(isMissingClip ? [say("noClip")] : []), ...unsure, ...told], isMissingClip || told.length ? "warn" : "info");
}

/** @type {(sentences: string[], severity: "info" | "warn") => void} */
function tell(sentences, severity) {
  app.extensionManager.toast.add({ severity, summary: "VSF", detail: sentences.join(" "), life: SHOWN_MS });
}

/** Why there is nothing to add to: what samples here is another pack's own, or nothing is. */
function noSampler() {
  const nodes = [...places(rootGraph(app))].map(({ node }) => node);
  const other = nodes.find((node) => node.inputs?.some(isForeignModel) && node.outputs?.some(({ type }) => type === "LATENT"));
  return other ? say("foreign", { node: nameOf(other) }) : say("noSampler");
}

const FOREIGN = /MODEL|PIPE/;
const COMFYS = /^(UPSCALE_MODEL|STYLE_MODEL|MODEL_PATCH|LORA_MODEL|LATENT_UPSCALE_MODEL|MODEL)$/;
/** @param {Slot} slot */
const isForeignModel = ({ type }) => FOREIGN.test(String(type)) && !COMFYS.test(String(type));

/**
 * @param {Lack[]} lacks
 */
function insertAll(lacks) {
  /** @type {GraphNode[]} */
  const added = [];
  let isMissingClip = false;
  const all = { patch: lacks.flatMap((one) => one.patch), negative: lacks.flatMap((one) => one.negative) };
  /** @type {Set<string>} */
  const done = new Set();
  app.canvas.emitBeforeChange();
  try {
    for (const lack of lacks) {
      for (const at of lack.patch) added.push(...insert(at, PATCH, all.patch, done).map((node) => begin(node, lack.start)));
      for (const at of lack.negative) {
        for (const node of insert(at, NEGATIVE, all.negative, done)) {
          added.push(node);
          isMissingClip = !connectClip(node, lack.encoder) || isMissingClip;
        }
      }
    }
  } finally {
    app.canvas.emitAfterChange();
  }
  return { added, isMissingClip };
}

/** @type {(node: GraphNode, start: Start) => GraphNode} */
function begin(node, start) {
  for (const [name, value] of Object.entries(start)) {
    const widget = ["scale", "offset", "layout"].includes(name) && node.widgets?.find((w) => w.name === name);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value);
  }
  return node;
}

/**
 * A new node in front of an input, on what comes in there, and of all `others` that get the same; none where one of
 * them brought it already.
 * @param {Consumer} at
 * @param {string} type
 * @param {Consumer[]} others
 * @param {Set<string>} done
 * @returns {GraphNode[]}
 */
function insert(at, type, others, done) {
  if (done.has(keyOf(at))) return [];
  const { graph } = at.place.node;
  const link = linkInto(at.place, at.index);
  const alike = others.filter((other) => other.place.node.graph === graph && isAlike(at, other));
  const node = window.LiteGraph.createNode(type);
  graph.add(node);
  placeNear(node, at.place.node);
  const slot = node.inputs.findIndex((input) => input.type === node.outputs[0].type);
  if (link) connectOrigin(graph, link, node, slot);
  for (const { place, index } of alike) {
    done.add(keyOf({ place, index }));
    node.connect(0, place.node, index);
  }
  return [node];
}

/** @param {Consumer} at one input of a definition, however often it is used */
const keyOf = ({ place: { node }, index }) => `${node.graph.id}:${node.id}:${index}`;

/** @type {(a: Consumer, b: Consumer) => boolean} whether both get the same output, or broadcast */
function isAlike(a, b) {
  const [mine, theirs] = [a, b].map(({ place, index }) => linkInto(place, index));
  if (mine && theirs) return mine.origin_id === theirs.origin_id && mine.origin_slot === theirs.origin_slot;
  if (mine || theirs) return false;
  const [from, other] = [a, b].map(({ place: { node }, index }) => broadcaster(node, node.inputs[index]));
  return keyOf(a) === keyOf(b) || Boolean(from && other && from.node === other.node && from.index === other.index);
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
 * Connects the CLIP that encodes the positive; false where it is not in this graph. A broadcast one comes by itself.
 * @type {(node: GraphNode, encoder: Place | undefined) => boolean}
 */
function connectClip(node, encoder) {
  if (!encoder) return false;
  const { graph } = node;
  const clip = clipInput(node);
  const index = clipInput(encoder.node);
  if (index < 0 && encoder.node.graph === graph) {
    return Boolean(encoder.node.connect(clipOutput(encoder.node), node, clip));
  }
  const link = encoder.node.graph === graph ? linkInto(encoder, index) : null;
  if (link) return connectOrigin(graph, link, node, clip);
  const source = sourceOf(encoder, index);
  if (source && "place" in source && source.place.node.graph === graph) {
    return Boolean(broadcaster(node, node.inputs[clip]) ?? source.place.node.connect(source.slot, node, clip));
  }
  return false;
}

/**
 * Every sampler that runs in a graph or in subgraphs of it, or as `node`.
 * @param {Graph | undefined} graph
 * @param {GraphNode} [node]
 */
function samplersIn(graph, node) {
  /** @type {(place: Place | null) => boolean} */
  const isInside = (place) => place !== null && ((node ? place.node === node : place.node.graph === graph) || isInside(place.outer));
  return [...places(rootGraph(app))].filter((place) => isSampler(place.node) && isInside(place));
}

const addToShown = () => addTo(samplersIn(app.canvas.graph));

/** @type {(graph: Graph | undefined) => boolean} whether anything here could be a sampler, be it another pack's */
function samples(graph) {
  return (graph?.nodes ?? []).some(
    (node) => isSampler(node) || node.inputs?.some(isForeignModel) || (node.subgraph && samples(node.subgraph)),
  );
}

app.registerExtension({
  name: "VSF.Splice",
  commands: [
    { id: "VSF.AddToWorkflow", label: "Add VSF to this workflow", icon: "pi pi-minus-circle", function: addToShown },
  ],
  getNodeMenuItems(node) {
    if (!isSampler(node) && !(node.subgraph && samples(node.subgraph))) return [];
    const callback = () => addTo(samplersIn(undefined, node));
    return [{ content: say("add"), disabled: false, callback }];
  },
  getCanvasMenuItems() {
    return samples(app.canvas.graph) ? [null, { content: say("add"), disabled: false, callback: addToShown }] : [];
  },
});
