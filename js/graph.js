// Walks a workflow as ComfyUI would run it: into and out of subgraphs, through reroutes and bypassed nodes, past muted
// ones, and from linked widgets to the values they get. It only reads.

const MUTED = 2;
const BYPASSED = 4;
const DEEPEST = 500; // links in a row; a graph that loops ends here

/**
 * A node, and the subgraph nodes that it is inside of: the same inner node runs once for each of them.
 * @typedef {{node: GraphNode, outer: Place | null}} Place
 * @typedef {{place: Place, slot: number}} Output
 * @typedef {Output | {value: unknown}} Source an output, or the value of a widget that stands for it
 */

/**
 * The workflow's outermost graph, whichever one is shown; undefined before there is one.
 * @param {App} app
 */
export function rootGraph(app) {
  const graph = app.canvas?.graph;
  return graph?.rootGraph ?? graph;
}

/**
 * Every node that runs, in this graph and in its subgraphs.
 * @param {Graph | undefined} graph
 * @param {Place | null} [outer]
 * @returns {Generator<Place>}
 */
export function* places(graph, outer = null) {
  for (const node of graph?.nodes ?? []) {
    if (node.mode === MUTED || node.mode === BYPASSED) continue;
    const place = { node, outer };
    if (node.subgraph) yield* places(node.subgraph, place);
    else if (!node.isVirtualNode) yield place;
  }
}

/**
 * What an input gets: null where nothing is connected.
 * @param {Place} place
 * @param {number} index
 * @param {string} [type] the type that is wanted at the end of the links
 * @param {number} [depth]
 * @returns {Source | null}
 */
export function sourceOf(place, index, type, depth = 0) {
  const input = place.node.inputs?.[index];
  const link = input?.link == null ? null : place.node.graph.getLink(input.link);
  if (!link || depth > DEEPEST) return null;
  return originOf(place.node.graph, place.outer, link, type ?? input.type, depth + 1);
}

/**
 * Whether a link comes from its subgraph's input side. Node ids are numbers in some frontends, strings in others.
 * @param {Link | null | undefined} link
 */
export function comesFromOutside(link) {
  return Number(link?.origin_id) === -10;
}

/**
 * @param {Graph} graph
 * @param {Place | null} outer
 * @param {Link} link
 * @param {string} type
 * @param {number} depth
 * @returns {Source | null}
 */
function originOf(graph, outer, link, type, depth) {
  if (!comesFromOutside(link)) {
    const node = graph.getNodeById(link.origin_id);
    return node ? outputOf({ node, outer }, link.origin_slot, type, depth) : null;
  }
  if (!outer) return null;
  const input = outer.node.inputs?.[link.origin_slot];
  if (input?.link != null) return sourceOf(outer, link.origin_slot, type, depth);
  const widget = outer.node.widgets?.find((w) => w.name === (input?.widget?.name ?? input?.name));
  return widget ? { value: widget.value } : null;
}

/**
 * @param {Place} place
 * @param {number} slot
 * @param {string} type
 * @param {number} depth
 * @returns {Source | null}
 */
function outputOf(place, slot, type, depth) {
  const { node, outer } = place;
  if (node.mode === MUTED) return null;
  if (node.mode === BYPASSED) {
    const index = bypassIndex(node, slot, type);
    return index < 0 ? null : sourceOf(place, index, type, depth);
  }
  if (node.subgraph) {
    const link = node.subgraph.getLink(node.subgraph.outputs[slot]?.linkIds?.[0]);
    return link ? originOf(node.subgraph, place, link, type, depth) : null;
  }
  if (node.isVirtualNode) {
    const link = node.getInputLink?.(slot); // a Reroute's own, or that of the setter behind a getter
    const target = link && node.graph.getNodeById(link.target_id);
    if (target) return sourceOf({ node: target, outer }, link.target_slot, type, depth);
    return node.widgets?.length ? { value: node.widgets[0].value } : null; // a primitive
  }
  return { place, slot };
}

/**
 * The input that stands in for a bypassed node's output: the one beside it, else the first of its type.
 * @param {GraphNode} node
 * @param {number} slot
 * @param {string} type
 */
function bypassIndex(node, slot, type) {
  const wanted = type === "*" ? node.outputs?.[slot]?.type : type;
  const inputs = node.inputs ?? [];
  if (inputs[slot]?.type === wanted || inputs[slot]?.type === "*") return slot;
  return inputs.findIndex((input) => input.type === wanted);
}

/**
 * Every node that a value of the input's type has come through, nearest first.
 * @param {Place} place
 * @param {string} name the input's name
 * @param {(node: GraphNode, input: Slot) => boolean} [follow] says which inputs of the nodes on the way to go on from
 * @returns {Place[]}
 */
export function upstream(place, name, follow = () => true) {
  const index = place.node.inputs?.findIndex((input) => input.name === name) ?? -1;
  if (index < 0) return [];
  const type = place.node.inputs[index].type;
  /** @type {Place[]} */
  const found = [];
  const todo = [sourceOf(place, index, type)];
  while (todo.length) {
    const source = todo.pop();
    if (!source || !("place" in source) || found.some((seen) => same(seen, source.place))) continue;
    found.push(source.place);
    for (const [i, input] of passages(source.place.node, type)) {
      if (follow(source.place.node, input)) todo.push(sourceOf(source.place, i, type));
    }
  }
  return found;
}

/**
 * Inputs that a value of this type can have come through: those of the type, else those of types like a pack's pipe.
 * @param {GraphNode} node
 * @param {string} type
 */
function passages(node, type) {
  const inputs = [...(node.inputs ?? []).entries()];
  const equal = inputs.filter(([, input]) => input.type === type);
  return equal.length ? equal : inputs.filter(([, input]) => !PLAIN.has(String(input.type)));
}

const PLAIN = new Set(
  "MODEL CLIP VAE CONDITIONING LATENT IMAGE MASK INT FLOAT STRING BOOLEAN COMBO CLIP_VISION CONTROL_NET NOISE".split(" "),
);

/**
 * A widget's value at a place, also when it comes over a link; undefined where only a run can tell.
 * @param {Place} place
 * @param {string} name
 * @returns {unknown}
 */
export function valueOf(place, name) {
  const index = place.node.inputs?.findIndex((input) => input.name === name) ?? -1;
  if (index < 0 || place.node.inputs[index].link == null) {
    return place.node.widgets?.find((w) => w.name === name)?.value;
  }
  const source = sourceOf(place, index);
  if (!source) return undefined;
  if ("value" in source) return source.value;
  return String(source.place.node.comfyClass).startsWith("Primitive") ? valueOf(source.place, "value") : undefined;
}

/**
 * Whether an input gets anything.
 * @param {Place} place
 * @param {string} name
 */
export function isConnected(place, name) {
  const index = place.node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return index >= 0 && sourceOf(place, index) !== null;
}

/**
 * @param {Place} a
 * @param {Place} b
 * @returns {boolean}
 */
export function same(a, b) {
  return a.node === b.node && (a.outer && b.outer ? same(a.outer, b.outer) : a.outer === b.outer);
}
