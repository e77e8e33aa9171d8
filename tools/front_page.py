"""Compose docs/images/front.png, the picture of README.md, from three pictures that the benchmarks and examples drew.

    python tools/front_page.py

Left: samples of configs/fashion_flow.yaml, one column per class. Right: paths of `genkit bench toy` from moons to eight
Gaussians, without and with optimal transport, and episodes of the flow policy of examples/06_four_ways.py.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE, CAPTION = (1244, 568), 30
PANELS = (  # file, crop (left, top, right, bottom), place, width on the sheet, caption
    ("fashion_flow.png", (0, 0, 582, 466), (0, CAPTION), 670, "Fashion-MNIST, 44 CPU minutes of training"),
    ("toy.png", (245, 32, 476, 224), (700, CAPTION), 262, "moons to 8 Gaussians"),
    ("toy.png", (245, 269, 476, 466), (976, CAPTION), 262, "with optimal transport"),
    ("four_ways.png", (8, 326, 496, 544), (700, 310), 540, "a policy that keeps all four ways past two obstacles"),
)


def main() -> None:
    sheet = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    for name, crop, place, width, caption in PANELS:
        panel = Image.open(IMAGES / name).convert("RGB").crop(crop)
        sheet.paste(panel.resize((width, round(width * panel.height / panel.width)), Image.Resampling.LANCZOS), place)
        draw.text((place[0], place[1] - 24), caption, fill="black", font_size=16)
    sheet.quantize(256).save(IMAGES / "front.png", optimize=True)


if __name__ == "__main__":
    main()
