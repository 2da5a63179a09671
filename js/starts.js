// Where to begin, by model: the one table of numbers that presets, "Add VSF to this workflow", the shipped workflows,
// the help page and the README have. The rows are JSON, so that tests and tests/release/workflows.py can read them.

/**
 * `files`: a pattern of model files' names, `clips`: types of ComfyUI's text encoder loaders, of the models that begin
 * there; neither: only a preset. `from`: who published it (words in locales: from_...); docs/settings.md has where. None
 * was measured here on real weights.
 * @typedef {{preset: string, files?: string, clips?: string[], scale: number, offset: number, layout: string, from: string}} Start
 * @type {Start[]}
 */
export const STARTS = [
  {"preset": "quality", "files": "sd3|stable.?diffusion.?3", "clips": ["sd3"], "scale": 3.3, "offset": 0.2, "layout": "released", "from": "paper"},
  {"preset": "strong", "scale": 3.8, "offset": 0.2, "layout": "released", "from": "paper"},
  {"preset": "hard", "scale": 3.3, "offset": 0.2, "layout": "paper", "from": "listing"},
  {"preset": "harder", "scale": 3.8, "offset": 0.2, "layout": "paper", "from": "listing"},
  {"preset": "schnellLow", "files": "schnell", "scale": 3.5, "offset": 0, "layout": "released", "from": "authors"},
  {"preset": "schnellHigh", "scale": 6, "offset": 0, "layout": "released", "from": "authors"},
  {"preset": "wanLow", "files": "wan.*14b", "scale": 0.8, "offset": 0.2, "layout": "paper", "from": "authors"},
  {"preset": "wan", "files": "wan", "clips": ["wan"], "scale": 1.5, "offset": 0.1, "layout": "paper", "from": "authors"},
  {"preset": "wanHigh", "scale": 1.9, "offset": 0.1, "layout": "paper", "from": "authors"},
  {"preset": "ltx23", "files": "ltx.?2\\.3", "scale": 1.5, "offset": 0, "layout": "paper", "from": "others"},
  {"preset": "start", "files": "", "clips": [], "scale": 1, "offset": 0.2, "layout": "paper", "from": "nobody"}
];

/**
 * Where a model begins: by its file's name, else by its text encoder's type.
 * @param {string[]} files
 * @param {unknown[]} clips
 * @returns {Start}
 */
export function startOf(files, clips) {
  const names = files.join(" ").toLowerCase();
  const byFile = STARTS.find((start) => start.files && new RegExp(start.files).test(names));
  const byClip = () => STARTS.find((start) => clips.some((clip) => start.clips?.includes(String(clip))));
  return byFile ?? (names && KNOWN.test(names) ? undefined : byClip()) ?? STARTS[STARTS.length - 1];
}

/** Files of supported models, by what their makers call them. */
export const KNOWN = new RegExp(
  "flux|sd3|stable.?diffusion.?[23]|schnell|kontext|ovis|wan|chrono_?edit|bernini|chroma|qwen.?image|firered|z.?image|" +
    "hunyuan.?video|capybara|ltx|cosmos.?predict2|anima|sd.?xl|sd.?v?1[.-]?5|v1-5|v2-1|dreamshaper|juggernaut",
);

/** Files of models that ComfyUI runs and VSF refuses, though their encoder or a part of their name may be a known one's. */
export const UNKNOWN_TO_VSF = new RegExp(
  "hidream|omnigen|newbie|neta|lumina|longcat|kandinsky|boogu|krea.?2|ideogram|mage.?flow|joyai|ernie|(^|[^a-z])lens[_-]|" +
    "pixeldit|(^|[^a-z])pid[_-]|seedvr|triposplat|hunyuan.?3d|hunyuan.?dit|hunyuan.?image|ace.?step|stable.?audio|svd|" +
    "refiner|sam3|sdpose|lotus|void.?pass|minimax|cogvideo|mochi|auraflow|pixart|humo|s2v|animate|scail|wan.*dancer|" +
    "causal.?forcing|stable.?cascade|playground|rt.?detr|supir|omni.?gen|unclip|instruct.?pix2pix",
);

/** Files, of models or LoRAs, whose name says that few steps and cfg 1 are wanted. */
export const DISTILLED = new RegExp(
  "turbo|schnell|lightning|distill|(^|[^a-z])lcm|(^|[^a-z])dmd|(^|[^a-z])hyper|causvid|lightx2v|self.?forcing|rapid|" +
    "klein(?!.*base)|(^|[^0-9])[1248]-?_?steps?",
);
