// What can be known of the model that a sampler runs, from loaders and file names: whether VSF serves it, whether it is
// distilled, and where to begin.

import { upstream, valueOf } from "./graph.js";
import { DISTILLED, KNOWN, UNKNOWN_TO_VSF, startOf } from "./starts.js";

/** Types of ComfyUI's text encoder loaders that make the encoder of a supported model. */
const ENCODERS = new Set(
  ["stable_diffusion", "sdxl", "sd3", "flux", "wan", "ltxv", "cosmos", "chroma", "qwen_image", "lumina2", "flux2"].concat(
    ["hunyuan_video", "hunyuan_video_15", "ovis"],
  ),
);
/** Loaders of models that VSF refuses: SVD, unCLIP, and those whose attention runs outside ComfyUI. */
const REFUSED = /^(ImageOnlyCheckpointLoader|unCLIPCheckpointLoader|Nunchaku.*Loader)$/;
const FILE = /\.(safetensors|sft|gguf|ckpt|pth?|bin)$/i;

/**
 * @typedef {import("./graph.js").Place} Place
 * @typedef {{node: GraphNode, key: string, values?: Record<string, unknown>}} Finding a message's key, for a node
 */

/**
 * What a place's model and encoder are known to be.
 * @param {Place} place
 * @param {string[]} models names of its model inputs
 * @param {string | undefined} positive name of its conditioning input
 */
export function modelOf(place, models, positive) {
  const chain = models.flatMap((name) => upstream(place, name));
  const loaders = chain.filter(({ node }) => !(node.inputs ?? []).some(({ type }) => type === "MODEL"));
  const files = loaders.flatMap(filesOf);
  const encoders = positive ? upstream(place, positive).flatMap(clipsOf) : [];
  const refusals = [...refusedLoaders(chain), ...loaders.flatMap(refusedFile), ...encoders.flatMap(refusedEncoder)];
  const clips = encoders.map((one) => valueOf(one, "type")).filter((type) => type !== undefined);
  return {
    refusals,
    isKnown: KNOWN.test(files.join(" ").toLowerCase()) || clips.some((type) => SURE.has(String(type))),
    isDistilled: chain.flatMap(filesOf).some((file) => DISTILLED.test(file.toLowerCase())),
    files,
    start: startOf(files, clips),
  };
}

/** Types that no other model of ComfyUI's takes. */
const SURE = new Set([...ENCODERS].filter((type) => !["stable_diffusion", "sdxl", "lumina2", "cosmos"].includes(type)));

/**
 * The loaders of the CLIP that a node encodes with.
 * @param {Place} place
 */
export function clipsOf(place) {
  const inputs = (place.node.inputs ?? []).filter(({ type }) => type === "CLIP");
  return inputs.flatMap(({ name }) => upstream(place, name)).filter(({ node }) => /CLIPLoader/.test(classOf(node)));
}

/**
 * Whether a node loads a model.
 * @param {GraphNode} node
 */
export function isLoader(node) {
  const gives = (node.outputs ?? []).some(({ type }) => type === "MODEL");
  return /CLIPLoader/.test(classOf(node)) || (gives && !(node.inputs ?? []).some(({ type }) => type === "MODEL"));
}

/** @param {GraphNode} node */
export const classOf = (node) => node.comfyClass ?? node.type;

/** @param {Place} place */
function filesOf(place) {
  const { node } = place;
  const shown = node.widgets?.length ? node.widgets.map(({ name }) => valueOf(place, name)) : saved(node);
  return shown.filter((value) => typeof value === "string" && FILE.test(value)).map(String);
}

/**
 * What a node that is not installed was saved with.
 * @param {GraphNode} node
 */
const saved = (node) => [node.widgets_values ?? []].flat();

/**
 * The refused loaders themselves, not what stands behind them: there is one cause.
 * @param {Place[]} chain
 * @returns {Finding[]}
 */
function refusedLoaders(chain) {
  const all = chain.filter(({ node }) => REFUSED.test(classOf(node)));
  const first = all.filter((place) => !upstream(place, "model").some(({ node }) => REFUSED.test(classOf(node))));
  return first.map(({ node }) => ({ node, key: "loader" }));
}

/** @type {(place: Place) => Finding[]} */
function refusedFile(place) {
  const file = filesOf(place).find((name) => UNKNOWN_TO_VSF.test(name.toLowerCase()));
  return file ? [{ node: place.node, key: "file", values: { file } }] : [];
}

/** @type {(place: Place) => Finding[]} */
export function refusedEncoder(place) {
  const type = classOf(place.node) === "QuadrupleCLIPLoader" ? "hidream" : valueOf(place, "type");
  return typeof type === "string" && !ENCODERS.has(type) ? [{ node: place.node, key: "encoder", values: { type } }] : [];
}
