// Walks a workflow as ComfyUI would run it: into and out of subgraphs, through reroutes, Get and Set, broadcasts and
// bypassed nodes, past muted ones, and from linked widgets to the values they get. It only reads.

const MUTED = 2;
const BYPASSED = 4;
const DEEPEST = 500; // links in a row; a graph that loops ends here

/**
 * A node, and the subgraph nodes that it is inside of: the same inner node runs once for each of them.
 * @typedef {{node: GraphNode, outer: Place | null}} Place
 * @typedef {{place: Place, slot: number}} Output
 * @typedef {Output | {value: unknown}} Source an output, or the value of a widget that stands for it
 * @typedef {{place: Place, index: number}} Consumer an input
 * @typedef {{steps: number, crossed: Consumer[]}} Way how many links were gone back, and the subgraphs' inputs among them
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
    if (!runs(node)) continue;
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
 * @param {Way} [way]
 * @returns {Source | null}
 */
export function sourceOf(place, index, type, way = { steps: 0, crossed: [] }) {
  const input = place.node.inputs?.[index];
  way.steps += 1;
  if (!input || way.steps > DEEPEST) return null;
  const link = linkInto(place, index);
  if (link) return originOf(place.node.graph, place.outer, link, type ?? input.type, way);
  const from = broadcaster(place.node, input);
  return from ? sourceOf({ node: from.node, outer: place.outer }, from.index, type ?? input.type, way) : null;
}

/**
 * @param {Place} place
 * @param {number} index
 */
export function linkInto(place, index) {
  const input = place.node.inputs?.[index];
  return input?.link == null ? null : place.node.graph.getLink(input.link);
}

const BROADCASTS = /^(Anything|Prompts) Everywhere/;

/**
 * The node of Use Everywhere that sends to an unlinked input when the workflow is queued: by type, and where it has
 * several of that type (Prompts Everywhere), by name. Its links exist only then, and asking it would make them.
 * @param {GraphNode} node
 * @param {Slot} input
 */
export function broadcaster(node, input) {
  if (BROADCASTS.test(node.type) || !["MODEL", "CLIP", "CONDITIONING"].includes(String(input.type))) return null;
  const senders = (node.graph?.nodes ?? []).filter((one) => BROADCASTS.test(one.type) && runs(one));
  const sent = senders.flatMap((one) =>
    (one.inputs ?? []).map((from, index) => ({ node: one, index, from })).filter(({ from, index }) => {
      const link = linkInto({ node: one, outer: null }, index);
      return link && (from.type === input.type || typeOf(one.graph, link) === input.type);
    }),
  );
  if (sent.length < 2) return sent[0] ?? null;
  const wantsNegative = NEGATIVE_NAME.test(input.name);
  return sent.find(({ from, index }) => (NEGATIVE_NAME.test(from.name) || index === 1) === wantsNegative) ?? sent[0];
}

const NEGATIVE_NAME = /neg/i;

/** @type {(graph: Graph, link: Link) => string | undefined} */
const typeOf = (graph, link) => graph.getNodeById(link.origin_id)?.outputs?.[link.origin_slot]?.type;
/** @param {GraphNode} node */
const runs = (node) => node.mode !== MUTED && node.mode !== BYPASSED;

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
 * @param {Way} way
 * @returns {Source | null}
 */
function originOf(graph, outer, link, type, way) {
  if (!comesFromOutside(link)) {
    const node = graph.getNodeById(link.origin_id);
    return node ? outputOf({ node, outer }, link.origin_slot, type, way) : null;
  }
  if (!outer) return null;
  way.crossed.push({ place: outer, index: link.origin_slot });
  const input = outer.node.inputs?.[link.origin_slot];
  if (input?.link != null || (input && broadcaster(outer.node, input))) return sourceOf(outer, link.origin_slot, type, way);
  const widget = outer.node.widgets?.find((w) => w.name === (input?.widget?.name ?? input?.name));
  return widget ? { value: widget.value } : null;
}

/**
 * @param {Place} place
 * @param {number} slot
 * @param {string} type
 * @param {Way} way
 * @returns {Source | null}
 */
