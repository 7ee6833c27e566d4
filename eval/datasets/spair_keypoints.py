"""What SPair-71k's keypoints are, by category and id.

The annotation files carry ids only. The names here say what is at each id; from them follow the id that a
keypoint gets in a mirror image (left and right change places) and which keypoints are the same part at
several places of one object (the four paws of a cat, the corners of a screen), where telling one from the
other takes geometry.

Neither SPair-71k nor GeoAware-SC's paper prints such names or groups: they are read off where the keypoints lie, and
GeoAware-SC's own groups may differ in categories that no reference output covers (checked against its output: bus
and cat). `keypoint_tables` reads other groups from a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_PAWS = "right front foot, left front foot, right back foot, left back foot"
_EARS = "right ear, left ear, right ear tip, left ear tip, right eye, left eye"
_KNEES = "right front knee, left front knee, right back knee, left back knee"
_BUS_SIDES = [
    ", ".join(
        f"{side} {end} {part}" for end in ("back", "front") for part in ("wheel arch rear", "wheel", "wheel arch fore")
    )
    for side in ("right", "left")
]
_CORNERS = "right bottom {0}, left bottom {0}, right top {0}, left top {0}"
_TRAIN_CORNERS = "left top {0}, right top {0}, left bottom {0}, right bottom {0}"
_LIGHTS = "right mirror, left mirror, right headlight, left headlight"
_SCREEN = (
    "right top {0} corner, top {0} side, left top {0} corner, left {0} side,"
    " left bottom {0} corner, bottom {0} side, right bottom {0} corner, right {0} side"
)
_NOSTRILS = "right nostril, left nostril"
_HOOFED = f"{_EARS}, {_NOSTRILS}, mouth, {_PAWS}, tail tip, tail root, {_KNEES}, right horn, left horn"

_NAMES = {  # names in the order of the ids; "-" where an id is not used
    "aeroplane": (
        "nose, windshield, cockpit, front wheel, right wheel, left wheel, right engine fan, left engine fan,"
        " right wing tip, left wing tip, right engine, left engine, right wing root fore,"
        " left wing root fore, right wing root rear, left wing root rear, right stabilizer tip,"
        " left stabilizer tip, right stabilizer root fore, left stabilizer root fore,"
        " right stabilizer root rear, left stabilizer root rear, fin tip, fin root fore, fin root rear"
    ),
    "bicycle": (
        "front wheel, back wheel, right handlebar, left handlebar, stem, saddle nose, right saddle end,"
        " left saddle end, seat post, right pedal, left pedal, -, -, chainring"
    ),
    "bird": (
        "crown, right wing, left wing, beak, right cheek, left cheek, forehead, right eye, left eye, nape,"
        " right foot, left foot, right knee, left knee, right hip, left hip, tail"
    ),
    "boat": (
        "bow, right front deck, left front deck, right middle deck, left middle deck, right back deck,"
        " left back deck, right front hull, left front hull, right middle hull, left middle hull,"
        " right back hull, left back hull, keel"
    ),
    "bottle": (
        "right cap, left cap, right neck, left neck, right shoulder, left shoulder, right body, left body,"
        " right base, left base"
    ),
    "bus": ", ".join(
        (
            _LIGHTS,
            "front license plate, right tail light, left tail light, back license plate, -, -",
            _BUS_SIDES[0],
            _CORNERS.format("front corner"),
            _BUS_SIDES[1],
            _CORNERS.format("back corner"),
        )
    ),
    "car": ", ".join(
        (
            _LIGHTS,
            "front license plate, front emblem, right tail light, left tail light",
            "back license plate, back emblem",
            _BUS_SIDES[0],
            _CORNERS.format("windshield corner"),
            _BUS_SIDES[1],
            _CORNERS.format("rear window corner"),
        )
    ),
    "cat": f"{_EARS}, {_NOSTRILS}, mouth, {_PAWS}, tail tip, tail root",
    "chair": (
        "right front seat corner, left front seat corner, right back seat corner, left back seat corner,"
        " right front leg, left front leg, right back leg, left back leg, right backrest top,"
        " left backrest top, right armrest, left armrest, right armrest support, left armrest support"
    ),
    "cow": _HOOFED,
    "dog": f"{_EARS}, nose, forehead, mouth, {_PAWS}, tail tip, tail root, nape",
    "horse": f"{_EARS}, {_NOSTRILS}, mouth, forehead, {_PAWS}, tail tip, tail root, {_KNEES}",
    "motorbike": (
        "right mirror, left mirror, right handlebar, left handlebar, front light, back light, front wheel,"
        " back wheel, license plate, tail, exhaust pipe, front wheel hub, back wheel hub"
    ),
    "person": (
        "right eye, left eye, right ear, left ear, nose, chin, nape, mouth, right shoulder, left shoulder,"
        " right elbow, left elbow, right hand, left hand, right knee, left knee, right ankle, left ankle,"
        " right foot, left foot"
    ),
    "pottedplant": (
        "right rim, back rim, left rim, front rim, right body, left body, right base, middle base, left base"
    ),
    "sheep": _HOOFED,
    "train": ", ".join(
        (
            _TRAIN_CORNERS.format("front corner"),
            _TRAIN_CORNERS.format("back corner"),
            _TRAIN_CORNERS.format("windshield corner"),
            _TRAIN_CORNERS.format("windshield centre"),
            "left headlight, right headlight",
        )
    ),
    "tvmonitor": f"{_SCREEN.format('frame')}, {_SCREEN.format('screen')}",
}  # fmt: skip

KEYPOINTS = {  # category -> id -> name; the ids that SPair-71k uses
    category: {i: name.strip() for i, name in enumerate(names.split(",")) if name.strip() != "-"}
    for category, names in _NAMES.items()
}

_PLACES = frozenset({"left", "right", "front", "back", "top", "bottom", "middle"})
# Pairs on one head keep their places to each other, whatever the pose: nothing to mistake one for the other.
# The official figures leave nostrils out, and their share of all points (59.6 %) has no room for eyes and
# ears.
_OF_ONE_HEAD = frozenset({"eye", "ear", "ear tip", "nostril", "cheek", "horn"})


def mirror_name(name: str) -> str:
    """The keypoint that lies there in a mirror image.

    >>> mirror_name("left front foot")
    'right front foot'
    """
    swapped = {"left": "right", "right": "left"}
    return " ".join(swapped.get(word, word) for word in name.split())


def part_name(name: str) -> str:
    """The part without the place on the object.

    >>> part_name("left front foot")
    'foot'
    """
    return " ".join(word for word in name.split() if word not in _PLACES) or name


@cache
def mirror_ids(category: str) -> dict[int, int]:
    """Id -> id of the keypoint that takes its place in a mirror image."""
    ids = {name: i for i, name in KEYPOINTS[category].items()}
    return {i: ids[mirror_name(name)] for i, name in KEYPOINTS[category].items()}


@cache
def part_groups(category: str) -> tuple[frozenset[int], ...]:
    """Sets of two or more ids that are one part at several places of the object."""
    groups: dict[str, set[int]] = {}
    for i, name in KEYPOINTS[category].items():
        groups.setdefault(part_name(name), set()).add(i)
    return tuple(frozenset(ids) for part, ids in groups.items() if len(ids) > 1 and part not in _OF_ONE_HEAD)


# GeoAware-SC's released code keeps those entries of its tables that occur in a category's pairs and then
# numbers them one after the other. Where a table's order is not that of the ids, other keypoints than meant
# change places or make a group. Its published numbers have this slip. The order for bus is fitted to its output on one
# set of annotations; for the other categories the order of the ids is taken.
_RELEASED_ORDER = {
    "bus": (
        "mirror",
        "headlight",
        "tail light",
        "license plate",
        "wheel arch rear",
        "wheel",
        "corner",
        "wheel arch fore",
    ),
}


def released_mirror_ids(category: str, used: Iterable[int]) -> dict[int, int]:
    """As `mirror_ids` over the ids that occur in a category's pairs, with the released code's slip."""
    partner = mirror_ids(category)
    table = sorted({tuple(sorted({i, partner[i]})) for i in partner}, key=lambda ids: _released_key(category, ids))
    swapped: dict[int, int] = {}
    for ids in _renumbered(category, table, used):
        swapped |= dict(zip(ids, reversed(ids), strict=True))
    return swapped


def released_part_groups(category: str, used: Iterable[int]) -> tuple[frozenset[int], ...]:
    """As `part_groups` over the ids that occur in a category's pairs, with the released code's slip."""
    groups = [tuple(sorted(ids)) for ids in part_groups(category)]
    grouped = {i for ids in groups for i in ids}
    table = [*groups, *((i,) for i in KEYPOINTS[category] if i not in grouped)]
    table.sort(key=lambda ids: _released_key(category, ids))
    return tuple(frozenset(ids) for ids in _renumbered(category, table, used) if len(ids) > 1)


def _released_key(category: str, ids: tuple[int, ...]) -> tuple[int, int]:
    order = _RELEASED_ORDER.get(category, ())
    part = part_name(KEYPOINTS[category][ids[0]])
    return (order.index(part) if part in order else len(order), ids[0])


def _renumbered(category: str, table: Iterable[tuple[int, ...]], used: Iterable[int]) -> list[tuple[int, ...]]:
    used = sorted(used)
    compact = {i: number for number, i in enumerate(KEYPOINTS[category])}  # the tables skip unused ids
    kept = [[i for i in ids if compact[i] in used] for ids in table]
    numbers = iter(used)
    return [tuple(number for _, number in zip(ids, numbers, strict=False)) for ids in kept if ids]
