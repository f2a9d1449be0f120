"""The names that photographs, stores and trials share: an item's key, and where its face is in the picture."""

KEY = ("face_id", "view")  # an item: one look at one person; both are strings
BOX = ("box_x", "box_y", "box_w", "box_h")  # left, top, width, height of the face, in pixels of the decoded picture
Box = tuple[float, float, float, float]  # one face's BOX