function outputOf(place, slot, type, way) {
  const { node, outer } = place;
  if (node.mode === MUTED) return null;
  if (node.mode === BYPASSED) {
    const index = bypassIndex(node, slot, type);
    return index < 0 ? null : sourceOf(place, index, type, way);
  }
  if (node.subgraph) {
    const link = node.subgraph.getLink(node.subgraph.outputs[slot]?.linkIds?.[0]);
    return link ? originOf(node.subgraph, place, link, type, way) : null;
  }
  if (GETS.test(node.type)) return fromSetter(place, slot, type, way);
  if (node.isVirtualNode) {
    const link = node.getInputLink?.(slot); // a Reroute's own
    const target = link && node.graph.getNodeById(link.target_id);
    if (target) return sourceOf({ node: target, outer }, link.target_slot, type, way);
    return node.widgets?.length ? { value: node.widgets[0].value } : null; // a primitive
  }
  return { place, slot };
}

const GETS = /^(easy )?getNode$/i;
const SETS = /^(easy )?setNode$/i;

/**
 * What the Set of a Get's name gets: of its own graph, else of one around it. The Get itself is not asked: where there
 * is none, KJNodes' shows a message.
 * @param {Place} get
 * @param {number} slot
 * @param {string} type
 * @param {Way} way
 * @returns {Source | null}
 */
function fromSetter(get, slot, type, way) {
  const name = get.node.widgets?.[0]?.value;
  for (let at = /** @type {Place | null} */ (get); at; at = at.outer) {
    const setter = at.node.graph.nodes.find((node) => SETS.test(node.type) && node.widgets?.[0]?.value === name);
    if (setter && name) return setter.mode === MUTED ? null : sourceOf({ node: setter, outer: at.outer }, slot, type, way);
  }
  return null;
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
export function upstream(place, name, follow) {
  const all = ways(place, name, follow).map((one) => one.place);
  return all.filter((one, i) => all.findIndex((other) => same(other, one)) === i);
}

/**
 * Those nodes' outputs, each with the inputs of subgraphs that it came in through, the innermost first.
 * @param {Place} place
 * @param {string} name
 * @param {(node: GraphNode, input: Slot) => boolean} [follow]
 * @returns {(Output & {name: string, crossed: Consumer[]})[]}
 */
export function ways(place, name, follow = () => true) {
  const index = place.node.inputs?.findIndex((input) => input.name === name) ?? -1;
  if (index < 0) return [];
  const type = place.node.inputs[index].type;
  /** @type {(Output & {name: string, crossed: Consumer[]})[]} */
  const found = [];
  /** @type {(Consumer & {type: string, name: string, crossed: Consumer[]})[]} */
  const todo = [{ place, index, type, name, crossed: [] }];
  while (todo.length) {
    const at = /** @type {typeof todo[0]} */ (todo.shift());
    const way = { steps: 0, crossed: [...at.crossed] };
    const source = sourceOf(at.place, at.index, at.type, way);
    if (!source || !("place" in source)) continue;
    const output = source.place.node.outputs?.[source.slot];
    const known = output?.type === type ? output.name : at.name; // a pipe has several: the name tells which
    if (found.some((seen) => same(seen.place, source.place) && seen.slot === source.slot && seen.name === known)) continue;
    found.push({ ...source, name: known, crossed: way.crossed });
    for (const [i, input] of passages(source.place, type, known)) {
      if (!follow(source.place.node, input)) continue;
      todo.push({ place: source.place, index: i, type: input.type, name: known, crossed: way.crossed });
    }
  }
  return found;
}

/**
 * Inputs that an output can have come through: those of its type, of which the one that is called as it is (a node
 * with both sides of a prompt); where none gets anything, those of types like a pack's pipe.
 * @param {Place} place
 * @param {string} type
 * @param {string} name
 */
function passages(place, type, name) {
  const inputs = [...(place.node.inputs ?? []).entries()];
  const equal = inputs.filter(([, input]) => input.type === type && !(type === "MODEL" && SECOND_MODEL.test(input.name)));
  const named = equal.filter(([, input]) => input.name.toLowerCase() === name.toLowerCase());
  const own = (named.length ? named : equal).filter(([i]) => sourceOf(place, i));
  return own.length ? own : inputs.filter(([, input]) => !PLAIN.has(String(input.type)));
}

/** Of merged models only the first keeps its patches: ComfyUI takes weights alone from the other. */
const SECOND_MODEL = /^model2$/;
const PLAIN = new Set(
  "MODEL CLIP VAE CONDITIONING LATENT IMAGE MASK INT FLOAT STRING BOOLEAN COMBO CLIP_VISION CONTROL_NET NOISE".split(" "),
);

/**
 * Whether a node hands its inputs on in a pipe of its pack's.
 * @param {GraphNode} node
 */
export function makesPipe(node) {
  return (node.outputs ?? []).some(({ type }) => !PLAIN.has(String(type)) && node.inputs.some((one) => one.type === type));
}

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
