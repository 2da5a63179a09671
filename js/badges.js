// Quiet badges on nodes that keep VSF from doing what is expected; a click says how to put it right.

import { app } from "../../scripts/app.js";
import { graphMayHaveChanged, onGraphChange } from "./changes.js";
import { rootGraph } from "./graph.js";
import { canHaveBadge, findings } from "./rules.js";
import { loadWords, say } from "./words.js";

const SETTING = "VSF.ShowBadges";
const COLORS = { fgColor: "#f3e3b5", bgColor: "#4a3f1d" };
/** @type {Map<GraphNode, Badge>} the badges of nodes that have something to say */
let shown = new Map();

function refresh() {
  const isOn = app.extensionManager.setting.get(SETTING) !== false;
  const next = new Map();
  for (const { node, key, values } of isOn ? findings(rootGraph(app)) : []) {
    if (next.has(node)) continue; // one badge a node; rules come most urgent first
    const text = say(key, values);
    const old = shown.get(node);
    next.set(node, old?.text === text ? old : makeBadge(text, say(`${key}Fix`, values)));
  }
  const changed = [...new Set([...shown.keys(), ...next.keys()])].filter((node) => shown.get(node) !== next.get(node));
  shown = next;
  changed.forEach(redraw);
}

/**
 * @param {string} text
 * @param {string} fix
 */
function makeBadge(text, fix) {
  const tell = () => app.extensionManager.toast.add({ severity: "info", summary: text, detail: fix, life: 12000 });
  return new window.LGraphBadge({ text, ...COLORS, onClick: tell });
}

/**
 * Nodes 2.0 asks for a badge again only when something changes that it was made from. What is found in the graph is
 * nothing that it could see change, so the badge also reads the first widget's label, and this changes that and back.
 * @param {GraphNode} node
 */
function redraw(node) {
  const widget = node.widgets?.[0];
  if (widget) {
    const { label } = widget;
    widget.label = `${label ?? ""} `;
    widget.label = label;
  }
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "VSF.Badges",
  settings: [
    {
      id: SETTING,
      category: ["VSF", "Badges", "ShowBadges"],
      name: "Show badges on nodes that keep VSF from working",
      tooltip: "For example when a negative is attached but the model is not patched. Nothing is ever blocked.",
      type: "boolean",
      defaultValue: true,
      onChange: () => graphMayHaveChanged(),
    },
  ],
  nodeCreated(node) {
    if (!canHaveBadge(node)) return;
    const none = new window.LGraphBadge({ text: "" });
    node.badges.push(() => {
      void node.widgets?.[0]?.label; // see redraw
      return shown.get(node) ?? none;
    });
  },
  async setup() {
    await loadWords();
    onGraphChange(refresh);
    graphMayHaveChanged();
  },
});
