"""Looks: each overlay against its definition, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support import videos

from pipeline.base.errors import SourceError, UsageError
from pipeline.draw.look import Layer, Look, parse_colour
from pipeline.draw.overlay import object_color, overlay
from pipeline.tracks.masks import mask_to_rle, record_of_mask

HEIGHT, WIDTH = 60, 80
MASK = np.zeros((HEIGHT, WIDTH), np.bool_)
MASK[20:40, 30:60] = True
OTHER = np.zeros((HEIGHT, WIDTH), np.bool_)
OTHER[45:55, 5:15] = True
RECORDS = [
    record_of_mask(mask_to_rle(mask), HEIGHT, WIDTH, frame_index=0, object_id=object_id)
    for object_id, mask in ((1, MASK), (2, OTHER))
]
IMAGE = videos.scene(0, WIDTH, HEIGHT)


def rgba() -> NDArray[np.uint8]:
    pixels = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    pixels[:10, :, 3], pixels[10:20, :, 3] = 0, 255
    return pixels


def shown(look: Look) -> NDArray[np.uint8]:
    return overlay(IMAGE, RECORDS, look)


def expected(overlay: str, opacity: float, inside: NDArray[np.bool_], place: str) -> NDArray[np.float64]:
    """What an overlay is defined to be, without outlines and ids."""
    image = IMAGE.astype(np.float64)
    if overlay in ("davis", "fade", "light"):
        result = image * 0.6 if overlay == "fade" else image.copy()
        for object_id, mask in ((1, MASK), (2, OTHER)):
            drawn = mask & inside
            result[drawn] = image[drawn] * (1 - opacity) + np.array(object_color(object_id)) * opacity
        return result
    if overlay == "popup":
        grey = (image @ [0.299, 0.587, 0.114])[..., None]
        result = grey * opacity + image * (1 - opacity)
    else:
        alpha = rgba()[..., 3:] / 255 * opacity
        result = image * (1 - alpha) + rgba()[..., :3] * alpha
        if place == "before":
            return result
    result[inside] = image[inside]
    return result


@pytest.mark.parametrize("objects", [None, {1}])
@pytest.mark.parametrize(
    ("overlay", "default", "place"),
    [
        ("davis", 0.5, "behind"),
        ("fade", 0.5, "behind"),
        ("light", 0.1, "behind"),
        ("popup", 1.0, "behind"),
        ("layered", 1.0, "behind"),
        ("layered", 1.0, "before"),
    ],
)
def test_overlays_are_what_they_are_defined_to_be(
    overlay: str, default: float, place: str, objects: set[int] | None
) -> None:
    inside = MASK if objects else MASK | OTHER
    layer = Layer(rgba()) if overlay == "layered" else None
    for opacity in (None, 0.3):
        look = Look(overlay, opacity, False, False, objects, layer=layer, layer_place=place)
        wanted = expected(overlay, opacity or default, inside, place)
        assert np.abs(shown(look) - wanted).max() <= 1.01


def test_outlines_ids_and_colours() -> None:
    colour = parse_colour("#12f034")
    plain = shown(Look(outlines=False, ids=False, colours={1: colour}))
    assert (plain[30, 45] == np.round(IMAGE[30, 45] * 0.5 + np.array(colour) * 0.5)).all()
    outlined = shown(Look(ids=False, colours={1: colour}))
    assert (outlined[20, 30:60] == colour).all()
    assert (outlined[45, 5:15] == object_color(2)).all()
    labelled = shown(Look(outlines=False))
    assert ((labelled != plain).any(axis=2) & ~MASK).sum() > 50
    for name in ("popup", "layered"):
        layer = Layer(rgba()) if name == "layered" else None
        off, on = Look(name, layer=layer), Look(name, outlines=True, layer=layer)
        assert np.array_equal(shown(off)[MASK], IMAGE[MASK])
        assert (shown(on)[20, 30:60] == object_color(1)).all()


def test_a_layer_is_read_and_scaled(tmp_path: Path) -> None:
    pixels = np.zeros((120, 160, 4), np.uint8)
    pixels[:, :80] = (10, 200, 30, 255)  # the left half, opaque; transparent pixels are black
    cv2.imwrite(str(tmp_path / "layer.png"), cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA))
    look = Look("layered", layer=Layer.read(str(tmp_path / "layer.png")))
    drawn = shown(look)
    assert (drawn[5, :39] == (10, 200, 30)).all()
    assert np.array_equal(drawn[5, 41:], IMAGE[5, 41:])
    cv2.imwrite(str(tmp_path / "plain.jpg"), np.full((9, 9, 3), 77, np.uint8))
    drawn = shown(Look("layered", layer=Layer.read(str(tmp_path / "plain.jpg"))))
    assert (drawn[~(MASK | OTHER)] == 77).all()


def test_looks_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'neon'.*davis, fade, light, popup, layered"):
        Look("neon")
    with pytest.raises(UsageError, match=r"opacity -0\.5"):
        Look(opacity=-0.5)
    with pytest.raises(UsageError, match="layered needs a layer"):
        Look("layered")
    with pytest.raises(UsageError, match="fade takes no layer"):
        Look("fade", layer=Layer(rgba()))
    with pytest.raises(UsageError, match=r"place 'above'.*behind or before"):
        Look("layered", layer=Layer(rgba()), layer_place="above")
    for text in ("red", "#12345", "#12345g", "##12345", "#1234567"):
        with pytest.raises(UsageError, match="form #rrggbb"):
            parse_colour(text)
    with pytest.raises(SourceError, match=r"none\.png"):
        Layer.read(str(tmp_path / "none.png"))
    with pytest.raises(UsageError, match="cannot be used as a layer"):
        Layer.decode(b"\x89PNG\r\n\x1a\n" + bytes(40), "x.png")
    deep = cv2.imencode(".png", np.zeros((4, 4, 4), np.uint16))[1].tobytes()
    with pytest.raises(UsageError, match="8 bits per channel"):
        Layer.decode(deep, "deep.png")
    large = cv2.imencode(".png", np.zeros((40, 40, 4), np.uint8))[1].tobytes()
    with pytest.raises(UsageError, match=r"40x40.*at most 100"):
        Layer.decode(large, "large.png", 100)
