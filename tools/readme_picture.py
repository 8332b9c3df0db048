"""Make the animated picture of the README with the demo model, by the public Python API.

    python tools/readme_picture.py [docs/demo.gif]

Shown are the first prompts of the held-out list of `wanloom.demo.world` with seeds 0, 1, 2, ...: none is chosen by its
looks.  What made them stands in the picture itself.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

import wanloom
from wanloom import demo
from wanloom.demo.world import example_prompts
from wanloom.durable import atomic_path

MODEL = "demo-t2v"
COLUMNS, ROWS = 4, 2
SCALE = 2  # screen pixels a pixel
MARGIN, TEXT, FOOT = 14, 40, 26  # pixels around a clip, below it, below all
PAUSE = 5  # times the last frame is shown
INK, PAPER, FAINT = (40, 40, 45), (250, 250, 248), (120, 120, 125)


def main() -> int:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/demo.gif")
    pipe = wanloom.load(MODEL)
    prompts = example_prompts(COLUMNS * ROWS)
    videos = []
    for seed, prompt in enumerate(prompts):
        print(f"{seed + 1} of {len(prompts)}: {prompt}", flush=True)
        videos.append(pipe(prompt=prompt, seed=seed))
    count = len(videos[0].frames)
    pages = [page([video.frames[k] for video in videos], prompts) for k in [*range(count), *[count - 1] * PAUSE]]
    with atomic_path(target) as part:
        first, *rest = [picture.quantize(128, dither=Image.Dither.NONE) for picture in pages]
        first.save(part, format="GIF", save_all=True, append_images=rest, duration=1000 // videos[0].plan.fps, loop=0)
    print(f"Wrote {target}, {target.stat().st_size} bytes")
    return 0


def page(frames: list[Any], prompts: list[str]) -> Image.Image:
    """One picture of the animation: a clip's frame in each cell, its prompt below it."""
    height, width = (SCALE * side for side in frames[0].shape[:2])
    across, down = width + MARGIN, height + TEXT + MARGIN
    picture = Image.new("RGB", (COLUMNS * across + MARGIN, ROWS * down + MARGIN + FOOT), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(11)
    for index, (frame, prompt) in enumerate(zip(frames, prompts, strict=True)):
        left, top = MARGIN + index % COLUMNS * across, MARGIN + index // COLUMNS * down
        picture.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(215, 215, 210))
        lines = textwrap.wrap(prompt, width * 10 // 58)  # the font is about 5.8 pixels wide
        draw.multiline_text((left, top + height + 5), "\n".join(lines[:3]), fill=INK, font=font, spacing=1)
    kind = "a smoke-test model" if demo.is_smoke_test(MODEL) else "a small model of moving shapes"
    words = f"made by {MODEL}, {kind} that ships with wanloom; not a Wan checkpoint"
    draw.text((MARGIN, picture.height - FOOT), words, fill=FAINT, font=font)
    return picture


if __name__ == "__main__":
    sys.exit(main())
