// What can go wrong with VSF in a workflow without an error. Rules only look; nothing is blocked.

import { isConnected, makesPipe, places, same, sourceOf, upstream, valueOf } from "./graph.js";
import { classOf, clipsOf, isLoader, modelOf, refusedEncoder } from "./models.js";

export const PATCH = "VSFModelPatch";
export const NEGATIVE = "VSFNegativeConditioning";

const HIGHEST_CFG = 2;
/** Nodes that keep only the other conditioning's extras, VSF's negative among them. */
const DROPS = new Set(["ConditioningAverage", "ConditioningConcat"]);
const SAMPLING = new Set(["steps", "denoise", "sampler_name", "scheduler"]);

/**
 * @typedef {import("./graph.js").Place} Place
 * @typedef {import("./models.js").Finding} Finding
 * @typedef {{place: Place, patches: Place[], negatives: Place[], wrong: Place[]}} Use what reaches a sampler
 */

/**
 * A node that makes a picture or latent from noise with a model and conditioning, or a guider that tells how. One that
 * returns its model too is told from a pack's pipe, and from nodes that prepare all three, by what it takes.
 * @param {GraphNode} node
 */
export function isSampler(node) {
  /** @type {(slots: Slot[] | undefined, ...types: string[]) => boolean} */
  const has = (slots, ...types) => (slots ?? []).some((slot) => types.includes(slot.type));
  if (!has(node.inputs, "MODEL") || !has(node.inputs, "CONDITIONING")) return false;
  if (!has(node.outputs, "LATENT", "IMAGE", "VIDEO", "GUIDER")) return false;
  if (!has(node.outputs, "MODEL")) return true;
  const samples = node.widgets?.some(({ name }) => SAMPLING.has(name)) ?? false;
  return samples || (has(node.inputs, "LATENT") && !makesPipe(node));
}

/**
 * The names of a sampler's model inputs, of the conditionings that it draws towards, and of those that it draws away
 * from. A model for the negative side alone meets no negative of VSF's.
 * @param {GraphNode} node
 * @returns {{models: string[], positives: string[], negatives: string[]}}
 */
export function samplerInputs(node) {
  /** @type {(type: string) => string[]} */
  const names = (type) => node.inputs.filter((input) => input.type === type).map((input) => input.name);
  /** @param {string} name */
  const isNegative = (name) => /neg|uncond/i.test(name);
  const conditionings = names("CONDITIONING");
  return {
    models: names("MODEL").filter((name) => !isNegative(name)),
    positives: conditionings.filter((name) => !isNegative(name)),
    negatives: conditionings.filter(isNegative),
  };
}

/**
 * Whether a rule can ever have something to say on this node.
 * @param {GraphNode} node
 */
export function canHaveBadge(node) {
  const type = classOf(node);
  return [PATCH, NEGATIVE].includes(type) || DROPS.has(type) || isLoader(node) || isSampler(node);
}

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
  const wrong = negatives.filter((one) => isOnWrongSide(one, uses)).map(({ node }) => node);
  const lonely = unmet(patches, uses, "patches", "negatives", "noNegative");
  return [
    ...wrong.map((node) => ({ node, key: "wrongSide" })),
    ...unmet(negatives, uses, "negatives", "patches", "unpatched"),
    ...lonely.filter(({ node }) => !uses.some((use) => has(use.patches, node) && use.wrong.length)), // one cause, one badge
    ...negatives.filter(isEmpty).map(({ node }) => ({ node, key: "empty" })),
    ...uses.flatMap(highCfg),
    ...halves(uses),
    ...all.filter(({ node }) => DROPS.has(classOf(node))).flatMap(dropped),
    ...uses.filter((use) => use.patches.length).flatMap(({ place }) => refusals(place)),
    ...negatives.flatMap(clipsOf).flatMap(refusedEncoder),
  ];
}

/** @type {(found: Place[], node: GraphNode) => boolean} */
const has = (found, node) => found.some((place) => place.node === node);

/** @type {(place: Place) => Finding[]} */
function refusals(place) {
  const { models, positives } = samplerInputs(place.node);
  return modelOf(place, models, positives[0]).refusals;
}

/**
 * What reaches a sampler. A model counts as patched when every one that it gets is.
 * @param {Place} place
 * @returns {Use}
 */
export function useOf(place) {
  const { models, positives, negatives } = samplerInputs(place.node);
  const patches = models.filter((name) => gets(place, name)).map((name) => ofClass(upstream(place, name), PATCH));
  /** @param {string[]} names */
  const reaching = (names) => names.flatMap((name) => ofClass(upstream(place, name, kept), NEGATIVE));
  return {
    place,
    patches: patches.every((found) => found.length) ? patches.flat() : [],
    negatives: reaching(positives),
    wrong: reaching(negatives),
  };
}

/** @type {(place: Place, name: string) => boolean} */
export function gets(place, name) {
  return sourceOf(place, place.node.inputs.findIndex((input) => input.name === name)) !== null;
}

/**
 * A negative that only samplers' negative prompts get: VSF works on the positive one.
 * @type {(negative: Place, uses: Use[]) => boolean}
 */
function isOnWrongSide(negative, uses) {
  /** @param {Place[]} found */
  const isIn = (found) => has(found, negative.node);
  return uses.some((use) => isIn(use.wrong)) && !uses.some((use) => isIn(use.negatives));
}

/**
 * Samplers that lack one half, where its nodes work elsewhere, so that these have no badge that says it.
 * @param {Use[]} uses
 * @returns {Finding[]}
 */
function halves(uses) {
  const whole = uses.filter((use) => use.patches.length && use.negatives.length);
  /** @type {(half: "patches" | "negatives", use: Use) => boolean} */
  const shared = (half, use) => use[half].some(({ node }) => whole.some((other) => has(other[half], node)));
  return uses.flatMap((use) => {
    const { node } = use.place;
    if (use.patches.length && !use.negatives.length && shared("patches", use)) return [{ node, key: "halfNegative" }];
    if (use.patches.length || !use.negatives.length || !shared("negatives", use)) return [];
    return refusals(use.place).length ? [] : [{ node, key: "halfPatch" }];
  });
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
  if (!patches.length || !negatives.length || typeof cfg !== "number" || cfg <= HIGHEST_CFG) return [];
  const { models } = samplerInputs(place.node);
  return modelOf(place, models, undefined).isDistilled ? [{ node: place.node, key: "cfg", values: { cfg } }] : [];
}

/** @type {(place: Place) => Finding[]} */
function dropped(place) {
  const lost = ofClass(upstream(place, "conditioning_from", kept), NEGATIVE);
  return lost.length ? [{ node: place.node, key: "dropped" }] : [];
}
