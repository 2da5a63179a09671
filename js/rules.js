// What can go wrong with VSF in a workflow without an error. Rules only look; nothing is blocked.

import { isConnected, places, same, upstream, valueOf } from "./graph.js";

export const PATCH = "VSFModelPatch";
export const NEGATIVE = "VSFNegativeConditioning";

const HIGHEST_CFG = 2;
/** Types of ComfyUI's text encoder loaders that make the encoder of a supported model. */
const ENCODERS = new Set(
  ["stable_diffusion", "sdxl", "sd3", "flux", "wan", "ltxv", "cosmos", "chroma", "qwen_image", "lumina2", "flux2"].concat(
    ["hunyuan_video", "hunyuan_video_15", "ovis"],
  ),
);
/** Loaders of models that VSF refuses: SVD, unCLIP, and those whose attention runs outside ComfyUI. */
const REFUSED = /^(ImageOnlyCheckpointLoader|unCLIPCheckpointLoader|Nunchaku.*Loader)$/;
/** Nodes that keep only the other conditioning's extras, VSF's negative among them. */
const DROPS = new Set(["ConditioningAverage", "ConditioningConcat"]);

/**
 * @typedef {import("./graph.js").Place} Place
 * @typedef {{node: GraphNode, key: string, values?: Record<string, unknown>}} Finding a message's key, for a node
 * @typedef {{place: Place, patches: Place[], negatives: Place[]}} Use what reaches a sampler
 */

/**
 * A node that takes a model and conditioning to use them: a sampler or a guider.
 * @param {GraphNode} node
 */
export function isSampler(node) {
  /** @type {(slots: Slot[] | undefined, type: string) => boolean} */
  const has = (slots, type) => (slots ?? []).some((slot) => slot.type === type);
  return has(node.inputs, "MODEL") && has(node.inputs, "CONDITIONING") && !has(node.outputs, "MODEL");
}

/**
 * The name of a sampler's model input, and those of the conditionings that it draws towards.
 * @param {GraphNode} node
 * @returns {{model: string, positives: string[]}}
 */
export function samplerInputs(node) {
  /** @param {string} type */
  const names = (type) => node.inputs.filter((input) => input.type === type).map((input) => input.name);
  return { model: names("MODEL")[0], positives: names("CONDITIONING").filter((name) => name !== "negative") };
}

/**
 * Whether a rule can ever have something to say on this node.
 * @param {GraphNode} node
 */
export function canHaveBadge(node) {
  const type = classOf(node);
  return [PATCH, NEGATIVE].includes(type) || DROPS.has(type) || /CLIPLoader/.test(type) || REFUSED.test(type) || isSampler(node);
}

/** @param {GraphNode} node */
const classOf = (node) => node.comfyClass ?? "";
/** @type {(node: GraphNode, input: Slot) => boolean} */
const kept = (node, input) => !(DROPS.has(classOf(node)) && input.name === "conditioning_from");
/** @type {(found: Place[], name: string) => Place[]} */
const ofClass = (found, name) => found.filter((place) => place.node.comfyClass === name);

/**
 * Everything worth a badge.
 * @param {Graph | undefined} graph the workflow's outermost graph
 * @returns {Finding[]}
 */
export function findings(graph) {
  const all = [...places(graph)];
  const patches = ofClass(all, PATCH);
  const negatives = ofClass(all, NEGATIVE);
  if (!patches.length && !negatives.length) return [];
  const uses = all.filter((place) => isSampler(place.node)).map(useOf);
  return [
    ...unmet(negatives, uses, "negatives", "patches", "unpatched"),
    ...unmet(patches, uses, "patches", "negatives", "noNegative"),
    ...negatives.filter(isEmpty).map(({ node }) => ({ node, key: "empty" })),
    ...uses.flatMap(highCfg),
    ...all.filter(({ node }) => DROPS.has(classOf(node))).flatMap(dropped),
    ...patches.flatMap(refusedLoader),
    ...negatives.flatMap(unknownEncoder),
  ];
}

/**
 * @param {Place} place
 * @returns {Use}
 */
function useOf(place) {
  const { model, positives } = samplerInputs(place.node);
  return {
    place,
    patches: ofClass(upstream(place, model), PATCH),
    negatives: positives.flatMap((name) => ofClass(upstream(place, name, kept), NEGATIVE)),
  };
}

/**
 * Those that reach samplers, but none that has what they need.
 * @param {Place[]} nodes
 * @param {Use[]} uses
 * @param {"patches" | "negatives"} own
 * @param {"patches" | "negatives"} needed
 * @param {string} key
 * @returns {Finding[]}
 */
function unmet(nodes, uses, own, needed, key) {
  const met = new Set();
  const reaching = new Set();
  for (const place of nodes) {
    const mine = uses.filter((use) => use[own].some((one) => same(one, place)));
    if (mine.length) reaching.add(place.node);
    if (mine.some((use) => use[needed].length)) met.add(place.node);
  }
  return [...reaching].filter((node) => !met.has(node)).map((node) => ({ node, key }));
}

/** @param {Place} place */
function isEmpty(place) {
  const text = valueOf(place, "text");
  return typeof text === "string" && !text.trim() && !isConnected(place, "negative");
}

/** @type {(use: Use) => Finding[]} */
function highCfg({ place, patches, negatives }) {
  const cfg = valueOf(place, "cfg");
  const burns = patches.length && negatives.length && typeof cfg === "number" && cfg > HIGHEST_CFG;
  return burns ? [{ node: place.node, key: "cfg", values: { cfg } }] : [];
}

/** @type {(place: Place) => Finding[]} */
function dropped(place) {
  const lost = ofClass(upstream(place, "conditioning_from", kept), NEGATIVE);
  return lost.length ? [{ node: place.node, key: "dropped" }] : [];
}

/** @type {(patch: Place) => Finding[]} */
function refusedLoader(patch) {
  const loaders = upstream(patch, "model").filter(({ node }) => REFUSED.test(classOf(node)));
  return loaders.map(({ node }) => ({ node, key: "loader" }));
}

/** @type {(negative: Place) => Finding[]} */
function unknownEncoder(negative) {
  return upstream(negative, "clip").flatMap((place) => {
    const type = place.node.comfyClass === "QuadrupleCLIPLoader" ? "hidream" : valueOf(place, "type");
    const isLoader = /CLIPLoader/.test(classOf(place.node)) && typeof type === "string";
    return isLoader && !ENCODERS.has(type) ? [{ node: place.node, key: "encoder", values: { type } }] : [];
  });
}
