"""The names that photographs, stores and trials share: an item's key, and where its face is in the picture."""

from typing import Any

KEY = ("face_id", "view")  # an item: one look at one person; both are strings
FLIPPED = "|flipped"  # ends the view of a photograph that is mirrored before anything else is done to it
BOX = ("box_x", "box_y", "box_w", "box_h")  # left, top, width, height of the face, in pixels of the decoded picture
# Five points of the face, in pixels of the decoded picture (0 is the middle of the first one) and in dlib's order: the outer
# and inner corner of the eye on the picture's right, those of the eye on its left, and the bottom of the nose.
LANDMARKS = tuple(
    f"{point}_{axis}"
    for point in ("eye_right_outer", "eye_right_inner", "eye_left_outer", "eye_left_inner", "nose")
    for axis in "xy"
)
Place = tuple[float, ...]  # where one face is: the numbers of its BOX, or of its LANDMARKS

CHIP = "chip"  # the ``resize`` of recipes that align faces by their landmarks


def place_columns(recipe: Any) -> tuple[str, ...]:
    """The coordinates by which a recipe, as a store's JSON has it, cuts a face out: BOX, LANDMARKS, or none."""
    if not isinstance(recipe, dict):
        return ()
    if recipe.get("resize") == CHIP:
        return LANDMARKS
    return BOX if recipe.get("box_margin") is not None else ()
