"""labelme's folders: a JSON next to each image."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmrla.datasets.findings import DataError
from mmrla.datasets.reading import Reading, shown_size, split_of


def read_labelme(root: Path) -> Reading:
    """Read labelme's rectangles, polygons and circles; shapes of a group form one object.

    Raises:
        mmrla.datasets.findings.DataError: A file cannot be read.
    """
    reading = Reading()
    for path in sorted(root.rglob("[!.]*.json")):
        try:
            content = json.loads(path.read_bytes())
            shapes, image_path = content["shapes"], content["imagePath"].replace("\\", "/")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: not labelme's JSON ({error!r})") from error
        file = path.parent / image_path
        if not file.is_file():
            file = path.parent / Path(image_path).name
        given = content.get("imageWidth"), content.get("imageHeight")
        size = given if all(given) else shown_size(file)
        top = path.relative_to(root).parts[0]
        split = split_of(top)
        folder = root if split is None else root / top
        file_name = Path(file).relative_to(folder).as_posix()
        split = split or "train"
        image = reading.image(split, file, file_name, size)
        groups: dict[Any, list[list[float]]] = {}
        for index, shape in enumerate(shapes):
            try:
                kind, label = shape.get("shape_type") or "polygon", str(shape["label"])
                points = [(float(x), float(y)) for x, y in shape["points"]]
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise DataError(f"{path}: shape {index} cannot be read ({error!r})") from error
            if kind == "rectangle" and len(points) in (2, 4):
                xs, ys = zip(*points, strict=True)
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                reading.add(split, image, label, box)
            elif (kind == "polygon" and len(points) > 2) or (kind == "circle" and len(points) == 2):
                # The parts of one object have one group.
                group = shape.get("group_id")
                key = (label, index if group is None else f"group {group}")
                flat = points if kind == "polygon" else _circle(*points)
                groups.setdefault(key, []).append([value for point in flat for value in point])
            else:
                reading.left_out[kind] += 1
        for (label, _), polygons in groups.items():
            reading.add_polygons(split, image, label, polygons)
    return reading


def _circle(centre: tuple[float, float], edge: tuple[float, float]) -> list[tuple[float, float]]:
    radius = math.dist(centre, edge)
    turns = (2 * math.pi * step / 64 for step in range(64))
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]
