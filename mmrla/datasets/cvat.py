"""CVAT's XML, "CVAT for images 1.1"."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from mmrla.datasets.findings import DataError
from mmrla.datasets.reading import Reading, split_of


def read_cvat(root: Path) -> Reading:
    """Read CVAT's boxes, rotated or not, and polygons, from a file or a folder with ``images/``.

    Raises:
        mmrla.datasets.findings.DataError: A file cannot be read.
    """
    files = [root] if root.is_file() else sorted(root.glob("[!.]*.xml"))
    folder = root.parent if root.is_file() else root
    reading = Reading()
    for path in files:
        try:
            tree = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{path}: not XML ({error})") from error
        for label in tree.iterfind("meta//labels/label/name"):
            if label.text and label.text not in reading.classes:
                reading.classes.append(label.text)
        if tree.find("track") is not None:
            raise DataError(f"{path}: tracks of a video; export it as 'CVAT for images 1.1'")
        for element in tree.iterfind("image"):
            try:
                _cvat_image(reading, element, folder)
            except (TypeError, KeyError, ValueError) as error:
                name = element.get("name")
                raise DataError(f"{path}: image {name!r} cannot be read ({error!r})") from error
    return reading


def _cvat_image(reading: Reading, element: ElementTree.Element, root: Path) -> None:
    split = split_of(element.get("subset") or "") or "train"
    name = element.attrib["name"]
    places = [root / "images" / (element.get("subset") or ""), root / "images", root]
    folder = next((place for place in places if (place / name).is_file()), root)
    size = int(element.attrib["width"]), int(element.attrib["height"])
    image = reading.image(split, folder / name, name, size)
    for shape in element:
        if shape.tag == "box":
            left, top, right, bottom = (
                float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr")
            )
            turn = math.radians(float(shape.get("rotation") or 0))
            box = [left, top, right - left, bottom - top]
            if turn:
                x, y = (left + right) / 2, (top + bottom) / 2
                corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
                polygon = [
                    value
                    for a, b in corners
                    for value in (
                        x + (a - x) * math.cos(turn) - (b - y) * math.sin(turn),
                        y + (a - x) * math.sin(turn) + (b - y) * math.cos(turn),
                    )
                ]
                reading.add_polygons(split, image, shape.attrib["label"], [polygon])
            else:
                reading.add(split, image, shape.attrib["label"], box)
        elif shape.tag == "polygon":
            pairs = [pair.split(",") for pair in shape.attrib["points"].split(";")]
            polygon = [float(value) for pair in pairs for value in pair]
            reading.add_polygons(split, image, shape.attrib["label"], [polygon])
        elif shape.tag != "tag":
            reading.left_out[shape.tag] += 1
