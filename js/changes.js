// Tells when the workflow may have changed, whoever changed it: once, shortly after the last of several changes.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const QUIET_MS = 150;
/** @type {(() => void)[]} */
const listeners = [];
/** @type {ReturnType<typeof setTimeout> | undefined} */
let timer;

/** @param {() => void} listener */
export function onGraphChange(listener) {
  listeners.push(listener);
}

export function graphMayHaveChanged() {
  clearTimeout(timer);
  timer = setTimeout(() => listeners.forEach((listener) => listener()), QUIET_MS);
}

app.registerExtension({
  name: "VSF.Changes",
  setup() {
    api.addEventListener("graphChanged", graphMayHaveChanged);
    // Widgets change after the press that the undo history looks at, and typing is no change to it until the end.
    for (const event of ["pointerup", "keyup", "change"]) {
      window.addEventListener(event, graphMayHaveChanged, { capture: true, passive: true });
    }
  },
  afterConfigureGraph: graphMayHaveChanged,
  nodeCreated: graphMayHaveChanged,
});
