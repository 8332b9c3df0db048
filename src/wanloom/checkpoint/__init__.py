"""Checkpoints: find them, say what they are, load them whole or not at all, write them in another project's layout.

    from wanloom.checkpoint.find import Files, resolve
    from wanloom.checkpoint.load import load_into, survey

    files = resolve(variant, ckpt_dir="Wan2.2-T2V-A14B")        # or dit_high=..., dit_low=..., vae=..., and so on
    variant = survey(variant, files)                            # sizes from the tensors; wrong files refused; no torch
    with torch.device("meta"):
        dit = build_dit(variant.dit)
    load_into(dit, files.experts["high_noise_model"], dtype=torch.float32, device="cpu")
    load_into(umt5, files.text, dtype=...)                      # files.vae, files.clip, files.audio, files.tokenizer

header.py     what a safetensors file holds, by our own strict rules
pickled.py    the same of a `.pth`, without unpickling
documents.py  JSON files of a model directory, strictly
names.py      other projects' tensor names, as data, both ways: a new format is added here
weights.py    one model in a file or in shards -> a table under the official names
shapes.py     every tensor a model of given sizes has
detect.py     sizes from shapes and config.json; which released model it is
find.py       the published, diffusers and ComfyUI directories, or one path for each part
load.py       survey and loading
lora.py       low-rank changes, read and added to weights
manifest.py   SHA-256 of every file
narrowed.py   wide files narrowed once, in the user's cache
convert.py    one layout into another; `save_official` for the trainer
inspect.py    what a path is, for people and as data
"""
