"""What ComfyUI's tokenizers of HunyuanVideo and Flux.2 Dev make of words with transformers 4, as a script:
``test_words.py`` runs it, since both read their vocabularies wrongly, or not at all, with newer ones.

Prints a JSON: for each encoder and text, what the node shows, and how many tokens the negative has.
"""

import base64
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import load_pack  # noqa: E402


def main() -> None:
    """Encodes each text with both."""
    import comfy.text_encoders.flux as flux
    import torch
    import transformers
    from comfy.supported_models_base import ClipTarget
    from encoders import make_hunyuan_video_clip, make_language_clip
    from helpers import conditioning

    data = torch.frombuffer(bytearray(json.dumps(tekken()).encode()), dtype=torch.uint8)
    target = ClipTarget(flux.Flux2Tokenizer, flux.flux2_te())
    clips = {
        "hunyuan_video": make_hunyuan_video_clip(),
        "flux2": make_language_clip(target, 31, {"tekken_model": data}, vocab_size=1024),
    }
    node, found = load_pack().mapping["VSFNegativeConditioning"], {"transformers": transformers.__version__}
    for name, clip in clips.items():
        for text in sys.argv[1:]:
            out = node.execute(positive=conditioning(), clip=clip, text=text)
            (negative,) = out.result[0][0][1]["vsf_negatives"]
            shown = out.ui.as_dict()["text"][0].splitlines()
            found[f"{name}: {text}"] = [shown, negative["tokens"].shape[1]]
    print(json.dumps(found))


def tekken() -> dict:
    """A vocabulary in the form of Flux.2 Dev's: bytes, some words, and the marks of its template."""
    words = [bytes([i]) for i in range(256)]
    for word in (b"red", b" red", b"roof", b" roof"):
        words += [word[:n] for n in range(2, len(word) + 1) if word[:n] not in words]
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    marks += [f"<{i}>" for i in range(len(marks), 12)]  # 11 is the padding
    return {
        "config": {"default_vocab_size": len(words) + len(marks), "default_num_special_tokens": len(marks)},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(w).decode()} for i, w in enumerate(words)],
        "special_tokens": [{"rank": i, "token_str": mark} for i, mark in enumerate(marks)],
    }


if __name__ == "__main__":
    main()
