// What js/ uses of ComfyUI's frontend, so that tsc can check it: the documented extension hooks, the graph and the
// two modules that packs may import. Written from the frontend's documentation; only what is used is here.

interface Slot {
  name: string;
  type: string;
  link?: number | null;
  widget?: { name: string };
}

interface Link {
  origin_id: number | string;
  origin_slot: number;
  target_id: number | string;
  target_slot: number;
}

interface Widget {
  name: string;
  value: unknown;
  label?: string;
  tooltip?: string;
  serialize?: boolean;
  callback?: (this: unknown, value: unknown, ...more: unknown[]) => unknown;
}

interface Badge {
  text: string;
}

interface GraphNode {
  id: number | string;
  comfyClass?: string;
  type: string;
  title: string;
  mode: number;
  graph: Graph;
  subgraph?: Subgraph;
  isVirtualNode?: boolean;
  inputs: Slot[];
  outputs: Slot[];
  widgets?: Widget[];
  /** Of a node that is not installed: what it was saved with. */
  widgets_values?: unknown;
  flags?: { collapsed?: boolean };
  badges: (Badge | (() => Badge))[];
  pos: [number, number];
  size: [number, number];
  setSize(size: [number, number]): void;
  setDirtyCanvas?(foreground: boolean, background: boolean): void;
  connect(slot: number, target: GraphNode, targetSlot: number): Link | null | undefined;
  getInputLink?(slot: number): Link | null;
  addWidget(
    type: "combo",
    name: string,
    value: string,
    callback: (value: string) => void,
    options: { values: string[]; getOptionLabel: (value?: string | null) => string; serialize: boolean },
  ): Widget;
  addDOMWidget(
    name: string,
    type: string,
    element: HTMLElement,
    options: { serialize: boolean; getMinHeight: () => number; getMaxHeight: () => number },
  ): Widget;
}

interface Graph {
  id: string;
  nodes: GraphNode[];
  rootGraph?: Graph;
  add(node: GraphNode): void;
  getNodeById(id: number | string): GraphNode | null;
  getLink(id: number | null | undefined): Link | undefined;
}

interface Subgraph extends Graph {
  /** Its input side: what comes in from outside, by slot. */
  inputNode: { slots: { connect(input: Slot, node: GraphNode): unknown }[] };
  outputs: { linkIds?: number[] }[];
}

interface MenuItem {
  content: string;
  disabled?: boolean;
  callback: () => void;
}

/** https://docs.comfy.org/custom-nodes/js/javascript_hooks */
interface Extension {
  name: string;
  settings?: {
    id: string;
    category: string[];
    name: string;
    tooltip: string;
    type: "boolean";
    defaultValue: boolean;
    onChange?: (value: boolean) => void;
  }[];
  commands?: { id: string; label: string; icon: string; function: () => void }[];
  setup?(): void | Promise<void>;
  nodeCreated?(node: GraphNode): void;
  afterConfigureGraph?(): void;
  getNodeMenuItems?(node: GraphNode): MenuItem[];
  getCanvasMenuItems?(): (MenuItem | null)[];
}

interface App {
  rootGraph?: Graph;
  graph?: Graph;
  canvas: {
    graph?: Graph;
    emitBeforeChange(): void;
    emitAfterChange(): void;
    selectItems(nodes: GraphNode[]): void;
    animateToBounds(bounds: [number, number, number, number]): void;
    ds: { offset: [number, number]; scale: number; element: HTMLCanvasElement };
  };
  extensionManager: {
    setting: { get(id: string): unknown };
    toast: { add(message: { severity: "info" | "warn"; summary: string; detail: string; life?: number }): void };
  };
  registerExtension(extension: Extension): void;
}

/** The `executed` message. */
interface Executed {
  node: string;
  display_node?: string;
  output?: { text?: unknown[] };
}

interface Api {
  addEventListener(type: "graphChanged", listener: () => void): void;
  addEventListener(type: "executed", listener: (event: CustomEvent<Executed>) => void): void;
  getCustomNodesI18n(): Promise<Record<string, { vsf?: Record<string, string> } | undefined>>;
}

declare module "*/scripts/app.js" {
  export const app: App;
}

declare module "*/scripts/api.js" {
  export const api: Api;
}

interface Window {
  LiteGraph: { createNode(type: string): GraphNode };
  LGraphBadge: new (options: { text: string; fgColor?: string; bgColor?: string; onClick?: () => void }) => Badge;
}
