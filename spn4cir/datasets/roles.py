"""Names that the columns of a table of pictures may have."""

from spn4cir.datasets.tables import BOXES

ROLES = {
    "image": ("image", "path", "image_path", "file", "file_name", "img_path", "filename", "image_name"),
    "id": ("image_id", "id"),
    "caption": ("caption", "description", "text", "captions"),
    "category": ("category",),
    "title": ("title",),
}
CORNERS = ("x0", "y0", "x1", "y1")
BOX_ROLES = {name: (name,) for name in (*CORNERS, *BOXES)}
IMAGES = (*ROLES["image"], "img", "jpg", "jpeg", "png", "webp")  # names of columns that hold the bytes of images
ROLES_OF_ROWS = {**ROLES, **BOX_ROLES, "caption": (*ROLES["caption"], "txt"), "category": ("category", "label")}
