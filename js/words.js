// The pack's own messages in the language that ComfyUI is set to; they are in locales/<language>/main.json.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** @type {Record<string, {vsf?: Record<string, string>} | undefined>} */
let languages = {};

/** Fetches the messages of all languages; without them (no such server route) a message is its key. */
export async function loadWords() {
  try {
    languages = await api.getCustomNodesI18n();
  } catch {
    languages = {};
  }
}

/**
 * @param {string} key
 * @param {Record<string, unknown>} [values] what stands for {name} in the message
 * @returns {string}
 */
export function say(key, values = {}) {
  const language = String(app.extensionManager.setting.get("Comfy.Locale") ?? "en");
  const text = languages[language]?.vsf?.[key] ?? languages.en?.vsf?.[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}
