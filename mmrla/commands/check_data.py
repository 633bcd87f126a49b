"""Find bad data before a run: missing and truncated images, wrong boxes, ids and classes.

Exit status 0: no errors, warnings at most. 1: errors. 2: nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmrla.datasets.findings import ERRORS
from mmrla.datasets.repair import repair
from mmrla.datasets.voc import read_set
from mmrla.engine.data.config import set_data_root
from mmrla.engine.data.sets import DataSet, print_report, sets_in, sets_of_config, write_json
from mmrla.engine.errors import exit_with_message, require_at_least
from mmrla.engine.run.config import OptionAction, read_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        "mmrla check-data", description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[2]
    )
    parser.add_argument(
        "dir",
        nargs="?",
        metavar="DIR",
        help="annotations/*.json beside folders of images (COCO), Annotations/ and JPEGImages/ "
        "(Pascal VOC), or class folders of images; with --config, its data root",
    )
    parser.add_argument("--ann", type=Path, metavar="FILE", help="an annotation file")
    parser.add_argument("--images", type=Path, metavar="DIR", help="its folder of images")
    parser.add_argument("--config", help="check the sets of a config, with its classes")
    parser.add_argument(
        "--cfg-options", nargs="+", action=OptionAction, metavar="KEY=VALUE", help="as in train.py"
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every pixel, not only headers and file ends"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that look at images")
    parser.add_argument(
        "--allow", nargs="+", default=[], choices=sorted(ERRORS), metavar="KIND",
        help=f"errors that do not count, of: {', '.join(ERRORS)}",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, default=20, help="findings of a kind to list, 0 for all (default 20)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all findings to OUT")
    parser.add_argument(
        "--fix", type=Path, metavar="OUT.json",
        help="write the annotation file with what can be mended without a guess, and check that",
    )  # fmt: skip
    return parser.parse_args(argv)


def sets_to_check(args: argparse.Namespace) -> tuple[list[DataSet], dict[str, str]]:
    """The sets selected by the options, and the reasons why others cannot be checked."""
    if (args.ann is None) != (args.images is None):
        raise ValueError("--ann FILE and --images DIR go together")
    if sum([args.ann is not None, args.config is not None or args.dir is not None]) != 1:
        raise ValueError("name DIR, --config CONFIG, or --ann FILE --images DIR")
    if args.cfg_options and args.config is None:
        raise ValueError("--cfg-options overrides settings of a config: name it with --config")
    if args.ann is not None:
        for path, there in ((args.ann, args.ann.is_file()), (args.images, args.images.is_dir())):
            if not there:
                raise FileNotFoundError(f"no such file or folder: {path.absolute()}")
        return [DataSet(args.images, args.ann)], {}
    if args.config is None:
        return sets_in(args.dir), {}
    cfg = read_config(args.config, args.cfg_options)
    if args.dir is not None:
        set_data_root(cfg, args.dir)
    sets, unchecked = sets_of_config(cfg)
    for one in sets:
        if one.ann_file is not None and not one.ann_file.is_file():
            raise FileNotFoundError(f"{one.used_as[0]}: no such file: {one.ann_file.absolute()}")
        if not one.images.is_dir():
            raise FileNotFoundError(f"{one.used_as[0]}: no such folder: {one.images.absolute()}")
    return sets, unchecked


def fix(sets: Sequence[DataSet], out: Path) -> DataSet:
    """Write the repaired annotation file of the only set, and print the repairs."""
    if len(sets) != 1 or not sets[0].is_json:
        raise ValueError(
            f"--fix mends one annotation file in COCO's format, got {len(sets)} set(s); name it "
            "with --ann FILE --images DIR"
        )
    (one,) = sets
    if out.exists():
        raise FileExistsError(f"--fix: already exists: {out.absolute()}")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--fix: no such folder: {out.absolute().parent}")
    assert one.ann_file is not None
    content, repairs = repair(read_set(one.ann_file), one.images)
    for what, count in repairs.items():
        print(f"{count:>8} {what}")
    out.write_text(json.dumps(content))
    print(f"{out}: " + ("written" if repairs else "nothing to mend; a copy was written"))
    return replace(one, ann_file=out)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; returns 1 if there are errors, else 0."""
    args = parse_args(argv)
    with exit_with_message():
        require_at_least(args, workers=1, limit=0)
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json: no such folder: {args.json.absolute().parent}")
        sets, unchecked = sets_to_check(args)
        if args.fix is not None:
            sets = [fix(sets, args.fix)]
        details: list[dict] = []
        errors = print_report(
            sets, decode=args.decode, workers=args.workers, allow=args.allow,
            limit=args.limit, details=details,
        )  # fmt: skip
        for place, reason in unchecked.items():
            print(f"not checked: {place}: {reason}")
        if args.json is not None:
            write_json(details, args.json, unchecked)
    return 1 if errors else 0
