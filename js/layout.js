// Where new nodes go: the nearest free place beside the node that they are for, and in view.

import { app } from "../../scripts/app.js";

const GAP = 20;
const TITLE = 30;
const STEP = 20;
const FAR = { x: 900, y: 900 };
const DRAWN = 60; // what text views add to what a node says its height is
const GROWTH = 40; // Nodes 2.0 draws nodes taller than they say before they are drawn
const LEAST_WIDTH = 340; // wide enough for the names of the presets

/**
 * @typedef {[number, number, number, number]} Box left, top (of the title), width, height
 */

/**
 * @param {GraphNode} node
 * @returns {Box}
 */
function boxOf({ pos, size, flags }) {
  return [pos[0], pos[1] - TITLE, size[0], (flags?.collapsed ? 0 : size[1]) + TITLE];
}

/** @type {(a: Box, b: Box) => number} how far apart; below GAP is too near */
function distance([ax, ay, aw, ah], [bx, by, bw, bh]) {
  return Math.hypot(Math.max(0, bx - ax - aw, ax - bx - bw), Math.max(0, by - ay - ah, ay - by - bh));
}

/** @type {(a: Box, b: Box) => boolean} */
function isTooNear([ax, ay, aw, ah], [bx, by, bw, bh]) {
  return ax < bx + bw + GAP && bx < ax + aw + GAP && ay < by + bh + GAP && by < ay + ah + GAP;
}

/**
 * Puts a new node near its target, where nothing is: the nearest place, the left side first, since links go right.
 * @param {GraphNode} node
 * @param {GraphNode} target
 */
export function placeNear(node, target) {
  // a node grows when it is first drawn, which the undo history would take for a change of the user's
  node.setSize([Math.max(LEAST_WIDTH, node.size[0]), node.size[1] + DRAWN]);
  const [width, height] = [node.size[0], node.size[1] + GROWTH + TITLE];
  const others = target.graph.nodes.filter((other) => other !== node).map(boxOf);
  const aim = boxOf(target);
  const [left, top] = [aim[0] - width - GAP - STEP, aim[1]];
  let best = { score: Infinity, x: left, y: aim[1] - FAR.y - height };
  for (let x = left - FAR.x; x <= aim[0] + aim[2] + FAR.x; x += STEP) {
    for (let y = top - FAR.y - height; y <= top + FAR.y; y += STEP) {
      /** @type {Box} */
      const box = [x, y, width, height];
      const score = distance(box, aim) + 0.2 * Math.abs(y - top) + (x > left ? 0.2 * (x - left) : 0);
      if (score < best.score && !others.some((other) => isTooNear(box, other))) best = { score, x, y };
    }
  }
  node.pos = [best.x, best.y + TITLE];
}

/**
 * Brings nodes into view, where they are not.
 * @param {GraphNode[]} nodes of the shown graph
 */
export function bringIntoView(nodes) {
  const { canvas } = app;
  const boxes = nodes.map(boxOf);
  const [x, y] = [Math.min(...boxes.map((b) => b[0])), Math.min(...boxes.map((b) => b[1]))];
  const right = Math.max(...boxes.map((b) => b[0] + b[2]));
  const bottom = Math.max(...boxes.map((b) => b[1] + b[3]));
  const { offset, scale, element } = canvas.ds;
  const ratio = window.devicePixelRatio || 1;
  const [seenRight, seenBottom] = [element.width / ratio / scale - offset[0], element.height / ratio / scale - offset[1]];
  const isSeen = x >= -offset[0] && y >= -offset[1] && right <= seenRight && bottom <= seenBottom;
  if (!isSeen) canvas.animateToBounds([x, y, right - x, bottom - y + GROWTH]);
}
